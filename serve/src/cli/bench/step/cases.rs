//! The steps that are measured, and what stands in the caches before.

use std::ops::Range;

use dsa80_model::engine::{Step, StepLimits};
use dsa80_model::measure::greedy_step;
use dsa80_reference::{Batch, Result, SequenceSlice, random};

/// A step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) kind: Kind,
    pub(super) sequences: usize,
    /// Tokens that every sequence has in its context, the new ones included.
    pub(super) context: usize,
    /// The same, as it was asked for.
    pub(super) wanted: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One new token for every sequence.
    Decode,
    /// A prompt's last tokens.
    Prefill { chunk: usize },
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Decode => "decode",
            Kind::Prefill { .. } => "prefill",
        }
    }
}

/// Tokens of a sequence that fills pages. They see none but each other, which costs less than contexts that grow, and gives rows that are as
/// good.
pub(super) const SEGMENT: usize = 512;

impl Case {
    /// New tokens.
    pub(super) fn tokens(&self) -> usize {
        match self.kind {
            Kind::Decode => self.sequences,
            Kind::Prefill { chunk } => chunk,
        }
    }

    /// The same step with contexts that the caches hold; nothing where they are too small for it.
    pub(super) fn fit(self, limits: &StepLimits) -> Option<Self> {
        let held = limits.num_pages / self.sequences * limits.page_size;
        let context = self.context.min(held).min(limits.max_model_len);
        (context >= self.tokens() / self.sequences && context > 0).then_some(Self { context, ..self })
    }

    fn pages_of_a_sequence(&self, limits: &StepLimits) -> usize {
        self.context.div_ceil(limits.page_size)
    }

    /// Pages of all sequences, from the first on.
    pub(super) fn pages(&self, limits: &StepLimits) -> usize {
        self.sequences * self.pages_of_a_sequence(limits)
    }

    /// The step, whose last tokens are wanted; tokens are of `vocabulary`.
    pub(super) fn step(&self, limits: &StepLimits, vocabulary: &Range<usize>) -> Result<Step> {
        let (each, new) = (self.pages_of_a_sequence(limits), self.tokens() / self.sequences);
        let tokens: Vec<Vec<u32>> =
            (0..self.sequences).map(|sequence| tokens(new, sequence + 1, vocabulary)).collect();
        let pages: Vec<u32> = (0..self.pages(limits)).map(|page| page as u32).collect();
        let slices: Vec<_> = tokens
            .iter()
            .zip(pages.chunks(each))
            .map(|(token_ids, pages)| SequenceSlice { token_ids, computed_len: self.context - new, pages })
            .collect();
        let batch = Batch::new(limits.page_size, &slices)?;
        Ok(greedy_step(batch, (1..=self.sequences).map(|sequence| sequence * new - 1)))
    }
}

/// Batches that fill the first `pages` pages with tokens of `vocabulary`.
pub(super) fn fill(limits: &StepLimits, pages: usize, vocabulary: &Range<usize>) -> Result<Vec<Batch>> {
    let size = limits.page_size;
    let each = (SEGMENT.min(limits.max_batch_tokens).min(limits.max_model_len) / size).max(1);
    let sequences = (limits.max_batch_tokens / (each * size)).clamp(1, limits.max_batch_seqs);
    let pages: Vec<u32> = (0..pages as u32).collect();
    let segments: Vec<(Vec<u32>, &[u32])> = pages
        .chunks(each)
        .map(|pages| (tokens(pages.len() * size, pages[0] as usize + (1 << 20), vocabulary), pages))
        .collect();
    let batch = |segments: &[(Vec<u32>, &[u32])]| {
        let slices: Vec<_> = segments
            .iter()
            .map(|(token_ids, pages)| SequenceSlice { token_ids, computed_len: 0, pages })
            .collect();
        Batch::new(size, &slices)
    };
    segments.chunks(sequences).map(batch).collect()
}

/// Tokens whose embeddings `ranks` have. They make zeros of all others, which would be alike: they would select the same rows and be sent to
/// the same experts.
pub(super) fn vocabulary(vocab_size: usize, ranks: Range<usize>, tp: usize) -> Range<usize> {
    let share = vocab_size / tp;
    ranks.start * share..ranks.end * share
}

/// Random tokens, other ones for another seed.
fn tokens(count: usize, seed: usize, vocabulary: &Range<usize>) -> Vec<u32> {
    let token = |i| vocabulary.start + random::word(i, seed as u32) as usize % vocabulary.len().max(1);
    (0..count as u64).map(|i| token(i) as u32).collect()
}

#[cfg(test)]
mod tests {
    use dsa80_reference::DType;

    use super::*;

    fn limits() -> StepLimits {
        StepLimits {
            page_size: 16,
            num_pages: 40,
            cache_dtype: DType::Act,
            max_batch_tokens: 64,
            max_batch_seqs: 8,
            max_model_len: 512,
            vocab_size: 1000,
            max_logprobs: 0,
        }
    }

    fn decode(sequences: usize, context: usize) -> Case {
        Case { kind: Kind::Decode, sequences, context, wanted: context }
    }

    #[test]
    fn contexts_that_do_not_fit_become_those_that_do() {
        let limits = limits();
        assert_eq!(decode(4, 100).fit(&limits), Some(decode(4, 100)));
        assert_eq!(decode(8, 512).fit(&limits), Some(Case { wanted: 512, ..decode(8, 80) }));
        assert_eq!(decode(41, 16).fit(&limits), None);
        let prefill =
            |chunk, context| Case { kind: Kind::Prefill { chunk }, sequences: 1, context, wanted: 1024 };
        assert_eq!(prefill(64, 1024).fit(&limits), Some(prefill(64, 512)));
        assert_eq!(prefill(1024, 1024).fit(&limits), None);
    }

    #[test]
    fn every_sequence_of_a_decode_has_pages_of_its_own_and_wants_a_token() {
        let limits = limits();
        let Step { batch, targets } = decode(3, 100).step(&limits, &vocabulary(1000, 1..2, 4)).unwrap();
        assert_eq!(batch.context_lens, [100; 3]);
        let mut pages = batch.block_table.clone();
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), 3 * 7);
        assert_eq!(targets.iter().map(|target| target.row).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(batch.token_ids[0] != batch.token_ids[1]);
        assert!(batch.token_ids.iter().all(|token| (250..500).contains(token)), "{:?}", batch.token_ids);
    }

    #[test]
    fn a_prefill_is_the_end_of_its_context_and_wants_the_last_token() {
        let case = Case { kind: Kind::Prefill { chunk: 48 }, sequences: 1, context: 100, wanted: 100 };
        let Step { batch, targets } = case.step(&limits(), &(0..1000)).unwrap();
        assert_eq!((batch.num_tokens(), batch.positions[0], batch.max_context_len), (48, 52, 100));
        assert_eq!((targets.len(), targets[0].row, targets[0].position), (1, 47, 100));
    }

    #[test]
    fn every_slot_of_the_pages_is_filled_once() {
        let limits = limits();
        let batches = fill(&limits, 11, &(0..1000)).unwrap();
        assert!(batches.iter().all(|batch| batch.num_tokens() <= limits.max_batch_tokens));
        assert!(batches.iter().all(|batch| batch.num_seqs() <= limits.max_batch_seqs));
        let mut slots: Vec<i64> = batches.iter().flat_map(|batch| batch.slot_mapping.clone()).collect();
        slots.sort_unstable();
        assert_eq!(slots, (0..11 * 16).collect::<Vec<_>>());
    }
}
