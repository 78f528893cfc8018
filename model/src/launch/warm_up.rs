//! First steps, so that a request finds every kernel compiled.

use std::sync::Arc;

use dsa80_reference::{Batch, SamplingParams, SequenceSlice};

use crate::config::ModelConfig;
use crate::engine::{SampleTarget, Step, StepLimits, StepModel};
use crate::error::LaunchError;

/// Where a backend takes another way with a prompt: none, by default.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Turns {
    /// A context long enough that chunks of any length take the way of long ones.
    pub context: usize,
    /// The longest chunk that takes another way when nothing is before it.
    pub chunk: Option<usize>,
}

/// A prompt in chunks, past the length from which the indexer has to choose, then chunks and batches of every power of two: what they
/// launch is compiled (or found in the cache on disk), and what the kernels keep between launches has grown. Calls `begin` before every step.
pub(super) fn warm_up(
    model: &mut dyn StepModel,
    config: &ModelConfig,
    turns: Turns,
    begin: &mut dyn FnMut(),
) -> Result<(), LaunchError> {
    let limits = model.limits();
    let context = warm_up_context(&limits, config, turns);
    for start in (0..context).step_by(limits.max_batch_tokens) {
        let chunk = limits.max_batch_tokens.min(context - start);
        begin();
        warm_up_step(model, &limits, 1, start, chunk)?;
    }
    let up_to =
        |most: usize| (0..usize::BITS).map(|i| 1 << i).take_while(move |&n: &usize| n < most).chain([most]);
    for tokens in up_to(limits.max_batch_tokens.min(context)) {
        begin();
        warm_up_step(model, &limits, 1, context - tokens, tokens)?;
    }
    if let Some(chunk) = turns.chunk {
        // It may be shorter than the first of those above.
        if chunk < limits.max_batch_tokens.min(context) {
            begin();
            warm_up_step(model, &limits, 1, 0, chunk)?;
        }
        // Chunks of several sequences do not take that way, however short their contexts are.
        let each = (limits.max_batch_tokens / 2).min(context);
        if limits.max_batch_seqs > 1 && each > 0 {
            begin();
            warm_up_step(model, &limits, 2, context - each, each)?;
        }
    }
    for sequences in up_to(limits.max_batch_seqs) {
        begin();
        warm_up_step(model, &limits, sequences, context - 1, 1)?;
    }
    Ok(())
}

/// A first step of a few tokens.
#[cfg(feature = "wgpu")]
pub(super) fn first_step(model: &mut dyn StepModel) -> Result<(), LaunchError> {
    const TOKENS: usize = 16;
    let limits = model.limits();
    let tokens = TOKENS.min(limits.max_model_len).min(limits.max_batch_tokens);
    warm_up_step(model, &limits, 1, 0, tokens)
}

/// The longest context of the warm-up: from it on, the indexer has to choose, and a backend takes no other way.
pub(super) fn warm_up_context(limits: &StepLimits, config: &ModelConfig, turns: Turns) -> usize {
    let held = limits.max_model_len.min(limits.num_pages.saturating_mul(limits.page_size));
    held.min(config.index_topk.saturating_add(limits.max_batch_tokens).max(turns.context))
}

/// `sequences` with `tokens` new ones each after `computed`, all on the same pages: what they write is never read again. Every second one
/// draws with all filters.
fn warm_up_step(
    model: &mut dyn StepModel,
    limits: &StepLimits,
    sequences: usize,
    computed: usize,
    tokens: usize,
) -> Result<(), LaunchError> {
    let pages: Vec<u32> =
        (0..(computed + tokens).div_ceil(limits.page_size)).map(|page| page as u32).collect();
    let token_ids: Vec<u32> = (computed..computed + tokens).map(|i| (i % limits.vocab_size) as u32).collect();
    let slice = SequenceSlice { token_ids: &token_ids, computed_len: computed, pages: &pages };
    let batch = Batch::new(limits.page_size, &vec![slice; sequences])?;
    let plain = Arc::new(SamplingParams::default());
    let filtered =
        Arc::new(SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.01, ..SamplingParams::default() });
    let target = |sequence: usize| SampleTarget {
        row: (sequence + 1) * tokens - 1,
        params: Arc::clone(if sequence.is_multiple_of(2) { &filtered } else { &plain }),
        prompt: Arc::default(),
        output: Vec::new(),
        banned: Arc::default(),
        position: 0,
        forced: None,
        logprobs: Some(limits.max_logprobs),
    };
    let targets = (0..sequences).map(target).collect();
    model
        .step(Arc::new(Step { batch, targets }))
        .map_err(|error| LaunchError::Options(format!("the device fails at a first step: {error}")))?;
    Ok(())
}
