//! What a batch selects, and which experts it is sent to.

use std::collections::BTreeMap;

use dsa80_reference::Batch;

use crate::runner::Probe;

/// Counts what a forward pass chooses: different rows and different experts, layer by layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// Different experts of every sparse layer.
    pub experts: BTreeMap<usize, usize>,
    /// Different rows of the caches, each sequence's own, that every layer with an indexer selects.
    pub rows: BTreeMap<usize, usize>,
    /// The sequence of every token row, and the longest context.
    seq_ids: Vec<usize>,
    context: usize,
}

impl Seen {
    pub(crate) fn of(batch: &Batch) -> Self {
        let seq_ids = batch.seq_ids.iter().map(|&id| id as usize).collect();
        Self { seq_ids, context: batch.max_context_len, ..Self::default() }
    }

    /// Rows that layer `layer` reads: those of the nearest layer with an indexer.
    pub(super) fn rows_of(&self, layer: usize) -> usize {
        self.rows.range(..=layer).next_back().map_or(0, |(_, &rows)| rows)
    }
}

impl Probe for Seen {
    fn topk_indices(&mut self, layer: usize, indices: &mut [i32]) -> bool {
        let sequences = self.seq_ids.last().map_or(0, |&last| last + 1);
        let mut selected = vec![false; sequences * self.context];
        let width = (indices.len() / self.seq_ids.len().max(1)).max(1);
        for (&sequence, row) in self.seq_ids.iter().zip(indices.chunks(width)) {
            for index in row.iter().filter_map(|&index| usize::try_from(index).ok()) {
                if let Some(selected) = selected.get_mut(sequence * self.context + index) {
                    *selected = true;
                }
            }
        }
        self.rows.insert(layer, selected.into_iter().filter(|&selected| selected).count());
        false
    }

    fn wants_hidden(&self) -> bool {
        false
    }

    fn experts(&mut self, layer: usize, ids: &mut [i32], _weights: &mut [f64]) -> bool {
        let different: std::collections::BTreeSet<i32> = ids.iter().copied().collect();
        self.experts.insert(layer, different.len());
        false
    }
}

#[cfg(test)]
mod tests {
    use dsa80_reference::SequenceSlice;

    use super::*;

    #[test]
    fn rows_are_counted_once_for_each_sequence_and_experts_once_a_layer() {
        let slice = |token_ids| SequenceSlice { token_ids, computed_len: 6, pages: &[0] };
        let batch = Batch::new(16, &[slice(&[1, 2]), slice(&[3])]).unwrap();
        let mut seen = Seen::of(&batch);
        // Two tokens of the first sequence share position 4; the second sequence has a position 4 of its own.
        assert!(!seen.topk_indices(0, &mut [4, 1, -1, 4, 5, 7, 4, 0, -1]));
        assert!(!seen.topk_indices(3, &mut [0, 0, 0, 0, 0, 0, 0, 0, 0]));
        assert!(!seen.experts(1, &mut [7, 2, 7, 3, 2, 1], &mut [0.0; 6]));
        assert_eq!(seen.rows, BTreeMap::from([(0, 6), (3, 2)]));
        assert_eq!([0, 1, 2, 3, 9].map(|layer| seen.rows_of(layer)), [6, 6, 6, 2, 2]);
        assert_eq!(seen.experts, BTreeMap::from([(1, 4)]));
    }
}
