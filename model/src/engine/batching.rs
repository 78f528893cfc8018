//! Continuous batching without the model and without the thread: requests in, steps out, results in, events
//! out.

use dsa80_reference::{Batch, SequenceSlice};
use tokio::sync::mpsc::UnboundedSender;

use super::request::Event;
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::stats::EngineStats;
use super::step::{Sampled, Step, StepError};

/// Stands for a token that is being sampled.
const UNKNOWN: u32 = 0;

/// The scheduler, the counters, and the events that are not sent yet.
#[derive(Debug)]
pub(super) struct Batching {
    pub(super) scheduler: Scheduler,
    vocab_size: usize,
    counters: EngineStats,
    /// Sequences that stopped counting against the waiting queue's bound since the last
    /// [`take_left_queue`](Self::take_left_queue).
    left_queue: usize,
    /// The step after the one that is being made, if all who run go on: all but the tokens that are not known yet.
    ahead: Option<Step>,
    outbox: Vec<(UnboundedSender<Event>, Event)>,
}

impl Batching {
    /// Nothing waits, nothing runs.
    pub(super) fn new(scheduler: Scheduler, vocab_size: usize) -> Self {
        let counters = EngineStats::default();
        Self { scheduler, vocab_size, counters, left_queue: 0, ahead: None, outbox: Vec::new() }
    }

    /// Puts a new sequence at the end of the queue.
    pub(super) fn enqueue(&mut self, sequence: Sequence) {
        self.scheduler.waiting.push_back(sequence);
    }

    /// Whether there is nothing to do.
    pub(super) fn is_idle(&self) -> bool {
        self.scheduler.waiting.is_empty() && self.scheduler.running.is_empty()
    }

    /// Drops sequences that nobody waits for and frees their pages.
    pub(super) fn drop_cancelled(&mut self) {
        for sequence in self.take_out(Sequence::is_cancelled) {
            self.counters.cancelled += 1;
            self.left_queue += usize::from(!sequence.admitted);
        }
    }

    /// Takes sequences out of the schedule. Whatever was described ahead counted on all of them.
    fn take_out(&mut self, gone: impl FnMut(&Sequence) -> bool) -> Vec<Sequence> {
        let taken = self.scheduler.take_out(gone);
        if !taken.is_empty() {
            self.ahead = None;
        }
        taken
    }

    /// Describes the next step while the one that [`next_step`](Self::next_step) gave is being made, as far as it is known: if all go on, each
    /// by the token that it is waiting for. Does nothing where that cannot be or pages are short.
    pub(super) fn describe_ahead(&mut self) {
        self.ahead = None;
        let scheduler = &mut self.scheduler;
        if scheduler.running.is_empty() || !scheduler.reserve_ahead() {
            return;
        }
        let running = scheduler.running.iter();
        let slices: Vec<_> = running
            .clone()
            .map(|sequence| SequenceSlice {
                token_ids: &[UNKNOWN],
                computed_len: sequence.len(),
                pages: &sequence.pages,
            })
            .collect();
        let targets = running.enumerate().map(|(row, sequence)| sequence.sampled_after(row, 1)).collect();
        // What cannot be described is reported when its turn has come.
        self.ahead =
            Batch::new(scheduler.blocks.page_size(), &slices).ok().map(|batch| Step { batch, targets });
    }

    /// The step that was described ahead, with the tokens that were missing, if what it counted on came true.
    fn take_ahead(&mut self) -> Option<Step> {
        let mut step = self.ahead.take().filter(|_| !self.scheduler.lets_in())?;
        self.scheduler.schedule_decodes();
        let places = step.batch.token_ids.iter_mut().zip(&mut step.targets);
        for ((place, target), sequence) in places.zip(&self.scheduler.running) {
            let (token, is_output) = sequence.last();
            *place = token as i32;
            target.output.extend(is_output.then_some(token));
        }
        self.counters.steps_ahead += 1;
        Some(step)
    }

