//! `GET /health`: 200 when requests are served, 503 otherwise, and in words which of the phases it is.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::{Health, ServerState};

pub(super) async fn health(State(state): State<ServerState>) -> (StatusCode, Json<Value>) {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    match state.health() {
        Health::Ready => (StatusCode::OK, Json(json!({"status": "ready"}))),
        Health::Loading => (unavailable, Json(json!({"status": "loading"}))),
        Health::Draining => (unavailable, Json(json!({"status": "draining"}))),
        Health::Failed(why) => (unavailable, Json(json!({"status": "failed", "message": why}))),
    }
}
