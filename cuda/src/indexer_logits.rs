//! `indexer_logits`: the lightning indexer's scores.
//!
//! One kernel takes any ragged batch; where every sequence has few rows, a second one streams the keys past them.

use std::ops::Range;

use dsa80_reference::{Batch, DType, DeviceTensor, Error, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "indexer_logits";
const DECODE: &str = "indexer_logits_decode";

/// Keys that a warp holds at least.
const GROUP_KEYS: usize = 32;

/// The constants of both kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexerLogitsTile {
    /// Of the kernel for any batch.
    pub general: GeneralTile,
    /// Of the kernel for few rows a sequence.
    pub decode: DecodeTile,
}

/// A block of keys in registers, queries that stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneralTile {
    /// Warps of a block, each with its own keys.
    pub warps: usize,
    /// Times 32 keys: what a warp holds.
    pub groups: usize,
    /// Queries of a stage.
    pub queries: usize,
    /// Stages in shared memory.
    pub stages: usize,
    /// Queries that a block takes.
    pub query_block: usize,
    /// Tiles of 8 heads whose products are under way at once.
    pub heads_at_once: usize,
    /// Blocks that a multiprocessor must be able to hold.
    pub blocks: usize,
}

/// Queries in shared memory, keys that stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecodeTile {
    /// Warps of a block.
    pub warps: usize,
    /// Groups of keys that are under way to a warp, and the one that it scores.
    pub stages: usize,
    /// Queries in shared memory, at most; the keys are read again for every so many rows of a sequence.
    pub queries: usize,
    /// Batches in which a sequence has more rows than this take the other kernel.
    pub rows: usize,
    /// Tiles of 8 heads whose products are under way at once.
    pub heads_at_once: usize,
    /// Blocks that a multiprocessor holds.
    pub blocks: usize,
}

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexerLogitsDims {
    /// Indexer heads.
    pub heads: usize,
    /// Columns of a head, and of a key.
    pub dims: usize,
}

impl IndexerLogitsDims {
    /// A query with its weights in shared memory: heads padded to whole MMA tiles, columns to what four lanes load.
    fn query_bytes(self) -> usize {
        let heads = self.heads.next_multiple_of(8);
        heads * 2 * self.dims.next_multiple_of(64) + heads * size_of::<f32>()
    }

    fn key_bytes(self, fp8: bool) -> usize {
        if fp8 { self.dims + size_of::<f32>() } else { 2 * self.dims }
    }

