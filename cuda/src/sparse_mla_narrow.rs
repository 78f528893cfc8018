//! `sparse_mla` for groups of eight heads, which fill the tensor core's columns: for every cache.

use dsa80_reference::{DType, DeviceTensor, Result};
use serde::{Deserialize, Serialize};

use crate::absorb_merged;
use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::slots;
use crate::sparse_mla::SparseMlaWorkspace;
use crate::sparse_mla_dims::{SparseMlaDims, output, queries, selected};
use crate::sparse_mla_merge::{self, Partials};
use crate::sparse_mla_union::SparseMlaUnionWorkspace;
use crate::tensor::CudaTensor;
use crate::tile::{Tile, require, require_shared};

const KERNEL: &str = "sparse_mla";

/// Heads of a block; the last may have fewer.
pub(crate) const HEADS: usize = 8;

/// Keys of a warp's step.
const KEYS: usize = 16;

/// How many times more blocks than are resident tokens may be split into, to fill the last wave.
const MAX_WAVES: usize = 4;

/// The constants of `sparse_mla` for groups of 8 heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SparseMlaTile {
    /// Warps of a block: they share its keys.
    pub warps: usize,
    /// Steps of 16 keys that a warp holds in shared memory.
    pub stages: usize,
    /// Blocks for every multiprocessor that tokens are split to reach.
    pub split_blocks: usize,
    /// Whether rows come through the L1 instead of past it.
    pub through_l1: bool,
}

/// What is compiled apart.
#[derive(Debug, Clone, Copy)]
struct Variant {
    fp8: bool,
    /// Several blocks share a token's rows.
    split: bool,
    /// The heads are a multiple of 8.
    whole_groups: bool,
}

impl SparseMlaTile {
    fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    fn shared_bytes(&self, dims: SparseMlaDims, fp8: bool) -> usize {
        // Whole steps of 16 columns, and an odd number of 16-byte chunks from row to row.
        let columns = SparseMlaDims { rope: dims.rope.next_multiple_of(16), ..dims };
        let stride = 16 * (columns.row_bytes(fp8).div_ceil(16) | 1);
        let rows = self.warps * self.stages * KEYS * stride;
        let queries = if fp8 { HEADS * ((2 * columns.width()).next_multiple_of(128) + 32) } else { 0 };
        let maxima_and_sums = 2 * 4 * HEADS * self.warps;
        rows + queries + maxima_and_sums
    }

    fn program(&self, dims: SparseMlaDims, Variant { fp8, split, whole_groups }: Variant) -> Program {
        Program::new(
            "sparse_mla.cu",
            [
                ("KV_LORA_RANK", dims.kv_lora_rank),
                ("ROPE_DIM", dims.rope),
                ("FP8", usize::from(fp8)),
                ("SPLIT", usize::from(split)),
                ("WHOLE_GROUPS", usize::from(whole_groups)),
                ("TILE_WARPS", self.warps),
                ("TILE_STAGES", self.stages),
                ("TILE_THROUGH_L1", usize::from(self.through_l1)),
                ("TILE_SHARED_BYTES", self.shared_bytes(dims, fp8)),
            ],
        )
    }

    /// Blocks that are resident at a time.
    fn slots(&self, limits: &Limits) -> usize {
        self.split_blocks * limits.multiprocessors as usize
    }

    /// Heads times splits that a launch leaves at most, if it splits.
    pub(crate) fn max_partials(&self, limits: &Limits) -> usize {
        MAX_WAVES * self.slots(limits) * HEADS
    }

