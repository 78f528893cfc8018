//! The fields that chat and text completions share, and what they come to for the engine.

use std::collections::BTreeMap;

use dsa80_reference::SamplingParams;
use serde::Deserialize;
use uuid::Uuid;

use super::ApiError;
use crate::text::TextModel;

/// Fields of both kinds of completion request. OpenAI's, and the extensions that evaluation harnesses and
/// benchmarks know from vLLM.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Common {
    /// The served model's name; absent is the one that is served.
    pub model: Option<String>,
    /// Server-sent events instead of one answer.
    pub stream: Option<bool>,
    /// What the stream carries besides.
    pub stream_options: Option<StreamOptions>,
    /// Choices for each prompt.
    pub n: Option<u32>,
    /// Only `n` or 1.
    pub best_of: Option<u32>,
    /// Tokens to generate at most.
    pub max_tokens: Option<usize>,
    /// The same, in OpenAI's newer word.
    pub max_completion_tokens: Option<usize>,
    /// Tokens to generate at most when the request says nothing; `None` is the rest of the context. The endpoint sets it.
    #[serde(skip)]
    pub default_max_tokens: Option<usize>,
    /// Tokens before which no end-of-sequence id, stop id or stop string counts.
    pub min_tokens: Option<usize>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::top_k`]; -1 and 0 keep all.
    pub top_k: Option<i64>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// See [`SamplingParams::frequency_penalty`].
    pub frequency_penalty: Option<f32>,
    /// See [`SamplingParams::presence_penalty`].
    pub presence_penalty: Option<f32>,
    /// Token ids, as strings, with what is added to their logits.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Random when absent.
    pub seed: Option<i64>,
    /// Strings that end the generation.
    pub stop: Option<StopList>,
    /// Ids that end the generation.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Go on past end-of-sequence ids.
    pub ignore_eos: Option<bool>,
    /// Leave special tokens out of the text; default true.
    pub skip_special_tokens: Option<bool>,
    /// Show the stop string too.
    pub include_stop_str_in_output: Option<bool>,
    /// Spell tokens as `token_id:N` in logprobs.
    pub return_tokens_as_token_ids: Option<bool>,
    /// Score the prompt, with so many alternatives at each place.
    pub prompt_logprobs: Option<usize>,
}

/// `stop`: one string or a list.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum StopList {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub struct StreamOptions {
    /// A last chunk with the token counts.
    pub include_usage: Option<bool>,
    /// The counts so far in every chunk.
    pub continuous_usage_stats: Option<bool>,
}

/// The most stop strings taken (OpenAI: 4).
const MAX_STOPS: usize = 64;
/// The most alternatives reported at a place.
pub(super) const MAX_LOGPROBS: usize = 20;
/// The most choices.
const MAX_CHOICES: u32 = 128;

impl Common {
    /// Checks all that can be checked without a model.
    ///
    /// # Errors
    /// A 400 naming the field, what it may be and what it is.
    pub fn validate(&self) -> Result<(), ApiError> {
        let range = |name: &str, value: Option<f32>, low: f32, high: f32| match value {
            Some(value) if !(low..=high).contains(&value) => {
                Err(ApiError::field(name, format!("{name} must be between {low} and {high}, found {value}.")))
            }
            _ => Ok(()),
        };
        // OpenAI stops at 2; what lies above is well defined, and infinity is not.
        range("temperature", self.temperature, 0.0, 100.0)?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)
            .map_err(|_| out_of("top_p", "above 0 and at most 1", self.top_p))?;
        range("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, 100.0)
            .map_err(|_| out_of("repetition_penalty", "above 0 and at most 100", self.repetition_penalty))?;
        if let Some(k) = self.top_k.filter(|&k| k < -1 || k > i64::from(u32::MAX)) {
            return Err(ApiError::field(
                "top_k",
                format!("top_k must be -1, 0 (both keep all) or more, found {k}."),
            ));
        }
        let n = self.n.unwrap_or(1);
        if !(1..=MAX_CHOICES).contains(&n) {
            return Err(ApiError::field("n", format!("n must be between 1 and {MAX_CHOICES}, found {n}.")));
        }
        if let Some(best_of) = self.best_of.filter(|&best_of| best_of != 1 && best_of != n) {
            return Err(ApiError::unsupported(
                "best_of",
                format!(
                    "best_of other than 1 or n is not supported by this server, found {best_of} with n = {n}."
                ),
            ));
        }
        if self.stream_options.is_some() && !self.stream() {
            return Err(ApiError::field("stream_options", "stream_options needs \"stream\": true."));
        }
        if self.prompt_logprobs.is_some() && self.stream() {
            return Err(ApiError::field("prompt_logprobs", "prompt_logprobs cannot be streamed."));
        }
        check_logprobs("prompt_logprobs", self.prompt_logprobs)?;
        let stops = self.stops();
        if stops.len() > MAX_STOPS {
            let message = format!("stop may hold {MAX_STOPS} strings at most, found {}.", stops.len());
            return Err(ApiError::field("stop", message));
        }
        if stops.iter().any(String::is_empty) {
            return Err(ApiError::field("stop", "stop must not hold an empty string."));
        }
        Ok(())
    }

    /// Whether the answer is streamed.
    pub fn stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Choices for each prompt.
    pub fn n(&self) -> usize {
        self.n.unwrap_or(1) as usize
    }

    /// Whether a last chunk carries the counts.
    pub fn include_usage(&self) -> bool {
        self.stream_options.is_some_and(|options| options.include_usage.unwrap_or(false))
    }

    /// Whether every chunk carries the counts.
    pub fn continuous_usage(&self) -> bool {
        self.stream_options.is_some_and(|options| options.continuous_usage_stats.unwrap_or(false))
    }

    /// `max_tokens` in either word.
    pub fn max_tokens(&self) -> Option<usize> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// The stop strings.
    pub fn stops(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(StopList::One(stop)) => vec![stop.clone()],
            Some(StopList::Many(stops)) => stops.clone(),
        }
    }

    /// How tokens are chosen. The seed is that of the first choice; see [`choice_seed`](Self::choice_seed).
    ///
    /// # Errors
    /// A 400 naming a `logit_bias` that is no token of the model, or out of range.
    pub fn sampling(&self, model: &TextModel) -> Result<SamplingParams, ApiError> {
        let plain = SamplingParams::default();
        let defaults = &model.defaults;
        let top_k = self.top_k.map(|k| u32::try_from(k).unwrap_or(0));
        Ok(SamplingParams {
            temperature: self.temperature.or(defaults.temperature).unwrap_or(plain.temperature),
            top_k: top_k.or(defaults.top_k).unwrap_or(plain.top_k),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(plain.top_p),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(plain.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(plain.repetition_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(plain.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(plain.presence_penalty),
            logit_bias: self.logit_bias(model.vocab_size)?,
            seed: self.seed.map_or_else(random_seed, i64::cast_unsigned),
        })
    }

    /// Checks that every id is one of the model's.
    ///
    /// # Errors
    /// A 400 naming the first that is not.
    pub fn check_ids(&self, model: &TextModel) -> Result<(), ApiError> {
        check_ids("stop_token_ids", self.stop_token_ids.as_deref().unwrap_or_default(), model.vocab_size)
    }

    /// The seed of choice `index`: choices differ, and the first is what a request with `n = 1` gives.
    pub fn choice_seed(seed: u64, index: usize) -> u64 {
        seed.wrapping_add(index as u64)
    }

    fn logit_bias(&self, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let wrong = |message: String| ApiError::field("logit_bias", message);
        let biases = self.logit_bias.iter().flatten();
        biases
            .map(|(token, &bias)| {
                let id: u32 =
                    token.parse().ok().filter(|&id| (id as usize) < vocab_size).ok_or_else(|| {
                        wrong(format!(
                            "logit_bias: {token:?} is not a token id of this model (0 to {}).",
                            vocab_size.saturating_sub(1)
                        ))
                    })?;
                if !(-100.0..=100.0).contains(&bias) {
                    return Err(wrong(format!(
                        "logit_bias of {token} must be between -100 and 100, found {bias}."
                    )));
                }
                Ok((id, bias))
            })
            .collect()
    }
}

/// Checks that every one of `ids` is below `vocab_size`.
///
/// # Errors
/// A 400 naming the field, the id and its place.
pub fn check_ids(field: &str, ids: &[u32], vocab_size: usize) -> Result<(), ApiError> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(at) => Err(ApiError::field(
            field,
            format!(
                "{field}: {} (at index {at}) is not a token id of this model (0 to {}).",
                ids[at],
                vocab_size.saturating_sub(1)
            ),
        )),
    }
}

/// Checks a number of alternatives.
pub(super) fn check_logprobs(field: &str, count: Option<usize>) -> Result<(), ApiError> {
    match count.filter(|&count| count > MAX_LOGPROBS) {
        None => Ok(()),
        Some(count) => Err(ApiError::field(
            field,
            format!("{field} must be between 0 and {MAX_LOGPROBS}, found {count}."),
        )),
    }
}

fn out_of(name: &str, range: &str, value: Option<f32>) -> ApiError {
    ApiError::field(name, format!("{name} must be {range}, found {}.", value.unwrap_or(f32::NAN)))
}

/// 64 random bits; two halves of a UUID, because each has a few fixed bits.
fn random_seed() -> u64 {
    let (high, low) = Uuid::new_v4().as_u64_pair();
    high.rotate_left(32) ^ low
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::mock;

    fn common(body: Json) -> Common {
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn each_value_out_of_range_is_named() {
        for (body, param) in [
            (json!({"temperature": -0.1}), "temperature"),
            (json!({"temperature": 1e300}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_p": 1.01}), "top_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"min_p": 2}), "min_p"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"frequency_penalty": 2.5}), "frequency_penalty"),
            (json!({"presence_penalty": -3}), "presence_penalty"),
            (json!({"n": 0}), "n"),
            (json!({"n": 129}), "n"),
            (json!({"n": 2, "best_of": 3}), "best_of"),
            (json!({"stop": ["a", ""]}), "stop"),
            (json!({"stop": vec!["x"; 65]}), "stop"),
            (json!({"stream_options": {"include_usage": true}}), "stream_options"),
            (json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs"),
            (json!({"prompt_logprobs": 21}), "prompt_logprobs"),
        ] {
            let error = common(body.clone()).validate().expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
            assert_eq!(error.status.as_u16(), 400);
        }
        common(json!({"n": 2, "best_of": 2, "temperature": 2, "top_p": 1, "top_k": -1, "stop": "x"}))
            .validate()
            .unwrap();
    }

    #[test]
    fn the_request_wins_over_the_checkpoint_and_both_over_openais_defaults() {
        let mut model = mock::text_model();
        model.defaults.temperature = Some(0.6);
        model.defaults.top_p = Some(0.9);
        let sampling = common(json!({"top_p": 0.5, "seed": -1})).sampling(&model).unwrap();
        assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.6, 0.5, 0));
        assert_eq!(sampling.seed, u64::MAX);
    }

    #[test]
    fn seeds_are_random_when_absent_and_differ_by_choice() {
        let model = mock::text_model();
        let seed = || common(json!({})).sampling(&model).unwrap().seed;
        assert_ne!(seed(), seed());
        assert_eq!(Common::choice_seed(u64::MAX, 1), 0);
    }

    #[test]
    fn ids_that_the_model_does_not_have_are_named() {
        let model = mock::text_model();
        let bias = |token: &str, bias: f32| common(json!({"logit_bias": {token: bias}})).sampling(&model);
        assert_eq!(bias("3", -100.0).unwrap().logit_bias, [(3, -100.0)]);
        for (token, value) in [("320", 1.0), ("-1", 1.0), ("hello", 1.0), ("3", 101.0)] {
            assert_eq!(bias(token, value).unwrap_err().param.as_deref(), Some("logit_bias"));
        }
        let error = common(json!({"stop_token_ids": [1, 320]})).check_ids(&model).unwrap_err();
        assert_eq!(
            error.message,
            "stop_token_ids: 320 (at index 1) is not a token id of this model (0 to 319)."
        );
    }
}
