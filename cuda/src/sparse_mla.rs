//! `sparse_mla`: attention over the selected latent rows.
//!
//! Three ways lead to the same result. Eight heads fill the tensor core's columns in the kernel of this file,
//! [`sparse_mla_narrow`], for every cache. From [`SparseMlaTiles::wide_heads`] heads on, 64 query rows share their
//! keys in [`sparse_mla_wide`]. And in long chunks with fewer heads, neighbouring tokens that select much the same rows
//! share those of [`sparse_mla_union`]; which tokens do is known on the device alone, so both kernels are launched, and
//! each leaves the other's tokens alone.

use dsa80_reference::fp8::MlaRow;
use dsa80_reference::{DType, DeviceTensor, Error, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::slots;
use crate::sparse_mla_union::{
    MAX_CACHE_ROWS, SparseMlaUnionTile, SparseMlaUnionWorkspace, sparse_mla_union,
};
use crate::sparse_mla_wide::{
    Partials, QUERIES, Selection, SparseMlaWideDims, SparseMlaWideTile, sparse_mla_wide,
};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "sparse_mla";

/// Heads of a block.
const HEADS: usize = 8;

/// Keys of a warp's step.
const KEYS: usize = 16;

/// Columns of a merging block.
const MERGE_COLUMNS: usize = 128;

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

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseMlaDims {
    /// Columns of the latent part, which are also the values.
    pub kv_lora_rank: usize,
    /// Columns of the rotary key part.
    pub rope: usize,
}

impl SparseMlaDims {
    fn width(self) -> usize {
        self.kv_lora_rank + self.rope
    }

    fn wide(self) -> SparseMlaWideDims {
        SparseMlaWideDims { kv_lora_rank: self.kv_lora_rank, rope: self.rope }
    }

    fn row(self) -> MlaRow {
        MlaRow { kv_lora_rank: self.kv_lora_rank, rope: self.rope }
    }

    fn row_bytes(self, fp8: bool) -> usize {
        if fp8 { self.row().row_bytes() } else { 2 * self.width() }
    }
}

impl SparseMlaTile {
    fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    fn shared_bytes(&self, dims: SparseMlaDims, fp8: bool) -> usize {
        // An odd number of 16-byte chunks from row to row.
        let stride = 16 * ((dims.row_bytes(fp8) / 16) | 1);
        let rows = self.warps * self.stages * KEYS * stride;
        let queries = if fp8 { HEADS * ((2 * dims.width()).next_multiple_of(128) + 32) } else { 0 };
        let maxima_and_sums = 2 * 4 * HEADS * self.warps;
        rows + queries + maxima_and_sums
    }

    fn program(&self, dims: SparseMlaDims, fp8: bool, split: bool) -> Program {
        Program {
            source: "sparse_mla.cu",
            defines: vec![
                ("KV_LORA_RANK", dims.kv_lora_rank.to_string()),
                ("ROPE_DIM", dims.rope.to_string()),
                ("FP8", u8::from(fp8).to_string()),
                ("SPLIT", u8::from(split).to_string()),
                ("TILE_WARPS", self.warps.to_string()),
                ("TILE_STAGES", self.stages.to_string()),
                ("TILE_THROUGH_L1", u8::from(self.through_l1).to_string()),
                ("TILE_SHARED_BYTES", self.shared_bytes(dims, fp8).to_string()),
            ],
        }
    }

    /// Blocks that are resident at a time.
    fn slots(&self, limits: &Limits) -> usize {
        self.split_blocks * limits.multiprocessors as usize
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
        let SparseMlaDims { kv_lora_rank: rank, rope } = dims;
        // Lanes hold the output and the queries of their warp: 128 and 72 registers at 512 + 64.
        require(self, (1..=8).contains(&self.warps), || {
            "a block has 1 to 8 warps, of 255 registers each".into()
        })?;
        require(self, (2..=4).contains(&self.stages), || "a warp holds 2 to 4 steps".into())?;
        require(self, (1..=16).contains(&self.split_blocks), || "1 to 16 blocks are resident".into())?;
        require(self, rank > 0 && rank.is_multiple_of(16) && rank <= 512, || {
            format!("a latent of {rank} columns is not a multiple of 16 up to 512")
        })?;
        require(self, rope > 0 && rope.is_multiple_of(16) && rope <= 64, || {
            format!("{rope} rotary columns are not a multiple of 16 up to 64")
        })?;
        require_shared(self, self.shared_bytes(dims, false).max(self.shared_bytes(dims, true)), limits)
    }
}

/// The kernel that adds up splits. Its warps share them; each can have eight under way.
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
        Program {
            source: "sparse_mla_merge.cu",
            defines: vec![
                ("KV_LORA_RANK", dims.kv_lora_rank.to_string()),
                ("TILE_WARPS", self.warps.to_string()),
                ("TILE_SHARED_BYTES", self.shared_bytes().to_string()),
            ],
        }
    }
}

