//! One request on its way through the engine: its tokens, its pages, and how far it is computed.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dsa80_reference::SamplingParams;
use tokio::sync::mpsc::UnboundedSender;

use super::block_manager::PageHash;
use super::request::{Event, FinishReason, Request, TokenLogprobs, Usage};
use super::step::{SampleTarget, Sampled};
use super::stop::StopConditions;

/// A request, waiting or running.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Where its events go.
    pub(super) events: UnboundedSender<Event>,
    cancelled: Arc<AtomicBool>,
    prompt: Arc<[u32]>,
    params: Arc<SamplingParams>,
    /// Whether the sampler needs the tokens generated so far.
    penalised: bool,
    stop: StopConditions,
    logprobs: Option<usize>,
    /// The prompt's scores, until they are handed out.
    scores: Option<PromptScores>,
    /// Prompt and output.
    tokens: Vec<u32>,
    /// Leading tokens whose cache rows are written.
    pub(super) num_computed: usize,
    /// The block table.
    pub(super) pages: Vec<u32>,
    /// Leading pages that the prefix cache knows about.
    pub(super) published: usize,
    /// Hashes of leading full pages, as far as they were needed. Tokens never change, so these outlive
    /// preemption.
    page_hashes: Vec<PageHash>,
    /// Whether it has ever held pages; only then does it no longer count against the waiting queue's bound.
    pub(super) admitted: bool,
    /// Prompt tokens found in the prefix cache when it was first admitted.
    pub(super) cached_tokens: usize,
    /// Prompt tokens that the counters know as computed or cached: recomputing after a preemption counts
    /// nothing.
    pub(super) prompt_counted: usize,
    /// Set when it has ended by itself.
    pub(super) finished: Option<FinishReason>,
}

/// The scores of a prompt as they come in.
#[derive(Debug)]
struct PromptScores {
    /// Alternatives wanted.
    top: usize,
    /// Entry `i` belongs to prompt token `i`; as long as what is scored so far.
    entries: Vec<Option<TokenLogprobs>>,
}

impl Sequence {
    /// A request that has passed validation.
    pub(super) fn new(
        request: Request,
        eos_token_ids: &[u32],
        cancelled: Arc<AtomicBool>,
        events: UnboundedSender<Event>,
    ) -> Self {
        let stop = StopConditions::new(&request, eos_token_ids);
        let params = request.sampling;
        Self {
            events,
            cancelled,
            prompt: Arc::from(&request.prompt[..]),
            penalised: params.repetition_penalty != 1.0
                || params.frequency_penalty != 0.0
                || params.presence_penalty != 0.0,
            params: Arc::new(params),
            stop,
            logprobs: request.logprobs,
            // Nothing comes before the first token, so it has no score.
            scores: request.prompt_logprobs.map(|top| PromptScores { top, entries: vec![None] }),
            tokens: request.prompt,
            num_computed: 0,
            pages: Vec::new(),
            published: 0,
            page_hashes: Vec::new(),
            admitted: false,
            cached_tokens: 0,
            prompt_counted: 0,
            finished: None,
        }
    }

    /// Tokens of prompt and output.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens of the prompt.
    pub(super) fn prompt_len(&self) -> usize {
        self.prompt.len()
    }

