//! The model as the engine sees it: one step over a ragged batch, and the tokens that come out of it.

use std::sync::Arc;

use dsa80_reference::{Batch, Breaker, DType, SamplingParams};

use super::request::TokenLogprobs;

/// A model that can be stepped: weights, paged caches and sampler, on however many ranks.
///
/// The engine owns the cache's pages by number (`0..num_pages`); the model only follows the batch's block
/// tables.
pub trait StepModel: Send {
    /// Runs one step on all ranks: writes the batch's cache rows and returns one result per target, in order. Calls `meanwhile` once on its
    /// way: when the device has all it needs and is only waited for, or else before it begins.
    ///
    /// # Errors
    /// [`StepError`]; the model's state is unknown afterwards and it is not stepped again.
    fn step_while(&mut self, step: Arc<Step>, meanwhile: &mut dyn FnMut())
    -> Result<Vec<Sampled>, StepError>;

    /// [`step_while`](Self::step_while) with nothing else to do.
    ///
    /// # Errors
    /// As there.
    fn step(&mut self, step: Arc<Step>) -> Result<Vec<Sampled>, StepError> {
        self.step_while(step, &mut || ())
    }

    /// What a step may hold. Must not change while the model lives.
    fn limits(&self) -> StepLimits;

    /// What ends, from any thread, a step in which one rank waits for another; None where no rank does.
    fn breaker(&self) -> Option<Breaker> {
        None
    }

    /// Whoever steps the model has failed with `reason` and will step it no more: ranks elsewhere hear that it is a failure, unless they know
    /// of an earlier one. Being dropped without it is the end of all work.
    fn give_up(&mut self, _reason: &str) {}

    /// Calls `tell` with the reason when the model can no longer be stepped, though no step is being made.
    fn on_loss(&mut self, _tell: Breaker) {}
}

/// One step: what to compute, and the rows from which to sample.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    /// The new tokens of every sequence that takes part.
    pub batch: Batch,
    /// The rows whose logits are wanted, in ascending order of `row`; empty when every sequence is in
    /// mid-prompt.
    pub targets: Vec<SampleTarget>,
}

/// A row of the batch from which a token is sampled, or whose next token is scored.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleTarget {
    /// Token row of the batch whose hidden state is projected to logits.
    pub row: usize,
    /// How to choose.
    pub params: Arc<SamplingParams>,
    /// The prompt's tokens (for the repetition penalty).
    pub prompt: Arc<[u32]>,
    /// The tokens generated so far; filled only if a penalty is on.
    pub output: Vec<u32>,
    /// Tokens that must not be chosen.
    pub banned: Arc<[u32]>,
    /// The position that the new token will take in its sequence; counts the random draw.
    pub position: u32,
    /// When set, nothing is drawn: this token is reported with its log-probability.
    pub forced: Option<u32>,
    /// Alternatives whose log-probabilities are wanted; `None` wants neither them nor the token's own.
    pub logprobs: Option<usize>,
}

/// What came out of one [`SampleTarget`].
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The chosen token (the forced one if there was one).
    pub token: u32,
    /// Present exactly when the target asked for `logprobs`.
    pub logprobs: Option<TokenLogprobs>,
}

/// What the model was built for. All sizes are at least 1, but `max_logprobs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens a page holds.
    pub page_size: usize,
    /// Pages of the caches.
    pub num_pages: usize,
    /// What the caches hold: `Act`, or `Fp8` in pages of a multiple of 4 tokens.
    pub cache_dtype: DType,
    /// Token rows of a step.
    pub max_batch_tokens: usize,
    /// Sequences of a step.
    pub max_batch_seqs: usize,
    /// The longest context (prompt and output).
    pub max_model_len: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// The largest number of alternatives that can be reported.
    pub max_logprobs: usize,
}

/// Why a step failed; the message is shown to the callers of the requests that it takes down.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StepError(
    /// The message.
    pub String,
);
