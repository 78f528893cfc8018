//! An engine that recites.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dsa80_model::engine::{
    EngineBackend, EngineHandle, EngineStats, Event, FinishReason, Request, SubmitError, TokenLogprobs, Usage,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::EOS;

/// What a [`MockEngine`] does.
#[derive(Debug, Clone)]
pub struct MockOptions {
    /// The tokens to recite, one list for each seed (`seed % scripts.len()`); after the last comes [`EOS`],
    /// or, when the request ignores it, the script again.
    pub scripts: Vec<Vec<u32>>,
    /// Before each token.
    pub token_delay: Duration,
    /// Before `Event::Started`: a queue or a long prompt.
    pub start_delay: Duration,
    /// The longest context.
    pub max_model_len: usize,
    /// Requests taken at a time.
    pub max_waiting: usize,
    /// What the prefix cache is said to have held.
    pub cached_tokens: usize,
    /// Fail after this many tokens.
    pub fail_after: Option<usize>,
}

impl Default for MockOptions {
    fn default() -> Self {
        Self {
            scripts: vec![b"Hello world".iter().map(|&byte| u32::from(byte)).collect()],
            token_delay: Duration::ZERO,
            start_delay: Duration::ZERO,
            max_model_len: 1000,
            max_waiting: 64,
            cached_tokens: 0,
            fail_after: None,
        }
    }
}

/// An [`EngineBackend`] that recites a script, a thread for each request.
#[derive(Debug)]
pub struct MockEngine {
    options: MockOptions,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stats: Mutex<EngineStats>,
    idle: Condvar,
    draining: AtomicBool,
    aborted: AtomicBool,
    requests: Mutex<Vec<Request>>,
}

impl MockEngine {
    /// A mock that recites as `options` say.
    pub fn new(options: MockOptions) -> Arc<Self> {
        Arc::new(Self { options, shared: Arc::default() })
    }

    /// A handle to it.
    pub fn handle(self: &Arc<Self>) -> EngineHandle {
        EngineHandle::new(Arc::clone(self) as Arc<dyn EngineBackend>)
    }

    /// All requests taken so far.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }
}

impl EngineBackend for MockEngine {
    fn submit(
        &self,
        request: Request,
        cancelled: Arc<AtomicBool>,
    ) -> Result<UnboundedReceiver<Event>, SubmitError> {
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(SubmitError::ShuttingDown);
        }
        if request.prompt.len() + request.max_tokens > self.options.max_model_len {
            return Err(SubmitError::TooLong {
                prompt_tokens: request.prompt.len(),
                max_tokens: request.max_tokens,
                max_model_len: self.options.max_model_len,
            });
        }
        {
            let mut stats = lock(&self.shared.stats);
            if stats.running >= self.options.max_waiting {
                return Err(SubmitError::QueueFull {
                    waiting: stats.running,
                    limit: self.options.max_waiting,
                });
            }
            stats.running += 1;
        }
        lock(&self.shared.requests).push(request.clone());
        let (sender, receiver) = unbounded_channel();
        let (options, shared) = (self.options.clone(), Arc::clone(&self.shared));
        std::thread::spawn(move || {
            let outcome = recite(&request, &options, &shared, &cancelled, &sender);
            let mut stats = lock(&shared.stats);
            stats.running -= 1;
            match outcome {
                Outcome::Finished => stats.finished += 1,
                Outcome::Cancelled => stats.cancelled += 1,
                Outcome::Failed => stats.failed += 1,
            }
            shared.idle.notify_all();
        });
        Ok(receiver)
    }

    fn stats(&self) -> EngineStats {
        *lock(&self.shared.stats)
    }

    fn max_model_len(&self) -> usize {
        self.options.max_model_len
    }

    fn shutdown(&self, grace: Duration) {
        self.shared.draining.store(true, Ordering::Release);
        let deadline = Instant::now() + grace;
        let mut stats = lock(&self.shared.stats);
        while stats.running > 0 {
            let now = Instant::now();
            if now >= deadline {
                break;
            }
            stats = self
                .shared
                .idle
                .wait_timeout(stats, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        self.shared.aborted.store(true, Ordering::Release);
    }

    fn is_alive(&self) -> bool {
        !self.shared.aborted.load(Ordering::Acquire)
    }
}

enum Outcome {
    Finished,
    Cancelled,
    Failed,
}

/// The log-probability that the mock gives to `token`, as generated or as part of a prompt.
pub fn logprob_of(token: u32) -> f32 {
    -0.125 - 0.25 * (token % 7) as f32
}

fn logprobs(token: u32, top: usize) -> TokenLogprobs {
    let logprob = logprob_of(token);
    let top = (0..top as u32).map(|i| ((token + i) % EOS, logprob - i as f32)).collect();
    TokenLogprobs { logprob, top, draft: None }
}

fn recite(
    request: &Request,
    options: &MockOptions,
    shared: &Shared,
    cancelled: &AtomicBool,
    sender: &UnboundedSender<Event>,
) -> Outcome {
    let send = |event| sender.send(event).is_ok();
    let wait = |time: Duration| {
        let end = Instant::now() + time;
        while !cancelled.load(Ordering::Acquire) && !shared.aborted.load(Ordering::Acquire) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(Duration::from_millis(2)));
        }
        false
    };
    let gone = || {
        if shared.aborted.load(Ordering::Acquire) && !cancelled.load(Ordering::Acquire) {
            send(Event::Failed("the engine was shut down".into()));
            return Outcome::Failed;
        }
        Outcome::Cancelled
    };
    if !wait(options.start_delay) || !send(Event::Started { cached_tokens: options.cached_tokens }) {
        return gone();
    }
    if let Some(top) = request.prompt_logprobs {
        let scored = request.prompt.iter().enumerate();
        let scored = scored.map(|(i, &token)| (i > 0).then(|| logprobs(token, top))).collect();
        send(Event::Prompt(scored));
    }
    let script = &options.scripts[request.sampling.seed as usize % options.scripts.len()];
    let mut made = 0;
    let mut reason = FinishReason::Length;
    while made < request.max_tokens {
        if options.fail_after == Some(made) {
            send(Event::Failed("the mock was told to fail".into()));
            return Outcome::Failed;
        }
        if !wait(options.token_delay) {
            return gone();
        }
        let ended = made >= script.len() && !request.ignore_eos && made >= request.min_tokens;
        let id = if ended { EOS } else { script[made % script.len()] };
        made += 1;
        lock(&shared.stats).generated_tokens += 1;
        if !send(Event::Token { id, logprobs: request.logprobs.map(|top| logprobs(id, top)) }) {
            return Outcome::Cancelled;
        }
        if ended || (request.stop_token_ids.contains(&id) && made > request.min_tokens) {
            reason = FinishReason::Stop;
            break;
        }
    }
    let usage = Usage {
        prompt_tokens: request.prompt.len(),
        completion_tokens: made,
        cached_tokens: options.cached_tokens,
    };
    send(Event::Finished { reason, usage });
    Outcome::Finished
}

/// A panic elsewhere must not hide a test's own message behind a poisoned lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
