//! A step's ragged batch in device memory.

use dsa80_reference::{Batch, Error, Result};

use crate::device::Device;

/// A [`Batch`] on a [`Device`]. The arrays keep their addresses from step to step, so a captured graph reads the newest batch; the
/// numbers beside them are the host's, and fix grids.
#[derive(Debug)]
pub struct CudaBatch<D: Device> {
    capacity: Capacity,
    host: Batch,
    pub(crate) token_ids: D::Buffer,
    pub(crate) positions: D::Buffer,
    pub(crate) seq_ids: D::Buffer,
    pub(crate) slot_mapping: D::Buffer,
    pub(crate) cu_seqlens: D::Buffer,
    pub(crate) context_lens: D::Buffer,
    pub(crate) block_table: D::Buffer,
}

#[derive(Debug, Clone, Copy)]
struct Capacity {
    max_tokens: usize,
    max_seqs: usize,
    max_blocks: usize,
}

impl<D: Device> CudaBatch<D> {
    /// An empty batch that can hold `max_tokens` tokens of `max_seqs` sequences with `max_blocks` pages each.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, max_tokens: usize, max_seqs: usize, max_blocks: usize) -> Result<Self> {
        Ok(Self {
            capacity: Capacity { max_tokens, max_seqs, max_blocks },
            host: Batch::default(),
            token_ids: device.alloc("token_ids", max_tokens * 4)?,
            positions: device.alloc("positions", max_tokens * 4)?,
            seq_ids: device.alloc("seq_ids", max_tokens * 4)?,
            slot_mapping: device.alloc("slot_mapping", max_tokens * 8)?,
            cu_seqlens: device.alloc("cu_seqlens", (max_seqs + 1) * 4)?,
            context_lens: device.alloc("context_lens", max_seqs * 4)?,
            block_table: device.alloc("block_table", max_seqs * max_blocks * 4)?,
        })
    }

    /// Replaces the contents.
    ///
    /// # Errors
    /// [`Error::Capacity`] when `batch` is larger than was allocated.
    pub fn upload(&mut self, device: &D, batch: &Batch) -> Result<()> {
        for (elements, capacity) in [
            (batch.num_tokens(), self.capacity.max_tokens),
            (batch.num_seqs(), self.capacity.max_seqs),
            (batch.max_blocks, self.capacity.max_blocks),
        ] {
            if elements > capacity {
                return Err(Error::Capacity { shape: vec![elements], elements, capacity });
            }
        }
        device.write(&self.token_ids, 0, bytemuck::cast_slice(&batch.token_ids))?;
        device.write(&self.positions, 0, bytemuck::cast_slice(&batch.positions))?;
        device.write(&self.seq_ids, 0, bytemuck::cast_slice(&batch.seq_ids))?;
        device.write(&self.slot_mapping, 0, bytemuck::cast_slice(&batch.slot_mapping))?;
        device.write(&self.cu_seqlens, 0, bytemuck::cast_slice(&batch.cu_seqlens))?;
        device.write(&self.context_lens, 0, bytemuck::cast_slice(&batch.context_lens))?;
        device.write(&self.block_table, 0, bytemuck::cast_slice(&batch.block_table))?;
        self.host.clone_from(batch);
        Ok(())
    }

    /// The batch that was uploaded last.
    pub fn host(&self) -> &Batch {
        &self.host
    }
}