    fn program<const N: usize>(
        self,
        source: &'static str,
        fp8: bool,
        shared_bytes: usize,
        tile: [(&'static str, usize); N],
    ) -> Program {
        let call = [
            ("HEADS", self.heads),
            ("DIMS", self.dims),
            ("FP8", usize::from(fp8)),
            ("TILE_SHARED_BYTES", shared_bytes),
        ];
        Program::new(source, call.into_iter().chain(tile))
    }
}

impl GeneralTile {
    fn shared_bytes(&self, dims: IndexerLogitsDims) -> usize {
        self.stages * self.queries * dims.query_bytes()
    }

    fn entry(&self, dims: IndexerLogitsDims, fp8: bool) -> ProgramEntry {
        let shared_bytes = self.shared_bytes(dims);
        let tile = [
            ("TILE_WARPS", self.warps),
            ("TILE_GROUPS", self.groups),
            ("TILE_QUERIES", self.queries),
            ("TILE_STAGES", self.stages),
            ("TILE_QUERY_BLOCK", self.query_block),
            ("TILE_HEADS_AT_ONCE", self.heads_at_once),
            ("TILE_BLOCKS", self.blocks),
        ];
        ProgramEntry {
            program: dims.program("indexer_logits.cu", fp8, shared_bytes, tile),
            entry: KERNEL,
            threads: 32 * self.warps as u32,
            shared_bytes,
            variant: format!("any batch, {} keys", key_type(fp8)),
        }
    }

    /// Blocks of queries times blocks of keys, over all sequences.
    fn items(&self, sequences: impl Iterator<Item = Rows>) -> usize {
        let block_keys = self.warps * self.groups * GROUP_KEYS;
        sequences.map(|rows| rows.count.div_ceil(self.query_block) * rows.keys.div_ceil(block_keys)).sum()
    }
}

impl DecodeTile {
    /// Queries that a block keeps for batches with up to `rows` rows a sequence: one program for one or two, one for more.
    fn queries_for(&self, rows: usize) -> usize {
        if rows <= 2 { self.queries.min(2) } else { self.queries }
    }

    fn shared_bytes(&self, dims: IndexerLogitsDims, fp8: bool, queries: usize) -> usize {
        let vectors = 16 * dims.dims.next_multiple_of(64) / if fp8 { 16 } else { 8 };
        let scales = size_of::<f32>() * if fp8 { GROUP_KEYS } else { 4 };
        queries * dims.query_bytes() + self.warps * self.stages * (GROUP_KEYS * vectors + scales)
    }

    fn entry(&self, dims: IndexerLogitsDims, fp8: bool, queries: usize) -> ProgramEntry {
        let shared_bytes = self.shared_bytes(dims, fp8, queries);
        let tile = [
            ("TILE_WARPS", self.warps),
            ("TILE_STAGES", self.stages),
            ("TILE_QUERIES", queries),
            ("TILE_HEADS_AT_ONCE", self.heads_at_once),
            ("TILE_BLOCKS", self.blocks),
        ];
        ProgramEntry {
            program: dims.program("indexer_logits_decode.cu", fp8, shared_bytes, tile),
            entry: DECODE,
            threads: 32 * self.warps as u32,
            shared_bytes,
            variant: format!("{queries} rows, {} keys", key_type(fp8)),
        }
    }
}

fn key_type(fp8: bool) -> &'static str {
    if fp8 { "8-bit" } else { "bf16" }
}

impl Tile for IndexerLogitsTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = IndexerLogitsDims;

    fn safe(_dims: Self::Dims) -> Self {
        let general = GeneralTile {
            warps: 4,
            groups: 2,
            queries: 1,
            stages: 3,
            query_block: 64,
            heads_at_once: 1,
            blocks: 1,
        };
        let decode = DecodeTile { warps: 4, stages: 2, queries: 4, rows: 6, heads_at_once: 1, blocks: 2 };
        Self { general, decode }
    }

    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self> {
        let safe = Self::safe(dims);
        let general = GENERAL.map(|[warps, groups, queries, stages, query_block, heads_at_once, blocks]| {
            let general = GeneralTile { warps, groups, queries, stages, query_block, heads_at_once, blocks };
            Self { general, ..safe }
        });
        let decode = DECODES.map(|[warps, stages, queries, rows, heads_at_once, blocks]| Self {
            decode: DecodeTile { warps, stages, queries, rows, heads_at_once, blocks },
            ..safe
        });
        general.into_iter().chain(decode).filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: Self::Dims, limits: &Limits) -> Result<()> {
        let IndexerLogitsDims { heads, dims: columns } = dims;
        let (general, decode) = (self.general, self.decode);
        require(self, columns > 0 && columns.is_multiple_of(16) && columns <= 128, || {
            format!("a key of {columns} columns is not a multiple of 16 up to 128, which registers hold")
        })?;
        require(self, heads > 0 && heads <= 128, || format!("{heads} heads are not 1 to 128"))?;
        require(self, matches!(general.groups, 1 | 2), || "a warp holds 1 or 2 groups of keys".into())?;
        let stages = [general.stages, decode.stages];
        require(self, stages.iter().all(|n| (2..=8).contains(n)), || "there are 2 to 8 stages".into())?;
        let sizes = [general.queries, general.query_block, decode.queries];
        require(self, sizes.iter().all(|size| (1..=1024).contains(size)), || {
            "blocks have 1 to 1024 queries".into()
        })?;
        let at_once = [general.heads_at_once, decode.heads_at_once];
        require(self, at_once.iter().all(|n| matches!(n, 1 | 2)), || {
            "1 or 2 tiles of heads are under way".into()
        })?;
        for (kernel, warps, blocks, most) in [
            (KERNEL, general.warps, general.blocks, if general.groups == 2 { 8 } else { 12 }),
            (DECODE, decode.warps, decode.blocks, 12),
        ] {
            require(self, warps > 0 && blocks > 0 && warps * blocks <= most, || {
                format!(
                    "{kernel}: {warps} x {blocks} warps of a multiprocessor are more than {most}, whose registers hold the keys"
                )
            })?;
        }
        require_shared(self, general.shared_bytes(dims), limits)?;
        require_shared(self, decode.shared_bytes(dims, false, decode.queries), limits)
    }
}

