//! `top_k`: the best positions of every row.

use std::ops::Range;

use dsa80_reference::{Batch, DType, DeviceTensor, Error, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const NAME: &str = "top_k";

/// Blocks that share a row at most: the last of them holds one number of each in a lane of a warp.
const MAX_PARTS: u32 = 32;

/// The constants of `top_k`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopKTile {
    /// Rows that fit the registers of a block.
    pub resident: Resident,
    /// Longer rows, enough of them to give each block its own.
    pub whole: Filtered,
    /// Longer rows, each shared by several blocks.
    pub split: Filtered,
    /// Blocks for every multiprocessor that rows are split to reach.
    pub split_blocks: u32,
    /// Bins of a histogram.
    pub bins: u32,
    /// Candidates for the last place that are compared each with each.
    pub ranked: u32,
}

/// A block that holds its row in registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    /// Threads of a block.
    pub threads: u32,
    /// Blocks on a multiprocessor that registers are limited for.
    pub blocks: u32,
    /// Vectors of four logits a thread.
    pub vectors: u32,
}

/// A block that reads its row, or its part of one, once, and keeps what may be selected in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filtered {
    /// Threads of a block.
    pub threads: u32,
    /// Blocks on a multiprocessor that registers are limited for.
    pub blocks: u32,
    /// Vectors of four logits that a thread has under way.
    pub vectors: u32,
    /// Elements of a row that are kept at most, for every thread.
    pub items: u32,
    /// Vectors of four logits that a thread samples.
    pub samples: u32,
    /// Positions that are put into order at a time.
    pub window: u32,
}

/// How one launch runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Resident,
    Whole,
    Split { parts: u32 },
}

impl TopKTile {
    /// The variant for `rows` rows of at most `columns` scores. Only what a captured graph fixes decides.
    fn variant(&self, rows: usize, columns: usize, limits: &Limits) -> Variant {
        // A row that does not start at a vector needs one more of them.
        let vectors = columns.div_ceil(4) + usize::from(columns % 4 != 0);
        if vectors <= (self.resident.threads * self.resident.vectors) as usize {
            return Variant::Resident;
        }
        let by_device = (limits.multiprocessors * self.split_blocks) as usize / rows.max(1);
        let by_row = vectors.div_ceil(self.split.threads as usize);
        match u32::try_from(by_device.min(by_row)).unwrap_or(MAX_PARTS).min(MAX_PARTS) {
            0 | 1 => Variant::Whole,
            parts => Variant::Split { parts: 1 << parts.ilog2() },
        }
    }

    /// The most rows that are split at a time.
    fn max_split_rows(&self, limits: &Limits) -> usize {
        (limits.multiprocessors * self.split_blocks) as usize / 2
    }

    /// Bytes of `Selection` in `top_k.cu`.
    fn selection_bytes(&self, threads: u32) -> u32 {
        let (histogram, ranked, warps) = (4 * self.bins, 8 * self.ranked, threads / 32);
        let (num_ranked, ranges_and_sums, found, kth) = (4, 12 * warps, 12, 8);
        histogram + ranked + num_ranked + ranges_and_sums + found + kth
    }

    /// Bytes of shared memory of a block.
    fn shared_bytes(&self, variant: Variant) -> usize {
        let filtered = |filtered: &Filtered| {
            let (list, marks, length, last) = (8 * filtered.threads * filtered.items, filtered.window / 8, 4, 4);
            self.selection_bytes(filtered.threads) + list + marks + length + last
        };
        let bytes = match variant {
            Variant::Resident => {
                let Resident { threads, vectors, .. } = self.resident;
                self.selection_bytes(threads) + 4 * vectors * (threads / 32)
            }
            Variant::Whole => filtered(&self.whole),
            Variant::Split { .. } => filtered(&self.split),
        };
        bytes as usize
    }

    fn threads(&self, variant: Variant) -> u32 {
        match variant {
            Variant::Resident => self.resident.threads,
            Variant::Whole => self.whole.threads,
            Variant::Split { .. } => self.split.threads,
        }
    }
}

