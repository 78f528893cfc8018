//! The MTP layer's drafts against those of Hugging Face transformers' own decoder layer in float64 (`fixtures/dsa80_fixtures/draft.py`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{Event, Request};
use dsa80_model::launch::{Device, KvCacheDtype, LaunchOptions, launch};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    tokens: Vec<u32>,
    /// Of row `t`: the best guess at token `t + 2`, from the tokens before that.
    drafts: Vec<u32>,
    /// By how much it is the best.
    margin: Vec<f64>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/cases/dense_context")
}

fn golden() -> Golden {
    serde_json::from_slice(&std::fs::read(folder().join("drafts.json")).unwrap()).unwrap()
}

/// Of every token of `prompt` that is scored, the draft of what follows it.
fn drafts(checkpoint: Checkpoint, options: &LaunchOptions, prompt: &[u32]) -> Vec<Option<u32>> {
    let engine = launch(&Arc::new(checkpoint), options).unwrap();
    let request =
        Request { prompt: prompt.to_vec(), max_tokens: 0, prompt_logprobs: Some(1), ..Request::default() };
    let mut events = engine.submit(request).unwrap();
    while let Some(event) = events.next_blocking() {
        match event {
            Event::Prompt(scores) => {
                engine.shutdown(Duration::ZERO);
                return scores.into_iter().map(|score| score.and_then(|score| score.draft)).collect();
            }
            Event::Failed(reason) => panic!("{reason}"),
            _ => {}
        }
    }
    panic!("no scores")
}

/// How many of them are not transformers', of those that it is sure of.
fn wrong(golden: &Golden, drafts: &[Option<u32>], sure: f64) -> usize {
    assert_eq!((drafts.len(), drafts[0]), (golden.tokens.len(), None), "nothing scores the first token");
    let theirs = golden.drafts.iter().zip(&golden.margin);
    drafts[1..]
        .iter()
        .zip(theirs)
        .filter(|(ours, (theirs, margin))| **margin > sure && **ours != Some(**theirs))
        .count()
}

#[test]
fn drafts_are_those_of_transformers_on_any_number_of_ranks_and_in_chunks() {
    let golden = golden();
    for (tp, chunk) in [(1, 512), (1, 7), (2, 512), (4, 7)] {
        let checkpoint = Checkpoint::open(&folder()).unwrap().with_draft_layer().unwrap();
        let options = LaunchOptions {
            device: Device::Cpu,
            tp,
            max_num_batched_tokens: chunk,
            max_num_seqs: 4,
            ..LaunchOptions::default()
        };
        let drafts = drafts(checkpoint, &options, &golden.tokens);
        assert_eq!(wrong(&golden, &drafts, 1e-3), 0, "{tp} ranks, chunks of {chunk}");
    }
}

#[test]
fn drafts_from_caches_in_8_bits() {
    let golden = golden();
    let checkpoint = Checkpoint::open(&folder()).unwrap().with_draft_layer().unwrap();
    let options =
        LaunchOptions { device: Device::Cpu, kv_cache_dtype: KvCacheDtype::Fp8, ..LaunchOptions::default() };
    let drafts = drafts(checkpoint, &options, &golden.tokens);
    assert_eq!(wrong(&golden, &drafts, 0.3), 0);
}

/// Behind a token that is drawn nothing is drafted: the layer would need that token.
#[test]
fn tokens_that_are_drawn_have_no_drafts() {
    let checkpoint = Checkpoint::open(&folder()).unwrap().with_draft_layer().unwrap();
    let options = LaunchOptions { device: Device::Cpu, ..LaunchOptions::default() };
    let engine = launch(&Arc::new(checkpoint), &options).unwrap();
    let request = Request { prompt: golden().tokens, max_tokens: 3, logprobs: Some(1), ..Request::default() };
    let (mut events, mut drawn) = (engine.submit(request).unwrap(), 0);
    while let Some(event) = events.next_blocking() {
        if let Event::Token { logprobs, .. } = event {
            assert_eq!(logprobs.unwrap().draft, None);
            drawn += 1;
        }
    }
    engine.shutdown(Duration::ZERO);
    assert_eq!(drawn, 3);
}

#[test]
fn a_model_that_is_loaded_without_the_layer_drafts_nothing() {
    let options = LaunchOptions { device: Device::Cpu, ..LaunchOptions::default() };
    let drafts = drafts(Checkpoint::open(&folder()).unwrap(), &options, &golden().tokens);
    assert!(drafts.iter().all(Option::is_none));
}

#[test]
fn a_checkpoint_without_the_layer_stays_as_it_is() {
    let checkpoint = || Checkpoint::open(&folder().join("../../default")).unwrap();
    assert_eq!(checkpoint().with_draft_layer().unwrap().config(), checkpoint().config());
    let whole = Checkpoint::open(&folder()).unwrap();
    let layers = whole.config().num_hidden_layers;
    let drafting = whole.with_draft_layer().unwrap();
    assert_eq!(drafting.config().index_of_draft_layer(), Some(layers));
}
