//! Who computes how much in the next step.
//!
//! Sequences run in the order in which they came: every running sequence came before every waiting one, and
//! when pages run out it is the youngest running one that goes back to the head of the queue and is
//! recomputed later. So the oldest always makes progress, and nobody starves.

use std::collections::VecDeque;

use super::block_manager::{BlockManager, PrefixHit};
use super::sequence::Sequence;

/// The queue, the running sequences and the pages that they hold.
#[derive(Debug)]
pub(super) struct Scheduler {
    /// Token rows of a step.
    max_batch_tokens: usize,
    /// Sequences that run at once.
    max_running: usize,
    prefix_caching: bool,
    pub(super) blocks: BlockManager,
    pub(super) waiting: VecDeque<Sequence>,
    pub(super) running: Vec<Sequence>,
    /// New tokens of each running sequence in the step that is being made; 0 sits it out.
    pub(super) chunks: Vec<usize>,
    /// Sequences put back into the queue so far.
    pub(super) preemptions: u64,
}

impl Scheduler {
    /// An empty scheduler. Nobody is started without a row to spare, so `max_batch_tokens` also bounds who
    /// runs.
    pub(super) fn new(
        max_batch_tokens: usize,
        max_running: usize,
        prefix_caching: bool,
        blocks: BlockManager,
    ) -> Self {
        Self {
            max_batch_tokens,
            max_running,
            prefix_caching,
            blocks,
            waiting: VecDeque::new(),
            running: Vec::new(),
            chunks: Vec::new(),
            preemptions: 0,
        }
    }

    /// Decides on a step: fills [`chunks`](Self::chunks). Decodes come first, then the prompts of running
    /// sequences, oldest first, then new sequences from the queue, as far as tokens and pages go.
    pub(super) fn schedule(&mut self) {
        self.chunks.clear();
        self.chunks.resize(self.running.len(), 0);
        let mut budget = self.max_batch_tokens;
        for decodes in [true, false] {
            let mut index = 0;
            // Shrinks at its end while sequences are preempted.
            while index < self.running.len() && budget > 0 {
                let remaining = self.running[index].remaining();
                if (remaining == 1) == decodes {
                    let wanted = remaining.min(budget);
                    let chunk = self.reserve(index, wanted);
                    self.chunks[index] = chunk;
                    budget -= chunk;
                }
                index += 1;
            }
        }
        self.admit(budget);
    }

    /// Whether everybody who runs can have a page for the token that comes after the step that is being made, if that step leaves everybody
    /// decoding. Takes the pages: whoever goes on needs them, and whoever does not gives them back with the others.
    pub(super) fn reserve_ahead(&mut self) -> bool {
        let all_decode =
            self.running.iter().zip(&self.chunks).all(|(sequence, &chunk)| sequence.decodes_after(chunk));
        all_decode && (0..self.running.len()).all(|index| self.cover(index, self.running[index].len() + 1))
    }

    /// Whether [`schedule`](Self::schedule) would let somebody in beside those who run, each of whom takes a row of the step.
    pub(super) fn lets_in(&mut self) -> bool {
        let most = self.max_running.min(self.max_batch_tokens);
        self.running.len() < most && self.room_for_the_next(self.owed()).is_some()
    }

    /// A step of one token for everybody.
    pub(super) fn schedule_decodes(&mut self) {
        self.chunks.clear();
        self.chunks.resize(self.running.len(), 1);
    }

    /// Takes out the sequences for which `gone` holds, wherever they are, and frees their pages.
    pub(super) fn take_out(&mut self, mut gone: impl FnMut(&Sequence) -> bool) -> Vec<Sequence> {
        let mut taken = Vec::new();
        for index in (0..self.waiting.len()).rev() {
            if gone(&self.waiting[index]) {
                taken.extend(self.waiting.remove(index));
            }
        }
        for index in (0..self.running.len()).rev() {
            if gone(&self.running[index]) {
                let mut sequence = self.running.remove(index);
                self.blocks.release(std::mem::take(&mut sequence.pages));
                taken.push(sequence);
            }
        }
        taken
    }

