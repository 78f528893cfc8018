//! `/v1/chat/completions`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::common::check_logprobs;
use super::refused::Endpoints;
use super::{
    ApiError, Body, ChatLogprobs, ChatMessage, Common, RefusedFields, Unknown, Usage, check_refused,
};

/// A chat completion request.
#[derive(Debug)]
pub struct ChatRequest {
    /// What it shares with text completions.
    pub common: Common,
    /// What is its own.
    pub chat: ChatFields,
    /// `tools`, which may only come with `"tool_choice": "none"`.
    pub tools: Option<Json>,
}

/// Fields of a chat request alone.
#[derive(Debug, Deserialize)]
pub struct ChatFields {
    /// The conversation; at least one message.
    pub messages: Vec<ChatMessage>,
    /// Report log-probabilities.
    pub logprobs: Option<bool>,
    /// With so many alternatives.
    pub top_logprobs: Option<usize>,
    /// Variables for the chat template.
    pub chat_template_kwargs: Option<Map<String, Json>>,
    /// Open an assistant's message; default true.
    pub add_generation_prompt: Option<bool>,
    /// Go on with the last message.
    pub continue_final_message: Option<bool>,
    /// Apply the tokenizer's own post-processor too; default false, because templates write their special
    /// tokens.
    pub add_special_tokens: Option<bool>,
    /// Passed to the chat template, if it reads it.
    pub reasoning_effort: Option<String>,
    /// Begin the answer with the last message when it is continued.
    pub echo: Option<bool>,
}

impl Body for ChatRequest {
    fn parse(bytes: &[u8], unknown: &mut Unknown) -> Result<Self, ApiError> {
        let mut refused: RefusedFields = unknown.pass(bytes)?;
        check_refused(&refused, Endpoints::Chat)?;
        let common: Common = unknown.pass(bytes)?;
        common.validate()?;
        let chat: ChatFields = unknown.pass(bytes)?;
        chat.validate(&common)?;
        Ok(Self { common, chat, tools: refused.take("tools") })
    }
}

impl ChatFields {
    fn validate(&self, common: &Common) -> Result<(), ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::field("messages", "messages must hold at least one message."));
        }
        if self.top_logprobs.is_some() && self.logprobs != Some(true) {
            return Err(ApiError::field("top_logprobs", "top_logprobs needs \"logprobs\": true."));
        }
        check_logprobs("top_logprobs", self.top_logprobs)?;
        if common.max_tokens() == Some(0) && common.prompt_logprobs.is_none() {
            let message = "max_tokens must be at least 1 (0 only together with prompt_logprobs).";
            return Err(ApiError::field("max_tokens", message));
        }
        if self.echo == Some(true) {
            let message = "echo is not supported for chat; it is for /v1/completions.";
            return Err(ApiError::unsupported("echo", message));
        }
        if self.continue_final_message == Some(true) && self.add_generation_prompt == Some(true) {
            return Err(ApiError::field(
                "continue_final_message",
                "continue_final_message and add_generation_prompt exclude each other.",
            ));
        }
        for reserved in ["messages", "tools", "add_generation_prompt", "continue_final_message"] {
            if self.chat_template_kwargs.as_ref().is_some_and(|kwargs| kwargs.contains_key(reserved)) {
                let message =
                    format!("chat_template_kwargs must not hold {reserved:?}; send it as its own field.");
                return Err(ApiError::field("chat_template_kwargs", message));
            }
        }
        Ok(())
    }
}

/// A whole answer.
#[derive(Debug, Serialize)]
pub struct ChatCompletion {
    /// `chatcmpl-...`
    pub id: String,
    /// `chat.completion`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name as the request gave it.
    pub model: String,
    /// The choices, by index.
    pub choices: Vec<ChatChoice>,
    /// The token counts.
    pub usage: Usage,
    /// Which build answered: equal seeds give equal tokens only on equal fingerprints.
    pub system_fingerprint: &'static str,
    /// The scored prompt, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Json>,
}

/// One choice.
#[derive(Debug, Serialize)]
pub struct ChatChoice {
    /// Its index.
    pub index: usize,
    /// What the model said.
    pub message: ChatReply,
    /// Log-probabilities, when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// The stop string or stop id that ended it, if it was one of the request's.
    pub stop_reason: Option<Json>,
}

/// The assistant's message.
#[derive(Debug, Serialize)]
pub struct ChatReply {
    /// `assistant`
    pub role: &'static str,
    /// The text.
    pub content: String,
    /// Always null: OpenAI's field for declined requests.
    pub refusal: Option<String>,
}

/// A piece of a streamed answer.
#[derive(Debug, Serialize)]
pub struct ChatChunk<'a> {
    /// As in [`ChatCompletion`], the same in all chunks.
    pub id: &'a str,
    /// `chat.completion.chunk`
    pub object: &'static str,
    /// As in [`ChatCompletion`].
    pub created: u64,
    /// As in [`ChatCompletion`].
    pub model: &'a str,
    /// As in [`ChatCompletion`].
    pub system_fingerprint: &'static str,
    /// One choice, or none in the usage chunk.
    pub choices: Vec<ChatChunkChoice>,
    /// Absent unless asked for; then null in all chunks but those that carry it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// A choice's piece.
#[derive(Debug, Serialize)]
pub struct ChatChunkChoice {
    /// The choice's index.
    pub index: usize,
    /// What is new.
    pub delta: ChatDelta,
    /// Log-probabilities of the tokens behind this piece, when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Null until the last piece.
    pub finish_reason: Option<&'static str>,
    /// As in [`ChatChoice`]; only in the last piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<Json>,
}

/// What is new in a choice.
#[derive(Debug, Default, Serialize)]
pub struct ChatDelta {
    /// In the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}
