//! The model that is served by default is quick enough to talk to, even in the build that tests use.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{
    Engine, EngineHandle, EngineOptions, Event, Request, Sampled, Step, StepError, StepLimits, StepModel,
};
use dsa80_model::launch::launch;
use dsa80_tests::engine::options;
use dsa80_tests::fixture;

/// Tokens a second over `streams` requests at once, from the moment when all of them have their first token.
fn decode_rate(engine: &EngineHandle, streams: usize, tokens: usize) -> f64 {
    let mut streams: Vec<_> = (0..streams)
        .map(|i| {
            let prompt = (0..40).map(|token| ((token * 7 + i * 31) % 740) as u32).collect();
            let request = Request { prompt, max_tokens: tokens + 1, ignore_eos: true, ..Request::default() };
            engine.submit(request).unwrap()
        })
        .collect();
    for stream in &mut streams {
        while !matches!(stream.next_blocking().expect("a first token"), Event::Token { .. }) {}
    }
    // The engine's own count: tokens that already wait in a stream were made before the clock started.
    let (start, before) = (Instant::now(), engine.stats().generated_tokens);
    for stream in &mut streams {
        while stream.next_blocking().is_some() {}
    }
    (engine.stats().generated_tokens - before) as f64 / start.elapsed().as_secs_f64()
}

/// Three tries, because other work may share the machine.
#[test]
fn the_default_model_decodes_at_conversational_speed() {
    let checkpoint = Arc::new(Checkpoint::open(&fixture::root().join("trained")).unwrap());
    let engine = launch(&checkpoint, &options()).unwrap();
    for (streams, tokens, least) in [(1, 128, 100.0), (8, 64, 200.0)] {
        let rates: Vec<f64> = (0..3).map(|_| decode_rate(&engine, streams, tokens)).collect();
        let best = rates.iter().copied().fold(0.0, f64::max);
        println!("{streams} streams: {rates:.0?} tokens/s");
        assert!(best >= least, "{streams} streams: {best:.0} tokens/s, expected at least {least}");
    }
    engine.shutdown(Duration::ZERO);
}

/// A model that takes no time, and knows how long the engine leaves it idle between two decode steps of so many sequences.
struct Idle {
    limits: StepLimits,
    streams: usize,
    /// Held until all streams are there, or the first would be done before the last begins.
    all_there: Receiver<()>,
    ended: Option<Instant>,
    idle: Arc<Mutex<Vec<Duration>>>,
}

impl StepModel for Idle {
    fn step_while(
        &mut self,
        step: Arc<Step>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<Sampled>, StepError> {
        // The other end is gone once they are.
        let _ = self.all_there.recv();
        let decodes = step.batch.num_tokens() == self.streams && step.targets.len() == self.streams;
        if let Some(ended) = self.ended.filter(|_| decodes) {
            self.idle.lock().unwrap().push(ended.elapsed());
        }
        meanwhile();
        let sampled = vec![Sampled { token: 1, logprobs: None }; step.targets.len()];
        self.ended = decodes.then(Instant::now);
        Ok(sampled)
    }

    fn limits(&self) -> StepLimits {
        self.limits
    }
}

/// Microseconds between two steps of 32 streams with contexts of 8000 tokens at most: half of the 200 that a token may cost the host.
const BETWEEN_STEPS: u128 = 100;

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_is_soon_ready_for_the_next_step() {
    const STREAMS: usize = 32;
    let limits = StepLimits {
        page_size: 64,
        num_pages: 8192,
        cache_dtype: dsa80_reference::DType::Act,
        max_batch_tokens: 8192,
        max_batch_seqs: STREAMS,
        max_model_len: 16_384,
        vocab_size: 154_880,
        max_logprobs: 0,
    };
    let idle = Arc::new(Mutex::new(Vec::new()));
    let (held, all_there) = channel::<()>();
    let model = Idle { limits, streams: STREAMS, all_there, ended: None, idle: Arc::clone(&idle) };
    let engine = Engine::start(Box::new(model), EngineOptions::default());
    let stream = |i: usize| {
        let prompt = (0..8000).map(|token| ((token * 7 + i * 31) % 154_880) as u32).collect();
        let request = Request { prompt, max_tokens: 400, ignore_eos: true, ..Request::default() };
        let mut stream = engine.submit(request).unwrap();
        tokio::spawn(async move { while stream.next().await.is_some() {} })
    };
    let streams: Vec<_> = (0..STREAMS).map(stream).collect();
    drop(held);
    for stream in streams {
        stream.await.unwrap();
    }
    tokio::task::block_in_place(|| engine.shutdown(Duration::ZERO));
    let mut idle = std::mem::take(&mut *idle.lock().unwrap());
    idle.sort();
    // Most of the time, not always: other work may share the machine.
    let [few, half, most] = [10, 50, 90].map(|percent| idle[idle.len() * percent / 100].as_micros());
    println!(
        "{} steps of {STREAMS} streams: {few}, {half}, {most} us between them (p10, p50, p90)",
        idle.len()
    );
    assert!(few < BETWEEN_STEPS, "{few} us between two steps");
}
