//! Fixtures on a backend, and the bounds that one in bf16 has to meet.

use anyhow::Result;
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::StepLimits;
use dsa80_model::runner::{INDEX_LOGITS, Rank};
use dsa80_reference::Kernels;
use dsa80_reference::communicator::SingleRank;

use crate::distance::{LogprobDelta, mean, percentile};
use crate::fixture::Fixture;
use crate::prompt::{self, Run};

/// The fixture's checkpoint on one rank, with caches for its prompt.
///
/// # Errors
/// A damaged checkpoint, or whatever the backend reports.
pub fn load<K: Kernels>(kernels: K, fixture: &Fixture, page_size: usize) -> Result<Rank<K>> {
    let checkpoint = Checkpoint::open(&fixture.dir)?;
    let limits = limits(fixture, page_size);
    Ok(Rank::load(kernels, Box::new(SingleRank::default()), &checkpoint, &limits, INDEX_LOGITS)?)
}

/// Limits for the fixture's prompt and its greedy continuation.
pub fn limits(fixture: &Fixture, page_size: usize) -> StepLimits {
    prompt::limits(fixture.tokens.len() + fixture.greedy.len(), page_size, fixture.vocab_size)
}

/// The bounds that a bf16 backend has to meet: 1.25 times HF bfloat16's own mean distance from HF float64, 1.5 times its p99. Panics with
/// the numbers unless they hold.
#[expect(clippy::print_stdout, reason = "a test shows what it measured")]
pub fn as_bf16(fixture: &Fixture, way: &str, run: &Run) {
    let delta = LogprobDelta::new(&run.logits, &fixture.logits, &fixture.tokens).target;
    let (scale, name) = (&fixture.scale.bf16, &fixture.name);
    let (mean, p99) = (mean(&delta), percentile(&delta, 0.99));
    println!(
        "{name:>20} {way:>16}: |delta logprob| mean {mean:.3} p99 {p99:.3} (HF bfloat16 {:.3} {:.3})",
        scale.mean, scale.p99
    );
    // Not the same numbers as float32 by accident: rounding must happen.
    assert!(mean > 1e-4, "{name} {way}: nothing was rounded");
    assert!(mean <= 1.25 * scale.mean, "{name} {way}: mean {mean}");
    assert!(p99 <= 1.5 * scale.p99, "{name} {way}: p99 {p99}");
}
