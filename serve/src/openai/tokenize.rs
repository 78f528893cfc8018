//! `/tokenize` and `/detokenize`, in vLLM's shapes.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::{ApiError, Body, ChatMessage, Unknown};

/// A text or a conversation to turn into tokens.
#[derive(Debug, Deserialize)]
pub struct TokenizeRequest {
    /// The served model's name.
    pub model: Option<String>,
    /// A text.
    pub prompt: Option<String>,
    /// Or a conversation, through the chat template.
    pub messages: Option<Vec<ChatMessage>>,
    /// Tools for the chat template.
    pub tools: Option<Json>,
    /// Apply the tokenizer's own post-processor; default true for a prompt, false for a conversation.
    pub add_special_tokens: Option<bool>,
    /// Open an assistant's message; default true.
    pub add_generation_prompt: Option<bool>,
    /// Leave the last message open.
    pub continue_final_message: Option<bool>,
    /// Variables for the chat template.
    pub chat_template_kwargs: Option<Map<String, Json>>,
    /// Also list the tokens as the vocabulary spells them.
    pub return_token_strs: Option<bool>,
}

/// The tokens.
#[derive(Debug, Serialize)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// The longest context served.
    pub max_model_len: usize,
    /// Their ids.
    pub tokens: Vec<u32>,
    /// Their spellings, when asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Tokens to turn into text.
#[derive(Debug, Deserialize)]
pub struct DetokenizeRequest {
    /// The served model's name.
    pub model: Option<String>,
    /// Their ids.
    pub tokens: Vec<u32>,
}

/// The text.
#[derive(Debug, Serialize)]
pub struct DetokenizeResponse {
    /// It.
    pub prompt: String,
}

impl Body for TokenizeRequest {
    fn parse(bytes: &[u8], unknown: &mut Unknown) -> Result<Self, ApiError> {
        let request: Self = unknown.pass(bytes)?;
        if request.prompt.is_some() == request.messages.is_some() {
            return Err(ApiError::field("prompt", "Send either prompt or messages."));
        }
        Ok(request)
    }
}

impl Body for DetokenizeRequest {
    fn parse(bytes: &[u8], unknown: &mut Unknown) -> Result<Self, ApiError> {
        unknown.pass(bytes)
    }
}
