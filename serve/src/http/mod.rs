//! The HTTP side: one file for each route, and what surrounds them all.

mod auth;
mod body;
mod chat;
mod collect;
mod completions;
mod health;
mod metrics;
mod models;
mod observe;
mod prompt;
mod sse;
mod state;
mod tokenize;
mod version;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use crate::openai::ApiError;

pub use state::{Health, ServedModel, ServerOptions, ServerState};

/// The name and value of the header that carries a request's id, in both directions.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// All routes, with what surrounds them: request ids and logs, CORS, API keys, the body limit.
pub fn router(state: ServerState) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::list))
        // Names may contain slashes.
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(health::health))
        .route("/metrics", get(metrics::metrics))
        .route("/version", get(version::version))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(state.options().max_body_bytes))
        .layer(from_fn_with_state(state.clone(), auth::require_key))
        .layer(cors(&state.options().cors_origins))
        .layer(from_fn_with_state(state.clone(), observe::observe))
        .with_state(state)
}

async fn not_found(method: Method, uri: Uri) -> ApiError {
    ApiError {
        code: Some("not_found"),
        ..ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("There is no {method} {}. The API's paths begin with /v1.", uri.path()),
        )
    }
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError {
        code: Some("method_not_allowed"),
        ..ApiError::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            format!("{} does not take {method}; see the Allow header.", uri.path()),
        )
    }
}

/// No origins: no CORS headers at all, and browsers keep other sites' pages out. `*` lets every site in.
fn cors(origins: &[String]) -> CorsLayer {
    if origins.is_empty() {
        return CorsLayer::new();
    }
    let origin = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::from(Any)
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    CorsLayer::new()
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(Any)
        .expose_headers([REQUEST_ID])
}
