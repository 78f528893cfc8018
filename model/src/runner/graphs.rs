//! Decode steps as graphs: one for every number of sequences, and length of their contexts, that a step is rounded up to.

use dsa80_reference::{Batch, Error, Kernels};

use super::workspace::LOGIT_ROWS;
use crate::engine::{Step, StepLimits};
use crate::error::LaunchError;

/// From one length of contexts to the next. What depends on it are the columns of the indexer's scores, of which a row uses as many as it
/// sees, and the width of the block tables.
const CONTEXT_FACTOR: usize = 4;

/// What a decode step is rounded up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bucket {
    /// With one new token each.
    pub(super) sequences: usize,
    /// Tokens of the longest context at most.
    pub(super) context: usize,
}

impl Bucket {
    /// Every bucket that steps within `limits` need, the largest first, so that what kernels keep between launches grows once: 1, 2, 4 and
    /// multiples of 8 sequences, contexts that the indexer selects whole, and longer ones up to the longest.
    ///
    /// Steps of more sequences than are projected to logits at once have no bucket: they keep a GPU busy for longer than their launches take.
    pub(super) fn all(limits: &StepLimits, index_topk: usize) -> Vec<Self> {
        let most = limits.max_batch_seqs.min(limits.max_batch_tokens).min(LOGIT_ROWS);
        let longest = limits.max_model_len;
        let sequences = [1, 2, 4].into_iter().chain((8..).step_by(8));
        let sequences: Vec<usize> = sequences.take_while(|&count| count < most).chain([most]).collect();
        let contexts = std::iter::successors(Some(index_topk.max(1)), |len| len.checked_mul(CONTEXT_FACTOR));
        let contexts: Vec<usize> = contexts.take_while(|&len| len < longest).chain([longest]).collect();
        let buckets = contexts
            .iter()
            .rev()
            .flat_map(|&context| sequences.iter().rev().map(move |&sequences| Self { sequences, context }));
        buckets.collect()
    }

    fn holds(&self, batch: &Batch) -> bool {
        batch.num_seqs() <= self.sequences && batch.max_context_len <= self.context
    }

    /// A step that fills the bucket, and writes nothing to the caches.
    pub(super) fn widest(&self, limits: &StepLimits) -> Batch {
        let &Self { sequences, context } = self;
        let blocks = context.div_ceil(limits.page_size);
        let pages = (0..blocks).map(|block| (block % limits.num_pages) as i32);
        Batch {
            page_size: limits.page_size,
            token_ids: vec![0; sequences],
            positions: vec![context as i32 - 1; sequences],
            seq_ids: (0..sequences as i32).collect(),
            slot_mapping: vec![NOWHERE; sequences],
            cu_seqlens: (0..=sequences as i32).collect(),
            context_lens: vec![context as i32; sequences],
            block_table: pages.collect::<Vec<_>>().repeat(sequences),
            max_blocks: blocks,
            max_context_len: context,
        }
    }

    /// The step of the bucket that computes `batch`, which it holds.
    ///
    /// What is missing is filled up with a sequence that is there, the one of the shortest context: it asks for no other expert's weights, and
    /// computes with numbers, not with what lies in a cache that nobody has written. Its rows of the caches are not written twice.
    pub(super) fn pad(&self, batch: &Batch) -> Batch {
        let &Self { sequences, context } = self;
        let mut padded = batch.clone();
        padded.max_blocks = context.div_ceil(batch.page_size);
        padded.max_context_len = context;
        padded.block_table.clear();
        for seq in 0..batch.num_seqs() {
            // A sequence may have more pages than its context has filled.
            let row = &batch.block_table[seq * batch.max_blocks..][..batch.max_blocks.min(padded.max_blocks)];
            padded.block_table.extend_from_slice(row);
            padded.block_table.resize((seq + 1) * padded.max_blocks, -1);
        }
        let shortest = (0..batch.num_seqs()).min_by_key(|&seq| batch.context_lens[seq]).unwrap_or(0);
        let row = shortest * padded.max_blocks..(shortest + 1) * padded.max_blocks;
        for seq in batch.num_seqs()..sequences {
            padded.token_ids.push(batch.token_ids[shortest]);
            padded.positions.push(batch.positions[shortest]);
            padded.seq_ids.push(seq as i32);
            padded.slot_mapping.push(NOWHERE);
            padded.cu_seqlens.push(seq as i32 + 1);
            padded.context_lens.push(batch.context_lens[shortest]);
            padded.block_table.extend_from_within(row.clone());
        }
        padded
    }
}