    /// Blocks that share the `k` rows of one of `rows` token and head groups: those that cost least, in steps of 16 keys. A step takes a
    /// warp about as long as it takes the memory to bring the keys of one to every multiprocessor; starting a block costs three, merging
    /// two and a bit for every split.
    fn splits(&self, rows: usize, k: usize, limits: &Limits) -> usize {
        const BLOCK: usize = 3;
        const MERGE: usize = 2;
        const SPLITS_FOR_ONE: usize = 8;
        let (slots, steps) = (self.slots(limits), k.div_ceil(KEYS));
        let most = steps.div_ceil(self.warps).min(MAX_WAVES * slots / rows.max(1)).max(1);
        let cost = |splits: usize| {
            let (blocks, steps_of_block) = (rows * splits, steps.div_ceil(splits));
            let warps = blocks.div_ceil(slots) * (steps_of_block.div_ceil(self.warps) + BLOCK);
            let memory = blocks.div_ceil(limits.multiprocessors as usize) * steps_of_block;
            let merge = if splits > 1 { MERGE + splits / SPLITS_FOR_ONE } else { 0 };
            warps + memory + merge
        };
        (1..=most).min_by_key(|&splits| cost(splits)).unwrap_or(1)
    }
}

impl Tile for SparseMlaTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = SparseMlaDims;

    fn safe(_dims: Self::Dims) -> Self {
        Self { warps: 2, stages: 2, split_blocks: 2, through_l1: true }
    }

    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self> {
        let rings = [(1, 2, 4), (2, 2, 1), (2, 2, 2), (2, 3, 1), (3, 2, 1), (4, 2, 1), (4, 3, 1)];
        rings
            .into_iter()
            .flat_map(|ring| [true, false].map(|through_l1| (ring, through_l1)))
            .map(|((warps, stages, split_blocks), through_l1)| Self {
                warps,
                stages,
                split_blocks,
                through_l1,
            })
            .filter(|tile| tile.validate(dims, limits).is_ok())
            .collect()
    }

    fn validate(&self, dims: Self::Dims, limits: &Limits) -> Result<()> {
        // Lanes hold the output and the queries of their warp: 128 and 72 registers at 512 + 64.
        require(self, (1..=8).contains(&self.warps), || {
            "a block has 1 to 8 warps, of 255 registers each".into()
        })?;
        require(self, (2..=4).contains(&self.stages), || "a warp holds 2 to 4 steps".into())?;
        require(self, (1..=16).contains(&self.split_blocks), || "1 to 16 blocks are resident".into())?;
        dims.require(self, 8)?;
        require_shared(self, self.shared_bytes(dims, false).max(self.shared_bytes(dims, true)), limits)
    }
}

/// Every variant of a tile, and what adds up its splits.
pub fn programs(tile: &SparseMlaTile, dims: SparseMlaDims) -> Vec<ProgramEntry> {
    let each = [false, true];
    let variants = each.into_iter().flat_map(|fp8| each.map(|split| (fp8, split)));
    variants
        .flat_map(|(fp8, split)| each.map(|whole_groups| Variant { fp8, split, whole_groups }))
        .map(|variant| ProgramEntry {
            program: tile.program(dims, variant),
            entry: KERNEL,
            threads: tile.threads(),
            shared_bytes: tile.shared_bytes(dims, variant.fp8),
            variant: format!(
                "{} cache{}{}",
                if variant.fp8 { "8-bit" } else { "bf16" },
                if variant.split { ", split" } else { "" },
                if variant.whole_groups { "" } else { ", some heads" }
            ),
        })
        .chain(sparse_mla_merge::programs(dims))
        .chain(absorb_merged::programs(dims))
        .collect()
}

/// The contract's arguments, but for the output.
#[derive(Debug)]
pub(crate) struct Inputs<'a, D: Device> {
    pub batch: &'a CudaBatch<D>,
    pub q: &'a CudaTensor<D>,
    pub cache: &'a CudaTensor<D>,
    pub topk_indices: &'a CudaTensor<D>,
    pub scale: f64,
}

/// The shapes of a call that fits the contract.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shapes {
    pub tokens: usize,
    pub heads: usize,
    pub dims: SparseMlaDims,
    pub k: usize,
    pub cache_rows: i32,
}

