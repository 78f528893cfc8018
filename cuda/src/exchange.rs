//! What the collectives between ranks share (`kernels/exchange.cuh`): workspaces that all ranks write, and how a launch names them.

use std::time::Duration;

use dsa80_reference::{DType, DeviceTensor, Error, Result};

use crate::device::{Arg, Device};
use crate::tensor::{CudaTensor, element_bytes};

/// Ranks of a group at most: the pointers that a kernel takes.
pub const MAX_RANKS: usize = 8;

/// Words of a workspace before the counts of exchanges.
const EPOCHS: usize = 32;
/// What a rank that gives up writes where the others look while they wait.
const ABORTED: u32 = u32::MAX;

/// What the ranks of a group agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExchangeDims {
    /// Ranks, 2 to [`MAX_RANKS`].
    pub ranks: usize,
    /// Blocks of a rank that can exchange at a time.
    pub channels: usize,
    /// What a block receives of another rank in one exchange, a multiple of 16.
    pub slot_bytes: usize,
}

impl ExchangeDims {
    /// 128 channels, and slots for 64 KiB of all other ranks together, and for a row of 6144 bf16 of each at least: workspaces of 32 MiB between
    /// two ranks, 56 MiB between eight.
    ///
    /// # Errors
    /// More ranks, or fewer, than the kernels are written for.
    pub fn new(ranks: usize) -> Result<Self> {
        if !(2..=MAX_RANKS).contains(&ranks) {
            let expected = format!("2 to {MAX_RANKS}");
            let found = ranks.to_string();
            return Err(Error::Value { kernel: "all_reduce", name: "ranks", expected, found });
        }
        Ok(Self {
            ranks,
            channels: 128,
            slot_bytes: (64 * 1024 / (ranks - 1)).max(16 * 1024).next_multiple_of(16),
        })
    }

    /// Words of a workspace in front of the slots.
    fn header_words(&self) -> usize {
        (EPOCHS + self.channels).next_multiple_of(32)
    }

    /// Bytes of slots: four of every other rank for every channel.
    fn slots_bytes(&self) -> usize {
        4 * self.channels * (self.ranks - 1) * self.slot_bytes
    }

    /// Bytes of a rank's workspace: status, counts and slots.
    pub fn workspace_bytes(&self) -> usize {
        4 * self.header_words() + self.slots_bytes()
    }

    /// The constants of `exchange.cuh`, but the threads of a block.
    pub(crate) fn defines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("RANKS", self.ranks.to_string()),
            ("CHANNELS", self.channels.to_string()),
            ("SLOT_BYTES", self.slot_bytes.to_string()),
        ]
    }
}

/// The ranks of a group as one launch sees them.
#[derive(Debug)]
pub struct Exchange<B> {
    /// What they agree on.
    pub dims: ExchangeDims,
    /// Everybody's workspace, in rank order.
    pub workspaces: Vec<B>,
    /// The ranks whose part this launch does: one, or several that share a GPU.
    pub first_rank: usize,
    /// How long a rank waits for another.
    pub patience: Duration,
}

/// A workspace for one rank, which has not exchanged anything yet.
///
/// # Errors
/// Memory.
pub fn alloc_workspace<D: Device>(device: &D, dims: ExchangeDims) -> Result<D::Buffer> {
    let workspace = device.alloc("the workspace of collectives", dims.workspace_bytes())?;
    let header_bytes = 4 * dims.header_words();
    device.write(&workspace, 0, &vec![0; header_bytes])?;
    // Words that are not there.
    device.write(&workspace, header_bytes, &vec![0xff; dims.slots_bytes()])?;
    // Other devices may write to it as soon as they know it: all this must be there.
    device.read(&workspace, 0, &mut [])?;
    Ok(workspace)
}

/// Why the exchanges of a workspace failed, if they did. Waits for the device.
///
/// # Errors
/// The device failed.
pub fn failure<D: Device>(device: &D, workspace: &D::Buffer, patience: Duration) -> Result<Option<String>> {
    let mut status = [0; 4];
    device.read(workspace, 0, &mut status)?;
    Ok(match u32::from_le_bytes(status) {
        0 => None,
        ABORTED => Some("a rank has given up".into()),
        late => Some(format!("rank {} has not come to a collective within {patience:?}", late - 1)),
    })
}

/// Makes all that wait in a collective of this workspace, now or later, give up.
///
/// # Errors
/// The device failed.
pub fn abort<D: Device>(device: &D, workspace: &D::Buffer) -> Result<()> {
    device.write(workspace, 0, &ABORTED.to_le_bytes())
}

