//! A whole choice, for answers that are not streamed.

use dsa80_model::engine::{FinishReason, TokenLogprobs};
use serde_json::{Value as Json, json};

use crate::generation::Generation;
use crate::openai::ApiError;
use crate::output::{Finish, GeneratedToken, Piece, StopReason};

/// All that a choice came to.
#[derive(Debug)]
pub(super) struct Collected {
    pub(super) text: String,
    pub(super) tokens: Vec<GeneratedToken>,
    pub(super) finish: Finish,
    /// The scored prompt.
    pub(super) prompt: Option<Vec<Option<TokenLogprobs>>>,
    pub(super) completion_tokens: usize,
    pub(super) cached_tokens: usize,
}

/// Waits for the end of a choice.
///
/// # Errors
/// 500 with the engine's words if it gave up.
pub(super) async fn collect(mut generation: Generation) -> Result<Collected, ApiError> {
    let (mut text, mut tokens, mut prompt) = (String::new(), Vec::new(), None);
    while let Some(piece) = generation.next().await {
        match piece {
            Piece::Prompt(scored) => prompt = Some(scored),
            Piece::Failed(message) => return Err(ApiError::internal(message)),
            Piece::Delta(delta) => {
                text.push_str(&delta.text);
                tokens.extend(delta.tokens);
                if let Some(finish) = delta.finish {
                    let completion_tokens = generation.completion_tokens();
                    let cached_tokens = generation.cached_tokens();
                    return Ok(Collected { text, tokens, finish, prompt, completion_tokens, cached_tokens });
                }
            }
        }
    }
    Err(ApiError::internal("the engine ended without a word"))
}

/// OpenAI's word for it.
pub(super) fn finish_reason(finish: &Finish) -> &'static str {
    match finish.reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// vLLM's `stop_reason`: the stop string or the stop id.
pub(super) fn stop_reason(finish: &Finish) -> Option<Json> {
    finish.stop.as_ref().map(|stop| match stop {
        StopReason::Text(text) => json!(text),
        StopReason::Token(id) => json!(id),
    })
}