    /// Tokens generated.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt.len()
    }

    /// Tokens whose rows are still to be computed. One for a sequence that decodes, more in its prompt (or
    /// while it is recomputed).
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// The next `chunk` tokens to compute.
    pub(super) fn chunk(&self, chunk: usize) -> &[u32] {
        &self.tokens[self.num_computed..self.num_computed + chunk]
    }

    /// Whether nobody waits for the answer any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire) || self.events.is_closed()
    }

    /// What it has cost so far.
    pub(super) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len(),
            completion_tokens: self.generated(),
            cached_tokens: self.cached_tokens,
        }
    }

    /// Hashes of the leading full pages that may be taken from the prefix cache: the last token is always
    /// computed, for the logits behind it, and so is every prompt token whose successor is not scored yet.
    pub(super) fn reusable_hashes(&mut self, page_size: usize) -> &[PageHash] {
        let mut reusable = self.len() - 1;
        if let Some(scores) = &self.scores {
            reusable = reusable.min(scores.entries.len() - 1);
        }
        let pages = reusable / page_size;
        self.extend_hashes(page_size, pages);
        &self.page_hashes[..pages]
    }

    /// The hash of full page `page`.
    pub(super) fn page_hash(&mut self, page_size: usize, page: usize) -> PageHash {
        self.extend_hashes(page_size, page + 1);
        self.page_hashes[page]
    }

    fn extend_hashes(&mut self, page_size: usize, pages: usize) {
        for page in self.page_hashes.len()..pages {
            let tokens = &self.tokens[page * page_size..(page + 1) * page_size];
            self.page_hashes.push(PageHash::new(self.page_hashes.last(), tokens));
        }
    }

    /// The prompt tokens that the next `chunk` tokens score: the row of token `i` gives the logits of token
    /// `i + 1`.
    fn scored_by(&self, chunk: usize) -> Range<usize> {
        let Some(scores) = &self.scores else { return 0..0 };
        let first = scores.entries.len();
        first..self.prompt_len().min(self.num_computed + chunk + 1).max(first)
    }

    /// Whether a token is sampled behind the next `chunk` tokens.
    fn samples_after(&self, chunk: usize) -> bool {
        self.num_computed + chunk == self.len() && !self.stop.generates_nothing()
    }

    /// Appends what is wanted from the rows of the next `chunk` tokens, in order; `first_row` is the chunk's
    /// first row in the batch.
    pub(super) fn push_targets(&self, chunk: usize, first_row: usize, targets: &mut Vec<SampleTarget>) {
        for token in self.scored_by(chunk) {
            targets.push(SampleTarget {
                row: first_row + token - 1 - self.num_computed,
                params: Arc::clone(&self.params),
                prompt: Arc::clone(&self.prompt),
                output: Vec::new(),
                banned: self.stop.nothing_banned(),
                position: token as u32,
                forced: Some(self.tokens[token]),
                logprobs: self.scores.as_ref().map(|scores| scores.top),
            });
        }
        if self.samples_after(chunk) {
            targets.push(self.sampled_after(first_row + chunk - 1, 0));
        }
    }

    /// What is wanted from `row` when `unknown` more tokens come before the one that is sampled there. They are not in
    /// [`output`](SampleTarget::output).
    pub(super) fn sampled_after(&self, row: usize, unknown: usize) -> SampleTarget {
        let output = if self.penalised { &self.tokens[self.prompt_len()..] } else { &[] };
        SampleTarget {
            row,
            params: Arc::clone(&self.params),
            prompt: Arc::clone(&self.prompt),
            output: output.to_vec(),
            banned: self.stop.banned(self.generated() + unknown),
            position: (self.len() + unknown) as u32,
            forced: None,
            logprobs: self.logprobs,
        }
    }

    /// Whether, after the next `chunk` tokens, it is one token further and has that one to compute, unless the token ends it.
    pub(super) fn decodes_after(&self, chunk: usize) -> bool {
        chunk > 0 && self.samples_after(chunk) && !self.stop.is_last(self.generated() + 1)
    }

    /// The last token, which stands in the output of what is sampled next if a penalty is on.
    pub(super) fn last(&self) -> (u32, bool) {
        (self.tokens[self.tokens.len() - 1], self.penalised)
    }

    /// Takes in what came out of the targets that [`push_targets`](Self::push_targets) named for `chunk`, and
    /// moves on by `chunk`. Appends the events that follow from it, the end excepted: that is
    /// [`finished`](Self::finished).
    pub(super) fn take_results(
        &mut self,
        chunk: usize,
        sampled: &mut impl Iterator<Item = Sampled>,
        events: &mut Vec<Event>,
    ) {
        let scored = self.scored_by(chunk).len();
        let samples = self.samples_after(chunk);
        self.num_computed += chunk;
        if let Some(mut scores) = self.scores.take() {
            scores.entries.extend(sampled.take(scored).map(|sampled| sampled.logprobs));
            if scores.entries.len() == self.prompt_len() {
                events.push(Event::Prompt(scores.entries));
            } else {
                self.scores = Some(scores);
            }
        }
        if samples && let Some(Sampled { token, logprobs }) = sampled.next() {
            self.tokens.push(token);
            events.push(Event::Token { id: token, logprobs });
            self.finished = self.stop.reached(token, self.generated());
        } else if self.stop.generates_nothing() && self.remaining() == 0 {
            self.finished = Some(FinishReason::Length);
        }
    }
}
