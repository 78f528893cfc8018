//! Engines over fixtures, and what their streams come to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{
    EngineHandle, EngineStats, Event, EventStream, FinishReason, TokenLogprobs, Usage,
};
use dsa80_model::launch::{Device, LaunchOptions, launch};

use crate::fixture;

/// The device that engines are tested on: `DSA80_TEST_DEVICE`, or the CPU. Never the best one there is: what a test shows must not
/// depend on the machine.
pub fn device() -> Device {
    match std::env::var("DSA80_TEST_DEVICE") {
        Ok(name) => name.parse().unwrap_or_else(|error| panic!("DSA80_TEST_DEVICE: {error}")),
        Err(_) => Device::Cpu,
    }
}

/// Default options, on [`device`].
pub fn options() -> LaunchOptions {
    LaunchOptions { device: device(), ..LaunchOptions::default() }
}

/// The checkpoint in `fixtures/default`, which answers gibberish.
///
/// # Errors
/// A damaged or missing file, by name.
pub fn default_checkpoint() -> Result<Arc<Checkpoint>> {
    Ok(Arc::new(Checkpoint::open(&fixture::root().join("default"))?))
}

/// Starts an engine over the checkpoint in `fixtures/default`.
///
/// # Errors
/// Whatever the launch reports.
pub fn start(options: &LaunchOptions) -> Result<EngineHandle> {
    Ok(launch(&default_checkpoint()?, options)?)
}

/// All that a request gave.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// The scored prompt, if it was asked for.
    pub prompt: Vec<Option<TokenLogprobs>>,
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Their log-probabilities, if they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// How it ended, and the counts; `None` when it failed.
    pub end: Option<(FinishReason, Usage)>,
    /// Why it failed.
    pub failure: Option<String>,
}

impl Answer {
    /// The same answer without what may differ from run to run: how many tokens the prefix cache had.
    #[must_use]
    pub fn without_cached_tokens(mut self) -> Self {
        if let Some((_, usage)) = &mut self.end {
            usage.cached_tokens = 0;
        }
        self
    }
}

/// Reads a stream to its end.
///
/// # Errors
/// Events out of order, or a stream that ends without a last word.
pub fn collect(mut stream: EventStream) -> Result<Answer> {
    let mut answer = Answer::default();
    let mut started = false;
    while let Some(event) = stream.next_blocking() {
        ensure!(answer.end.is_none() && answer.failure.is_none(), "{event:?} after the end");
        match event {
            Event::Started { .. } => {
                ensure!(!started, "started twice");
                started = true;
            }
            Event::Prompt(scored) => {
                ensure!(started && answer.prompt.is_empty() && answer.tokens.is_empty(), "a late prompt");
                answer.prompt = scored;
            }
            Event::Token { id, logprobs } => {
                ensure!(started, "a token before the start");
                answer.tokens.push(id);
                answer.logprobs.extend(logprobs);
            }
            Event::Finished { reason, usage } => answer.end = Some((reason, usage)),
            Event::Failed(message) => answer.failure = Some(message),
        }
    }
    ensure!(answer.end.is_some() || answer.failure.is_some(), "the stream ended without a word");
    Ok(answer)
}

/// Waits until `holds` of the engine's counters, for at most five seconds.
///
/// # Errors
/// The counters as they are when the time is up.
pub fn eventually(engine: &EngineHandle, holds: impl Fn(&EngineStats) -> bool) -> Result<EngineStats> {
    let start = Instant::now();
    loop {
        let stats = engine.stats();
        if holds(&stats) {
            return Ok(stats);
        }
        ensure!(start.elapsed() < Duration::from_secs(5), "still {stats:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
