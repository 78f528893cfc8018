//! `GET /metrics`: Prometheus text.

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;

use super::ServerState;

pub(super) async fn metrics(State(state): State<ServerState>) -> impl IntoResponse {
    let text = state.metrics().render(state.engine().map(|engine| engine.stats()));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}
