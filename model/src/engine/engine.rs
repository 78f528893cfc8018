//! The engine's thread, and the handle's side of it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dsa80_reference::Breaker;
use tokio::sync::mpsc::{UnboundedReceiver, WeakUnboundedSender, unbounded_channel};

use super::batching::Batching;
use super::block_manager::BlockManager;
use super::handle::{EngineBackend, EngineHandle};
use super::request::{Event, Request, SubmitError};
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::stats::EngineStats;
use super::step::{StepError, StepLimits, StepModel};
use super::validate;
use super::watchdog::{self, StepClock};

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
    /// A step that takes longer stops the engine.
    pub step_timeout: Duration,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_waiting: 256,
            eos_token_ids: Vec::new(),
            max_batch_tokens: 2048,
            max_running: 256,
            enable_prefix_caching: true,
            step_timeout: Duration::from_secs(120),
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
    commands: Arc<Sender<Command>>,
    shared: Arc<Shared>,
    /// Until it is joined.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the thread that steps `model`. Should the system refuse a thread, the engine is stopped from
    /// the start ([`EngineHandle::is_alive`]) and the log says why.
    pub fn start(mut model: Box<dyn StepModel>, options: EngineOptions) -> EngineHandle {
        let limits = model.limits();
        let EngineOptions {
            max_waiting,
            mut eos_token_ids,
            max_batch_tokens,
            max_running,
            enable_prefix_caching,
            step_timeout,
        } = options;
        eos_token_ids.retain(|&token| (token as usize) < limits.vocab_size);
        let scheduler = Scheduler::new(
            max_batch_tokens.min(limits.max_batch_tokens).max(1),
            max_running.min(limits.max_batch_seqs).max(1),
            enable_prefix_caching,
            BlockManager::new(limits.page_size, limits.num_pages),
        );
        let batching = Batching::new(scheduler, limits.vocab_size);
        let shared = Arc::new(Shared::new(batching.stats()));
        let (commands, inbox) = channel();
        let commands = Arc::new(commands);
        model.on_loss(tell_of_loss(&commands));
        let clock = Arc::new(StepClock::default());
        let failed = {
            let shared = Arc::clone(&shared);
            move |reason: String| shared.abandon(&format!("the engine stopped: {reason}"))
        };
        let watched = watchdog::start(Arc::clone(&clock), step_timeout, model.breaker(), failed);
        let mut worker = Worker {
            model,
            batching,
            shared: Arc::clone(&shared),
            inbox,
            clock,
            draining: false,
            deadline: None,
            lost: None,
        };
        // Handed over once the thread is there: where there is none, the ranks must hear of it.
        let (hand, handed) = channel::<Worker>();
        let run = move || {
            if let Ok(worker) = handed.recv() {
                worker.run();
            }
        };
        let builder = std::thread::Builder::new().name("dsa80-engine".into());
        let thread = match watched.and_then(|()| builder.spawn(run)) {
            Ok(thread) => {
                // It does not end before it has been given this.
                let _ = hand.send(worker);
                Some(thread)
            }
            Err(error) => {
                let failure = format!("the engine's threads could not be started: {error}");
                tracing::error!("{failure}");
                worker.model.give_up(&failure);
                worker.clock.end();
                shared.stop(Some(failure));
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
        let listener = events.downgrade();
        let sequence = Box::new(Sequence::new(request, &self.eos_token_ids, cancelled, events));
        // Sent under the lock: a request that was accepted reaches the thread before the word that ends it.
        let mut shared = self.shared.lock();
        if !shared.accepting {
            return Err(SubmitError::ShuttingDown);
        }
        if shared.queued >= self.max_waiting {
            return Err(SubmitError::QueueFull { waiting: shared.queued, limit: self.max_waiting });
        }
        self.commands.send(Command::Submit(sequence)).map_err(|_| SubmitError::ShuttingDown)?;
        shared.queued += 1;
        shared.listeners.retain(|listener| listener.strong_count() > 0);
        shared.listeners.push(listener);
        Ok(receiver)
    }

    fn stats(&self) -> EngineStats {
        let shared = self.shared.lock();
        EngineStats { waiting: shared.queued + shared.stats.waiting, ..shared.stats }
    }

    /// Never more than the cache can hold.
    fn max_model_len(&self) -> usize {
        self.limits.max_model_len.min(self.limits.num_pages * self.limits.page_size)
    }

    /// A step that is being made is waited for, also beyond `grace`, but not beyond a step's own deadline.
    fn shutdown(&self, grace: Duration) {
        {
            let mut shared = self.shared.lock();
            shared.accepting = false;
            // A grace beyond what the clock can count is no deadline.
            let deadline = Instant::now().checked_add(grace);
            // The thread has ended already when nobody receives this.
            let _ = self.commands.send(Command::Shutdown { deadline });
        }
        // Held while joining, so that a second caller returns only when the thread has ended, too.
        let mut thread = lock(&self.thread);
        let abandoned = self.shared.wait_stopped();
        if let Some(thread) = thread.take()
            && !abandoned
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread panicked");
        }
    }

    fn is_alive(&self) -> bool {
        self.shared.lock().alive
    }

    fn failure(&self) -> Option<String> {
        self.shared.lock().failure.clone()
    }
}