    /// Lets the prefix cache know of the pages of a running sequence whose rows are all computed by now.
    pub(super) fn publish(&mut self, index: usize) {
        if !self.prefix_caching {
            return;
        }
        let page_size = self.blocks.page_size();
        let sequence = &mut self.running[index];
        for page in sequence.published..sequence.num_computed / page_size {
            let hash = sequence.page_hash(page_size, page);
            self.blocks.publish(sequence.pages[page], hash);
            sequence.published = page + 1;
        }
    }

    /// Gets pages for up to `wanted` (at least one) more tokens of a running sequence and says for how many
    /// there are pages. Preempts younger sequences only when there would be none; 0 when there is no younger
    /// one, and it waits for the older ones to finish.
    fn reserve(&mut self, index: usize, wanted: usize) -> usize {
        loop {
            let covered = self.grow(index, wanted);
            if covered > 0 {
                return covered;
            }
            if index + 1 == self.running.len() {
                return 0;
            }
            self.preempt_youngest();
        }
    }

    /// Extends the block table towards `wanted` more tokens; returns how many of them it covers.
    fn grow(&mut self, index: usize, wanted: usize) -> usize {
        let page_size = self.blocks.page_size();
        self.cover(index, self.running[index].num_computed + wanted);
        let sequence = &self.running[index];
        wanted.min(sequence.pages.len() * page_size - sequence.num_computed)
    }

    /// Extends the block table towards `tokens` tokens in all; whether it covers them.
    fn cover(&mut self, index: usize, tokens: usize) -> bool {
        let pages = tokens.div_ceil(self.blocks.page_size());
        let sequence = &mut self.running[index];
        while sequence.pages.len() < pages {
            match self.blocks.allocate() {
                Some(page) => sequence.pages.push(page),
                None => return false,
            }
        }
        true
    }

    /// Sends the youngest running sequence back to the head of the queue.
    fn preempt_youngest(&mut self) {
        self.chunks.pop();
        if let Some(mut sequence) = self.running.pop() {
            self.blocks.release(std::mem::take(&mut sequence.pages));
            sequence.num_computed = 0;
            self.preemptions += 1;
            self.waiting.push_front(sequence);
        }
    }

    /// Starts waiting sequences, strictly in order, while there are tokens in the budget and pages for all
    /// that is known of them. What the running ones still need, and one page more for each to grow, is not
    /// there for newcomers: starting one that must be preempted soon after would be work for nothing.
    fn admit(&mut self, mut budget: usize) {
        let page_size = self.blocks.page_size();
        let mut owed = self.owed();
        while budget > 0 && self.running.len() < self.max_running {
            let Some(hit) = self.room_for_the_next(owed) else { return };
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            let hashes = if self.prefix_caching { sequence.reusable_hashes(page_size) } else { &[] };
            let shared = hashes[..hit.pages].iter().map_while(|hash| self.blocks.acquire(hash)).collect();
            sequence.pages = shared;
            sequence.published = sequence.pages.len();
            sequence.num_computed = sequence.pages.len() * page_size;
            let wanted = sequence.remaining().min(budget);
            self.running.push(sequence);
            let index = self.running.len() - 1;
            let chunk = self.grow(index, wanted);
            self.chunks.push(chunk);
            budget -= chunk;
            owed += self.owed_to(&self.running[index]);
        }
    }

    /// Pages that those who run still need, and one more for each to grow.
    fn owed(&self) -> usize {
        self.running.iter().map(|sequence| self.owed_to(sequence)).sum()
    }

    fn owed_to(&self, sequence: &Sequence) -> usize {
        (sequence.len().div_ceil(self.blocks.page_size()) + 1).saturating_sub(sequence.pages.len())
    }

    /// What the prefix cache has for the first who waits, if there are pages for all that is known of it beside those that are `owed`.
    fn room_for_the_next(&mut self, owed: usize) -> Option<PrefixHit> {
        let page_size = self.blocks.page_size();
        let sequence = self.waiting.front_mut()?;
        let pages = sequence.len().div_ceil(page_size);
        let hashes = if self.prefix_caching { sequence.reusable_hashes(page_size) } else { &[] };
        let hit = self.blocks.lookup(hashes);
        (pages - hit.pages + hit.idle + owed <= self.blocks.available()).then_some(hit)
    }
}