/// Warps, groups, queries of a stage, stages, queries of a block, head tiles at once, blocks.
const GENERAL: [[usize; 7]; 6] = [
    [4, 2, 1, 4, 64, 1, 2],
    [4, 2, 2, 3, 32, 1, 2],
    [4, 2, 2, 3, 64, 1, 2],
    [4, 2, 4, 2, 64, 1, 2],
    [8, 2, 4, 3, 32, 1, 1],
    [4, 1, 2, 3, 64, 2, 3],
];

/// Warps, stages, queries, rows, head tiles at once, blocks.
const DECODES: [[usize; 6]; 5] =
    [[4, 2, 6, 6, 1, 2], [4, 2, 6, 6, 1, 3], [4, 3, 6, 6, 1, 2], [4, 3, 6, 6, 1, 3], [4, 3, 6, 6, 2, 3]];

/// Every variant of a tile.
pub fn programs(tile: &IndexerLogitsTile, dims: IndexerLogitsDims) -> Vec<ProgramEntry> {
    let mut entries = Vec::new();
    for fp8 in [false, true] {
        entries.push(tile.general.entry(dims, fp8));
        entries.push(tile.decode.entry(dims, fp8, tile.decode.queries_for(1)));
        if tile.decode.queries > 2 {
            entries.push(tile.decode.entry(dims, fp8, tile.decode.queries));
        }
    }
    entries
}

/// The rows of one sequence that a launch scores.
#[derive(Debug, Clone, Copy)]
struct Rows {
    count: usize,
    /// Keys that the last of them sees.
    keys: usize,
    /// Pairs of a row and a key that it sees.
    visible: usize,
}

fn sequences(batch: &Batch, rows: Range<usize>) -> impl Iterator<Item = Rows> {
    batch.cu_seqlens.windows(2).filter_map(move |bounds| {
        let (first, end) = (rows.start.max(bounds[0] as usize), rows.end.min(bounds[1] as usize));
        (first < end).then(|| {
            let (count, keys) = (end - first, batch.visible(end - 1));
            Rows { count, keys, visible: count * keys - count * (count - 1) / 2 }
        })
    })
}

/// What a launch moves and computes: every key once a sequence, every query, every score that is visible.
pub fn cost(batch: &Batch, rows: Range<usize>, dims: IndexerLogitsDims, fp8: bool) -> Cost {
    let query = dims.heads * (2 * dims.dims + size_of::<f32>());
    let mut cost = Cost::default();
    for Rows { count, keys, visible } in sequences(batch, rows) {
        cost.bytes += (keys * dims.key_bytes(fp8) + count * query + visible * size_of::<f32>()) as f64;
        cost.flops += (visible * 2 * dims.heads * dims.dims) as f64;
    }
    cost
}