/// Tells the engine's thread, which may be asleep, that its model is lost. Does not keep it alive.
fn tell_of_loss(commands: &Arc<Sender<Command>>) -> Breaker {
    let commands = Arc::downgrade(commands);
    Arc::new(move |reason| {
        if let Some(commands) = commands.upgrade() {
            let _ = commands.send(Command::Lost(reason.to_owned()));
        }
    })
}

#[derive(Debug)]
enum Command {
    Submit(Box<Sequence>),
    Shutdown {
        deadline: Option<Instant>,
    },
    /// The model cannot be stepped any more.
    Lost(String),
}

/// What the thread and the handles both look at.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    stopped: Condvar,
}

#[derive(Debug)]
struct State {
    /// Whether requests are taken.
    accepting: bool,
    /// Whether the thread runs.
    alive: bool,
    /// Requests that have not had their first step.
    queued: usize,
    /// As of the thread's last word; `waiting` counts the preempted ones only.
    stats: EngineStats,
    /// Why the thread has stopped, if nobody asked it to.
    failure: Option<String>,
    /// The thread is stuck in a step: those who wait were told in its place, and it is not waited for.
    abandoned: bool,
    /// Those who wait for events, and some who do not any more.
    listeners: Vec<WeakUnboundedSender<Event>>,
}

impl Shared {
    fn new(stats: EngineStats) -> Self {
        let state = State {
            accepting: true,
            alive: true,
            queued: 0,
            stats,
            failure: None,
            abandoned: false,
            listeners: Vec::new(),
        };
        Self { state: Mutex::new(state), stopped: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The thread has ended, or is about to; false where it was given up before.
    fn stop(&self, failure: Option<String>) -> bool {
        let mut state = self.lock();
        state.accepting = false;
        state.alive = false;
        self.stopped.notify_all();
        if !state.abandoned {
            state.failure = failure;
        }
        !state.abandoned
    }

    /// Ends all requests in place of the thread, which is stuck.
    fn abandon(&self, reason: &str) {
        tracing::error!("{reason}");
        let mut state = self.lock();
        if !state.alive {
            return;
        }
        state.accepting = false;
        state.alive = false;
        state.abandoned = true;
        state.failure = Some(reason.to_owned());
        for listener in state.listeners.drain(..).filter_map(|listener| listener.upgrade()) {
            // Who has gone needs no reason.
            let _ = listener.send(Event::Failed(reason.to_owned()));
        }
        self.stopped.notify_all();
    }

    /// Waits until the thread has ended or is about to, or was given up; whether it was.
    fn wait_stopped(&self) -> bool {
        let alive = |state: &mut State| state.alive;
        let state = self.stopped.wait_while(self.lock(), alive).unwrap_or_else(PoisonError::into_inner);
        state.abandoned
    }
}

/// What the thread owns.
struct Worker {
    model: Box<dyn StepModel>,
    batching: Batching,
    shared: Arc<Shared>,
    inbox: Receiver<Command>,
    clock: Arc<StepClock>,
    draining: bool,
    /// When draining ends at the latest, if it is bounded.
    deadline: Option<Instant>,
    /// Why the model cannot be stepped any more.
    lost: Option<String>,
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
            self.model.give_up(failure);
        }
        let message = failure
            .clone()
            .unwrap_or_else(|| "the engine was shut down before the request was finished".into());
        self.clock.end();
        let is_first = self.shared.stop(failure);
        // Nothing more can be accepted, so this takes out all there is.
        while let Ok(command) = self.inbox.try_recv() {
            self.obey(command);
        }
        self.batching.drop_cancelled();
        self.batching.fail_all(&message);
        self.publish();
        if is_first {
            self.batching.send_events();
        }
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
            if let Some(reason) = self.lost.take() {
                return Err(StepError(reason));
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
            self.clock.start();
            let sampled = self.model.step_while(Arc::new(step), &mut || {
                batching.send_events();
                batching.describe_ahead();
            })?;
            self.clock.stop();
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
            Command::Lost(reason) => {
                self.lost.get_or_insert(reason);
            }
        }
    }

    /// Lets the handles see the counters as they are now.
    fn publish(&mut self) {
        let left_queue = self.batching.take_left_queue();
        let stats = self.batching.stats();
        let mut shared = self.shared.lock();
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
