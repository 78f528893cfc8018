//! API keys. They guard every route but `/health`: a key that leaves some routes open is a trap.

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::ServerState;
use crate::openai::ApiError;

pub(super) async fn require_key(State(state): State<ServerState>, request: Request, next: Next) -> Response {
    let keys = &state.options().api_keys;
    if keys.is_empty() || request.uri().path() == "/health" {
        return next.run(request).await;
    }
    let sent = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let sent = sent.and_then(|value| value.split_once(' '));
    let sent = sent.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key.trim());
    // Every key is compared, whichever fits.
    let fits = sent.is_some_and(|sent| keys.iter().fold(false, |fits, key| fits | same(key, sent)));
    if fits {
        return next.run(request).await;
    }
    let message = match sent {
        None => "This server needs an API key: send the header \"Authorization: Bearer KEY\".",
        Some(_) => "Incorrect API key.",
    };
    let error = ApiError {
        code: Some("invalid_api_key"),
        ..ApiError::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message)
    };
    let mut response = error.into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// Compares without telling by its time how much of the key was right.
fn same(key: &str, sent: &str) -> bool {
    let differ = key.bytes().zip(sent.bytes()).fold(0, |differ, (a, b)| differ | (a ^ b));
    std::hint::black_box(differ) == 0 && key.len() == sent.len()
}
