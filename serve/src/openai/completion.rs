//! `/v1/completions`.

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::common::check_logprobs;
use super::refused::Endpoints;
use super::{ApiError, Body, Common, CompletionLogprobs, RefusedFields, Unknown, Usage, check_refused};

/// A text completion request.
#[derive(Debug)]
pub struct CompletionRequest {
    /// What it shares with chat completions.
    pub common: Common,
    /// What is its own.
    pub completion: CompletionFields,
}

/// Fields of a text completion request alone.
#[derive(Debug, Deserialize)]
pub struct CompletionFields {
    /// One prompt or a batch.
    pub prompt: Prompt,
    /// Begin the answer with the prompt.
    pub echo: Option<bool>,
    /// Report log-probabilities, with so many alternatives.
    pub logprobs: Option<usize>,
    /// Apply the tokenizer's own post-processor; default true.
    pub add_special_tokens: Option<bool>,
}

/// `prompt`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids, or a list of lists of token ids"
)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
    /// Texts.
    Texts(Vec<String>),
    /// Lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

/// Tokens to generate when neither `max_tokens` nor `min_tokens` asks for more: OpenAI's default. Clients count on short
/// answers here, and a batch of prompts that each ran to the end of the context would block everybody.
const DEFAULT_MAX_TOKENS: usize = 16;
/// The most prompts in a batch.
const MAX_PROMPTS: usize = 2048;

impl Body for CompletionRequest {
    fn parse(bytes: &[u8], unknown: &mut Unknown) -> Result<Self, ApiError> {
        check_refused(&unknown.pass::<RefusedFields>(bytes)?, Endpoints::Completions)?;
        let mut common: Common = unknown.pass(bytes)?;
        common.validate()?;
        common.default_max_tokens = Some(DEFAULT_MAX_TOKENS.max(common.min_tokens.unwrap_or(0)));
        let completion: CompletionFields = unknown.pass(bytes)?;
        completion.validate(&common)?;
        Ok(Self { common, completion })
    }
}

impl CompletionFields {
    fn validate(&self, common: &Common) -> Result<(), ApiError> {
        let prompts = match &self.prompt {
            Prompt::Text(_) => 1,
            Prompt::Ids(ids) => usize::from(!ids.is_empty()),
            Prompt::Texts(texts) => texts.len(),
            Prompt::IdLists(lists) => lists.len(),
        };
        if !(1..=MAX_PROMPTS).contains(&prompts) {
            let message = format!("prompt must hold between 1 and {MAX_PROMPTS} prompts, found {prompts}.");
            return Err(ApiError::field("prompt", message));
        }
        check_logprobs("logprobs", self.logprobs)?;
        let scores = self.echo == Some(true) || common.prompt_logprobs.is_some();
        if common.max_tokens() == Some(0) && !scores {
            let message = "max_tokens must be at least 1 (0 only together with echo or prompt_logprobs).";
            return Err(ApiError::field("max_tokens", message));
        }
        Ok(())
    }
}

/// A whole answer, and, with fewer fields, a piece of a streamed one.
#[derive(Debug, Serialize)]
pub struct Completion<'a> {
    /// `cmpl-...`
    pub id: &'a str,
    /// `text_completion`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name as the request gave it.
    pub model: &'a str,
    /// Which build answered.
    pub system_fingerprint: &'static str,
    /// The choices; for a batch, prompt `p` has indices `p * n` to `p * n + n - 1`.
    pub choices: Vec<CompletionChoice>,
    /// The token counts; in a stream as in `ChatChunk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// One choice, or its piece.
#[derive(Debug, Serialize)]
pub struct CompletionChoice {
    /// Its index.
    pub index: usize,
    /// The text, with the prompt before it on `echo`.
    pub text: String,
    /// Log-probabilities, when asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null in all pieces but the last.
    pub finish_reason: Option<&'static str>,
    /// The stop string or stop id that ended it, if it was one of the request's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<Json>,
    /// The scored prompt, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Json>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: Json) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::parse(body.to_string().as_bytes(), &mut Unknown::default())
    }

    #[test]
    fn prompts_of_all_four_kinds() {
        for (prompt, want) in [
            (json!("a"), Prompt::Text("a".into())),
            (json!([1, 2]), Prompt::Ids(vec![1, 2])),
            (json!(["a", "b"]), Prompt::Texts(vec!["a".into(), "b".into()])),
            (json!([[1], [2, 3]]), Prompt::IdLists(vec![vec![1], vec![2, 3]])),
        ] {
            assert_eq!(parse(json!({"prompt": prompt})).unwrap().completion.prompt, want);
        }
    }

    #[test]
    fn a_bad_prompt_is_named() {
        for body in [
            json!({}),
            json!({"prompt": null}),
            json!({"prompt": [-1]}),
            json!({"prompt": ["a", 1]}),
            json!({"prompt": []}),
        ] {
            let error = parse(body.clone()).unwrap_err();
            assert!(error.message.contains("prompt"), "{body} {}", error.message);
        }
    }

    #[test]
    fn sixteen_tokens_unless_more_are_asked_for() {
        let default = |body: Json| parse(body).unwrap().common.default_max_tokens;
        assert_eq!(default(json!({"prompt": "a"})), Some(16));
        assert_eq!(default(json!({"prompt": "a", "min_tokens": 20})), Some(20));
    }

    #[test]
    fn nothing_to_generate_needs_something_to_score() {
        assert!(parse(json!({"prompt": "a", "max_tokens": 0})).is_err());
        assert!(parse(json!({"prompt": "a", "max_tokens": 0, "echo": true})).is_ok());
        assert!(parse(json!({"prompt": "a", "max_tokens": 0, "prompt_logprobs": 0})).is_ok());
    }
}
