//! `top_k`: the best positions of every row.

use std::ops::Range;

use dsa80_reference::{Batch, DType, Error, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "top_k";

/// Blocks that share a row at most: a lane of a warp holds what one of them hands over.
const MAX_PARTS: usize = 32;

/// The constants of `top_k`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopKTile {
    /// For rows that a block can hold.
    pub held: Held,
    /// For longer rows.
    pub filtered: Filtered,
    /// Bins of a histogram, a power of two.
    pub bins: usize,
    /// Candidates for the last place that are compared each with each.
    pub ranked: usize,
}

/// A block that holds its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    /// Threads of a block.
    pub threads: usize,
    /// Blocks that the registers of a multiprocessor must be enough for.
    pub blocks: usize,
    /// Vectors of four logits that a thread holds.
    pub vectors: usize,
    /// Whether in registers; otherwise in shared memory.
    pub registers: bool,
}

/// A block that reads its row, or its part of one, once, and keeps in shared memory what may be selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filtered {
    /// Threads of a block.
    pub threads: usize,
    /// Blocks that the registers of a multiprocessor must be enough for.
    pub blocks: usize,
    /// Vectors of four logits that a thread has under way.
    pub vectors: usize,
    /// Elements of a row that are kept at most, for every thread.
    pub items: usize,
    /// Vectors of four logits that a thread samples.
    pub samples: usize,
    /// Positions that are put into order at a time.
    pub window: usize,
    /// Blocks for every multiprocessor that rows are split to reach; 0 splits none.
    pub split: usize,
}

/// What tiles depend on: nothing in the model, but how many rows a launch has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopKRows {
    /// Not enough to give every multiprocessor one.
    Few,
    /// More.
    Many,
}

impl TopKRows {
    /// Of a launch with `rows` rows.
    pub fn of(rows: usize, limits: &Limits) -> Self {
        if rows < limits.multiprocessors as usize { Self::Few } else { Self::Many }
    }
}

/// How one launch runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Held,
    Filtered { parts: usize },
}

impl Variant {
    fn parts(self) -> usize {
        match self {
            Variant::Held => 1,
            Variant::Filtered { parts } => parts,
        }
    }
}

impl Tile for TopKTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = TopKRows;

    fn safe(rows: TopKRows) -> Self {
        let (held, filtered) = match rows {
            // One block for a multiprocessor: all the threads that it can have.
            TopKRows::Few => (
                Held { threads: 1024, blocks: 1, vectors: 2, registers: true },
                Filtered {
                    threads: 1024,
                    blocks: 1,
                    vectors: 2,
                    items: 8,
                    samples: 2,
                    window: 1 << 18,
                    split: 1,
                },
            ),
            // Several: while some wait for a barrier or for memory, the others work.
            TopKRows::Many => (
                Held { threads: 256, blocks: 4, vectors: 8, registers: false },
                Filtered {
                    threads: 512,
                    blocks: 2,
                    vectors: 4,
                    items: 10,
                    samples: 2,
                    window: 1 << 16,
                    split: 0,
                },
            ),
        };
        Self { held, filtered, bins: 2048, ranked: 128 }
    }

    fn candidates(rows: TopKRows, limits: &Limits) -> Vec<Self> {
        let safe = Self::safe(rows);
        // Threads, blocks, vectors, registers; threads, blocks, vectors, items.
        let (held, filtered): (&[_], &[_]) = match rows {
            TopKRows::Few => (
                &[(1024, 1, 2, true), (512, 1, 4, true)],
                &[(1024, 1, 2, 8), (1024, 1, 1, 8), (512, 1, 4, 16)],
            ),
            TopKRows::Many => (
                &[(256, 4, 8, false), (512, 3, 4, false)],
                &[(512, 2, 4, 10), (512, 2, 2, 10), (256, 4, 4, 20)],
            ),
        };
        let held = held.iter().map(|&(threads, blocks, vectors, registers)| Held {
            threads,
            blocks,
            vectors,
            registers,
        });
        let tiles = held.flat_map(|held| {
            filtered.iter().map(move |&(threads, blocks, vectors, items)| {
                let filtered = Filtered { threads, blocks, vectors, items, ..safe.filtered };
                Self { held, filtered, ..safe }
            })
        });
        tiles.filter(|tile| tile.validate(rows, limits).is_ok()).collect()
    }

    fn validate(&self, _rows: TopKRows, limits: &Limits) -> Result<()> {
        let Self { held, filtered, bins, ranked } = *self;
        for (threads, blocks) in [(held.threads, held.blocks), (filtered.threads, filtered.blocks)] {
            require(self, threads % 32 == 0 && (32..=1024).contains(&threads), || {
                format!("{threads} threads are not 1 to 32 warps")
            })?;
            require(self, bins.is_power_of_two() && bins % threads == 0 && bins <= 1 << 16, || {
                format!("{bins} bins are not a power of two up to 65536 that {threads} threads divide")
            })?;
            require(
                self,
                (1..=limits.threads_per_multiprocessor as usize).contains(&(blocks * threads)),
                || {
                    format!(
                        "a multiprocessor holds {} threads, not {blocks} x {threads}",
                        limits.threads_per_multiprocessor
                    )
                },
            )?;
        }
        require(self, ranked > 0, || "the last place has a candidate".into())?;
        require(self, (1..=16).contains(&held.vectors), || "a thread holds 1 to 16 vectors".into())?;
        let Filtered { vectors, items, samples, window, .. } = filtered;
        require(self, (1..=8).contains(&vectors), || {
            "a thread marks what it keeps of 1 to 8 vectors in a word".into()
        })?;
        require(self, (1..=4).contains(&samples), || "a thread samples 1 to 4 vectors".into())?;
        require(self, items > 0 && items % 2 == 0, || "kept elements are handed over in pairs".into())?;
        require(self, window > 0 && window % 32 == 0, || "positions are marked in whole words".into())?;
        for variant in [Variant::Held, Variant::Filtered { parts: 1 }] {
            require_shared(self, self.shared_bytes(variant), limits)?;
        }
        Ok(())
    }
}

