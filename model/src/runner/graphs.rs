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

    /// The smallest graph that computes `step`: one new token for every sequence, and at most one target for each.
    pub(super) fn of(&self, step: &Step) -> Option<(Bucket, &K::Graph)> {
        let Step { batch, targets } = step;
        let decodes = batch.num_tokens() == batch.num_seqs()
            && batch.cu_seqlens.windows(2).all(|bounds| bounds[0] < bounds[1]);
        let apart = targets.windows(2).all(|pair| pair[0].row < pair[1].row);
        let graph = || self.0.iter().rev().find(|(bucket, _)| bucket.holds(batch));
        (decodes && apart).then(graph).flatten().map(|(bucket, graph)| (*bucket, graph))
    }
}

/// Why a step could not be recorded, and what serves all the same.
pub(super) fn cannot_record(bucket: Bucket, error: &Error) -> LaunchError {
    let Bucket { sequences, context } = bucket;
    LaunchError::Options(format!(
        "a decode step of {sequences} sequences with contexts up to {context} tokens cannot be recorded as a graph: {error}; \
         --cuda-graphs off launches every kernel by itself"
    ))
}
