//! `GET /v1/models` and `GET /v1/models/{id}`

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::{ServedModel, ServerState};
use crate::openai::ApiError;

pub(super) async fn list(State(state): State<ServerState>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let names = state.options().model_names.iter();
    let cards: Vec<Value> = names.map(|name| card(&state, &model, name)).collect();
    Ok(Json(json!({"object": "list", "data": cards})))
}

pub(super) async fn one(
    State(state): State<ServerState>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let name = state.model_name(Some(&id))?;
    Ok(Json(card(&state, &model, &name)))
}

fn card(state: &ServerState, model: &ServedModel, name: &str) -> Value {
    json!({
        "id": name, "object": "model", "created": state.created(), "owned_by": "dsa80",
        "max_model_len": model.engine.max_model_len(),
    })
}