/// Every variant of a tile.
pub fn programs(tile: &SparseMlaTile, dims: SparseMlaDims) -> Vec<ProgramEntry> {
    let merges = [1, 2, 4, 8].map(|warps| Merge { warps }).map(|merge| ProgramEntry {
        program: merge.program(dims),
        entry: "sparse_mla_merge",
        threads: merge.threads(),
        shared_bytes: merge.shared_bytes(),
        variant: format!("merge, {} warps", merge.warps),
    });
    let variants = [false, true].into_iter().flat_map(|fp8| [false, true].map(|split| (fp8, split)));
    variants
        .map(|(fp8, split)| ProgramEntry {
            program: tile.program(dims, fp8, split),
            entry: KERNEL,
            threads: tile.threads(),
            shared_bytes: tile.shared_bytes(dims, fp8),
            variant: format!(
                "{} cache{}",
                if fp8 { "8-bit" } else { "bf16" },
                if split { ", split" } else { "" }
            ),
        })
        .chain(merges)
        .collect()
}

/// The tiles of all ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseMlaTiles {
    /// For few tokens, whose rows are shared out among blocks.
    pub decode: SparseMlaTile,
    /// For many.
    pub prefill: SparseMlaTile,
    /// For many heads, few tokens.
    pub wide_decode: SparseMlaWideTile,
    /// For many heads, many tokens, and for tokens that share rows.
    pub wide_prefill: SparseMlaWideTile,
    /// Which rows they share.
    pub union: SparseMlaUnionTile,
    /// From this many heads on, 64 query rows share their keys.
    pub wide_heads: usize,
    /// From this many token rows a sequence on, tokens with fewer heads may share rows; 0 for never.
    pub union_tokens: usize,
    /// How many times the rows of one token the union of a group may have and still be worth masked products, in quarters.
    pub union_quarters: usize,
}

impl SparseMlaTiles {
    /// Tiles that fit any device.
    pub fn safe(dims: SparseMlaDims) -> Self {
        let wide = SparseMlaWideTile::safe(dims.wide());
        Self {
            decode: SparseMlaTile::safe(dims),
            prefill: SparseMlaTile::safe(dims),
            wide_decode: wide,
            wide_prefill: wide,
            union: SparseMlaUnionTile::safe(()),
            wide_heads: 24,
            union_tokens: 256,
            union_quarters: 12,
        }
    }
}

/// What splits hand to who adds them up, and what tokens select together.
#[derive(Debug)]
pub struct SparseMlaWorkspace<D: Device> {
    partial_out: D::Buffer,
    partial_max: D::Buffer,
    partial_sum: D::Buffer,
    /// Heads of a token times splits.
    capacity: usize,
    union: Option<SparseMlaUnionWorkspace<D>>,
}

impl<D: Device> SparseMlaWorkspace<D> {
    /// For steps of up to `max_tokens` tokens with `heads` heads that select up to `max_k` rows each, with `tiles`:
    /// `4 * (kv_lora_rank + 2)` bytes for every head and split, of which a multiprocessor needs at most
    /// `max(32 * split_blocks, 64)`; and what the unions need, if there can be any.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(
        device: &D,
        tiles: &SparseMlaTiles,
        dims: SparseMlaDims,
        max_tokens: usize,
        heads: usize,
        max_k: usize,
    ) -> Result<Self> {
        let limits = device.limits();
        let narrow = tiles.decode.slots(limits).max(tiles.prefill.slots(limits)) * MAX_WAVES * HEADS;
        let wide = limits.multiprocessors as usize * QUERIES;
        let capacity = narrow.max(wide).max(heads);
        let union = (union_group(tiles, heads, max_tokens) > 1)
            .then(|| SparseMlaUnionWorkspace::alloc(device, max_tokens, max_k))
            .transpose()?;
        Ok(Self {
            partial_out: device.alloc("sparse_mla partial_out", 4 * capacity * dims.kv_lora_rank)?,
            partial_max: device.alloc("sparse_mla partial_max", 4 * capacity)?,
            partial_sum: device.alloc("sparse_mla partial_sum", 4 * capacity)?,
            capacity,
            union,
        })
    }

    fn partials(&self, splits: usize) -> Partials<'_, D> {
        Partials { splits, out: &self.partial_out, max: &self.partial_max, sum: &self.partial_sum }
    }

    fn reserve(&self, heads: usize, splits: usize) -> Result<()> {
        let elements = heads * splits;
        if elements <= self.capacity {
            return Ok(());
        }
        Err(Error::Capacity { shape: vec![heads, splits], elements, capacity: self.capacity })
    }
}

