//! Around every request: its id, the count of requests in flight, and one line in the log when its response
//! has ended, or when the client has gone.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use uuid::Uuid;

use super::{REQUEST_ID, ServerState};
use crate::openai::ErrorNote;
use crate::record::RequestRecord;

pub(super) async fn observe(State(state): State<ServerState>, mut request: Request, next: Next) -> Response {
    let sent = request.headers().get(&REQUEST_ID).and_then(|value| value.to_str().ok());
    let id = sent.filter(|id| !id.is_empty() && id.len() <= 128).map_or_else(new_id, str::to_owned);
    let header = HeaderValue::from_str(&id).ok();
    let record = Arc::new(RequestRecord::new(id));
    request.extensions_mut().insert(Arc::clone(&record));
    state.enter();
    let mut guard = Guard {
        state,
        record,
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        status: None,
        complete: false,
    };
    let mut response = next.run(request).await;
    guard.status = Some(response.status());
    if let Some(ErrorNote(note)) = response.extensions().get() {
        guard.record.fail(note);
    }
    if let Some(header) = header {
        response.headers_mut().insert(REQUEST_ID, header);
    }
    response.map(|inner| {
        guard.complete = http_body::Body::is_end_stream(&inner);
        Body::new(Observed { inner, guard })
    })
}

fn new_id() -> String {
    format!("req-{}", Uuid::new_v4().simple())
}

/// Lives as long as the request does: dropped with the handler if the client goes before the response, with
/// the body otherwise.
struct Guard {
    state: ServerState,
    record: Arc<RequestRecord>,
    method: Method,
    path: String,
    status: Option<StatusCode>,
    complete: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.state.leave();
        if !self.complete {
            self.state.metrics().disconnected.increment(1);
        }
        if self.complete && matches!(self.path.as_str(), "/health" | "/metrics") {
            // Probes come every few seconds and would drown the rest.
            return;
        }
        let (prompt_tokens, completion_tokens, first_token_ms, error) = self.record.summary();
        let status = self.status.map_or(0, |status| status.as_u16());
        let elapsed_ms = (self.record.started().elapsed().as_secs_f64() * 1e4).round() / 10.0;
        let end = if self.complete { "answered" } else { "client went away" };
        tracing::info!(
            request_id = self.record.id(),
            method = %self.method,
            path = self.path,
            status,
            elapsed_ms,
            prompt_tokens,
            completion_tokens,
            first_token_ms,
            error,
            "{end}"
        );
    }
}

/// A response body that knows whether it was sent to its end.
struct Observed {
    inner: Body,
    guard: Guard,
}

impl http_body::Body for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(None) => self.guard.complete = true,
            Poll::Ready(Some(Ok(_))) => self.guard.complete = http_body::Body::is_end_stream(&self.inner),
            _ => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
