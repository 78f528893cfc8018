//! The wire: what OpenAI's clients send and what they expect back. Types and rules only; no engine, no HTTP.

mod chat;
mod common;
mod completion;
mod error;
mod logprobs;
mod message;
mod parse;
mod refused;
mod tokenize;
mod usage;

pub use chat::{ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatReply, ChatRequest};
pub use common::{Common, StopList, StreamOptions, check_ids};
pub use completion::{Completion, CompletionChoice, CompletionRequest, Prompt};
pub use error::{ApiError, ErrorBody, ErrorNote, ErrorObject};
pub use logprobs::{ChatLogprobs, CompletionLogprobs, TokenEntry, TokenNames, TopEntry, prompt_logprobs};
pub use message::{ChatMessage, Content, ContentPart, Role, ToolCall, ToolFunction};
pub use parse::{Body, Unknown};
pub use refused::{Endpoints, NO_OPS, Refusal, RefusedFields, check_refused, refusals};
pub use tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
pub use usage::{PromptTokensDetails, Usage};
