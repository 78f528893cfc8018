//! `GET /version`

use axum::Json;
use serde_json::{Value, json};

/// OpenAI's `system_fingerprint`: equal seeds promise equal tokens only under one of these.
pub(super) const FINGERPRINT: &str = concat!("dsa80-", env!("CARGO_PKG_VERSION"));

pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
