//! `sparse_mla_union`: the cache rows that neighbouring tokens select together, for [`sparse_mla_wide`](crate::sparse_mla_wide).

use dsa80_reference::{Batch, Error, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::sparse_mla_dims::selected;
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "sparse_mla_union";

/// Cache rows that an entry can name beside its byte of tokens: a sign bit and eight bits are taken.
pub const MAX_CACHE_ROWS: usize = 1 << 23;

/// The constants of `sparse_mla_union`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SparseMlaUnionTile {
    /// Threads of a block.
    pub threads: u32,
    /// Blocks on a multiprocessor that registers are limited for.
    pub blocks: u32,
    /// Positions whose tokens are collected at a time, a byte of shared memory each.
    pub window: u32,
}

impl SparseMlaUnionTile {
    fn shared_bytes(&self) -> usize {
        let (members, counts) = (self.window, self.threads / 32 * 4);
        (members + counts) as usize
    }

    fn program(&self, group: usize) -> Program {
        Program {
            source: "sparse_mla_union.cu",
            defines: vec![
                ("TILE_THREADS", self.threads.to_string()),
                ("TILE_BLOCKS", self.blocks.to_string()),
                ("TILE_WINDOW", self.window.to_string()),
                ("TILE_TOKENS", group.to_string()),
                ("TILE_SHARED_BYTES", self.shared_bytes().to_string()),
            ],
        }
    }
}

impl Tile for SparseMlaUnionTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = ();

    fn safe((): ()) -> Self {
        Self { threads: 512, blocks: 2, window: 32768 }
    }

    fn candidates((): (), limits: &Limits) -> Vec<Self> {
        let tiles = [(512, 2), (512, 4), (1024, 1), (1024, 2)].into_iter().flat_map(|(threads, blocks)| {
            [16384, 32768, 65536].map(|window| Self { threads, blocks, window })
        });
        tiles.filter(|tile| tile.validate((), limits).is_ok()).collect()
    }

    fn validate(&self, (): (), limits: &Limits) -> Result<()> {
        require(self, (32..=1024).contains(&self.threads) && self.threads.is_multiple_of(32), || {
            "a block has whole warps, 1024 threads at most".into()
        })?;
        require(
            self,
            self.blocks > 0 && self.blocks * self.threads <= limits.threads_per_multiprocessor,
            || format!("{} has {} threads a multiprocessor", limits.name, limits.threads_per_multiprocessor),
        )?;
        require(self, self.window > 0 && self.window.is_multiple_of(4 * self.threads), || {
            "a window is not four positions, or a multiple, for each thread".into()
        })?;
        require_shared(self, self.shared_bytes(), limits)
    }
}

/// Every variant of a tile.
pub fn programs(tile: &SparseMlaUnionTile) -> Vec<ProgramEntry> {
    [2, 4, 8]
        .map(|group| ProgramEntry {
            program: tile.program(group),
            entry: KERNEL,
            threads: tile.threads,
            shared_bytes: tile.shared_bytes(),
            variant: format!("{group} tokens"),
        })
        .into()
}

/// The unions of a step's token groups, in device memory.
#[derive(Debug)]
pub struct SparseMlaUnionWorkspace<D: Device> {
    pub(crate) entries: D::Buffer,
    pub(crate) counts: D::Buffer,
    /// Places of `entries`.
    capacity: usize,
}

impl<D: Device> SparseMlaUnionWorkspace<D> {
    /// For steps of up to `max_tokens` tokens that select up to `max_k` rows: `4 * (max_tokens + 8) * max_k` bytes, and 4 for each
    /// two tokens.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, max_tokens: usize, max_k: usize) -> Result<Self> {
        let capacity = (max_tokens + 8) * max_k;
        Ok(Self {
            entries: device.alloc("sparse_mla union", 4 * capacity)?,
            counts: device.alloc("sparse_mla union counts", 4 * max_tokens.div_ceil(2))?,
            capacity,
        })
    }

    /// `[groups, group * k]` `i32`: cache row << 8 | a bit for each token, ascending in position.
    pub fn entries(&self) -> &D::Buffer {
        &self.entries
    }

    /// `[groups]` `i32`: how many of them there are.
    pub fn counts(&self) -> &D::Buffer {
        &self.counts
    }
}

/// What a launch moves: the selections once, and at least the rows of one token of each group.
pub fn cost(batch: &Batch, group: usize, k: usize) -> Cost {
    let tokens = batch.num_tokens();
    Cost { bytes: (4 * k * (tokens + tokens.div_ceil(group))) as f64, flops: 0.0 }
}

/// Collects, for every `group` (2, 4 or 8) neighbouring token rows, the cache rows that any of them selects, with who selects them.
/// The rows that one token selects must be distinct.
///
/// # Errors
/// A tensor does not fit the contract; the workspace is too small; the launch fails.
pub fn sparse_mla_union<D: Device>(
    device: &D,
    tile: &SparseMlaUnionTile,
    workspace: &SparseMlaUnionWorkspace<D>,
    batch: &CudaBatch<D>,
    topk_indices: &CudaTensor<D>,
    group: usize,
) -> Result<()> {
    let host = batch.host();
    let tokens = host.num_tokens();
    let k = selected(KERNEL, topk_indices, tokens)?;
    let groups = tokens.div_ceil(group);
    if groups * group * k > workspace.capacity {
        return Err(Error::Capacity {
            shape: vec![groups, group * k],
            elements: groups * group * k,
            capacity: workspace.capacity,
        });
    }
    tile.validate((), device.limits())?;
    if tokens == 0 {
        return Ok(());
    }
    device.launch(&Launch {
        program: &tile.program(group),
        entry: KERNEL,
        grid: [groups as u32, 1, 1],
        threads: tile.threads,
        shared_bytes: tile.shared_bytes(),
        shape: format!("{groups} groups of {group} tokens, k {k}"),
        args: &[
            Arg::Buffer(topk_indices.buffer()),
            Arg::Buffer(&batch.positions),
            Arg::Buffer(&batch.seq_ids),
            Arg::Buffer(&batch.block_table),
            Arg::Buffer(&workspace.entries),
            Arg::Buffer(&workspace.counts),
            Arg::I32(tokens as i32),
            Arg::I32(k as i32),
            Arg::I32(host.page_size as i32),
            Arg::I32(host.max_blocks as i32),
        ],
    })
}