impl<D: Device> Inputs<'_, D> {
    pub(crate) fn check(&self, out: &CudaTensor<D>) -> Result<Shapes> {
        let Self { batch, q, cache, topk_indices, .. } = self;
        let tokens = batch.host().num_tokens();
        let (heads, width) = queries(KERNEL, q, tokens)?;
        let dims = output(KERNEL, out, tokens, heads, width)?;
        let cache_rows = slots(KERNEL, cache, batch.host().page_size, width, dims.row().row_bytes())?;
        let k = selected(KERNEL, topk_indices, tokens)?;
        Ok(Shapes { tokens, heads, dims, k, cache_rows })
    }
}

/// Groups of tokens that the wide kernel has done.
#[derive(Debug)]
pub(crate) struct Done<'a, D: Device> {
    pub union: &'a SparseMlaUnionWorkspace<D>,
    pub group: usize,
    pub most: usize,
}

/// Attention of groups of up to 8 heads, at least one, of inputs that fit the contract: what is not `done`. The partial results, if there
/// are several, are still to be merged.
pub(crate) fn sparse_mla_narrow<'w, D: Device>(
    device: &D,
    tile: &SparseMlaTile,
    workspace: &'w SparseMlaWorkspace<D>,
    inputs: &Inputs<'_, D>,
    shapes: Shapes,
    done: Option<&Done<'_, D>>,
    out: &mut CudaTensor<D>,
) -> Result<Option<Partials<'w, D>>> {
    let Shapes { tokens, heads, dims, k, .. } = shapes;
    let Inputs { batch, q, cache, topk_indices, scale } = inputs;
    tile.validate(dims, device.limits())?;
    let groups = heads.div_ceil(HEADS);
    let splits = if done.is_some() { 1 } else { tile.splits(tokens * groups, k, device.limits()) };
    let partials = workspace.partials(tokens * heads, splits)?;
    let [partial_out, partial_max, partial_sum] = Partials::args(partials.as_ref());
    let fp8 = cache.dtype() == DType::Fp8;
    let variant = Variant { fp8, split: partials.is_some(), whole_groups: heads.is_multiple_of(HEADS) };
    device.launch(&Launch {
        program: &tile.program(dims, variant),
        entry: KERNEL,
        grid: [tokens as u32, groups as u32, splits as u32],
        threads: tile.threads(),
        shared_bytes: tile.shared_bytes(dims, fp8),
        shape: format!("{tokens} tokens, {heads} heads, {k} places, {}, {splits} splits", cache.dtype()),
        args: &[
            Arg::Buffer(q.buffer()),
            Arg::Buffer(cache.buffer()),
            Arg::Buffer(topk_indices.buffer()),
            Arg::Buffer(&batch.seq_ids),
            Arg::Buffer(&batch.block_table),
            Arg::Buffer(out.buffer()),
            partial_out,
            partial_max,
            partial_sum,
            done.map_or(Arg::Null, |done| Arg::Buffer(&done.union.counts)),
            Arg::I32(done.map_or(1, |done| done.group as i32)),
            Arg::I32(done.map_or(0, |done| done.most.min(i32::MAX as usize) as i32)),
            Arg::I32(heads as i32),
            Arg::I32(k as i32),
            Arg::I32(batch.host().page_size as i32),
            Arg::I32(batch.host().max_blocks as i32),
            Arg::F32((scale * std::f64::consts::LOG2_E) as f32),
        ],
    })?;
    Ok(partials)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_a_gpu_and_the_workspace_holds_them() {
        let glm = SparseMlaDims { kv_lora_rank: 512, rope: 64 };
        let limits = Limits { multiprocessors: 132, ..Limits::a100() };
        let tile = SparseMlaTile::safe(glm);
        let splits = |rows| tile.splits(rows, 2048, &limits);
        assert_eq!([1, 4, 8, 16, 32, 2048].map(splits), [32, 32, 16, 16, 8, 1]);
        for rows in 1..300 {
            for k in [0, 1, 16, 100, 2048] {
                let splits = tile.splits(rows, k, &limits);
                assert!(splits == 1 || rows * splits <= MAX_WAVES * tile.slots(&limits));
                assert!((1..=k.div_ceil(KEYS).max(1)).contains(&splits));
            }
        }
    }
}