/// How many graphs [`Rank::record_graphs`](super::Rank::record_graphs) records for steps within `limits`.
pub fn decode_graphs(limits: &StepLimits, index_topk: usize) -> usize {
    Bucket::all(limits, index_topk).len()
}

/// A slot of no cache: the row is not written.
const NOWHERE: i64 = -1;

/// What was recorded, by bucket, the smallest last.
pub(super) struct DecodeGraphs<K: Kernels>(Vec<(Bucket, K::Graph)>);

impl<K: Kernels> Default for DecodeGraphs<K> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: Kernels> DecodeGraphs<K> {
    pub(super) fn push(&mut self, bucket: Bucket, graph: K::Graph) {
        self.0.push((bucket, graph));
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The smallest graph that computes `step`.
    pub(super) fn of(&self, step: &Step) -> Option<(Bucket, &K::Graph)> {
        let bucket = || self.0.iter().rev().find(|(bucket, _)| bucket.holds(&step.batch));
        is_decode(step).then(bucket).flatten().map(|(bucket, graph)| (*bucket, graph))
    }
}

/// Whether a step is one new token for every sequence, and at most one target for each.
fn is_decode(Step { batch, targets }: &Step) -> bool {
    batch.cu_seqlens.windows(2).all(|bounds| bounds[1] - bounds[0] == 1)
        && targets.windows(2).all(|pair| pair[0].row < pair[1].row)
        && targets.last().is_none_or(|target| target.row < batch.num_tokens())
}

/// Why a step could not be recorded, and what serves all the same.
pub(super) fn cannot_record(bucket: Bucket, error: &Error) -> LaunchError {
    let Bucket { sequences, context } = bucket;
    LaunchError::Options(format!(
        "a decode step of {sequences} sequences with contexts up to {context} tokens cannot be recorded as a graph: {error}; \
         --cuda-graphs off launches every kernel by itself"
    ))
}

#[cfg(test)]
mod tests {
    use dsa80_reference::SequenceSlice;

    use super::*;
    use crate::engine::SampleTarget;

    fn limits() -> StepLimits {
        StepLimits {
            page_size: 16,
            num_pages: 8,
            cache_dtype: dsa80_reference::DType::Act,
            max_batch_tokens: 512,
            max_batch_seqs: 20,
            max_model_len: 1000,
            vocab_size: 64,
            max_logprobs: 20,
        }
    }

    #[test]
    fn buckets_reach_every_limit_and_no_further() {
        let buckets = |limits: StepLimits, index_topk| {
            let all = Bucket::all(&limits, index_topk);
            let (mut sequences, mut contexts) = (Vec::new(), Vec::new());
            for Bucket { sequences: s, context: c } in &all {
                sequences.push(*s);
                contexts.push(*c);
            }
            sequences.dedup();
            contexts.dedup();
            let each = sequences.len() / contexts.len();
            assert_eq!(all.len(), each * contexts.len());
            (sequences[..each].to_vec(), contexts)
        };
        assert_eq!(buckets(limits(), 32), (vec![20, 16, 8, 4, 2, 1], vec![1000, 512, 128, 32]));
        // The indexer selects everything.
        assert_eq!(buckets(StepLimits { max_batch_seqs: 4, ..limits() }, 2048), (vec![4, 2, 1], vec![1000]));
        let tokens = StepLimits { max_batch_tokens: 1, ..limits() };
        assert_eq!(buckets(tokens, 1000), (vec![1], vec![1000]));
        let many = StepLimits { max_batch_seqs: 256, ..limits() };
        assert_eq!(buckets(many, 1000).0, [64, 56, 48, 40, 32, 24, 16, 8, 4, 2, 1]);
        assert_eq!(decode_graphs(&many, 1000), 11);
    }

