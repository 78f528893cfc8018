//! The MTP layer's drafts are those of transformers' own decoder layer in float64, where rounding to bf16 does not decide.

use dsa80_cuda::Cuda;
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{SampleTarget, Step};
use dsa80_reference::{Batch, SequenceSlice};
use dsa80_tests::parity::TestDevice;
use dsa80_tests::{fixture, judge, prompt};
use serde::Deserialize;

use super::{emulated, on_gpu};

const PAGE_SIZE: usize = 16;
/// How much better than the next best a draft is that must be found.
const SURE: f64 = 0.3;

/// `drafts.json`.
#[derive(Deserialize)]
struct Golden {
    tokens: Vec<u32>,
    drafts: Vec<u32>,
    margin: Vec<f64>,
}

#[expect(clippy::print_stdout, reason = "a test shows what it measured")]
fn compare(cuda: Cuda<TestDevice>, tokens: usize) {
    let folder = fixture::root().join("cases/dense_context");
    let golden: Golden = serde_json::from_slice(&std::fs::read(folder.join("drafts.json")).unwrap()).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap().with_draft_layer().unwrap();
    let limits = prompt::limits(golden.tokens.len(), PAGE_SIZE, checkpoint.config().vocab_size);
    let mut rank = judge::load_weights(cuda, &checkpoint, &limits).unwrap();
    let pages = prompt::scattered_pages(&limits, 0);
    let slice = SequenceSlice { token_ids: &golden.tokens[..tokens], computed_len: 0, pages: &pages };
    let target = |row: usize| SampleTarget {
        row,
        params: std::sync::Arc::default(),
        prompt: std::sync::Arc::default(),
        output: Vec::new(),
        banned: std::sync::Arc::default(),
        position: row as u32 + 1,
        forced: Some(golden.tokens[row + 1]),
        logprobs: Some(1),
    };
    let batch = Batch::new(PAGE_SIZE, &[slice]).unwrap();
    let sampled = rank.step(&Step { batch, targets: (0..tokens).map(target).collect() }).unwrap();
    let drafts = sampled.iter().map(|sampled| sampled.logprobs.as_ref().unwrap().draft.unwrap());
    let (mut sure, mut wrong) = (0, Vec::new());
    for (row, draft) in drafts.enumerate().filter(|&(row, _)| golden.margin[row] > SURE) {
        sure += 1;
        if draft != golden.drafts[row] {
            wrong.push((row, draft, golden.drafts[row]));
        }
    }
    println!("{sure} of {tokens} drafts are sure, wrong: {wrong:?}");
    assert!(sure > tokens / 3 && wrong.is_empty(), "(row, draft, transformers' draft): {wrong:?}");
}

#[test]
fn drafts_are_those_of_transformers() {
    if let Some(cuda) = emulated() {
        compare(cuda, 40);
    }
    if let Some(cuda) = on_gpu() {
        compare(cuda, 95);
    }
}
