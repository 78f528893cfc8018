//! Random ragged batches.

use dsa80_reference::{Batch, SequenceSlice, sampling::uniform};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// What a random batch may look like.
#[derive(Debug, Clone, Copy)]
pub struct Batches {
    /// One of these.
    pub page_sizes: &'static [usize],
    /// Sequences, 0 to this many.
    pub max_seqs: usize,
    /// Tokens that a sequence has in the caches before the step, 0 to this many.
    pub max_computed: usize,
    /// New tokens of a prefill chunk, 1 to this many.
    pub max_chunk: usize,
}

/// A batch and the caches that it wants.
#[derive(Debug, Clone)]
pub struct BatchCase {
    /// The step. Pages lie in random order, and two sequences may share the pages of a common prefix.
    pub batch: Batch,
    /// Pages of the caches: a few more than are used.
    pub pages: usize,
    /// Whether each page (of `pages`) holds the rows of some sequence.
    pub used: Vec<bool>,
}

#[derive(Debug, Clone, Copy)]
struct Sequence {
    computed: usize,
    new: usize,
    /// Reads the pages of the sequence before as far as neither writes them.
    shares: bool,
    /// Pages beyond the context.
    spare: usize,
}

impl Batches {
    /// Any mixture of prefill chunks, decodes of 1 to 6 rows, sequences without a new token, and empty ones.
    pub fn any(self) -> impl Strategy<Value = BatchCase> {
        let new = prop_oneof![
            4 => 1..=6_usize,
            3 => 1..=self.max_chunk.max(1),
            1 => Just(0_usize),
        ];
        let computed = prop_oneof![3 => 0..=self.max_computed, 1 => Just(0_usize)];
        let sequence = (computed, new, any::<bool>(), 0..2_usize)
            .prop_map(|(computed, new, shares, spare)| Sequence { computed, new, shares, spare });
        (select(self.page_sizes), vec(sequence, 0..=self.max_seqs), any::<u64>())
            .prop_map(|(page_size, sequences, seed)| build(page_size, &sequences, seed))
    }
}

impl BatchCase {
    /// A batch of sequences given as (tokens computed, new tokens).
    pub fn of(page_size: usize, sequences: &[(usize, usize)]) -> Self {
        let sequences: Vec<_> = sequences
            .iter()
            .map(|&(computed, new)| Sequence { computed, new, shares: false, spare: 0 })
            .collect();
        build(page_size, &sequences, 1)
    }

    /// The number of cache slots.
    pub fn slots(&self) -> usize {
        self.pages * self.batch.page_size
    }
}

fn build(page_size: usize, sequences: &[Sequence], seed: u64) -> BatchCase {
    let needed = |s: &Sequence| (s.computed + s.new).div_ceil(page_size) + s.spare;
    let pages = sequences.iter().map(needed).sum::<usize>() + 2;
    let mut free: Vec<u32> = (0..pages as u32).collect();
    free.sort_by(|&a, &b| uniform(seed, 0, a).total_cmp(&uniform(seed, 0, b)));
    let mut tables: Vec<Vec<u32>> = Vec::new();
    for (i, sequence) in sequences.iter().enumerate() {
        let mut table = match i.checked_sub(1) {
            Some(before) if sequence.shares => {
                let common = sequences[before].computed.min(sequence.computed) / page_size;
                tables[before][..common].to_vec()
            }
            _ => Vec::new(),
        };
        table.extend(free.drain(..needed(sequence) - table.len()));
        tables.push(table);
    }
    let token_ids: Vec<Vec<u32>> = sequences.iter().map(|s| (0..s.new as u32).collect()).collect();
    let slices: Vec<_> = sequences
        .iter()
        .zip(tables.iter().zip(&token_ids))
        .map(|(s, (pages, token_ids))| SequenceSlice { token_ids, computed_len: s.computed, pages })
        .collect();
    let batch = Batch::new(page_size, &slices).expect("every sequence has its pages");
    let mut used = vec![true; pages];
    free.iter().for_each(|&page| used[page as usize] = false);
    BatchCase { batch, pages, used }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    proptest! {
        #[test]
        fn no_slot_is_written_twice_or_read_by_another_sequence(
            case in Batches { page_sizes: &[1, 3, 4], max_seqs: 5, max_computed: 20, max_chunk: 9 }.any(),
        ) {
            let batch = &case.batch;
            let written: HashSet<i64> = batch.slot_mapping.iter().copied().collect();
            prop_assert_eq!(written.len(), batch.num_tokens());
            for (seq, &context_len) in batch.context_lens.iter().enumerate() {
                let new = (batch.cu_seqlens[seq + 1] - batch.cu_seqlens[seq]) as usize;
                for position in 0..context_len as usize - new {
                    let page = batch.block_table[seq * batch.max_blocks + position / batch.page_size] as usize;
                    prop_assert!(case.used[page]);
                    let slot = page * batch.page_size + position % batch.page_size;
                    prop_assert!(!written.contains(&(slot as i64)), "slot {} is shared and written", slot);
                }
            }
        }
    }
}
