//! A batch in host memory.

use crate::batch::Batch;
use crate::error::{Error, Result};

/// A [`Batch`] and the capacity that was asked for it. Reads as the batch itself.
///
/// The capacity costs nothing here; it is kept so that a caller who outgrows it is told, as on a GPU.
#[derive(Debug, Clone)]
pub struct CpuBatch {
    host: Batch,
    max_tokens: usize,
    max_seqs: usize,
    max_blocks: usize,
}

impl CpuBatch {
    pub(super) fn new(max_tokens: usize, max_seqs: usize, max_blocks: usize) -> Self {
        Self { host: Batch::default(), max_tokens, max_seqs, max_blocks }
    }

    pub(super) fn replace(&mut self, batch: &Batch) -> Result<()> {
        for (elements, capacity) in [
            (batch.num_tokens(), self.max_tokens),
            (batch.num_seqs(), self.max_seqs),
            (batch.max_blocks, self.max_blocks),
        ] {
            if elements > capacity {
                return Err(Error::Capacity { shape: vec![elements], elements, capacity });
            }
        }
        self.host.clone_from(batch);
        Ok(())
    }
}

impl std::ops::Deref for CpuBatch {
    type Target = Batch;

    fn deref(&self) -> &Batch {
        &self.host
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::SequenceSlice;

    #[test]
    fn holds_what_it_was_allocated_for_and_refuses_more() {
        let slice = SequenceSlice { token_ids: &[1, 2, 3], computed_len: 0, pages: &[4, 5] };
        let batch = Batch::new(2, &[slice]).unwrap();
        let mut device = CpuBatch::new(3, 1, 2);
        device.replace(&batch).unwrap();
        assert_eq!(*device, batch);
        for (max_tokens, max_seqs, max_blocks) in [(2, 1, 2), (3, 0, 2), (3, 1, 1)] {
            let error = CpuBatch::new(max_tokens, max_seqs, max_blocks).replace(&batch).unwrap_err();
            assert!(matches!(error, Error::Capacity { .. }), "{error}");
        }
    }
}