impl TopKTile {
    /// The variant for `rows` rows of at most `columns` scores: it depends on nothing that a captured graph does not fix.
    fn variant(&self, rows: usize, columns: usize, limits: &Limits) -> Variant {
        // A row that does not start at a vector touches one more of them.
        let vectors = columns.div_ceil(4) + usize::from(!columns.is_multiple_of(4));
        if vectors <= self.held.threads * self.held.vectors {
            return Variant::Held;
        }
        let by_device = limits.multiprocessors as usize * self.filtered.split / rows.max(1);
        let by_row = vectors.div_ceil(self.filtered.threads);
        let parts = by_device.min(by_row).clamp(1, MAX_PARTS);
        Variant::Filtered { parts: 1 << parts.ilog2() }
    }

    /// The file of the variant, and the entry point in it.
    fn source(variant: Variant) -> (&'static str, &'static str) {
        match variant {
            Variant::Held => ("top_k.cu", "top_k"),
            Variant::Filtered { .. } => ("top_k_filtered.cu", "top_k_filtered"),
        }
    }

    fn threads(&self, variant: Variant) -> usize {
        match variant {
            Variant::Held => self.held.threads,
            Variant::Filtered { .. } => self.filtered.threads,
        }
    }

    /// Bytes of `Shared` in the variant's file.
    fn shared_bytes(&self, variant: Variant) -> usize {
        let warps = self.threads(variant) / 32;
        let (ranked, last, num_ranked, ranges_and_sums, found) = (8 * self.ranked, 8, 4, 12 * warps, 12);
        let histogram = 4 * (self.bins + self.threads(variant));
        let selection =
            (ranked + last + num_ranked + ranges_and_sums + found + histogram).next_multiple_of(8);
        match variant {
            Variant::Held => {
                let Held { threads, vectors, registers, .. } = self.held;
                let rest = (selection + 4 * vectors.div_ceil(4) * warps).next_multiple_of(8);
                if registers { rest } else { (16 * threads * vectors + rest).next_multiple_of(16) }
            }
            Variant::Filtered { parts } => {
                let Filtered { threads, items, window, .. } = self.filtered;
                // At least two blocks share a row, if any.
                let slots = if parts > 1 { threads * items / 2 } else { threads * items };
                let (list, marks, length, last_block) = (8 * (slots + threads), window / 8, 4, 4);
                selection + list + marks + length + last_block
            }
        }
    }

    fn program(&self, variant: Variant) -> Program {
        let mut defines = vec![
            ("TILE_BINS", self.bins),
            ("TILE_RANKED", self.ranked),
            ("TILE_THREADS", self.threads(variant)),
            ("TILE_SHARED_BYTES", self.shared_bytes(variant)),
        ];
        match variant {
            Variant::Held => defines.extend([
                ("TILE_BLOCKS", self.held.blocks),
                ("TILE_VECTORS", self.held.vectors),
                ("TILE_REGISTERS", usize::from(self.held.registers)),
            ]),
            Variant::Filtered { parts } => {
                let Filtered { blocks, vectors, items, samples, window, .. } = self.filtered;
                defines.extend([
                    ("TILE_BLOCKS", blocks),
                    ("TILE_VECTORS", vectors),
                    ("TILE_ITEMS", items),
                    ("TILE_SAMPLES", samples),
                    ("TILE_WINDOW", window),
                    ("TILE_SPLIT", usize::from(parts > 1)),
                ]);
            }
        }
        Program::new(Self::source(variant).0, defines)
    }

    /// Rows that are split at most in a launch.
    fn max_split_rows(&self, limits: &Limits) -> usize {
        limits.multiprocessors as usize * self.filtered.split / 2
    }
}

