//! From messages and texts to prompts, off the async threads when that takes long.

use serde_json::Value as Json;

use super::ServedModel;
use crate::openai::ApiError;
use crate::text::RenderOptions;

/// Bytes of text from which work goes to a thread of its own. Tokenising runs at some megabytes a second:
/// below this an async thread is held for about two milliseconds.
const INLINE_BYTES: usize = 8 << 10;

/// Runs CPU work on about `bytes` bytes of text.
///
/// # Errors
/// What `work` says, or 500 if it panicked.
pub(super) async fn run_cpu<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= INLINE_BYTES {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!("the request could not be prepared: {error}"))),
    }
}

/// A conversation through the chat template and the tokenizer.
///
/// # Errors
/// 400 for what the template refuses.
pub(super) async fn chat_prompt(
    model: &ServedModel,
    messages: Vec<Json>,
    bytes: usize,
    options: RenderOptions,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    let text = model.text.clone();
    run_cpu(bytes, move || {
        let rendered = text
            .template()
            .and_then(|template| template.render(&messages, &options))
            .map_err(|error| ApiError::field("messages", format!("The chat template refuses: {error}.")))?;
        encode(&text.tokenizer, &rendered, add_special_tokens, "messages")
    })
    .await
}

/// A text through the tokenizer.
///
/// # Errors
/// 400 for what the tokenizer refuses.
pub(super) async fn text_prompt(
    model: &ServedModel,
    prompt: String,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    let text = model.text.clone();
    run_cpu(prompt.len(), move || encode(&text.tokenizer, &prompt, add_special_tokens, "prompt")).await
}

fn encode(
    tokenizer: &crate::text::Tokenizer,
    text: &str,
    add_special_tokens: bool,
    field: &str,
) -> Result<Vec<u32>, ApiError> {
    tokenizer
        .encode(text, add_special_tokens)
        .map_err(|error| ApiError::field(field, format!("{field} could not be tokenised: {error}.")))
}
