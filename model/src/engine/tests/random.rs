//! Random mixes of requests, page counts, budgets and cancellations.

use dsa80_reference::SamplingParams;
use proptest::prelude::*;

use super::*;
use crate::engine::{Engine, EngineOptions};

#[derive(Debug, Clone)]
enum Op {
    Submit(Request),
    /// Stops the n-th request (modulo their number); true hangs up, false raises the flag.
    Cancel(usize, bool),
    Steps(usize),
}

/// Requests that share beginnings, so that the prefix cache has something to find; at most 40 tokens in all.
fn any_request() -> impl Strategy<Value = Request> {
    let prompt =
        (0..3u32, 0..20usize, prop::collection::vec(0..50u32, 1..8)).prop_map(|(stem, len, tail)| {
            (0..len as u32).map(|i| (stem * 17 + i * 3) % 50).chain(tail).collect::<Vec<u32>>()
        });
    let stops = (prop::collection::vec(0..50u32, 0..3), any::<bool>(), 0..6usize);
    let wanted = (prop::option::of(0..=5usize), prop::option::weighted(0.3, 0..=5usize));
    (prompt, 0..13usize, stops, wanted, 0..4u64, prop::sample::select(vec![1.0, 1.1f32])).prop_map(
        |(prompt, max_tokens, (stop_token_ids, ignore_eos, min), (logprobs, scores), seed, penalty)| {
            let max_tokens = if scores.is_none() { max_tokens.max(1) } else { max_tokens };
            Request {
                prompt,
                sampling: SamplingParams { seed, repetition_penalty: penalty, ..SamplingParams::default() },
                max_tokens,
                min_tokens: min.min(max_tokens),
                stop_token_ids,
                ignore_eos,
                logprobs,
                prompt_logprobs: scores,
            }
        },
    )
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => any_request().prop_map(Op::Submit),
        1 => (0..100usize, any::<bool>()).prop_map(|(n, hang_up)| Op::Cancel(n, hang_up)),
        3 => (1..5usize).prop_map(Op::Steps),
    ]
}

/// Every request fits alone; little more does at the lower end.
fn any_limits() -> impl Strategy<Value = StepLimits> {
    (1..9usize, 0..12usize, 1..20usize, 1..8usize).prop_map(|(page_size, spare, tokens, seqs)| StepLimits {
        page_size,
        num_pages: 40usize.div_ceil(page_size) + spare,
        max_batch_tokens: tokens,
        max_batch_seqs: seqs,
        ..limits()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_request_gets_its_own_tokens_and_no_page_is_lost(
        limits in any_limits(),
        prefix_caching in any::<bool>(),
        ahead in any::<bool>(),
        ops in prop::collection::vec(any_op(), 1..40),
    ) {
        let mut bench = Bench::new(limits, prefix_caching);
        bench.ahead = ahead;
        let mut clients: Vec<(Client, bool)> = Vec::new();
        for op in ops {
            match op {
                Op::Submit(request) => clients.push((bench.submit(request), false)),
                Op::Cancel(n, hang_up) if !clients.is_empty() => {
                    let index = n % clients.len();
                    let (client, stopped) = &mut clients[index];
                    *stopped = true;
                    if hang_up { client.hang_up() } else { client.cancel() }
                }
                Op::Cancel(..) => {}
                Op::Steps(count) => {
                    for _ in 0..count {
                        bench.step();
                        let stats = bench.stats();
                        prop_assert!(stats.pages_used + stats.pages_cached <= stats.pages_total);
                        prop_assert!(stats.running <= limits.max_batch_seqs);
                        let held = &bench.batching.scheduler.running;
                        prop_assert!(held.iter().map(|s| s.pages.len()).sum::<usize>() >= stats.pages_used);
                        prop_assert_eq!(held.is_empty(), stats.pages_used == 0);
                    }
                }
            }
        }
        bench.drain();
        let stats = bench.stats();
        prop_assert_eq!((stats.pages_used, stats.running, stats.waiting, stats.failed), (0, 0, 0, 0));
        prop_assert_eq!(stats.finished + stats.cancelled, clients.len() as u64);
        let mut prompt_tokens = 0;
        let mut generated = 0;
        let mut lost = false;
        for (client, stopped) in &mut clients {
            let expected = mock::expected(&client.request, &EOS, limits.vocab_size);
            let found = without_cached(client.read());
            if *stopped {
                lost = true;
                prop_assert!(expected.starts_with(&found), "{found:?} does not begin {expected:?}");
            } else {
                prop_assert_eq!(found, expected);
            }
            prompt_tokens += client.request.prompt.len() as u64;
            generated += client.tokens().len() as u64;
        }
        let counted = stats.prompt_tokens + stats.cached_tokens;
        if lost {
            prop_assert!(counted <= prompt_tokens);
            prop_assert!(stats.generated_tokens >= generated);
        } else {
            prop_assert_eq!(counted, prompt_tokens);
            prop_assert_eq!(stats.generated_tokens, generated);
        }
        if !prefix_caching {
            prop_assert_eq!((stats.cached_tokens, stats.pages_cached), (0, 0));
        }
    }

    #[test]
    fn the_thread_serves_what_the_queue_takes(
        limits in any_limits(),
        max_waiting in 1..6usize,
        requests in prop::collection::vec((any_request(), prop::bool::weighted(0.2)), 1..20),
    ) {
        let model = Box::new(MockModel::new(limits));
        let options = EngineOptions { max_waiting, eos_token_ids: EOS.to_vec(), ..EngineOptions::default() };
        let engine = Engine::start(model, options);
        let mut taken = Vec::new();
        let mut dropped = 0;
        for (request, drop_it) in requests {
            match engine.submit(request.clone()) {
                Ok(_) if drop_it => dropped += 1,
                Ok(stream) => taken.push((request, stream)),
                Err(error) => prop_assert!(error.to_string().contains("is full"), "{error}"),
            }
            prop_assert!(engine.stats().waiting <= max_waiting + limits.max_batch_seqs);
        }
        let count = taken.len() as u64;
        for (request, mut stream) in taken {
            let events: Vec<Event> = std::iter::from_fn(|| stream.next_blocking()).collect();
            prop_assert_eq!(without_cached(&events), mock::expected(&request, &EOS, limits.vocab_size));
        }
        engine.shutdown(std::time::Duration::from_secs(600));
        let stats = engine.stats();
        prop_assert_eq!((stats.pages_used, stats.running, stats.waiting), (0, 0, 0));
        prop_assert_eq!(stats.finished + stats.cancelled, count + dropped);
        prop_assert!(stats.cancelled <= dropped);
    }
}
