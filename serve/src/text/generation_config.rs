//! `generation_config.json`: the sampling that a checkpoint's makers recommend.

use serde_json::Value as Json;

/// Sampling defaults for requests that do not say otherwise. `None` leaves OpenAI's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// `temperature`.
    pub temperature: Option<f32>,
    /// `top_p`.
    pub top_p: Option<f32>,
    /// `top_k`; 0 keeps all.
    pub top_k: Option<u32>,
    /// `min_p`.
    pub min_p: Option<f32>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// Reads the fields that matter here; the file's others steer kinds of decoding that a server does not
    /// do.
    pub(super) fn from_json(config: &Json) -> Self {
        let float = |name: &str| config[name].as_f64().map(|value| value as f32);
        Self {
            temperature: float("temperature"),
            top_p: float("top_p"),
            top_k: config["top_k"].as_i64().map(|k| u32::try_from(k).unwrap_or(0)),
            min_p: float("min_p"),
            repetition_penalty: float("repetition_penalty"),
        }
    }
}

/// `eos_token_id` of `config.json` or `generation_config.json`: one id or a list.
pub(super) fn eos_ids(config: &Json) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match &config["eos_token_id"] {
        Json::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}
