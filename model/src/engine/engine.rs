//! The engine's thread, and the handle's side of it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::batching::Batching;
use super::block_manager::BlockManager;
use super::handle::{EngineBackend, EngineHandle};
use super::request::{Event, Request, SubmitError};
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::stats::EngineStats;
use super::step::{StepError, StepLimits, StepModel};
use super::validate;

/// How an engine is run; what the model was built for bounds all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    /// Requests that may wait for their first step; one more is refused with [`SubmitError::QueueFull`].
    /// Preempted requests wait beside them. At least 1.
    pub max_waiting: usize,
    /// Ids that end a generation. Ids outside the vocabulary are ignored.
    pub eos_token_ids: Vec<u32>,
    /// Token rows of a step: decodes first, the rest for chunks of prompts. At least 1.
    pub max_batch_tokens: usize,
    /// Requests that run at once; no more than `max_batch_tokens` do. At least 1.
    pub max_running: usize,
    /// Whether pages of known prefixes are found again.
    pub enable_prefix_caching: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_waiting: 256,
            eos_token_ids: Vec::new(),
            max_batch_tokens: 2048,
            max_running: 256,
            enable_prefix_caching: true,
        }
    }
}

/// Continuous batching over a [`StepModel`], on a thread of its own.
///
/// Dropping the last handle without [`shutdown`](EngineHandle::shutdown) lets the requests that are there
/// finish and then ends the thread.
#[derive(Debug)]
pub struct Engine {
    limits: StepLimits,
    max_waiting: usize,
    eos_token_ids: Vec<u32>,
    commands: Sender<Command>,
    shared: Arc<Mutex<Shared>>,
    /// Until it is joined.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the thread that steps `model`. Should the system refuse a thread, the engine is stopped from
    /// the start ([`EngineHandle::is_alive`]) and the log says why.
    pub fn start(model: Box<dyn StepModel>, options: EngineOptions) -> EngineHandle {
        let limits = model.limits();
        let EngineOptions {
            max_waiting,
            mut eos_token_ids,
            max_batch_tokens,
            max_running,
            enable_prefix_caching,
        } = options;
        eos_token_ids.retain(|&token| (token as usize) < limits.vocab_size);
        let scheduler = Scheduler::new(
            max_batch_tokens.min(limits.max_batch_tokens).max(1),
            max_running.min(limits.max_batch_seqs).max(1),
            enable_prefix_caching,
            BlockManager::new(limits.page_size, limits.num_pages),
        );
        let batching = Batching::new(scheduler, limits.vocab_size);
        let shared =
            Arc::new(Mutex::new(Shared { accepting: true, alive: true, queued: 0, stats: batching.stats() }));
        let (commands, inbox) = channel();
        let worker =
            Worker { model, batching, shared: Arc::clone(&shared), inbox, draining: false, deadline: None };
        let thread = std::thread::Builder::new().name("dsa80-engine".into()).spawn(|| worker.run());
        let thread = match thread {
            Ok(thread) => Some(thread),
            Err(error) => {
                tracing::error!("the engine's thread could not be started: {error}");
                lock(&shared).stop();
                None
            }
        };
        EngineHandle::new(Arc::new(Self {
            limits,
            max_waiting: max_waiting.max(1),
            eos_token_ids,
            commands,
            shared,
            thread: Mutex::new(thread),
        }))
    }
}

impl EngineBackend for Engine {
    fn submit(
        &self,
        request: Request,
        cancelled: Arc<AtomicBool>,
    ) -> Result<UnboundedReceiver<Event>, SubmitError> {
        validate::check(&request, &self.limits, &self.eos_token_ids)?;
        let (events, receiver) = unbounded_channel();
        let sequence = Box::new(Sequence::new(request, &self.eos_token_ids, cancelled, events));
        // Sent under the lock: a request that was accepted reaches the thread before the word that ends it.
        let mut shared = lock(&self.shared);
        if !shared.accepting {
            return Err(SubmitError::ShuttingDown);
        }
        if shared.queued >= self.max_waiting {
            return Err(SubmitError::QueueFull { waiting: shared.queued, limit: self.max_waiting });
        }
        self.commands.send(Command::Submit(sequence)).map_err(|_| SubmitError::ShuttingDown)?;
        shared.queued += 1;
        Ok(receiver)
    }

    fn stats(&self) -> EngineStats {
        let shared = lock(&self.shared);
        EngineStats { waiting: shared.queued + shared.stats.waiting, ..shared.stats }
    }

