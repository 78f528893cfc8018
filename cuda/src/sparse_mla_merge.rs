//! `sparse_mla_merge`: adds up the partial results of blocks that share a token's rows.

use dsa80_reference::Result;

use crate::device::{Arg, Device, Launch, Program, ProgramEntry};
use crate::sparse_mla_dims::SparseMlaDims;
use crate::tensor::CudaTensor;

const KERNEL: &str = "sparse_mla_merge";

/// Columns of a block.
const COLUMNS: usize = 128;

/// Where partial results go: the selected rows are shared out among `splits` blocks.
#[derive(Debug, Clone, Copy)]
pub struct Partials<'a, D: Device> {
    /// Blocks that share a token group's keys.
    pub splits: usize,
    /// `[T, H, splits, kv_lora_rank]` f32, unnormalised.
    pub out: &'a D::Buffer,
    /// `[T, H, splits]` f32: the maximum (log2) that the sums are relative to.
    pub max: &'a D::Buffer,
    /// `[T, H, splits]` f32: the sum of the weights.
    pub sum: &'a D::Buffer,
}

impl<'a, D: Device> Partials<'a, D> {
    /// The places of partial results among a kernel's arguments: null where it writes none.
    pub(crate) fn args(partials: Option<&Self>) -> [Arg<'a, D::Buffer>; 3] {
        partials.map_or([Arg::Null, Arg::Null, Arg::Null], |Self { out, max, sum, .. }| {
            [Arg::Buffer(out), Arg::Buffer(max), Arg::Buffer(sum)]
        })
    }
}

/// Warps share the splits; each can have eight under way.
#[derive(Debug, Clone, Copy)]
struct Merge {
    warps: usize,
}

impl Merge {
    fn of(splits: usize) -> Self {
        Self { warps: splits.div_ceil(8).next_power_of_two().min(8) }
    }

    fn threads(self) -> u32 {
        32 * self.warps as u32
    }

    fn shared_bytes(self) -> usize {
        let (columns, maximum_and_sum) = (32 * 16, 2 * 4);
        (self.warps * (columns + maximum_and_sum)).next_multiple_of(16)
    }

    fn program(self, dims: SparseMlaDims) -> Program {
        Program::new(
            "sparse_mla_merge.cu",
            [
                ("KV_LORA_RANK", dims.kv_lora_rank),
                ("TILE_WARPS", self.warps),
                ("TILE_SHARED_BYTES", self.shared_bytes()),
            ],
        )
    }
}

/// Every variant.
pub(crate) fn programs(dims: SparseMlaDims) -> [ProgramEntry; 4] {
    [1, 2, 4, 8].map(|warps| Merge { warps }).map(|merge| ProgramEntry {
        program: merge.program(dims),
        entry: KERNEL,
        threads: merge.threads(),
        shared_bytes: merge.shared_bytes(),
        variant: format!("merge, {} warps", merge.warps),
    })
}

pub(crate) fn sparse_mla_merge<D: Device>(
    device: &D,
    partials: &Partials<'_, D>,
    dims: SparseMlaDims,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let (heads, splits) = (out.len() / dims.kv_lora_rank, partials.splits);
    let merge = Merge::of(splits);
    device.launch(&Launch {
        program: &merge.program(dims),
        entry: KERNEL,
        grid: [heads as u32, dims.kv_lora_rank.div_ceil(COLUMNS) as u32, 1],
        threads: merge.threads(),
        shared_bytes: merge.shared_bytes(),
        shape: format!("{heads} heads, {splits} splits"),
        args: &[
            Arg::Buffer(partials.out),
            Arg::Buffer(partials.max),
            Arg::Buffer(partials.sum),
            Arg::Buffer(out.buffer()),
            Arg::I32(splits as i32),
        ],
    })
}