/// Every variant of a tile.
pub fn programs(tile: &TopKTile) -> Vec<ProgramEntry> {
    let mut variants = vec![(Variant::Held, "held"), (Variant::Filtered { parts: 1 }, "filtered")];
    if tile.filtered.split > 0 {
        variants.push((Variant::Filtered { parts: 2 }, "filtered, split"));
    }
    let entry = |(variant, name): (Variant, &str)| ProgramEntry {
        program: tile.program(variant),
        entry: TopKTile::source(variant).1,
        threads: tile.threads(variant) as u32,
        shared_bytes: tile.shared_bytes(variant),
        variant: name.to_owned(),
    };
    variants.into_iter().map(entry).collect()
}

/// What the blocks that share a row hand to the last of them.
#[derive(Debug)]
pub struct TopKWorkspace<D: Device> {
    max_rows: usize,
    slots: usize,
    arrivals: D::Buffer,
    parts: D::Buffer,
    lists: D::Buffer,
}

impl<D: Device> TopKWorkspace<D> {
    /// For every launch with one of `tiles`: `split / 2` rows for each multiprocessor, of `8 * threads * items + 260` bytes.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, tiles: &[TopKTile]) -> Result<Self> {
        let max_rows = tiles.iter().map(|tile| tile.max_split_rows(device.limits())).max().unwrap_or(0);
        let slots = tiles.iter().map(|tile| tile.filtered.threads * tile.filtered.items).max().unwrap_or(0);
        let arrivals = device.alloc("top_k arrivals", max_rows * 4)?;
        device.write(&arrivals, 0, &vec![0; max_rows * 4])?;
        Ok(Self {
            max_rows,
            slots,
            arrivals,
            parts: device.alloc("top_k parts", max_rows * 8 * MAX_PARTS)?,
            lists: device.alloc("top_k lists", max_rows * 8 * slots)?,
        })
    }
}

/// What a launch over `rows` moves: each score that is looked at once, and the places.
pub fn cost(batch: &Batch, rows: Range<usize>, k: usize) -> Cost {
    let bytes = |t| 4 * (1 + k + Some(batch.visible(t)).filter(|&visible| visible > k).unwrap_or(0));
    Cost { bytes: rows.map(bytes).sum::<usize>() as f64, flops: 0.0 }
}

/// The kernel of the contract's [`top_k`](dsa80_reference::Kernels::top_k). Positions ascend, as the oracle's do.
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
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
        let (expected, found) = (format!("inside the step's {tokens} rows"), format!("{rows:?}"));
        return Err(Error::Value { kernel: KERNEL, name: "rows", expected, found });
    }
    let [out_rows, k] = topk_indices.dims(KERNEL, "topk_indices")?;
    topk_indices.expect(KERNEL, "topk_indices", out_rows == tokens, || format!("[{tokens}, k]"))?;
    topk_indices.expect_dtype(KERNEL, "topk_indices", &[DType::Index], "indices")?;
    // Rows that select everything do not read their logits, so the logits need only fit the others.
    let longest = rows.clone().map(|t| host.visible(t)).filter(|&visible| visible > k).max().unwrap_or(0);
    let [logits_rows, columns] = logits.dims(KERNEL, "logits")?;
    let fits = logits_rows == rows.len() && columns >= longest;
    logits
        .expect(KERNEL, "logits", longest == 0 || fits, || format!("[{}, at least {longest}]", rows.len()))?;
    logits.expect_dtype(KERNEL, "logits", &[DType::Float], "floats")?;
    let limits = device.limits();
    tile.validate(TopKRows::of(rows.len(), limits), limits)?;
    if rows.is_empty() || k == 0 {
        return Ok(());
    }
    // The kernel starts to read before it knows that a row is short.
    let columns = if fits { columns } else { 0 };

    let variant = tile.variant(rows.len(), columns, limits);
    let mut args =
        vec![Arg::Buffer(&batch.positions), Arg::Buffer(logits.buffer()), Arg::Buffer(topk_indices.buffer())];
    match variant {
        Variant::Held => {}
        Variant::Filtered { parts: 1 } => args.extend([Arg::Null, Arg::Null, Arg::Null]),
        Variant::Filtered { .. } => {
            let slots = tile.filtered.threads * tile.filtered.items;
            if rows.len() > workspace.max_rows || slots > workspace.slots {
                let (shape, elements) = (vec![rows.len(), slots], rows.len() * slots);
                return Err(Error::Capacity {
                    shape,
                    elements,
                    capacity: workspace.max_rows * workspace.slots,
                });
            }
            args.extend([&workspace.arrivals, &workspace.parts, &workspace.lists].map(Arg::Buffer));
        }
    }
    args.extend([rows.start, columns, k].map(|number| Arg::I32(number as i32)));
    if let Variant::Filtered { parts } = variant {
        args.push(Arg::I32(parts as i32));
    }
    device.launch(&Launch {
        program: &tile.program(variant),
        entry: TopKTile::source(variant).1,
        grid: [(rows.len() * variant.parts()) as u32, 1, 1],
        threads: tile.threads(variant) as u32,
        shared_bytes: tile.shared_bytes(variant),
        shape: format!("{} rows of {columns}, k {k}", rows.len()),
        args: &args,
    })
}
