//! Small models in emulation, so that a machine without a GPU sees the backend whole.

use std::sync::Arc;

use dsa80_cuda::expanded_mla::Expansion;
use dsa80_model::engine::{SampleTarget, Step};
use dsa80_reference::{Batch, SamplingParams, SequenceSlice};
use dsa80_tests::distance::{argmax, log_softmax};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::{judge, prompt};

use super::{emulated, fixtures, layers};

/// How many of the further prompts run in emulation, which is slow.
const PROMPTS: usize = 8;

/// The first tokens of every prompt: more than `index_topk` for most fixtures, so that the indexer chooses.
#[test]
fn every_model_is_the_oracles_within_rounding() {
    for fixture in fixture::all().unwrap() {
        let Some(cuda) = emulated() else { return };
        layers::compare(cuda, &fixture, 48);
    }
}

/// A step ends with the tokens, and the log-probabilities, that its own logits say.
#[test]
fn a_step_samples_from_its_logits() {
    let Some(cuda) = emulated() else { return };
    let fixture = Fixture::open(fixture::root().join("cases/int4_channel")).unwrap();
    let mut rank = judge::load(cuda, &fixture, 16).unwrap();
    let limits = judge::limits(&fixture, 16);
    let pages = [0, 1].map(|sequence| prompt::scattered_pages(&limits, sequence));
    let slices = [(5, &pages[0]), (3, &pages[1])].map(|(tokens, pages)| SequenceSlice {
        token_ids: &fixture.tokens[..tokens],
        computed_len: 0,
        pages,
    });
    let params = Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
    let targets = [4, 7].map(|row| SampleTarget {
        row,
        params: Arc::clone(&params),
        prompt: Arc::default(),
        output: Vec::new(),
        banned: Arc::default(),
        position: 9,
        forced: None,
        logprobs: Some(3),
    });
    let step = Step { batch: Batch::new(16, &slices).unwrap(), targets: targets.into() };
    let sampled = rank.step(&step).unwrap();
    let logits = rank.logits(&[4, 7]).unwrap();
    for (sampled, logits) in sampled.iter().zip(logits.chunks(fixture.vocab_size)) {
        let (best, logprobs) = (argmax(logits), log_softmax(logits));
        let reported = sampled.logprobs.as_ref().unwrap();
        assert_eq!((sampled.token as usize, reported.top.len()), (best, 3));
        assert!((f64::from(reported.logprob) - logprobs[best]).abs() < 1e-5, "{reported:?}");
        for &(token, logprob) in &reported.top {
            assert!((f64::from(logprob) - logprobs[token as usize]).abs() < 1e-5, "{reported:?}");
        }
    }
}

/// What a backend expands that expands every step of one sequence.
pub(super) const ALWAYS: Expansion =
    Expansion { tokens: 1, context_of_token: usize::MAX, visible_of_selected: 64 };

#[test]
fn every_model_that_expands_is_as_close_to_hf_as_hf_in_bf16() {
    for fixture in fixture::all().unwrap() {
        let Some(cuda) = emulated() else { return };
        fixtures::judge_pool(cuda.with_expansion(ALWAYS), &fixture, PROMPTS);
    }
}

#[test]
fn every_model_is_as_close_to_hf_as_hf_in_bf16() {
    for fixture in fixture::all().unwrap() {
        let Some(cuda) = emulated() else { return };
        fixtures::judge_pool(cuda, &fixture, PROMPTS);
    }
}
