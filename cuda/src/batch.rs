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
        // What is there already is not written again: from one decode step to the next, that is most of it. Taken: after an error nobody
        // knows what is there.
        let there = std::mem::take(&mut self.host);
        write(device, &self.token_ids, &there.token_ids, &batch.token_ids)?;
        write(device, &self.positions, &there.positions, &batch.positions)?;
        write(device, &self.seq_ids, &there.seq_ids, &batch.seq_ids)?;
        write(device, &self.slot_mapping, &there.slot_mapping, &batch.slot_mapping)?;
        write(device, &self.cu_seqlens, &there.cu_seqlens, &batch.cu_seqlens)?;
        write(device, &self.context_lens, &there.context_lens, &batch.context_lens)?;
        write(device, &self.block_table, &there.block_table, &batch.block_table)?;
        self.host = batch.clone();
        Ok(())
    }

    /// The batch that was uploaded last.
    pub fn host(&self) -> &Batch {
        &self.host
    }
}

/// Replaces what is `there` at the start of a buffer.
fn write<D: Device, E: bytemuck::NoUninit + PartialEq>(
    device: &D,
    buffer: &D::Buffer,
    there: &[E],
    values: &[E],
) -> Result<()> {
    if there.starts_with(values) { Ok(()) } else { device.write(buffer, 0, bytemuck::cast_slice(values)) }
}