/// The kernel of the contract's [`indexer_logits`](dsa80_reference::Kernels::indexer_logits).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn indexer_logits<D: Device>(
    device: &D,
    tile: &IndexerLogitsTile,
    batch: &CudaBatch<D>,
    rows: Range<usize>,
    q: &CudaTensor<D>,
    weights: &CudaTensor<D>,
    cache: &CudaTensor<D>,
    scale: f64,
    logits: &mut CudaTensor<D>,
) -> Result<()> {
    let host = batch.host();
    let tokens = host.num_tokens();
    let [q_tokens, heads, columns] = q.dims(KERNEL, "q")?;
    q.expect(KERNEL, "q", q_tokens == tokens, || format!("[{tokens}, HI, D]"))?;
    q.expect_dtype(KERNEL, "q", &[DType::Act], "activations")?;
    let [weight_rows, weight_heads] = weights.dims(KERNEL, "weights")?;
    weights.expect(KERNEL, "weights", weight_rows == tokens && weight_heads == heads, || {
        format!("[{tokens}, {heads}]")
    })?;
    weights.expect_dtype(KERNEL, "weights", &[DType::Float], "floats")?;
    let dims = IndexerLogitsDims { heads, dims: columns };
    let fp8 = check_cache(cache, host.page_size, dims)?;
    let refuse = |name, expected: String, found| Err(Error::Value { kernel: KERNEL, name, expected, found });
    if rows.start > rows.end || rows.end > tokens {
        return refuse("rows", format!("within 0..{tokens}"), format!("{rows:?}"));
    }
    if !(scale.is_finite() && scale > 0.0) {
        return refuse("scale", "a positive number".into(), scale.to_string());
    }
    let longest = rows.clone().map(|row| host.visible(row)).max().unwrap_or(0);
    let [logits_rows, pitch] = logits.dims(KERNEL, "logits")?;
    logits.expect(KERNEL, "logits", logits_rows == rows.len() && pitch >= longest, || {
        format!("[{}, at least {longest}]", rows.len())
    })?;
    logits.expect_dtype(KERNEL, "logits", &[DType::Float], "floats")?;
    tile.validate(dims, device.limits())?;
    if rows.is_empty() {
        return Ok(());
    }

    let most_rows = sequences(host, rows.clone()).map(|rows| rows.count).max().unwrap_or(0);
    // Either kernel is right for any batch with any grid: these are the fastest.
    let (entry, blocks) = if most_rows <= tile.decode.rows {
        let entry = tile.decode.entry(dims, fp8, tile.decode.queries_for(most_rows));
        let resident = device.limits().resident_blocks(entry.threads, 1, entry.shared_bytes);
        (entry, device.limits().multiprocessors as usize * tile.decode.blocks.min(resident as usize))
    } else {
        (tile.general.entry(dims, fp8), tile.general.items(sequences(host, rows.clone())))
    };
    device.launch(&Launch {
        program: &entry.program,
        entry: entry.entry,
        grid: [blocks as u32, 1, 1],
        threads: entry.threads,
        shared_bytes: entry.shared_bytes,
        shape: format!(
            "{} rows of {} sequences, {heads} x {columns}, contexts up to {longest}, {}",
            rows.len(),
            host.num_seqs(),
            cache.dtype()
        ),
        args: &[
            Arg::Buffer(q.buffer()),
            Arg::Buffer(weights.buffer()),
            Arg::Buffer(cache.buffer()),
            Arg::Buffer(&batch.cu_seqlens),
            Arg::Buffer(&batch.context_lens),
            Arg::Buffer(&batch.block_table),
            Arg::Buffer(logits.buffer()),
            Arg::I32(host.num_seqs() as i32),
            Arg::I32(host.max_blocks as i32),
            Arg::I32(host.page_size as i32),
            Arg::I32(rows.start as i32),
            Arg::I32(rows.end as i32),
            Arg::I64(pitch as i64),
            Arg::F32(scale as f32),
        ],
    })
}

