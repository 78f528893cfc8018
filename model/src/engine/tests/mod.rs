//! The engine against a model that checks every step it is given.

mod ahead;
mod lifecycle;
mod mock;
mod random;
mod requests;
mod scheduling;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::batching::Batching;
use super::block_manager::BlockManager;
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::validate;
use super::{EngineStats, Event, FinishReason, Request, StepLimits, StepModel, Usage};
use mock::MockModel;

/// A small model: 4 tokens a page, 16 pages, 8 rows a step.
fn limits() -> StepLimits {
    StepLimits {
        page_size: 4,
        num_pages: 16,
        cache_dtype: dsa80_reference::DType::Act,
        max_batch_tokens: 8,
        max_batch_seqs: 8,
        max_model_len: 64,
        vocab_size: 50,
        max_logprobs: 5,
    }
}

/// The end-of-sequence ids of these tests' model.
const EOS: [u32; 2] = [0, 1];

/// Batching and the mock model without a thread: the test decides when a step is made.
struct Bench {
    batching: Batching,
    model: MockModel,
    limits: StepLimits,
    /// Whether steps are described ahead.
    ahead: bool,
}

/// One submitted request.
struct Client {
    request: Request,
    cancelled: Arc<AtomicBool>,
    /// Dropped to hang up.
    receiver: Option<UnboundedReceiver<Event>>,
    events: Vec<Event>,
}

impl Bench {
    fn new(limits: StepLimits, prefix_caching: bool) -> Self {
        let blocks = BlockManager::new(limits.page_size, limits.num_pages);
        let scheduler =
            Scheduler::new(limits.max_batch_tokens, limits.max_batch_seqs, prefix_caching, blocks);
        let batching = Batching::new(scheduler, limits.vocab_size);
        Self { batching, model: MockModel::new(limits), limits, ahead: true }
    }

    fn submit(&mut self, request: Request) -> Client {
        validate::check(&request, &self.limits, &EOS).expect("these requests are valid");
        let cancelled = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = unbounded_channel();
        let flag = Arc::clone(&cancelled);
        self.batching.enqueue(Sequence::new(request.clone(), &EOS, flag, sender));
        Client { request, cancelled, receiver: Some(receiver), events: Vec::new() }
    }

    /// One turn of the engine's loop; false when there was nothing to do.
    fn step(&mut self) -> bool {
        self.batching.drop_cancelled();
        let Some(step) = self.batching.next_step().expect("there is always a sequence that can go on") else {
            return false;
        };
        let targets = step.targets.len();
        if self.ahead {
            self.batching.describe_ahead();
        }
        let sampled = self.model.step(Arc::new(step)).expect("the mock has no fault");
        self.batching.complete(targets, sampled).expect("the mock answers every target");
        self.batching.send_events();
        true
    }

    /// Steps until nothing is left; returns the number of steps.
    fn drain(&mut self) -> usize {
        // Far more than one step for every row of every request, some of them recomputed.
        (0..100_000).find(|_| !self.step()).expect("the engine must come to an end")
    }

    fn stats(&self) -> EngineStats {
        self.batching.stats()
    }

    /// Runs one request alone on a fresh engine of this kind.
    fn alone(limits: StepLimits, request: Request) -> Vec<Event> {
        let mut bench = Bench::new(limits, false);
        let mut client = bench.submit(request);
        bench.drain();
        client.read().to_vec()
    }
}

impl Client {
    fn read(&mut self) -> &[Event] {
        if let Some(receiver) = &mut self.receiver {
            self.events.extend(std::iter::from_fn(|| receiver.try_recv().ok()));
        }
        &self.events
    }

    fn cancel(&mut self) {
        self.cancelled.store(true, Ordering::Release);
    }

    fn hang_up(&mut self) {
        self.read();
        self.receiver = None;
    }

    fn tokens(&mut self) -> Vec<u32> {
        tokens(self.read())
    }

    fn usage(&mut self) -> Usage {
        match self.read().last() {
            Some(Event::Finished { usage, .. }) => *usage,
            other => panic!("expected the end, found {other:?}"),
        }
    }

    fn finish(&mut self) -> Option<FinishReason> {
        match self.read().last() {
            Some(Event::Finished { reason, .. }) => Some(*reason),
            _ => None,
        }
    }

    /// Requires the events that the model's definition gives for the request, whatever the engine did
    /// meanwhile.
    fn assert_expected(&mut self) {
        let expected = mock::expected(&self.request, &EOS, limits().vocab_size);
        assert_eq!(without_cached(self.read()), expected, "for {:?}", self.request);
    }
}

fn tokens(events: &[Event]) -> Vec<u32> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::Token { id, .. } => Some(*id),
            _ => None,
        })
        .collect()
}

/// The events with the one number that depends on other requests set to 0. It must be the same number
/// wherever it stands.
fn without_cached(events: &[Event]) -> Vec<Event> {
    let mut events = events.to_vec();
    let mut found = Vec::new();
    for event in &mut events {
        match event {
            Event::Started { cached_tokens } => found.push(std::mem::take(cached_tokens)),
            Event::Finished { usage, .. } => found.push(std::mem::take(&mut usage.cached_tokens)),
            _ => {}
        }
    }
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{found:?}");
    events
}

/// A request for `max_tokens` tokens that nothing but length ends.
fn request(prompt: impl IntoIterator<Item = u32>, max_tokens: usize) -> Request {
    Request { prompt: prompt.into_iter().collect(), max_tokens, ignore_eos: true, ..Request::default() }
}
