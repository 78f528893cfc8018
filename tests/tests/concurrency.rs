//! What a request gives does not depend on its company: neighbours, page budget, prefix cache, number of ranks,
//! requests that go away.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, in its helpers too, and shows what it measured"
)]

use std::time::Duration;

use dsa80_model::engine::{EngineHandle, Event, Request, SubmitError, TokenLogprobs};
use dsa80_model::launch::{Device, LaunchOptions};
use dsa80_reference::SamplingParams;
use dsa80_tests::engine::{Answer, collect, device, eventually, start};

const REQUESTS: usize = 32;
/// One page of the default options is 64 tokens; small ones make page tables long and sharing likely.
const PAGE_SIZE: usize = 16;

/// A prompt of `len` tokens. Those of one `family` begin alike, so that the prefix cache has something to find.
fn prompt(family: usize, seed: usize, len: usize) -> Vec<u32> {
    let common = len * 2 / 3;
    (0..len)
        .map(|i| {
            let salt = if i < common { family } else { 1000 + seed };
            ((i * 37 + salt * 101 + i * i * salt) % 740) as u32
        })
        .collect()
}

/// Requests of all kinds: lengths from one token to far beyond `index_topk` (128), greedy and drawn, with and without
/// penalties, filters, biases, stop ids, and scored prompts.
fn mixed() -> Vec<Request> {
    (0..REQUESTS)
        .map(|i| {
            let sampling = SamplingParams {
                temperature: [0.0, 0.6, 1.0, 1.7][i % 4],
                top_p: [1.0, 0.9, 0.6][i % 3],
                top_k: [0, 0, 40][i % 3],
                min_p: [0.0, 0.02][i % 2],
                repetition_penalty: [1.0, 1.0, 1.2][i % 3],
                frequency_penalty: [0.0, 0.5, 0.0, -0.3, 0.0][i % 5],
                presence_penalty: [0.0, 0.0, 0.0, 0.7, 0.0][i % 5],
                logit_bias: if i % 7 == 0 { vec![(70, 3.0), (71, -100.0)] } else { Vec::new() },
                seed: (i as u64) << 29 ^ 0x5EED,
            };
            Request {
                prompt: prompt(i % 4, i, [1, 17, 60, 130, 210, 16, 33, 90][i % 8]),
                sampling,
                max_tokens: 6 + (i * 5) % 23,
                min_tokens: if i % 6 == 0 { 4 } else { 0 },
                stop_token_ids: if i % 6 == 0 { (0..100).collect() } else { Vec::new() },
                ignore_eos: i % 2 == 0,
                logprobs: [Some(3), None, Some(0)][i % 3],
                prompt_logprobs: [None, Some(2), None, None][i % 4],
            }
        })
        .collect()
}

fn options() -> LaunchOptions {
    LaunchOptions { page_size: PAGE_SIZE, max_model_len: Some(512), ..dsa80_tests::engine::options() }
}

/// Each request on its own, on an engine that remembers nothing.
fn alone(requests: &[Request]) -> Vec<Answer> {
    let engine = start(&LaunchOptions { enable_prefix_caching: false, ..options() }).unwrap();
    let answers =
        requests.iter().map(|request| collect(engine.submit(request.clone()).unwrap()).unwrap()).collect();
    engine.shutdown(Duration::ZERO);
    answers
}

fn together(engine: &EngineHandle, requests: &[Request]) -> Vec<Answer> {
    let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
    streams.into_iter().map(|stream| collect(stream).unwrap()).collect()
}

/// Tokens, reasons and log-probabilities: the very same bits. Not on a GPU, where the order of a sum depends on the size of the step, and
/// one rounding can flip a choice: there most answers are the same, and all are whole.
fn assert_same(way: &str, found: Vec<Answer>, alone: &[Answer]) {
    let on_the_oracle = device() == Device::Cpu;
    let mut same = 0;
    for (i, (found, alone)) in found.into_iter().zip(alone).enumerate() {
        assert!(found.failure.is_none(), "{way}: request {i}: {:?}", found.failure);
        if !on_the_oracle {
            assert!(found.end.is_some() && found.prompt.len() == alone.prompt.len(), "{way}: request {i}");
            same += usize::from(found.tokens == alone.tokens);
            continue;
        }
        assert_eq!(found.without_cached_tokens(), *alone, "{way}: request {i}");
    }
    if !on_the_oracle {
        println!("{way}: {same} of {} answers are the same", alone.len());
        assert!(same * 2 > alone.len(), "{way}: only {same} of {} answers are the same", alone.len());
    }
}