    /// Never more than the cache can hold.
    fn max_model_len(&self) -> usize {
        self.limits.max_model_len.min(self.limits.num_pages * self.limits.page_size)
    }

    /// A step that is being made is waited for, also beyond `grace`.
    fn shutdown(&self, grace: Duration) {
        {
            let mut shared = lock(&self.shared);
            shared.accepting = false;
            // A grace beyond what the clock can count is no deadline.
            let deadline = Instant::now().checked_add(grace);
            // The thread has ended already when nobody receives this.
            let _ = self.commands.send(Command::Shutdown { deadline });
        }
        // Held while joining, so that a second caller returns only when the thread has ended, too.
        let mut thread = lock(&self.thread);
        if let Some(thread) = thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread panicked");
        }
    }

    fn is_alive(&self) -> bool {
        lock(&self.shared).alive
    }
}

#[derive(Debug)]
enum Command {
    Submit(Box<Sequence>),
    Shutdown { deadline: Option<Instant> },
}

/// What the thread and the handles both look at.
#[derive(Debug)]
struct Shared {
    /// Whether requests are taken.
    accepting: bool,
    /// Whether the thread runs.
    alive: bool,
    /// Requests that have not had their first step.
    queued: usize,
    /// As of the thread's last word; `waiting` counts the preempted ones only.
    stats: EngineStats,
}

impl Shared {
    /// The thread has ended, or is about to.
    fn stop(&mut self) {
        self.accepting = false;
        self.alive = false;
    }
}

/// What the thread owns.
struct Worker {
    model: Box<dyn StepModel>,
    batching: Batching,
    shared: Arc<Mutex<Shared>>,
    inbox: Receiver<Command>,
    draining: bool,
    /// When draining ends at the latest, if it is bounded.
    deadline: Option<Instant>,
}

impl Worker {
    /// Serves until it is told to stop or cannot go on, then ends every request that is left.
    fn run(mut self) {
        // Neither the model nor the schedule is used again after a panic; the requests are only told of it.
        let failure = match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("the engine stopped: {error}")),
            Err(panic) => Some(format!("the engine stopped: a step panicked: {}", panic_message(&*panic))),
        };
        if let Some(failure) = &failure {
            tracing::error!("{failure}");
        }
        let message =
            failure.unwrap_or_else(|| "the engine was shut down before the request was finished".into());
        lock(&self.shared).stop();
        // Nothing more can be accepted, so this takes out all there is.
        while let Ok(command) = self.inbox.try_recv() {
            self.obey(command);
        }
        self.batching.drop_cancelled();
        self.batching.fail_all(&message);
        self.publish();
        self.batching.send_events();
    }

    /// Steps as long as there is something to do, and sleeps when there is not.
    fn serve(&mut self) -> Result<(), StepError> {
        loop {
            if self.batching.is_idle() && !self.draining {
                self.batching.send_events();
                match self.inbox.recv() {
                    Ok(command) => self.obey(command),
                    // Every handle is gone.
                    Err(_) => return Ok(()),
                }
            }
            while let Ok(command) = self.inbox.try_recv() {
                self.obey(command);
            }
            self.batching.drop_cancelled();
            let out_of_time = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if self.draining && (self.batching.is_idle() || out_of_time) {
                return Ok(());
            }
            let step = self.batching.next_step()?;
            self.publish();
            let Some(step) = step else { continue };
            // While the device makes this step, what the last one gave is sent (waking those who wait for it takes about as long as
            // everything else that is done for a token), and the next one is described.
            let (targets, batching) = (step.targets.len(), &mut self.batching);
            let mut meanwhile = || {
                batching.send_events();
                batching.describe_ahead();
            };
            let sampled = self.model.step_while(Arc::new(step), &mut meanwhile)?;
            self.batching.complete(targets, sampled)?;
            self.publish();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(sequence) => self.batching.enqueue(*sequence),
            Command::Shutdown { deadline } => {
                self.draining = true;
                self.deadline = [self.deadline, deadline].into_iter().flatten().min();
            }
        }
    }

    /// Lets the handles see the counters as they are now.
    fn publish(&mut self) {
        let left_queue = self.batching.take_left_queue();
        let stats = self.batching.stats();
        let mut shared = lock(&self.shared);
        shared.queued = shared.queued.saturating_sub(left_queue);
        shared.stats = stats;
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

/// Locks; a panic under one of these locks leaves nothing half-done, so poison means nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
