//! `absorb_merged`: `absorb_output` of what the splits of `sparse_mla` have left, which it merges itself.

use dsa80_reference::{DType, DeviceTensor, Result};

use crate::absorb::OutputHeads;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::sparse_mla_dims::SparseMlaDims;
use crate::sparse_mla_merge::Partials;
use crate::tensor::CudaTensor;

const KERNEL: &str = "absorb_merged";

/// The warps of a block, its features and tokens.
const WARPS: usize = 16;
const FEATURES: usize = 32;
const TOKENS: usize = 8;

/// Splits that a warp has factors for.
const MAX_SPLITS: usize = 64;

/// Partial results of a head at most, in rows: several blocks read each of them, and more are better merged once.
const MAX_ROWS: usize = 64;

const THREADS: u32 = 32 * WARPS as u32;

fn shared_bytes(SparseMlaDims { kv_lora_rank, .. }: SparseMlaDims) -> usize {
    let stride = 2 * (kv_lora_rank + 8);
    let parts = WARPS / (FEATURES / 16);
    let sums = parts * TOKENS * (FEATURES + 4) * 4;
    (FEATURES + TOKENS) * stride + sums.max(WARPS * 32 * 16)
}

fn program(dims: SparseMlaDims) -> Program {
    Program::new(
        "absorb_merged.cu",
        [
            ("KV_LORA_RANK", dims.kv_lora_rank),
            ("TILE_WARPS", WARPS),
            ("TILE_FEATURES", FEATURES),
            ("TILE_SHARED_BYTES", shared_bytes(dims)),
        ],
    )
}

/// What there is to compile.
pub(crate) fn programs(dims: SparseMlaDims) -> [ProgramEntry; 1] {
    [ProgramEntry {
        program: program(dims),
        entry: KERNEL,
        threads: THREADS,
        shared_bytes: shared_bytes(dims),
        variant: "merge and absorb_output".into(),
    }]
}

/// Whether the kernel takes them, and gains by it.
pub(crate) fn takes<D: Device>(
    partials: &Partials<'_, D>,
    heads: OutputHeads,
    dims: SparseMlaDims,
    kv_b: &CudaTensor<D>,
    limits: &Limits,
) -> bool {
    let fits = kv_b.dtype() == DType::Bf16
        && heads.v.is_multiple_of(2)
        && partials.splits <= MAX_SPLITS
        && shared_bytes(dims) <= limits.shared_per_block;
    fits && heads.tokens * partials.splits <= MAX_ROWS
}

/// Launches what [it takes](takes).
pub(crate) fn absorb_merged<D: Device>(
    device: &D,
    partials: &Partials<'_, D>,
    heads: OutputHeads,
    dims: SparseMlaDims,
    kv_b: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let OutputHeads { tokens, heads, rows, v, .. } = heads;
    if tokens * heads * v == 0 {
        return Ok(());
    }
    let grid = [tokens.div_ceil(TOKENS), v.div_ceil(FEATURES), heads];
    device.launch(&Launch {
        program: &program(dims),
        entry: KERNEL,
        grid: grid.map(|blocks| blocks as u32),
        threads: THREADS,
        shared_bytes: shared_bytes(dims),
        shape: format!("{tokens} x {heads} heads, {} splits, {} -> {v}", partials.splits, dims.kv_lora_rank),
        args: &[
            Arg::Buffer(partials.out),
            Arg::Buffer(partials.max),
            Arg::Buffer(partials.sum),
            Arg::Buffer(kv_b.buffer()),
            Arg::Buffer(out.buffer()),
            Arg::I32(tokens as i32),
            Arg::I32(heads as i32),
            Arg::I32(partials.splits as i32),
            Arg::I32(rows as i32),
            Arg::I32(v as i32),
        ],
    })
}