/// Nothing is held any more.
fn assert_idle(engine: &EngineHandle) {
    let stats = eventually(engine, |stats| stats.running == 0 && stats.waiting == 0).unwrap();
    assert_eq!(stats.pages_used, 0, "{stats:?}");
    assert_eq!(stats.failed, 0, "{stats:?}");
}

#[test]
fn requests_together_give_what_they_give_alone() {
    let requests = mixed();
    let alone = alone(&requests);
    assert!(alone.iter().any(|answer| answer.tokens.len() > 20), "the test would show little");
    // Pages for little more than the longest of them, and of one token, so that every output token needs another.
    let longest = requests.iter().map(|request| request.prompt.len() + request.max_tokens).max().unwrap();
    let tight =
        LaunchOptions { page_size: 1, num_pages: Some(longest + 10), max_model_len: None, ..options() };
    for (way, options, rounds) in [
        // Twice: the second time the prefix cache knows all of them.
        ("prefix caching", options(), 2),
        ("no prefix caching", LaunchOptions { enable_prefix_caching: false, ..options() }, 1),
        ("small steps", LaunchOptions { max_num_batched_tokens: 24, max_num_seqs: 7, ..options() }, 1),
        ("few pages", tight.clone(), 1),
        ("few pages, no prefix caching", LaunchOptions { enable_prefix_caching: false, ..tight }, 1),
    ] {
        let engine = start(&options).unwrap();
        for round in 1..=rounds {
            assert_same(&format!("{way}, round {round}"), together(&engine, &requests), &alone);
        }
        assert_idle(&engine);
        let stats = engine.stats();
        println!("{way}: {stats:?}");
        assert_eq!(stats.finished, (rounds * REQUESTS) as u64);
        assert_eq!(stats.cached_tokens > 0, options.enable_prefix_caching, "{way}: {stats:?}");
        assert_eq!(stats.preemptions > 0, options.num_pages.is_some(), "{way}: {stats:?}");
        engine.shutdown(Duration::ZERO);
    }
}

/// Log-probabilities of the same token, from another number of ranks.
const TP_TOLERANCE: f32 = 1e-4;

fn assert_close(place: &str, found: &TokenLogprobs, expected: &TokenLogprobs) {
    let delta = (found.logprob - expected.logprob).abs();
    assert!(delta <= TP_TOLERANCE, "{place}: {found:?}, expected {expected:?}");
    for (found, expected) in found.top.iter().zip(&expected.top) {
        // Two alternatives closer than the tolerance may change places; their values may not.
        assert!((found.1 - expected.1).abs() <= TP_TOLERANCE, "{place}: {found:?}, expected {expected:?}");
    }
}

#[test]
fn any_number_of_ranks_gives_the_same_tokens() {
    if device() != Device::Cpu {
        return;
    }
    // Greedy, with the margin of every choice.
    let requests: Vec<Request> = mixed()
        .into_iter()
        .step_by(3)
        .map(|request| Request {
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            logprobs: Some(2),
            prompt_logprobs: Some(2),
            ..request
        })
        .collect();
    let alone = alone(&requests);
    for tp in [1, 2, 8] {
        let engine = start(&LaunchOptions { tp, ..options() }).unwrap();
        let (mut same, mut all) = (0, 0);
        for (i, (found, expected)) in together(&engine, &requests).iter().zip(&alone).enumerate() {
            assert_eq!(found.prompt.len(), expected.prompt.len());
            for (found, expected) in found.prompt.iter().flatten().zip(expected.prompt.iter().flatten()) {
                assert_close(&format!("tp {tp}: prompt {i}"), found, expected);
            }
            all += expected.tokens.len();
            for (j, expected_token) in expected.tokens.iter().enumerate() {
                let place = format!("tp {tp}: request {i}, token {j}");
                let margin = expected.logprobs[j].top[0].1 - expected.logprobs[j].top[1].1;
                if found.tokens.get(j) != Some(expected_token) {
                    assert!(margin <= 2.0 * TP_TOLERANCE, "{place}: margin {margin}");
                    // From here on they are different texts.
                    break;
                }
                assert_close(&place, &found.logprobs[j], &expected.logprobs[j]);
                same += 1;
            }
        }
        println!("tp {tp}: {same} of {all} tokens compared");
        assert!(same * 10 > all * 9, "tp {tp}: only {same} of {all} tokens could be compared");
        engine.shutdown(Duration::ZERO);
    }
}