    /// Decides on the next step and describes it. `None` when no sequence is there.
    ///
    /// # Errors
    /// A description that cannot be built, or no sequence that can go on: both are faults of the engine.
    pub(super) fn next_step(&mut self) -> Result<Option<Step>, StepError> {
        if self.is_idle() {
            return Ok(None);
        }
        if let Some(step) = self.take_ahead() {
            return Ok(Some(step));
        }
        self.scheduler.schedule();
        self.welcome_newcomers();
        let scheduler = &self.scheduler;
        let mut step = Step::default();
        let mut slices = Vec::with_capacity(scheduler.running.len());
        let mut row = 0;
        for (sequence, &chunk) in scheduler.running.iter().zip(&scheduler.chunks) {
            if chunk > 0 {
                slices.push(SequenceSlice {
                    token_ids: sequence.chunk(chunk),
                    computed_len: sequence.num_computed,
                    pages: &sequence.pages,
                });
                sequence.push_targets(chunk, row, &mut step.targets);
                row += chunk;
            }
        }
        if slices.is_empty() {
            return Err(StepError("the scheduler found nothing to do for the sequences it has".into()));
        }
        step.batch = Batch::new(scheduler.blocks.page_size(), &slices)
            .map_err(|error| StepError(format!("the step could not be described: {error}")))?;
        Ok(Some(step))
    }

    /// Counts and tells those who run for the first time.
    fn welcome_newcomers(&mut self) {
        for sequence in self.scheduler.running.iter_mut().filter(|sequence| !sequence.admitted) {
            let cached_tokens = sequence.num_computed;
            sequence.admitted = true;
            sequence.cached_tokens = cached_tokens;
            sequence.prompt_counted = cached_tokens;
            self.left_queue += 1;
            self.counters.cached_tokens += cached_tokens as u64;
            self.outbox.push((sequence.events.clone(), Event::Started { cached_tokens }));
        }
    }

    /// Takes in the results of the step that [`next_step`](Self::next_step) described, one per target.
    ///
    /// # Errors
    /// Results that cannot belong to that step.
    pub(super) fn complete(&mut self, targets: usize, sampled: Vec<Sampled>) -> Result<(), StepError> {
        if sampled.len() != targets {
            return Err(StepError(format!("the model gave {} results for {targets} targets", sampled.len())));
        }
        if let Some(bad) = sampled.iter().find(|sampled| sampled.token as usize >= self.vocab_size) {
            let vocab_size = self.vocab_size;
            return Err(StepError(format!(
                "the model chose token {}, expected ids below {vocab_size}",
                bad.token
            )));
        }
        self.counters.steps += 1;
        let mut sampled = sampled.into_iter();
        let mut events = Vec::new();
        for index in 0..self.scheduler.running.len() {
            let sequence = &mut self.scheduler.running[index];
            sequence.take_results(self.scheduler.chunks[index], &mut sampled, &mut events);
            let prompt_computed = sequence.num_computed.min(sequence.prompt_len());
            if prompt_computed > sequence.prompt_counted {
                self.counters.prompt_tokens += (prompt_computed - sequence.prompt_counted) as u64;
                sequence.prompt_counted = prompt_computed;
            }
            for event in events.drain(..) {
                self.counters.generated_tokens += u64::from(matches!(event, Event::Token { .. }));
                self.outbox.push((sequence.events.clone(), event));
            }
            self.scheduler.publish(index);
        }
        for sequence in self.take_out(|sequence| sequence.finished.is_some()) {
            self.counters.finished += 1;
            if let Some(reason) = sequence.finished {
                let usage = sequence.usage();
                self.outbox.push((sequence.events, Event::Finished { reason, usage }));
            }
        }
        Ok(())
    }

    /// Ends every sequence with `message`.
    pub(super) fn fail_all(&mut self, message: &str) {
        for sequence in self.take_out(|_| true) {
            self.counters.failed += 1;
            self.left_queue += usize::from(!sequence.admitted);
            self.outbox.push((sequence.events, Event::Failed(message.into())));
        }
    }

    /// Sends what has happened. Apart from the rest so that the counters can be published first: who sees the
    /// end of a request also sees it counted.
    pub(super) fn send_events(&mut self) {
        for (events, event) in self.outbox.drain(..) {
            // Nobody listens any more: the sequence is dropped before the next step.
            let _ = events.send(event);
        }
    }

    /// Sequences that stopped counting against the waiting queue's bound since the last call.
    pub(super) fn take_left_queue(&mut self) -> usize {
        std::mem::take(&mut self.left_queue)
    }

    /// The counters as they stand; `waiting` counts preempted sequences only, the others are still the
    /// intake's.
    pub(super) fn stats(&self) -> EngineStats {
        let scheduler = &self.scheduler;
        let blocks = &scheduler.blocks;
        EngineStats {
            running: scheduler.running.len(),
            // A preempted sequence goes before every sequence that has not run yet.
            waiting: scheduler.waiting.iter().take_while(|sequence| sequence.admitted).count(),
            pages_total: blocks.total(),
            pages_used: blocks.total() - blocks.available(),
            pages_cached: blocks.idle(),
            preemptions: scheduler.preemptions,
            ..self.counters
        }
    }
}
