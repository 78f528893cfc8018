//! Fixtures on a backend, and the bounds that one in bf16 has to meet.

use anyhow::Result;
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::StepLimits;
use dsa80_model::runner::{INDEX_LOGITS, Rank, WeightSource};
use dsa80_reference::Kernels;
use dsa80_reference::communicator::SingleRank;

use crate::distance::{LogprobDelta, mean, percentile};
use crate::fixture::{Fixture, Spread};
use crate::prompt::{self, Run};

/// The fixture's checkpoint on one rank, with caches for its prompt.
///
/// # Errors
/// A damaged checkpoint, or whatever the backend reports.
pub fn load<K: Kernels>(kernels: K, fixture: &Fixture, page_size: usize) -> Result<Rank<K>> {
    load_weights(kernels, &Checkpoint::open(&fixture.dir)?, &limits(fixture, page_size))
}

/// A model on one rank.
///
/// # Errors
/// Whatever the weights or the backend report.
pub fn load_weights<K: Kernels>(
    kernels: K,
    weights: &dyn WeightSource,
    limits: &StepLimits,
) -> Result<Rank<K>> {
    Ok(Rank::load(kernels, Box::new(SingleRank::default()), weights, limits, INDEX_LOGITS)?)
}

/// Limits for the fixture's prompt and its greedy continuation.
pub fn limits(fixture: &Fixture, page_size: usize) -> StepLimits {
    prompt::limits(fixture.tokens.len() + fixture.greedy.len(), page_size, fixture.vocab_size)
}

/// How far a bf16 backend's log-probabilities of a prompt's tokens are from HF float64, as a share of HF bfloat16's own distance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bf16Distance {
    /// Of the means.
    pub mean: f64,
    /// Of the 99th percentiles.
    pub p99: f64,
}

/// The shares that a bf16 backend may have, over several prompts.
pub const BF16_BOUND: Bf16Distance = Bf16Distance { mean: 1.25, p99: 1.5 };

/// What a run of the one prompt in `golden.safetensors` may have.
///
/// Twice as much, because its p99 is the second-worst of about 160 positions, and the worst ones are those where bf16 happened to flip a
/// selection or an expert, each off by up to 2: in HF as here. On the same fixture, arithmetic that is as precise and rounds otherwise is
/// outside [`BF16_BOUND`] in 11 to 14 % of draws, and HF's own p99 of `bf16` is 0.615 on this prompt and 1.09 over 32 others. A better
/// judge is the [pool](crate::pool) of those, over which every fixture is held to the bound itself.
pub const BF16_BOUND_OF_ONE_PROMPT: Bf16Distance =
    Bf16Distance { mean: 2.0 * BF16_BOUND.mean, p99: 2.0 * BF16_BOUND.p99 };

impl Bf16Distance {
    /// Of one run of the fixture's prompt, which it prints.
    pub fn of(fixture: &Fixture, way: &str, run: &Run) -> Self {
        let delta = LogprobDelta::new(&run.logits, &fixture.logits, &fixture.tokens).target;
        Self::new(&fixture.name, way, &delta, &fixture.scale.bf16)
    }

    /// Of |delta logprob| at some positions, at which HF bfloat16's own is `scale`. It prints both.
    #[expect(clippy::print_stdout, reason = "a test shows what it measured")]
    pub fn new(name: &str, way: &str, delta: &[f64], scale: &Spread) -> Self {
        let (mean, p99) = (mean(delta), percentile(delta, 0.99));
        let shares = Self { mean: mean / scale.mean, p99: p99 / scale.p99 };
        println!(
            "{name:>20} {way:>16}: |delta logprob| mean {mean:.3} p99 {p99:.3} (HF bfloat16 {:.3} {:.3}: {:.2} {:.2})",
            scale.mean, scale.p99, shares.mean, shares.p99
        );
        // Not the same numbers as float32 by accident: rounding must happen.
        assert!(mean > 1e-4, "{name} {way}: nothing was rounded");
        shares
    }

    /// Panics unless both shares are within `bound`.
    pub fn assert_within(&self, bound: Self, name: &str, way: &str) {
        let within = self.mean <= bound.mean && self.p99 <= bound.p99;
        assert!(within, "{name} {way}: {self:?} of HF bfloat16's own, allowed {bound:?}");
    }
}