#[test]
fn requests_that_are_dropped_free_all_they_hold() {
    let engine = start(&LaunchOptions { max_num_seqs: 8, ..options() }).unwrap();
    let request = |i: usize| Request {
        prompt: prompt(i, i, 20 + 7 * i),
        max_tokens: 40,
        ignore_eos: true,
        sampling: SamplingParams { seed: i as u64, ..SamplingParams::default() },
        ..Request::default()
    };
    let mut streams: Vec<_> = (0..REQUESTS).map(|i| engine.submit(request(i)).unwrap()).collect();
    // Some of those that go away are in the middle, most still in the queue: 8 run.
    while !matches!(streams[1].next_blocking(), Some(Event::Token { .. })) {}
    let mut kept = Vec::new();
    for (i, stream) in streams.drain(..).enumerate() {
        if i % 2 == 0 {
            kept.push((i, stream));
        }
    }
    for (i, stream) in kept {
        let answer = collect(stream).unwrap();
        assert_eq!(answer.tokens.len(), 40, "request {i}: {answer:?}");
    }
    assert_idle(&engine);
    let stats = engine.stats();
    assert_eq!((stats.cancelled, stats.finished), (REQUESTS as u64 / 2, REQUESTS as u64 / 2), "{stats:?}");
    // All pages can be had again: one request that needs the longest context.
    let long = Request { prompt: prompt(9, 9, 500), max_tokens: 12, ignore_eos: true, ..Request::default() };
    assert_eq!(collect(engine.submit(long).unwrap()).unwrap().tokens.len(), 12);
    engine.shutdown(Duration::ZERO);
}

#[test]
fn shutting_down_in_the_middle_ends_every_stream() {
    let request = |i: usize| Request {
        prompt: prompt(i, i, 30),
        max_tokens: 400,
        ignore_eos: true,
        ..Request::default()
    };
    let tp = if device() == Device::Cpu { 2 } else { 1 };
    let engine = start(&LaunchOptions { max_num_seqs: 4, tp, ..options() }).unwrap();
    let mut streams: Vec<_> = (0..12).map(|i| engine.submit(request(i)).unwrap()).collect();
    while !matches!(streams[0].next_blocking(), Some(Event::Token { .. })) {}
    engine.shutdown(Duration::ZERO);
    assert!(!engine.is_alive());
    assert_eq!(engine.submit(request(0)).err(), Some(SubmitError::ShuttingDown));
    for (i, mut stream) in streams.into_iter().enumerate() {
        let mut last = None;
        while let Some(event) = stream.next_blocking() {
            last = Some(event);
        }
        assert!(matches!(last, Some(Event::Failed(_))), "request {i} ended with {last:?}");
    }
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.pages_used, stats.failed), (0, 0, 0, 12), "{stats:?}");

    // With time to finish, all finish.
    let engine = start(&LaunchOptions { max_num_seqs: 4, ..options() }).unwrap();
    let streams: Vec<_> =
        (0..6).map(|i| engine.submit(Request { max_tokens: 10, ..request(i) }).unwrap()).collect();
    engine.shutdown(Duration::from_secs(60));
    for stream in streams {
        assert_eq!(collect(stream).unwrap().tokens.len(), 10);
    }
    assert!(!engine.is_alive());
}
