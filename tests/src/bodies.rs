//! What the model has to do on every backend: a body each, which the tests of all of them call.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and shows what it measured"
)]

use std::ops::Range;
use std::sync::Arc;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{SampleTarget, Step, StepLimits};
use dsa80_model::launch::LaunchOptions;
use dsa80_model::runner::{INDEX_LOGITS, Rank, RankParts, WeightSource};
use dsa80_reference::cpu::Cpu;
use dsa80_reference::{Batch, Kernels, SamplingParams, SequenceSlice};
use serde_json::{Value, json};

use crate::distance::{argmax, log_softmax};
use crate::fixture::{self, Fixture};
use crate::judge::{self, BF16_BOUND, BF16_BOUND_OF_ONE_PROMPT, Bf16Distance, limits};
use crate::layers::{Forced, Trace, relative_l2};
use crate::parity::oracle;
use crate::pool::{PAGE_SIZE, Pool};
use crate::prompt::{self, Run};
use crate::server::{ServerOptions, TestServer};

/// What the residual stream may be off the oracle with the same rounding points after the last layer. Five layers have been 9e-3 off: of
/// two values that differ by a share of an ulp as large a share of the roundings goes to different sides, so that after a few of them the
/// errors of both are independent.
const RELATIVE_L2: f64 = 1e-2;
/// How many times as far from what is exact as that oracle it may be: tensor cores round the probabilities as well, and a step has but a
/// few hundred numbers.
const FROM_EXACT: f64 = 1.25;

/// Two logits closer than this may change places in float32.
const GREEDY_MARGIN: f64 = 1e-3;

/// The first `count` of the fixture's further prompts together are as close to HF float64 as HF is in bf16.
pub fn prompts_together<K: Kernels>(kernels: K, fixture: &Fixture, count: usize) {
    let mut rank = judge::load(kernels, fixture, PAGE_SIZE).unwrap();
    let distance = Pool::open(fixture).unwrap().distance(&mut rank, fixture, count).unwrap();
    distance.assert_within(BF16_BOUND, &fixture.name, "prompts together");
}

/// So is the fixture's own prompt, on other pages for every piece size, so that nothing of the run before can help.
pub fn in_pieces<K: Kernels>(kernels: K, fixture: &Fixture, ways: &[(&str, usize)]) {
    let mut rank = judge::load(kernels, fixture, PAGE_SIZE).unwrap();
    let len = fixture.tokens.len();
    for &(way, size) in ways {
        let pages = prompt::scattered_pages(&limits(fixture, PAGE_SIZE), size % 3);
        let pieces = prompt::pieces(len, size);
        let run = prompt::run(&mut rank, &fixture.tokens, &pages, PAGE_SIZE, &pieces).unwrap();
        close(fixture, way, &run);
    }
}

/// The pieces that the fixture's prompt is cut into: what they are called, and their size.
pub fn ways(fixture: &Fixture) -> [(&'static str, usize); 4] {
    [("one piece", fixture.tokens.len()), ("chunks of 64", 64), ("chunks of 7", 7), ("token by token", 1)]
}

/// In f32 it is within what HF's own float32 is, ten times, whatever the pieces.
pub fn exact_in_pieces<K: Kernels>(kernels: K, fixture: &Fixture, ways: &[(&str, usize)]) {
    let mut rank = judge::load(kernels, fixture, PAGE_SIZE).unwrap();
    for &(way, size) in ways {
        let pages = prompt::scattered_pages(&limits(fixture, PAGE_SIZE), size % 3);
        let pieces = prompt::pieces(fixture.tokens.len(), size);
        let run = prompt::run(&mut rank, &fixture.tokens, &pages, PAGE_SIZE, &pieces).unwrap();
        judge::exact(fixture, way, &run).unwrap();
    }
}

/// And its greedy tokens are HF's where HF's margin is clear.
pub fn greedy_tokens<K: Kernels>(kernels: K, fixture: &Fixture) {
    let mut rank = judge::load(kernels, fixture, PAGE_SIZE).unwrap();
    let start = fixture.scale.greedy_prompt_len;
    let pages = prompt::scattered_pages(&limits(fixture, PAGE_SIZE), 0);
    let tokens = [&fixture.tokens[..start], &fixture.greedy].concat();
    let pieces = prompt::pieces(tokens.len(), start);
    let run = prompt::run(&mut rank, &tokens, &pages, PAGE_SIZE, &pieces).unwrap();
    let mut judged = 0;
    for (i, (&token, &margin)) in fixture.greedy.iter().zip(&fixture.greedy_margin).enumerate() {
        let row = start + i - 1;
        let logits = &run.logits[row * fixture.vocab_size..(row + 1) * fixture.vocab_size];
        if margin > GREEDY_MARGIN {
            judged += 1;
            assert_eq!(argmax(logits), token as usize, "{}: greedy token {i}", fixture.name);
        }
    }
    assert!(judged * 2 > fixture.greedy.len(), "{}: only {judged} clear margins", fixture.name);
}

/// And with half of it prefilled, then token by token.
pub fn prefill_then_decodes<K: Kernels>(kernels: K, fixture: &Fixture, page_size: usize) {
    let len = fixture.tokens.len();
    let mut rank = judge::load(kernels, fixture, page_size).unwrap();
    let mut pieces = prompt::pieces(len / 2, len);
    pieces.extend((len / 2..len).map(|position| position..position + 1));
    let pages = prompt::scattered_pages(&limits(fixture, page_size), 1);
    let run = prompt::run(&mut rank, &fixture.tokens, &pages, page_size, &pieces).unwrap();
    close(fixture, &format!("pages of {page_size}"), &run);
}

/// A run of the one prompt is within its bound.
pub fn close(fixture: &Fixture, way: &str, run: &Run) {
    Bf16Distance::of(fixture, way, run).assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, way);
}

