//! `sparse_mla` for 64 query rows that share their keys: many heads of a token, or few heads of neighbouring tokens.

use dsa80_reference::{DType, Error, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::sparse_mla_dims::{SparseMlaDims, output, queries, selected};
use crate::sparse_mla_merge::Partials;
use crate::sparse_mla_union::{MAX_CACHE_ROWS, SparseMlaUnionWorkspace};
use crate::tensor::CudaTensor;
use crate::tile::{Tile, require, require_shared};

const KERNEL: &str = "sparse_mla_wide";

/// Query rows of a block.
pub const QUERIES: usize = 64;

const THREADS: u32 = 256;

/// The constants of `sparse_mla_wide`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SparseMlaWideTile {
    /// Keys of a tile.
    pub keys: usize,
    /// Tiles of keys in shared memory.
    pub stages: usize,
    /// Whether keys are gathered through the L1.
    pub l1: bool,
}

impl SparseMlaWideTile {
    fn shared_bytes(&self, dims: SparseMlaDims) -> usize {
        let keys = self.stages * self.keys * 2 * (dims.width() + 8);
        let exchange = 4 * QUERIES * self.keys;
        let (maxima, factors, members) = (2 * 4 * QUERIES, 4 * QUERIES, self.stages * self.keys);
        keys + exchange + maxima + factors + members
    }

    fn program(&self, dims: SparseMlaDims, group: usize, split: bool) -> Program {
        Program::new(
            "sparse_mla_wide.cu",
            [
                ("KV_LORA_RANK", dims.kv_lora_rank),
                ("ROPE_DIM", dims.rope),
                ("TILE_KEYS", self.keys),
                ("TILE_L1", usize::from(self.l1)),
                ("TILE_STAGES", self.stages),
                ("TILE_TOKENS", group),
                ("TILE_SHARED_BYTES", self.shared_bytes(dims)),
                ("SPLIT", usize::from(split)),
            ],
        )
    }
}

impl Tile for SparseMlaWideTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = SparseMlaDims;

    fn safe(_dims: Self::Dims) -> Self {
        Self { keys: 64, stages: 2, l1: false }
    }

    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self> {
        let rings = [(64, 2), (32, 4), (32, 3)];
        rings
            .into_iter()
            .flat_map(|(keys, stages)| [false, true].map(|l1| Self { keys, stages, l1 }))
            .filter(|tile| tile.validate(dims, limits).is_ok())
            .collect()
    }

    fn validate(&self, dims: Self::Dims, limits: &Limits) -> Result<()> {
        require(self, matches!(self.keys, 32 | 64), || "a tile has 32 or 64 keys".into())?;
        require(self, (2..=8).contains(&self.stages) && self.keys * (self.stages - 1) >= QUERIES, || {
            format!("the {QUERIES} queries pass through all stages but the first, 8 at most")
        })?;
        // A thread holds an eighth of its warp's output columns and its part of the queries: 200 registers at 512 + 64.
        dims.require(self, 16)?;
        require_shared(self, self.shared_bytes(dims), limits)
    }
}

/// Every variant of a tile.
pub fn programs(tile: &SparseMlaWideTile, dims: SparseMlaDims) -> Vec<ProgramEntry> {
    let variants = [1, 2, 4, 8].into_iter().flat_map(|group| [false, true].map(|split| (group, split)));
    variants
        .map(|(group, split)| ProgramEntry {
            program: tile.program(dims, group, split),
            entry: KERNEL,
            threads: THREADS,
            shared_bytes: tile.shared_bytes(dims),
            variant: format!("{group} tokens{}", if split { ", split" } else { "" }),
        })
        .collect()
}

/// Whose keys a block reads.
#[derive(Debug, Clone, Copy)]
pub enum Selection<'a, D: Device> {
    /// One token's, `[T, k]` positions or -1.
    Token(&'a CudaTensor<D>),
    /// The union of `group` tokens' selections of `k` rows each; groups with more than `most` rows in it are left alone.
    Group {
        /// What [`sparse_mla_union`](crate::sparse_mla_union::sparse_mla_union) wrote, of the same batch and group.
        union: &'a SparseMlaUnionWorkspace<D>,
        /// Token rows that share a block.
        group: usize,
        /// Rows that each of them selects.
        k: usize,
        /// Rows of a union that is still worth its masked products.
        most: usize,
    },
}