/// Tokens that share rows in chunks of `tokens` token rows; 1 if none do.
fn union_group(tiles: &SparseMlaTiles, heads: usize, tokens: usize) -> usize {
    if tiles.union_tokens == 0 || tokens < tiles.union_tokens || heads >= tiles.wide_heads {
        return 1;
    }
    match heads {
        0..=8 => 8,
        9..=16 => 4,
        17..=32 => 2,
        _ => 1,
    }
}

/// The bytes of the selected rows, of the queries, places and output, and the operations of both products. Of a row that several tokens
/// select every selection counts: that they are the same is not known on the host.
pub fn cost(tokens: usize, heads: usize, k: usize, dims: SparseMlaDims, fp8: bool) -> Cost {
    let rows = (tokens * k) as f64;
    let queries_and_output = 2 * tokens * heads * (dims.width() + dims.kv_lora_rank);
    Cost {
        bytes: rows * (dims.row_bytes(fp8) + 4) as f64 + queries_and_output as f64,
        flops: rows * (2 * heads * (dims.width() + dims.kv_lora_rank)) as f64,
    }
}

/// The shapes of a call that fits the contract.
#[derive(Debug, Clone, Copy)]
struct Shapes {
    tokens: usize,
    heads: usize,
    dims: SparseMlaDims,
    k: usize,
    cache_rows: i32,
}

impl Shapes {
    fn check<D: Device>(
        batch: &CudaBatch<D>,
        q: &CudaTensor<D>,
        cache: &CudaTensor<D>,
        topk_indices: &CudaTensor<D>,
        out: &CudaTensor<D>,
    ) -> Result<Self> {
        let tokens = batch.host().num_tokens();
        let [q_tokens, heads, width] = q.dims(KERNEL, "q")?;
        q.expect_dtype(KERNEL, "q", &[DType::Act], "activations")?;
        q.expect(KERNEL, "q", q_tokens == tokens && heads.is_multiple_of(HEADS), || {
            format!("[{tokens}, H, kv_lora_rank + rope] with a multiple of {HEADS} heads")
        })?;
        let [out_tokens, out_heads, rank] = out.dims(KERNEL, "out")?;
        out.expect_dtype(KERNEL, "out", &[DType::Act], "activations")?;
        out.expect(KERNEL, "out", (out_tokens, out_heads) == (tokens, heads) && rank <= width, || {
            format!("[{tokens}, {heads}, kv_lora_rank] with kv_lora_rank at most {width}")
        })?;
        let dims = SparseMlaDims { kv_lora_rank: rank, rope: width - rank };
        let cache_rows = slots(KERNEL, cache, batch.host().page_size, width, dims.row().row_bytes())?;
        let [index_tokens, k] = topk_indices.dims(KERNEL, "topk_indices")?;
        topk_indices.expect_dtype(KERNEL, "topk_indices", &[DType::Index], "indices")?;
        topk_indices.expect(KERNEL, "topk_indices", index_tokens == tokens, || format!("[{tokens}, k]"))?;
        Ok(Self { tokens, heads, dims, k, cache_rows })
    }
}

/// The kernel of the contract's [`sparse_mla`](dsa80_reference::Kernels::sparse_mla), for multiples of 8 heads; the rows
/// that a token selects must be distinct.
///
/// # Errors
/// A shape, element type or tile that does not fit; a workspace that is too small; the device.
pub fn sparse_mla<D: Device>(
    device: &D,
    tiles: &SparseMlaTiles,
    workspace: &SparseMlaWorkspace<D>,
    batch: &CudaBatch<D>,
    q: &CudaTensor<D>,
    cache: &CudaTensor<D>,
    topk_indices: &CudaTensor<D>,
    scale: f64,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let Shapes { tokens, heads, dims, k, cache_rows } = Shapes::check(batch, q, cache, topk_indices, out)?;
    let many = tokens * heads / HEADS > device.limits().multiprocessors as usize;
    let narrow = if many { &tiles.prefill } else { &tiles.decode };
    if cache.dtype() == DType::Fp8 {
        return sparse_mla_narrow(device, narrow, workspace, batch, q, cache, topk_indices, scale, out);
    }
    if heads >= tiles.wide_heads {
        let rows = tokens * heads.div_ceil(QUERIES);
        let splits = wide_splits(rows, k, device.limits());
        let wide = if splits > 1 { &tiles.wide_decode } else { &tiles.wide_prefill };
        workspace.reserve(tokens * heads, if splits > 1 { splits } else { 0 })?;
        let partials = (splits > 1).then(|| workspace.partials(splits));
        sparse_mla_wide(device, wide, batch, q, cache, Selection::Token(topk_indices), scale, partials, out)?;
        return if splits > 1 { merge(device, workspace, dims, splits, out) } else { Ok(()) };
    }
    let group = union_group(tiles, heads, tokens / batch.host().num_seqs().max(1));
    let union = workspace.union.as_ref().filter(|_| group > 1 && (cache_rows as usize) < MAX_CACHE_ROWS);
    let Some(union) = union else {
        return sparse_mla_narrow(device, narrow, workspace, batch, q, cache, topk_indices, scale, out);
    };
    let most = k * tiles.union_quarters / 4;
    sparse_mla_union(device, &tiles.union, union, batch, topk_indices, group)?;
    let selection = Selection::Group { union, group, k, most };
    sparse_mla_wide(device, &tiles.wide_prefill, batch, q, cache, selection, scale, None, out)?;
    let done = Done { union, group, most };
    narrow_launch(device, narrow, workspace, batch, q, cache, topk_indices, scale, Some(&done), out)
}

