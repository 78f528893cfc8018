//! What is asked of the engine, and what it answers.

use dsa80_reference::SamplingParams;

/// One generation request, already tokenised.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Request {
    /// The prompt's token ids; at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens to generate at most. 0 only makes sense with `prompt_logprobs`: the prompt is scored, nothing
    /// is generated.
    pub max_tokens: usize,
    /// End-of-sequence ids and `stop_token_ids` are not chosen before this many tokens.
    pub min_tokens: usize,
    /// Further token ids that end the generation, besides the model's end-of-sequence ids.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the model's end-of-sequence ids.
    pub ignore_eos: bool,
    /// Report the log-probability of every generated token and of this many best alternatives.
    pub logprobs: Option<usize>,
    /// Report the log-probability of every prompt token but the first, and of this many best alternatives.
    pub prompt_logprobs: Option<usize>,
}

/// A token's log-probability, and the best alternatives at its place.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token's own natural log-probability under the raw logits.
    pub logprob: f32,
    /// The best tokens with theirs, best first, ties to the lower id.
    pub top: Vec<(u32, f32)>,
    /// The MTP layer's guess at the token after this one, where this one was scored by a model that was loaded with that layer.
    pub draft: Option<u32>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence id or one of `stop_token_ids`; that token is the last `Event::Token`.
    Stop,
    /// `max_tokens`, or the model's context is full.
    Length,
}

/// Tokens counted for one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Prompt tokens whose cache rows were found in the prefix cache.
    pub cached_tokens: usize,
}

/// What a request's stream yields, in order: `Started` (once, when it leaves the queue for the first time;
/// one that fails before has none), `Prompt` (only when asked for), any number of `Token`, then exactly one
/// of `Finished` and `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request left the waiting queue. A caller that stops reading early (a stop string) has the number
    /// from here.
    Started {
        /// Prompt tokens whose cache rows were found in the prefix cache.
        cached_tokens: usize,
    },
    /// The scored prompt: entry `i` belongs to prompt token `i`; the first is `None`.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// One generated token.
    Token {
        /// The token.
        id: u32,
        /// Present when `logprobs` was asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The generation ended.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// The engine could not go on; the message says why.
    Failed(String),
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The waiting queue is full; try again later.
    #[error("the waiting queue is full ({waiting} requests of at most {limit}); try again later")]
    QueueFull {
        /// Requests waiting now.
        waiting: usize,
        /// The bound.
        limit: usize,
    },
    /// The engine is draining or has stopped.
    #[error("the engine is shutting down and takes no new requests")]
    ShuttingDown,
    /// The request can never run: the message says which field, what was found and what is possible.
    #[error("{0}")]
    Invalid(String),
    /// Prompt and `max_tokens` (or the prompt alone) do not fit the context.
    #[error(
        "this model's maximum context length is {max_model_len} tokens, but {prompt_tokens} in the prompt \
         and {max_tokens} to generate were asked for"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// `max_tokens` of the request.
        max_tokens: usize,
        /// The longest context served.
        max_model_len: usize,
    },
}