/// Two runs are the same to the bit.
pub fn two_runs<K: Kernels>(kernels: K, fixture: &Fixture) {
    let mut rank = judge::load(kernels, fixture, PAGE_SIZE).unwrap();
    let pages = prompt::scattered_pages(&limits(fixture, PAGE_SIZE), 0);
    let pieces = prompt::pieces(fixture.tokens.len(), 50);
    let [first, second] =
        [0; 2].map(|_| prompt::run(&mut rank, &fixture.tokens, &pages, PAGE_SIZE, &pieces).unwrap());
    assert!(first == second, "{}: two runs differ", fixture.name);
}

/// Runs the first `tokens` of the prompt in three steps, and compares after every layer of each with the oracle, whose choices are forced.
pub fn layer_by_layer<K: Kernels>(kernels: K, fixture: &Fixture, tokens: usize) {
    let limits = limits(fixture, PAGE_SIZE);
    let pieces = prompt::pieces(tokens, tokens.div_ceil(3));
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    layers_of_steps(kernels, &fixture.name, &checkpoint, &limits, &fixture.tokens, &pieces);
}

/// [`layer_by_layer`], of any weights, in these pieces.
pub fn layers_of_steps<K: Kernels>(
    kernels: K,
    name: &str,
    weights: &dyn WeightSource,
    limits: &StepLimits,
    tokens: &[u32],
    pieces: &[Range<usize>],
) {
    let mut rounding = judge::load_weights(oracle(), weights, limits).unwrap();
    let mut exact = judge::load_weights(Cpu::<f64>::new(), weights, limits).unwrap();
    let mut rank = judge::load_weights(kernels, weights, limits).unwrap();
    let pages = prompt::scattered_pages(limits, 1);
    for piece in pieces {
        let token_ids = &tokens[piece.clone()];
        let slice = SequenceSlice { token_ids, computed_len: piece.start, pages: &pages };
        let batch = Batch::new(limits.page_size, &[slice]).unwrap();
        let mut expected = Trace::default();
        rounding.forward(&batch, Some(&mut expected)).unwrap();
        let (mut unrounded, mut found) = (Forced::new(&expected), Forced::new(&expected));
        exact.forward(&batch, Some(&mut unrounded)).unwrap();
        rank.forward(&batch, Some(&mut found)).unwrap();

        let by_layer = relative_l2(&found.hidden, &expected.hidden);
        let last = |distances: Vec<f64>| distances[distances.len() - 1];
        let from_exact = last(relative_l2(&found.hidden, &unrounded.hidden));
        let own = last(relative_l2(&expected.hidden, &unrounded.hidden));
        let words: Vec<String> = by_layer.iter().map(|distance| format!("{distance:.1e}")).collect();
        let place = format!("{name:>20} {piece:?}");
        println!(
            "{place}: by layer {}; from exact {from_exact:.1e}, the oracle's {own:.1e}",
            words.join(" ")
        );
        assert!(from_exact <= FROM_EXACT * own, "{place}");
        assert!(last(by_layer) <= RELATIVE_L2, "{place}");
    }
}

/// A step ends with the tokens, and the log-probabilities, that its own logits say.
pub fn a_step_samples_from_its_logits<K: Kernels>(kernels: K) {
    let fixture = Fixture::open(fixture::root().join("cases/int4_channel")).unwrap();
    let mut rank = judge::load(kernels, &fixture, 16).unwrap();
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

/// What `body` gives on every rank of a checkpoint, each on a thread of its own, in their order.
pub fn on_ranks<K: Kernels, R: Send>(
    weights: &dyn WeightSource,
    limits: &StepLimits,
    ranks: Vec<RankParts<K>>,
    body: impl Fn(&mut Rank<K>) -> R + Sync,
) -> Vec<R> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = ranks
            .into_iter()
            .map(|RankParts { kernels, communicator }| {
                let body = &body;
                scope.spawn(move || {
                    let mut rank = Rank::load(kernels, communicator, weights, limits, INDEX_LOGITS).unwrap();
                    body(&mut rank)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The server over the default checkpoint answers eight requests at once, with what was asked for.
///
/// On a runtime of several threads: it waits for the server to start and to end.
pub async fn the_server_answers(launch: LaunchOptions) {
    let start = || TestServer::start(ServerOptions { launch, ..ServerOptions::default() });
    let server = tokio::task::block_in_place(start).unwrap();
    let client = reqwest::Client::new();
    let ask = |seed: u64| {
        let body = json!({
            "messages": [{"role": "user", "content": "What is 17 x 24?"}],
            "max_tokens": 32, "seed": seed, "temperature": 0.8, "top_p": 0.9, "logprobs": true, "top_logprobs": 3,
        });
        client.post(server.url("/v1/chat/completions")).json(&body).send()
    };
    let answers = futures::future::join_all((0..8).map(ask)).await;
    for answer in answers {
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 200);
        let answer: Value = answer.json().await.unwrap();
        let tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
        assert!((1..=32).contains(&tokens), "{answer}");
        let logprobs = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
        assert!(!logprobs.is_empty(), "{answer}");
        for token in logprobs {
            let logprob = token["logprob"].as_f64().unwrap();
            assert!(logprob.is_finite() && logprob <= 0.0, "{token}");
            assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3, "{token}");
        }
    }
    tokio::task::block_in_place(|| drop(server));
}