/// `sparse_mla` of a bf16 cache, 64 query rows a block. With `partials` it writes those and not `out`.
///
/// # Errors
/// A tensor does not fit the contract; the tile does not fit the device; the launch fails.
pub fn sparse_mla_wide<D: Device>(
    device: &D,
    tile: &SparseMlaWideTile,
    batch: &CudaBatch<D>,
    q: &CudaTensor<D>,
    cache: &CudaTensor<D>,
    selection: Selection<'_, D>,
    scale: f64,
    partials: Option<&Partials<'_, D>>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let host = batch.host();
    let tokens = host.num_tokens();
    let (heads, width) = queries(KERNEL, q, tokens)?;
    let dims = output(KERNEL, out, tokens, heads, width)?;
    let [pages, page_size, cache_width] = cache.dims(KERNEL, "cache")?;
    cache.expect_dtype(KERNEL, "cache", &[DType::Act], "bf16 rows")?;
    let max_rows = match selection {
        Selection::Token(_) => i32::MAX as usize,
        Selection::Group { .. } => MAX_CACHE_ROWS,
    };
    cache.expect(
        KERNEL,
        "cache",
        (page_size, cache_width) == (host.page_size, width) && pages * page_size < max_rows,
        || format!("[pages, {}, {width}] with fewer than {max_rows} rows", host.page_size),
    )?;
    let (group, places, most) = match selection {
        Selection::Token(topk_indices) => {
            let k = selected(KERNEL, topk_indices, tokens)?;
            (1, k, k)
        }
        Selection::Group { group, k, most, .. } => (group, group * k, most),
    };
    // Places in the lists and in the block table are counted in 32 bits.
    let (lists, table) = (tokens.div_ceil(group) * places, host.num_seqs() * host.max_blocks);
    if lists.max(table) >= i32::MAX as usize {
        let (expected, found) = ("fewer than 2^31 - 1".to_owned(), lists.max(table).to_string());
        return Err(Error::Value { kernel: KERNEL, name: "places", expected, found });
    }
    tile.validate(dims, device.limits())?;
    if tokens == 0 || heads == 0 {
        return Ok(());
    }
    let (entries, counts) = match selection {
        Selection::Token(topk_indices) => (Arg::Buffer(topk_indices.buffer()), Arg::Null),
        Selection::Group { union, .. } => (Arg::Buffer(union.entries()), Arg::Buffer(union.counts())),
    };
    let splits = partials.map_or(1, |partials| partials.splits);
    let [partial_out, partial_max, partial_sum] = Partials::args(partials);
    device.launch(&Launch {
        program: &tile.program(dims, group, partials.is_some()),
        entry: KERNEL,
        grid: [tokens.div_ceil(group) as u32, heads.div_ceil(QUERIES / group) as u32, splits as u32],
        threads: THREADS,
        shared_bytes: tile.shared_bytes(dims),
        shape: format!(
            "{tokens} tokens in groups of {group}, {heads} heads, {places} places, {splits} splits"
        ),
        args: &[
            Arg::Buffer(q.buffer()),
            Arg::Buffer(cache.buffer()),
            entries,
            counts,
            Arg::Buffer(&batch.seq_ids),
            Arg::Buffer(&batch.block_table),
            Arg::Buffer(out.buffer()),
            partial_out,
            partial_max,
            partial_sum,
            Arg::I32(tokens as i32),
            Arg::I32(heads as i32),
            Arg::I32(places as i32),
            Arg::I32(page_size as i32),
            Arg::I32(host.max_blocks as i32),
            Arg::I32(most.min(i32::MAX as usize) as i32),
            Arg::F32((scale * std::f64::consts::LOG2_E) as f32),
        ],
    })
}