    #[test]
    fn a_padded_step_computes_the_same_and_writes_the_same() {
        let pages: [&[u32]; 2] = [&[5, 1, 7], &[3, 0]];
        let slices = [(40, 9), (17, 4)].map(|(computed_len, token)| (computed_len, [token]));
        let slices: Vec<_> = slices
            .iter()
            .zip(pages)
            .map(|((computed_len, token_ids), pages)| SequenceSlice {
                token_ids,
                computed_len: *computed_len,
                pages,
            })
            .collect();
        let batch = Batch::new(16, &slices).unwrap();
        let padded = Bucket { sequences: 4, context: 64 }.pad(&batch);
        let expected = Batch {
            page_size: 16,
            token_ids: vec![9, 4, 4, 4],
            positions: vec![40, 17, 17, 17],
            seq_ids: vec![0, 1, 2, 3],
            slot_mapping: vec![7 * 16 + 8, 1, -1, -1],
            cu_seqlens: vec![0, 1, 2, 3, 4],
            context_lens: vec![41, 18, 18, 18],
            block_table: [[5, 1, 7, -1], [3, 0, -1, -1], [3, 0, -1, -1], [3, 0, -1, -1]].concat(),
            max_blocks: 4,
            max_context_len: 64,
        };
        assert_eq!(padded, expected);
        // Pages beyond the bucket's contexts hold nothing yet.
        assert_eq!(Bucket { sequences: 2, context: 48 }.pad(&batch).block_table, [5, 1, 7, 3, 0, -1]);
        let spare = SequenceSlice { token_ids: &[1], computed_len: 3, pages: &[2, 4, 6] };
        assert_eq!(
            Bucket { sequences: 1, context: 16 }.pad(&Batch::new(16, &[spare]).unwrap()).block_table,
            [2]
        );
    }

    #[test]
    fn the_widest_step_of_a_bucket_is_one_of_its_own_and_writes_nothing() {
        let bucket = Bucket { sequences: 3, context: 200 };
        let batch = bucket.widest(&limits());
        assert!(bucket.holds(&batch) && batch.num_tokens() == 3 && batch.visible(2) == 200);
        assert_eq!(bucket.pad(&batch), batch);
        assert!(batch.slot_mapping.iter().all(|&slot| slot < 0));
        // More blocks than there are pages.
        assert!(
            batch.block_table.len() == 3 * 13 && batch.block_table.iter().all(|page| (0..8).contains(page))
        );
    }

    #[test]
    fn a_decode_has_one_token_and_at_most_one_target_for_every_sequence() {
        let slice = |token_ids| SequenceSlice { token_ids, computed_len: 0, pages: &[0] };
        let target = |row| SampleTarget {
            row,
            params: Default::default(),
            prompt: Default::default(),
            output: Vec::new(),
            banned: Default::default(),
            position: 1,
            forced: None,
            logprobs: None,
        };
        let step = |slices: &[SequenceSlice<'_>], rows: &[usize]| Step {
            batch: Batch::new(16, slices).unwrap(),
            targets: rows.iter().map(|&row| target(row)).collect(),
        };
        let two = [slice(&[1]), slice(&[2])];
        assert!(
            is_decode(&step(&two, &[0, 1])) && is_decode(&step(&two, &[1])) && is_decode(&step(&two, &[]))
        );
        assert!(!is_decode(&step(&two, &[0, 0])) && !is_decode(&step(&two, &[0, 2])));
        assert!(!is_decode(&step(&[slice(&[1, 2])], &[1])));
        // As many tokens as sequences, and not one each.
        assert!(!is_decode(&step(&[slice(&[1, 2]), slice(&[])], &[1])));
    }
}