fn program(tile: &TopKTile, variant: Variant) -> Program {
    let mut defines = vec![
        ("TILE_BINS", tile.bins.to_string()),
        ("TILE_RANKED", tile.ranked.to_string()),
        ("TILE_SHARED_BYTES", tile.shared_bytes(variant).to_string()),
    ];
    let mut define = |constants: &[(&'static str, u32)]| {
        defines.extend(constants.iter().map(|&(name, value)| (name, value.to_string())));
    };
    let filtered = match variant {
        Variant::Resident => None,
        Variant::Whole => Some((&tile.whole, 0)),
        Variant::Split { .. } => Some((&tile.split, 1)),
    };
    match filtered {
        None => define(&[
            ("TILE_THREADS", tile.resident.threads),
            ("TILE_BLOCKS", tile.resident.blocks),
            ("TILE_VECTORS", tile.resident.vectors),
        ]),
        Some((filtered, split)) => define(&[
            ("TILE_THREADS", filtered.threads),
            ("TILE_BLOCKS", filtered.blocks),
            ("TILE_VECTORS", filtered.vectors),
            ("TILE_ITEMS", filtered.items),
            ("TILE_SAMPLES", filtered.samples),
            ("TILE_WINDOW", filtered.window),
            ("TILE_SPLIT", split),
        ]),
    }
    Program { source: "top_k.cu", defines }
}

/// Every program of a tile.
pub fn programs(tile: &TopKTile) -> Vec<ProgramEntry> {
    [("resident", Variant::Resident), ("whole", Variant::Whole), ("split", Variant::Split { parts: 2 })]
        .map(|(name, variant)| ProgramEntry {
            program: program(tile, variant),
            entry: NAME,
            threads: tile.threads(variant),
            shared_bytes: tile.shared_bytes(variant),
            variant: name.to_owned(),
        })
        .into()
}

/// What the blocks that share a row hand to the last of them.
#[derive(Debug)]
pub struct TopKWorkspace<D: Device> {
    arrivals: D::Buffer,
    counts: D::Buffer,
    lists: D::Buffer,
}

impl<D: Device> TopKWorkspace<D> {
    /// For every launch with `tile`: `split_blocks / 2` rows for each multiprocessor, with `8 * split.threads * split.items + 132` bytes each.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, tile: &TopKTile) -> Result<Self> {
        let rows = tile.max_split_rows(device.limits());
        let arrivals = device.alloc("top_k arrivals", rows * 4)?;
        device.write(&arrivals, 0, &vec![0; rows * 4])?;
        Ok(Self {
            arrivals,
            counts: device.alloc("top_k counts", rows * 4 * MAX_PARTS as usize)?,
            lists: device.alloc("top_k lists", rows * 8 * (tile.split.threads * tile.split.items) as usize)?,
        })
    }
}

/// The bytes of the rows: each visible score of those that do not select everything once, and the places.
pub fn cost(batch: &Batch, rows: Range<usize>, k: usize) -> Cost {
    let bytes = |t| {
        let visible = batch.visible(t);
        4 * (1 + k + if visible > k { visible } else { 0 })
    };
    Cost { bytes: rows.map(bytes).sum::<usize>() as f64, flops: 0.0 }
}

/// The `k` best positions of every row, ascending; see the kernel contract.
///
/// # Errors
/// A tensor does not fit the contract; the launch fails.
pub fn top_k<D: Device>(
    device: &D,
    tile: &TopKTile,
    workspace: &TopKWorkspace<D>,
    batch: &CudaBatch<D>,
    rows: Range<usize>,
    logits: &CudaTensor<D>,
    topk_indices: &mut CudaTensor<D>,
) -> Result<()> {
    let host = batch.host();
    let tokens = host.num_tokens();
    if rows.start > rows.end || rows.end > tokens {
        let (expected, found) = (format!("a range inside the {tokens} token rows"), format!("{rows:?}"));
        return Err(Error::Value { kernel: NAME, name: "rows", expected, found });
    }
    let [out_rows, k] = topk_indices.dims(NAME, "topk_indices")?;
    topk_indices.expect_dtype(NAME, "topk_indices", &[DType::Index], "indices")?;
    topk_indices.expect(NAME, "topk_indices", out_rows == tokens, || format!("[{tokens}, k]"))?;
    logits.expect_dtype(NAME, "logits", &[DType::Float], "floats")?;
    let longest = rows.clone().map(|t| host.visible(t)).filter(|&visible| visible > k).max().unwrap_or(0);
    let [logits_rows, columns] = logits.dims(NAME, "logits")?;
    logits.expect(NAME, "logits", longest == 0 || (logits_rows == rows.len() && columns >= longest), || {
        format!("[{}, at least {longest}]", rows.len())
    })?;
    if rows.is_empty() || k == 0 {
        return Ok(());
    }

    let variant = tile.variant(rows.len(), columns, device.limits());
    let parts = if let Variant::Split { parts } = variant { parts } else { 1 };
    let mut args = vec![Arg::Buffer(&batch.positions), Arg::Buffer(logits.buffer()), Arg::Buffer(topk_indices.buffer())];
    match variant {
        Variant::Resident => {}
        Variant::Whole => args.extend([Arg::Null, Arg::Null, Arg::Null]),
        Variant::Split { .. } => args.extend([
            Arg::Buffer(&workspace.arrivals),
            Arg::Buffer(&workspace.counts),
            Arg::Buffer(&workspace.lists),
        ]),
    }
    args.extend([rows.start, columns, k].map(|number| Arg::I32(number as i32)));
    if variant != Variant::Resident {
        args.push(Arg::I32(parts as i32));
    }
    device.launch(&Launch {
        program: &program(tile, variant),
        entry: NAME,
        grid: [rows.len() as u32 * parts, 1, 1],
        threads: tile.threads(variant),
        shared_bytes: tile.shared_bytes(variant),
        shape: format!("{} rows of {columns}, k {k}", rows.len()),
        args: &args,
    })
}
