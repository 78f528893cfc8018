//! The default model is quick enough to talk to, even in the build that tests use.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::time::{Duration, Instant};

use dsa80_model::engine::{EngineHandle, Event, Request};
use dsa80_tests::engine::{options, start};

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
    let engine = start(&options()).unwrap();
    for (streams, tokens, least) in [(1, 128, 100.0), (8, 64, 200.0)] {
        let rates: Vec<f64> = (0..3).map(|_| decode_rate(&engine, streams, tokens)).collect();
        let best = rates.iter().copied().fold(0.0, f64::max);
        println!("{streams} streams: {rates:.0?} tokens/s");
        assert!(best >= least, "{streams} streams: {best:.0} tokens/s, expected at least {least}");
    }
    engine.shutdown(Duration::ZERO);
}