impl<B> Exchange<B> {
    /// Fails unless a launch has a part for one rank or for several, which the group has.
    pub(crate) fn expect_parts(&self, kernel: &'static str, parts: usize) -> Result<()> {
        let ranks = self.dims.ranks;
        if parts == 0 || self.first_rank + parts > ranks || self.workspaces.len() != ranks {
            let expected = format!("those of 1 to {ranks} ranks, with {ranks} workspaces");
            let found = format!("{parts} from rank {} on, {}", self.first_rank, self.workspaces.len());
            return Err(Error::Value { kernel, name: "parts", expected, found });
        }
        Ok(())
    }

    /// Pointers for every rank: those of this launch, and null for the others.
    pub(crate) fn pointers<'a>(&self, parts: impl Iterator<Item = &'a B>) -> Vec<Arg<'a, B>> {
        let mut args: Vec<Arg<'a, B>> = (0..self.first_rank).map(|_| Arg::Null).collect();
        args.extend(parts.map(Arg::Buffer));
        args.resize_with(MAX_RANKS, || Arg::Null);
        args
    }

    pub(crate) fn workspace_pointers(&self) -> Vec<Arg<'_, B>> {
        let mut args: Vec<Arg<'_, B>> = self.workspaces.iter().map(Arg::Buffer).collect();
        args.resize_with(MAX_RANKS, || Arg::Null);
        args
    }

    pub(crate) fn patience_ns(&self) -> i64 {
        i64::try_from(self.patience.as_nanos()).unwrap_or(i64::MAX)
    }
}

/// How the vectors of a rank are dealt to blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dealt {
    pub(crate) blocks: usize,
    /// Vectors that a slot receives at most.
    pub(crate) segment: usize,
}

/// Deals `vectors` to at most `blocks` blocks, each with work for all its threads if it can be, and `shares` segments of it at a time.
pub(crate) fn deal(
    dims: ExchangeDims,
    vectors: usize,
    vector_bytes: usize,
    [threads, blocks, shares]: [usize; 3],
) -> Dealt {
    let cell = if vector_bytes == 16 { 16 } else { 4 };
    let blocks = vectors.div_ceil(threads * shares).clamp(1, blocks.min(dims.channels).max(1));
    let segment = vectors.div_ceil(blocks * shares).min(dims.slot_bytes / cell);
    Dealt { blocks, segment }
}

/// Elements of a vector of `bytes` bytes each, where runs of `elements` are moved: 16 bytes, or one.
pub(crate) fn vector(elements: usize, dtype: DType) -> usize {
    let vector = 16 / element_bytes(dtype);
    if elements.is_multiple_of(vector) { vector } else { 1 }
}

/// What is summed and gathered.
pub(crate) const SUMMED: (&[DType], &str) = (&[DType::Act, DType::Float], "activations or floats");

/// Fails unless all tensors have the first one's shape and type, which is one of `dtypes`.
pub(crate) fn expect_alike<D: Device>(
    kernel: &'static str,
    name: &'static str,
    tensors: &[CudaTensor<D>],
    (dtypes, expected): (&[DType], &'static str),
) -> Result<()> {
    let Some(first) = tensors.first() else { return Ok(()) };
    let shape = first.shape();
    for tensor in tensors {
        tensor.expect_dtype(kernel, name, dtypes, expected)?;
        tensor
            .expect(kernel, name, tensor.shape() == shape, || format!("{shape:?}, as on the first rank"))?;
        if tensor.dtype() != first.dtype() {
            let expected = "the element type of the first rank";
            return Err(Error::DType { kernel, tensor: name, expected, found: tensor.dtype() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_dealt_to_blocks_that_have_work() {
        let dims = ExchangeDims::new(8).unwrap();
        assert_eq!(dims.workspace_bytes(), 4 * 160 + (56 << 20));
        // One token of 6144 bf16, 32 of them, and 2048.
        assert_eq!(deal(dims, 768, 16, [128, 64, 1]), Dealt { blocks: 6, segment: 128 });
        assert_eq!(deal(dims, 32 * 768, 16, [512, 64, 8]), Dealt { blocks: 6, segment: 512 });
        assert_eq!(deal(dims, 2048 * 768, 16, [512, 64, 8]), Dealt { blocks: 64, segment: 1024 });
        assert_eq!(deal(dims, 3, 2, [128, 64, 1]), Dealt { blocks: 1, segment: 3 });
        assert!(ExchangeDims::new(9).is_err() && ExchangeDims::new(1).is_err());
    }
}