/// Groups of tokens that the wide kernel has done.
#[derive(Debug)]
struct Done<'a, D: Device> {
    union: &'a SparseMlaUnionWorkspace<D>,
    group: usize,
    most: usize,
}

/// [`sparse_mla`] with the kernel for groups of 8 heads.
///
/// # Errors
/// A shape, element type or tile that does not fit; a workspace that is too small; the device.
pub fn sparse_mla_narrow<D: Device>(
    device: &D,
    tile: &SparseMlaTile,
    workspace: &SparseMlaWorkspace<D>,
    batch: &CudaBatch<D>,
    q: &CudaTensor<D>,
    cache: &CudaTensor<D>,
    topk_indices: &CudaTensor<D>,
    scale: f64,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    narrow_launch(device, tile, workspace, batch, q, cache, topk_indices, scale, None, out)
}

fn narrow_launch<D: Device>(
    device: &D,
    tile: &SparseMlaTile,
    workspace: &SparseMlaWorkspace<D>,
    batch: &CudaBatch<D>,
    q: &CudaTensor<D>,
    cache: &CudaTensor<D>,
    topk_indices: &CudaTensor<D>,
    scale: f64,
    done: Option<&Done<'_, D>>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let Shapes { tokens, heads, dims, k, .. } = Shapes::check(batch, q, cache, topk_indices, out)?;
    tile.validate(dims, device.limits())?;
    let groups = heads / HEADS;
    if tokens * groups == 0 {
        return Ok(());
    }
    let splits = if done.is_some() { 1 } else { tile.splits(tokens * groups, k, device.limits()) };
    let split = splits > 1;
    if split {
        workspace.reserve(tokens * heads, splits)?;
    }
    let partial = |buffer| if split { Arg::Buffer(buffer) } else { Arg::Null };
    let fp8 = cache.dtype() == DType::Fp8;
    device.launch(&Launch {
        program: &tile.program(dims, fp8, split),
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
            partial(&workspace.partial_out),
            partial(&workspace.partial_max),
            partial(&workspace.partial_sum),
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
    if split { merge(device, workspace, dims, splits, out) } else { Ok(()) }
}

/// Blocks that share the `k` rows of one of `rows` token groups in the wide kernel, of which a multiprocessor holds one.
fn wide_splits(rows: usize, k: usize, limits: &Limits) -> usize {
    (limits.multiprocessors as usize / rows.max(1)).min(k.div_ceil(QUERIES)).max(1)
}

fn merge<D: Device>(
    device: &D,
    workspace: &SparseMlaWorkspace<D>,
    dims: SparseMlaDims,
    splits: usize,
    out: &CudaTensor<D>,
) -> Result<()> {
    let heads = out.len() / dims.kv_lora_rank;
    let merge = Merge::of(splits);
    device.launch(&Launch {
        program: &merge.program(dims),
        entry: "sparse_mla_merge",
        grid: [heads as u32, dims.kv_lora_rank.div_ceil(MERGE_COLUMNS) as u32, 1],
        threads: merge.threads(),
        shared_bytes: merge.shared_bytes(),
        shape: format!("{heads} heads, {splits} splits"),
        args: &[
            Arg::Buffer(&workspace.partial_out),
            Arg::Buffer(&workspace.partial_max),
            Arg::Buffer(&workspace.partial_sum),
            Arg::Buffer(out.buffer()),
            Arg::I32(splits as i32),
        ],
    })
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