/// Whether the cache holds 8-bit keys.
fn check_cache<D: Device>(cache: &CudaTensor<D>, page_size: usize, dims: IndexerLogitsDims) -> Result<bool> {
    cache.expect_dtype(KERNEL, "cache", &[DType::Act, DType::Fp8], "activations or 8-bit cache rows")?;
    let fp8 = cache.dtype() == DType::Fp8;
    let width = if fp8 { dims.key_bytes(true) } else { dims.dims };
    let [_, cache_page_size, columns] = cache.dims(KERNEL, "cache")?;
    // The vectors of 8-bit keys are aligned where a page's scales fill 16 bytes.
    let aligned = !fp8 || page_size.is_multiple_of(4);
    cache.expect(
        KERNEL,
        "cache",
        cache_page_size == page_size && columns == width && page_size > 0 && aligned,
        || {
            format!(
                "[pages, {page_size}, {width}]{}",
                if aligned { "" } else { " with pages of a multiple of 4" }
            )
        },
    )?;
    Ok(fp8)
}

#[cfg(test)]
mod tests {
    use dsa80_reference::SequenceSlice;

    use super::*;

    const GLM: IndexerLogitsDims = IndexerLogitsDims { heads: 32, dims: 128 };

    #[test]
    fn candidates_fit_an_a100_and_refusals_say_why() {
        let limits = Limits::a100();
        let (safe, candidates) = (IndexerLogitsTile::safe(GLM), IndexerLogitsTile::candidates(GLM, &limits));
        assert_eq!(candidates.len(), GENERAL.len() + DECODES.len(), "{candidates:?}");
        let general = |general| IndexerLogitsTile { general, ..safe };
        for (tile, dims, reason) in [
            (safe, IndexerLogitsDims { dims: 24, ..GLM }, "multiple of 16"),
            (safe, IndexerLogitsDims { heads: 0, ..GLM }, "0 heads"),
            (general(GeneralTile { groups: 3, ..safe.general }), GLM, "1 or 2 groups"),
            (general(GeneralTile { stages: 1, ..safe.general }), GLM, "2 to 8 stages"),
            (general(GeneralTile { warps: 8, blocks: 2, ..safe.general }), GLM, "8 x 2 warps"),
            (general(GeneralTile { queries: 8, ..safe.general }), GLM, "bytes of shared memory"),
        ] {
            let error = tile.validate(dims, &limits).unwrap_err().to_string();
            assert!(error.starts_with("indexer_logits: ") && error.contains(reason), "{error}");
        }
        for (i, entry) in programs(&safe, GLM).iter().enumerate() {
            assert!(limits.resident_blocks(entry.threads, 128, entry.shared_bytes) > 0, "{entry:?}");
            assert!(programs(&safe, GLM)[..i].iter().all(|other| other.program != entry.program));
        }
    }

    #[test]
    fn costs_and_items_count_what_is_visible() {
        let pages: Vec<u32> = (0..8).collect();
        let slices = [(3, 4), (100, 1)].map(|(computed_len, new)| SequenceSlice {
            token_ids: &[0; 4][..new],
            computed_len,
            pages: &pages,
        });
        let batch = Batch::new(16, &slices).unwrap();
        let found: Vec<_> =
            sequences(&batch, 1..5).map(|rows| (rows.count, rows.keys, rows.visible)).collect();
        assert_eq!(found, [(3, 7, 5 + 6 + 7), (1, 101, 101)]);
        let cost = cost(&batch, 1..5, GLM, true);
        assert_eq!(cost.flops, f64::from(119 * 2 * 32 * 128));
        assert_eq!(cost.bytes, f64::from(108 * 132 + 4 * 32 * 260 + 119 * 4));
        let tile =
            GeneralTile { query_block: 2, warps: 1, groups: 1, ..IndexerLogitsTile::safe(GLM).general };
        assert_eq!(tile.items(sequences(&batch, 1..5)), 2 + 4);
    }
}
