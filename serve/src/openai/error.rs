//! Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use dsa80_model::engine::SubmitError;
use serde::Serialize;

/// An error on its way to a client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// What is wrong, what was expected, and what to do.
    pub message: String,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// The request field that is meant.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
}

/// The body of an error response, also sent as an event when a stream breaks.
#[derive(Debug, Clone, Serialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorObject,
}

/// OpenAI's error object.
#[derive(Debug, Clone, Serialize)]
pub struct ErrorObject {
    /// For people.
    pub message: String,
    /// The class of error.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The request field that is meant.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// An error without param, code or retry.
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code: None, retry_after: None }
    }

    /// 400: the request cannot be served as it is.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400 about one field.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::bad_request(message) }
    }

    /// 400: the field would change the output and is not supported.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// 500: the server's own fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 503 with a time to come back.
    pub fn unavailable(code: &'static str, message: impl Into<String>, retry_after: u64) -> Self {
        Self {
            code: Some(code),
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message)
        }
    }

    /// 400: prompt and output do not fit the context.
    pub fn too_long(
        param: &str,
        prompt_tokens: usize,
        max_tokens: Option<usize>,
        max_model_len: usize,
    ) -> Self {
        let asked = match max_tokens {
            Some(max_tokens) => format!(
                "you asked for {} tokens ({prompt_tokens} in the prompt, {max_tokens} to generate)",
                prompt_tokens + max_tokens
            ),
            None => format!("your prompt has {prompt_tokens} tokens, which leaves no room to generate"),
        };
        let message = format!(
            "This model's maximum context length is {max_model_len} tokens, but {asked}. Shorten the prompt or the output."
        );
        Self { code: Some("context_length_exceeded"), ..Self::field(param, message) }
    }

    /// The same error, about `param`.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The error as a response body.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorObject {
                message: self.message.clone(),
                kind: self.kind,
                param: self.param.clone(),
                code: self.code,
            },
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { .. } => Self {
                code: Some("rate_limit_exceeded"),
                retry_after: Some(1),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", error.to_string())
            },
            SubmitError::ShuttingDown => Self::unavailable("draining", error.to_string(), 10),
            SubmitError::Invalid(message) => Self::bad_request(message),
            SubmitError::TooLong { prompt_tokens, max_tokens, max_model_len } => {
                Self::too_long("max_tokens", prompt_tokens, Some(max_tokens), max_model_len)
            }
        }
    }
}

/// An error's message, left on its response for the log.
#[derive(Debug, Clone)]
pub struct ErrorNote(pub String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(ErrorNote(self.message));
        response
    }
}
