//! One request as a client makes it, with a clock in its hand.

use std::error::Error;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_TYPE, HeaderValue};
use serde_json::Value as Json;

use super::Api;
use super::events::Events;
use super::workload::Asked;

/// Of an error's words: as many as a line of a terminal or two hold.
const WORDS: usize = 200;

/// Between two questions whether a server is ready.
const POLL: Duration = Duration::from_millis(500);

/// Where requests go.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    http: reqwest::Client,
    root: String,
    /// Of the requests.
    pub(super) url: String,
    key: Option<String>,
    timeout: Duration,
    pub(super) model: String,
}

/// A whole answer and when its parts came, counted from the moment it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    /// The first text; the end, where there was none.
    pub(super) first: Duration,
    /// From text to text.
    pub(super) gaps: Vec<Duration>,
    pub(super) total: Duration,
    /// As the server counted them.
    pub(super) input_tokens: Option<usize>,
    /// As the server counted them, or else pieces of text.
    pub(super) output_tokens: usize,
    /// Whether the server counted.
    pub(super) counted: bool,
}

/// Why there is none.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    #[error("no connection: {0}")]
    NoConnection(String),
    #[error("HTTP {status}: {message}")]
    Status { status: u16, message: String },
    #[error("the connection broke: {0}")]
    Disconnected(String),
    #[error("not a stream of completions: {0}")]
    Malformed(String),
    #[error("an error instead of the rest: {0}")]
    Said(String),
    #[error("an answer without a token")]
    Empty,
    #[error("not answered within {:.1} s", .0.as_secs_f64())]
    TimedOut(Duration),
}

impl Failure {
    /// What it is counted as.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::NoConnection(_) => "no connection".into(),
            Self::Status { status, .. } => format!("http {status}"),
            Self::Disconnected(_) => "disconnected".into(),
            Self::Malformed(_) => "malformed".into(),
            Self::Said(_) => "error event".into(),
            Self::Empty => "empty".into(),
            Self::TimedOut(_) => "timed out".into(),
        }
    }
}

impl Endpoint {
    /// The endpoint `api` below `base`, which may end in `/v1`.
    pub(super) fn new(base: &str, api: Api, key: Option<String>, timeout: Duration) -> anyhow::Result<Self> {
        let root = base.trim_end_matches('/');
        let root = root.strip_suffix("/v1").unwrap_or(root).to_owned();
        ensure!(
            !root.starts_with("https://"),
            "--base-url {base}: this build speaks plain HTTP only, because every TLS library needs a C compiler; measure the server behind its \
             TLS proxy, by its http:// address"
        );
        ensure!(
            root.starts_with("http://"),
            "--base-url {base}: expected an address such as http://127.0.0.1:8000"
        );
        let path = match api {
            Api::Chat => "chat/completions",
            Api::Completions => "completions",
        };
        // A proxy between would be measured, too.
        let http = reqwest::Client::builder().no_proxy().build().context("cannot make an HTTP client")?;
        Ok(Self { http, url: format!("{root}/v1/{path}"), root, key, timeout, model: String::new() })
    }

