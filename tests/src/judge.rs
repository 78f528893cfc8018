//! Fixtures on a backend, and the bounds that one in f32 has to meet, and one in bf16.

use anyhow::{Result, ensure};
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::StepLimits;
use dsa80_model::runner::{INDEX_LOGITS, Rank, WeightSource};
use dsa80_reference::Kernels;
use dsa80_reference::communicator::SingleRank;

use crate::distance::{LogprobDelta, largest, mean, percentile, share_within};
use crate::fixture::{Fixture, Spread};
use crate::prompt::{self, Run};

/// Two scores closer than this may change places in float32.
const SELECTION_GAP: f64 = 1e-5;

/// Prints how far a run of the fixture's prompt in f32 is from HF.
///
/// # Errors
/// It is not what HF computes: log-probabilities are further from HF float64's than ten times what HF float32's are, or than 5e-4; or
/// selections differ where HF's scores are not too close to tell.
#[expect(clippy::print_stdout, reason = "a test shows what it measured")]
pub fn exact(fixture: &Fixture, way: &str, run: &Run) -> Result<()> {
    let delta = LogprobDelta::new(&run.logits, &fixture.logits, &fixture.tokens);
    let (name, scale) = (&fixture.name, &fixture.scale);
    println!(
        "{name:>20} {way:>16}: |delta logprob| mean {:.1e} max {:.1e}, worst token {:.1e} (HF float32 max {:.1e}, {:.1e})",
        mean(&delta.target),
        largest(&delta.target),
        largest(&delta.worst),
        scale.f32.max,
        scale.f32_max_over_vocab.max,
    );
    for (what, deltas, p99) in [
        ("target", &delta.target, scale.f32.p99),
        ("worst token", &delta.worst, scale.f32_max_over_vocab.p99),
    ] {
        let share = share_within(deltas, 10.0 * p99);
        ensure!(share >= 0.99, "{name} {way}: {what}: only {share} within 10 x {p99:e}");
        ensure!(largest(deltas) <= 5e-4, "{name} {way}: {what}: {:e}", largest(deltas));
    }
    let layers: Vec<usize> = fixture.selections.iter().map(|selection| selection.layer).collect();
    let found: Vec<usize> = run.selections.keys().copied().collect();
    ensure!(found == layers, "{name} {way}: full layers {found:?}, expected {layers:?}");
    for selection in &fixture.selections {
        let (layer, found) = (selection.layer, &run.selections[&selection.layer]);
        let (count, expected) = (found.len(), selection.indices.len());
        ensure!(count == expected, "{name} {way}: layer {layer}: {count} places, expected {expected}");
        let rows = found.chunks(selection.topk).zip(selection.indices.chunks(selection.topk));
        for (position, (found, expected)) in rows.enumerate() {
            if selection.gap[position] > SELECTION_GAP {
                let (found, expected) = (as_set(found), as_set(expected));
                let place = format!("{name} {way}: layer {layer}, position {position}");
                ensure!(found == expected, "{place}: {found:?}, expected {expected:?}");
            }
        }
    }
    Ok(())
}

/// The selected positions, ascending.
fn as_set(row: &[i32]) -> Vec<i32> {
    let mut set: Vec<i32> = row.iter().copied().filter(|&index| index >= 0).collect();
    set.sort_unstable();
    set
}

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
