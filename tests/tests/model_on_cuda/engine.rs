//! The engine over the backend: what it continues a prompt with is what the backend itself finds best.

use std::sync::Arc;
use std::time::Duration;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{EngineHandle, FinishReason, Request};
use dsa80_model::launch::{Device, LaunchOptions, launch};
use dsa80_reference::SamplingParams;
use dsa80_tests::distance::argmax;
use dsa80_tests::engine::{Answer, collect};
use dsa80_tests::fixture::Fixture;
use dsa80_tests::judge::{self, limits};
use dsa80_tests::prompt;

use super::every_fixture_on_a_gpu;

/// Tokens of a continuation that may be another than the best of a run in other pieces: a flipped selection or expert changes the logits of
/// a position at random.
const FLIPPED: f64 = 0.15;

fn greedy(engine: &EngineHandle, fixture: &Fixture) -> Answer {
    let request = Request {
        prompt: fixture.tokens[..fixture.scale.greedy_prompt_len].to_vec(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: fixture.greedy.len(),
        ignore_eos: true,
        logprobs: Some(2),
        ..Request::default()
    };
    collect(engine.submit(request).unwrap()).unwrap()
}

#[test]
fn a_greedy_continuation_is_what_the_backend_finds_best() {
    every_fixture_on_a_gpu(|cuda, fixture| {
        let name = &fixture.name;
        let checkpoint = Arc::new(Checkpoint::open(&fixture.dir).unwrap());
        let options =
            LaunchOptions { device: Device::Cuda, max_num_batched_tokens: 50, ..LaunchOptions::default() };
        let engine = launch(&checkpoint, &options).unwrap();
        let answer = greedy(&engine, fixture);
        let (reason, usage) = answer.end.unwrap();
        assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, fixture.greedy.len()), "{name}");
        for (token, logprobs) in answer.tokens.iter().zip(&answer.logprobs) {
            assert_eq!(logprobs.top[0].0, *token, "{name}: greedy takes the best");
        }
        // Once more, now that the prefix cache knows the prompt.
        let again = greedy(&engine, fixture);
        assert!(engine.stats().cached_tokens > 0, "{name}: nothing was cached");
        assert_eq!(again.tokens.len(), answer.tokens.len());
        engine.shutdown(Duration::ZERO);

        let start = fixture.scale.greedy_prompt_len;
        let tokens = [&fixture.tokens[..start], &answer.tokens].concat();
        let mut rank = judge::load(cuda, fixture, 16).unwrap();
        let pages = prompt::scattered_pages(&limits(fixture, 16), 0);
        let pieces = prompt::pieces(tokens.len(), start);
        let run = prompt::run(&mut rank, &tokens, &pages, 16, &pieces).unwrap();
        let others = answer.tokens.iter().enumerate().filter(|&(i, &token)| {
            let row = start + i - 1;
            argmax(&run.logits[row * fixture.vocab_size..][..fixture.vocab_size]) != token as usize
        });
        let others = others.count();
        println!(
            "{name:>20}: {others} of {} tokens are not the best of a run in other pieces",
            answer.tokens.len()
        );
        assert!(others as f64 <= FLIPPED * answer.tokens.len() as f64, "{name}: {others} tokens");
    });
}