    /// Waits as long as the server says that it is not ready yet (503), for no more than `limit`.
    pub(super) async fn wait(&self, limit: Duration) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut told = false;
        loop {
            let asked = if limit.is_zero() {
                None
            } else {
                let left = limit.saturating_sub(started.elapsed()).max(POLL);
                match tokio::time::timeout(left, self.models()).await {
                    Ok(asked) => asked.ok(),
                    Err(_) => bail!(
                        "GET {}/v1/models: no answer after {:.0} s; --wait SECONDS waits longer",
                        self.root,
                        started.elapsed().as_secs_f64()
                    ),
                }
            };
            // Who cannot be asked is told of by what follows.
            let Some((url, status, body)) = asked.filter(|asked| asked.1 == StatusCode::SERVICE_UNAVAILABLE)
            else {
                return Ok(());
            };
            let (waited, said) = (started.elapsed(), error_of(&body));
            if waited + POLL > limit {
                bail!(
                    "GET {url}: {status}: {said}; not ready after {:.0} s; --wait SECONDS waits longer",
                    waited.as_secs_f64()
                );
            }
            if !told {
                told = true;
                tracing::warn!(
                    "the server is not ready ({said}); waiting for it, {} s at most",
                    limit.as_secs()
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// What the server says of its models, and where.
    async fn models(&self) -> anyhow::Result<(String, StatusCode, String)> {
        let url = format!("{}/v1/models", self.root);
        let get = async {
            let response = self.with_key(self.http.get(&url)).send().await?;
            anyhow::Ok((response.status(), response.text().await?))
        };
        let answered = tokio::time::timeout(self.timeout, get).await;
        let (status, body) = answered
            .with_context(|| format!("GET {url}: not answered in time"))?
            .with_context(|| format!("GET {url}: is a server running there?"))?;
        Ok((url, status, body))
    }

    /// The first model that the server lists.
    pub(super) async fn first_model(&self) -> anyhow::Result<String> {
        let (url, status, body) = self.models().await?;
        if !status.is_success() {
            bail!("GET {url}: {status}: {}; --api-key gives a key, --model the name", short(&body));
        }
        let body: Json =
            serde_json::from_str(&body).with_context(|| format!("GET {url}: {}", short(&body)))?;
        let name = body["data"][0]["id"].as_str();
        name.map(str::to_owned).with_context(|| format!("GET {url} lists no model; --model names one"))
    }

    /// Asks and reads the answer to its end.
    pub(super) async fn ask(&self, asked: Asked) -> Result<Answer, Failure> {
        let body = asked.body.to_string();
        let request = self.with_key(self.http.post(&self.url));
        let request = request.header(CONTENT_TYPE, HeaderValue::from_static("application/json")).body(body);
        let answer = tokio::time::timeout(self.timeout, read(request)).await;
        answer.unwrap_or(Err(Failure::TimedOut(self.timeout)))
    }

    fn with_key(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }
}

async fn read(request: reqwest::RequestBuilder) -> Result<Answer, Failure> {
    let mut reading = Reading::new();
    let response = request.send().await.map_err(|error| match error.is_connect() {
        true => Failure::NoConnection(chain(&error)),
        false => Failure::Disconnected(chain(&error)),
    })?;
    let status = response.status();
    if !status.is_success() {
        let body = response.text().await.unwrap_or_default();
        return Err(Failure::Status { status: status.as_u16(), message: error_of(&body) });
    }
    let kind = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !kind.starts_with("text/event-stream") {
        return Err(Failure::Malformed(format!("expected text/event-stream, found {kind:?}")));
    }
    let (mut bytes, mut events) = (response.bytes_stream(), Events::default());
    while let Some(piece) = bytes.next().await {
        let piece = piece.map_err(|error| Failure::Disconnected(chain(&error)))?;
        for data in events.push(&piece) {
            if data == b"[DONE]" {
                return reading.end(true);
            }
            reading.event(&data)?;
        }
    }
    reading.end(false)
}

/// An answer as it comes.
struct Reading {
    asked: Instant,
    first: Option<Duration>,
    last: Duration,
    gaps: Vec<Duration>,
    texts: usize,
    finished: bool,
    input_tokens: Option<usize>,
    output_tokens: Option<usize>,
}

impl Reading {
    fn new() -> Self {
        Self {
            asked: Instant::now(),
            first: None,
            last: Duration::ZERO,
            gaps: Vec::new(),
            texts: 0,
            finished: false,
            input_tokens: None,
            output_tokens: None,
        }
    }

    fn event(&mut self, data: &[u8]) -> Result<(), Failure> {
        let words = || short(&String::from_utf8_lossy(data));
        let chunk: Json = serde_json::from_slice(data).map_err(|_| Failure::Malformed(words()))?;
        if chunk.get("error").is_some_and(|error| !error.is_null()) {
            return Err(Failure::Said(error_of(&String::from_utf8_lossy(data))));
        }
        let count = |name| chunk["usage"][name].as_u64().map(|count| count as usize);
        self.input_tokens = count("prompt_tokens").or(self.input_tokens);
        self.output_tokens = count("completion_tokens").or(self.output_tokens);
        let choices = chunk["choices"].as_array().ok_or_else(|| Failure::Malformed(words()))?;
        for choice in choices {
            let delta = &choice["delta"];
            let texts =
                [&choice["text"], &delta["content"], &delta["reasoning_content"], &delta["reasoning"]];
            if texts.iter().any(|text| text.as_str().is_some_and(|text| !text.is_empty())) {
                self.text();
            }
            self.finished |= choice["finish_reason"].is_string();
        }
        Ok(())
    }

    fn text(&mut self) {
        let now = self.asked.elapsed();
        match self.first {
            Some(_) => self.gaps.push(now - self.last),
            None => self.first = Some(now),
        }
        self.last = now;
        self.texts += 1;
    }

    /// `done`: the server said that this is all.
    fn end(self, done: bool) -> Result<Answer, Failure> {
        let total = self.asked.elapsed();
        if !done && !self.finished {
            return Err(Failure::Disconnected(format!(
                "the stream ended after {} pieces of text, with neither a finish_reason nor [DONE]",
                self.texts
            )));
        }
        let output_tokens = self.output_tokens.unwrap_or(self.texts);
        if output_tokens == 0 {
            return Err(Failure::Empty);
        }
        Ok(Answer {
            // All tokens may have been special ones, which have no text.
            first: self.first.unwrap_or(total),
            gaps: self.gaps,
            total,
            input_tokens: self.input_tokens,
            output_tokens,
            counted: self.output_tokens.is_some(),
        })
    }
}

/// OpenAI's message, or the text itself.
fn error_of(body: &str) -> String {
    let parsed: Option<Json> = serde_json::from_str(body).ok();
    let error = parsed.as_ref().map(|body| &body["error"]);
    let message = error.and_then(|error| error["message"].as_str().or(error.as_str()));
    short(message.unwrap_or(body))
}

fn short(text: &str) -> String {
    let mut short: String = text.trim().chars().take(WORDS).collect();
    if short.len() < text.trim().len() {
        short.push_str("...");
    }
    short
}

/// An error with its causes: reqwest's own words leave them out.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
