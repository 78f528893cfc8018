//! What all routes share.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use dsa80_model::engine::EngineHandle;
use tokio::sync::watch;

use crate::metrics::Metrics;
use crate::openai::ApiError;
use crate::text::TextModel;

/// A server's settings.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Names under which the model is served; at least one. The first is listed.
    pub model_names: Vec<String>,
    /// Keys that open every route but `/health`; none leaves them open.
    pub api_keys: Vec<String>,
    /// Origins that browsers may call from; `*` is any.
    pub cors_origins: Vec<String>,
    /// The longest request body.
    pub max_body_bytes: usize,
    /// How long running requests may take after the signal to stop.
    pub shutdown_timeout: Duration,
    /// A comment is sent on a silent stream after so long, lest proxies close it.
    pub sse_keep_alive: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            model_names: vec!["dsa80-tiny".into()],
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            max_body_bytes: 32 << 20,
            shutdown_timeout: Duration::from_secs(30),
            sse_keep_alive: Duration::from_secs(15),
        }
    }
}

/// A model that answers.
#[derive(Clone)]
pub struct ServedModel {
    /// Tokenizer, chat template and defaults.
    pub text: Arc<TextModel>,
    /// The engine.
    pub engine: EngineHandle,
}

/// What `/health` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// The model is being loaded.
    Loading,
    /// Requests are served.
    Ready,
    /// No new requests; the running ones finish.
    Draining,
    /// It will not become ready again.
    Failed(String),
}

enum Phase {
    Loading,
    Ready(ServedModel),
    Draining(Option<ServedModel>),
    Failed(String),
}

struct Inner {
    options: ServerOptions,
    phase: RwLock<Phase>,
    metrics: Arc<Metrics>,
    /// HTTP requests whose response has not ended.
    in_flight: watch::Sender<usize>,
    /// Seconds since 1970.
    created: u64,
}

/// The state of one server; cheap to clone.
#[derive(Clone)]
pub struct ServerState(Arc<Inner>);

impl ServerState {
    /// A server that is still loading.
    pub fn new(options: ServerOptions) -> Self {
        Self(Arc::new(Inner {
            options,
            phase: RwLock::new(Phase::Loading),
            metrics: Arc::default(),
            in_flight: watch::Sender::new(0),
            created: unix_time(),
        }))
    }

    /// A server that is ready at once.
    pub fn ready_with(options: ServerOptions, model: ServedModel) -> Self {
        let state = Self::new(options);
        state.set_ready(model);
        state
    }

    /// Loading is done. After the signal to stop it is ignored.
    pub fn set_ready(&self, model: ServedModel) {
        let mut phase = self.0.phase.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(*phase, Phase::Loading) {
            *phase = Phase::Ready(model);
        }
    }

    /// Loading failed.
    pub fn set_failed(&self, why: impl Into<String>) {
        *self.0.phase.write().unwrap_or_else(PoisonError::into_inner) = Phase::Failed(why.into());
    }

    /// Takes no new requests from now on. Returns the model, if there is one.
    pub fn drain(&self) -> Option<ServedModel> {
        let mut phase = self.0.phase.write().unwrap_or_else(PoisonError::into_inner);
        let model = match std::mem::replace(&mut *phase, Phase::Draining(None)) {
            Phase::Ready(model) | Phase::Draining(Some(model)) => Some(model),
            _ => None,
        };
        *phase = Phase::Draining(model.clone());
        model
    }

    /// The model, if requests are served.
    ///
    /// # Errors
    /// 503 while loading or draining, or when the engine has failed.
    pub fn model(&self) -> Result<ServedModel, ApiError> {
        match &*self.0.phase.read().unwrap_or_else(PoisonError::into_inner) {
            Phase::Ready(model) if model.engine.is_alive() => Ok(model.clone()),
            Phase::Ready(_) => Err(dead("the engine has stopped")),
            Phase::Loading => {
                Err(ApiError::unavailable("model_loading", "The model is being loaded; try again soon.", 2))
            }
            Phase::Draining(_) => Err(ApiError::unavailable(
                "draining",
                "The server is shutting down and takes no new requests.",
                10,
            )),
            Phase::Failed(why) => Err(dead(why)),
        }
    }

    /// What `/health` says.
    pub fn health(&self) -> Health {
        match &*self.0.phase.read().unwrap_or_else(PoisonError::into_inner) {
            Phase::Loading => Health::Loading,
            Phase::Ready(model) if model.engine.is_alive() => Health::Ready,
            Phase::Ready(_) => Health::Failed("the engine has stopped".into()),
            Phase::Draining(_) => Health::Draining,
            Phase::Failed(why) => Health::Failed(why.clone()),
        }
    }

    /// The engine, whether or not requests are served, for its numbers.
    pub fn engine(&self) -> Option<EngineHandle> {
        match &*self.0.phase.read().unwrap_or_else(PoisonError::into_inner) {
            Phase::Ready(model) | Phase::Draining(Some(model)) => Some(model.engine.clone()),
            _ => None,
        }
    }

    /// The name to answer under.
    ///
    /// # Errors
    /// 404 for a name that is not served.
    pub fn model_name(&self, asked: Option<&str>) -> Result<String, ApiError> {
        let names = &self.0.options.model_names;
        let Some(asked) = asked else { return Ok(names.first().cloned().unwrap_or_default()) };
        if names.iter().any(|name| name == asked) {
            return Ok(asked.to_owned());
        }
        Err(ApiError {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..ApiError::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("The model {asked:?} is not served here; this server has {}.", names.join(", ")),
            )
        })
    }

    /// The settings.
    pub fn options(&self) -> &ServerOptions {
        &self.0.options
    }

    /// The metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    /// When the server was made, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.0.created
    }

    /// Counts an HTTP request in.
    pub(super) fn enter(&self) {
        self.0.in_flight.send_modify(|count| *count += 1);
        self.0.metrics.http_in_flight.increment(1.0);
    }

    /// Counts an HTTP request out.
    pub(super) fn leave(&self) {
        self.0.in_flight.send_modify(|count| *count = count.saturating_sub(1));
        self.0.metrics.http_in_flight.decrement(1.0);
    }

    /// Returns when no HTTP request is in flight.
    pub async fn idle(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        let _ = self.0.in_flight.subscribe().wait_for(|count| *count == 0).await;
    }
}

fn dead(why: &str) -> ApiError {
    ApiError {
        code: Some("engine_failed"),
        ..ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable_error",
            format!("No model: {why}."),
        )
    }
}

/// Seconds since 1970.
pub(super) fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
