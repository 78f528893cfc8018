//! Small models in emulation, so that a machine without a GPU sees the backend whole.

use dsa80_cuda::expanded_mla::Expansion;
use dsa80_tests::{bodies, fixture};

use super::emulated;

/// How many of the further prompts run in emulation, which is slow.
const PROMPTS: usize = 8;

/// The first tokens of every prompt: more than `index_topk` for most fixtures, so that the indexer chooses.
#[test]
fn every_model_is_the_oracles_within_rounding() {
    for fixture in fixture::all().unwrap() {
        let Some(cuda) = emulated() else { return };
        bodies::layer_by_layer(cuda, &fixture, 48);
    }
}

#[test]
fn a_step_samples_from_its_logits() {
    emulated().into_iter().for_each(bodies::a_step_samples_from_its_logits);
}

/// What a backend expands that expands every step of one sequence.
pub(super) const ALWAYS: Expansion =
    Expansion { tokens: 1, context_of_token: usize::MAX, visible_of_selected: 64 };

#[test]
fn every_model_that_expands_is_as_close_to_hf_as_hf_in_bf16() {
    for fixture in fixture::all().unwrap() {
        let Some(cuda) = emulated() else { return };
        bodies::prompts_together(cuda.with_expansion(ALWAYS), &fixture, PROMPTS);
    }
}

#[test]
fn every_model_is_as_close_to_hf_as_hf_in_bf16() {
    for fixture in fixture::all().unwrap() {
        let Some(cuda) = emulated() else { return };
        bodies::prompts_together(cuda, &fixture, PROMPTS);
    }
}
