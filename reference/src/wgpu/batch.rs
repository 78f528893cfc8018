//! A step's ragged batch in device memory.

use super::Wgpu;
use super::tensor::WgpuTensor;
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// A [`Batch`] of `Wgpu`: `Index` tensors, and the host's own.
#[derive(Debug)]
pub struct WgpuBatch {
    capacity: [usize; 3],
    host: Batch,
    pub(super) token_ids: WgpuTensor,
    pub(super) positions: WgpuTensor,
    pub(super) seq_ids: WgpuTensor,
    /// Slots that i32 does not hold are -1: WGSL has no 64 bits, and no cache is that large.
    pub(super) slot_mapping: WgpuTensor,
    pub(super) cu_seqlens: WgpuTensor,
    pub(super) context_lens: WgpuTensor,
    pub(super) block_table: WgpuTensor,
}

impl WgpuBatch {
    pub(super) fn alloc(wgpu: &Wgpu, max_tokens: usize, max_seqs: usize, max_blocks: usize) -> Result<Self> {
        let index = |elements: usize| wgpu.tensor(DType::Index, &[elements]);
        Ok(Self {
            capacity: [max_tokens, max_seqs, max_blocks],
            host: Batch::default(),
            token_ids: index(max_tokens)?,
            positions: index(max_tokens)?,
            seq_ids: index(max_tokens)?,
            slot_mapping: index(max_tokens)?,
            cu_seqlens: index(max_seqs + 1)?,
            context_lens: index(max_seqs)?,
            block_table: index(max_seqs.saturating_mul(max_blocks))?,
        })
    }

    pub(super) fn upload(&mut self, wgpu: &Wgpu, batch: &Batch) -> Result<()> {
        let sizes = [batch.num_tokens(), batch.num_seqs(), batch.max_blocks];
        for (elements, capacity) in sizes.into_iter().zip(self.capacity) {
            if elements > capacity {
                return Err(Error::Capacity { shape: vec![elements], elements, capacity });
            }
        }
        let slots: Vec<i32> =
            batch.slot_mapping.iter().map(|&slot| i32::try_from(slot).unwrap_or(-1)).collect();
        for (tensor, values) in [
            (&self.token_ids, &batch.token_ids),
            (&self.positions, &batch.positions),
            (&self.seq_ids, &batch.seq_ids),
            (&self.slot_mapping, &slots),
            (&self.cu_seqlens, &batch.cu_seqlens),
            (&self.context_lens, &batch.context_lens),
            (&self.block_table, &batch.block_table),
        ] {
            wgpu.write_bytes_to(tensor, bytemuck::cast_slice(values))?;
        }
        self.host = batch.clone();
        Ok(())
    }

    /// The batch that was uploaded last.
    pub(super) fn host(&self) -> &Batch {
        &self.host
    }
}
