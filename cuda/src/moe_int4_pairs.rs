//! `moe_int4` for few tokens: every pair of token and k is an item, and down adds up a token's experts itself.

use dsa80_reference::{DType, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::int4::{Int4Shape, PackedInt4, TILE_INPUTS};
use crate::moe_int4::{MoeInt4Dims, variants};
use crate::moe_int4_grouped::{ProductTile, Variant, unit};
use crate::tile::{Tile, require};

const DOWN: &str = "moe_int4_down";

/// The constants for few tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeInt4PairsTile {
    /// Steps of at most this many tokens.
    pub max_tokens: usize,
    /// Of the gate-up product.
    pub gate_up: ProductTile,
    /// Of down.
    pub down: DownTile,
}

/// How a block takes a token's features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DownTile {
    /// Warps, which take the token's experts in turn.
    pub warps: usize,
    /// Tiles of 16 features of a block.
    pub row_tiles: usize,
    /// Tiles of 64 inputs that are loaded at once.
    pub k_tiles: usize,
}

impl Tile for MoeInt4PairsTile {
    const KERNEL: &'static str = "moe_int4_pairs";
    type Dims = MoeInt4Dims;

    fn safe(_dims: Self::Dims) -> Self {
        let gate_up = ProductTile {
            warps_m: 1,
            warps_k: 8,
            row_tiles: 1,
            k_tiles: 1,
            stages: 8,
            row_groups: 1,
            blocks: 2,
        };
        Self { max_tokens: 4, gate_up, down: DownTile { warps: 8, row_tiles: 1, k_tiles: 4 } }
    }

    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self> {
        let tile = |[max_tokens, warps_k, row_tiles, k_tiles, stages, blocks, warps, down_tiles]: [usize;
                        8]| {
            let gate_up =
                ProductTile { warps_m: 1, warps_k, row_tiles, k_tiles, stages, row_groups: 1, blocks };
            let down = DownTile { warps, row_tiles: down_tiles, k_tiles: 4 };
            Self { max_tokens, gate_up, down }
        };
        CANDIDATES.map(tile).into_iter().filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: Self::Dims, limits: &Limits) -> Result<()> {
        self.gate_up.require(self, pairs_variant(dims.gate_up), limits)?;
        let DownTile { warps, row_tiles, k_tiles } = self.down;
        require(self, self.max_tokens <= 1024, || "few tokens are at most 1024".into())?;
        require(self, (1..=16).contains(&warps), || "a block has 1 to 16 warps".into())?;
        require(self, row_tiles > 0 && row_tiles * 16 <= 32 * warps, || {
            format!("{row_tiles} tiles of features are not 1 to {}, a thread each", 2 * warps)
        })?;
        require(self, (1..=4).contains(&k_tiles), || "1 to 4 tiles of inputs are loaded at once".into())
    }
}

/// Tokens at most; of gate-up: columns of warps, row tiles, tiles of inputs, stages, blocks; of down: warps, row tiles.
const CANDIDATES: [[usize; 8]; 8] = [
    [4, 8, 1, 1, 8, 2, 8, 1],
    [4, 4, 2, 4, 3, 2, 4, 1],
    [4, 4, 2, 2, 4, 3, 4, 1],
    [4, 4, 1, 4, 4, 3, 8, 2],
    [4, 8, 1, 4, 3, 2, 4, 1],
    [4, 8, 2, 4, 2, 1, 8, 1],
    [4, 4, 4, 2, 3, 2, 4, 2],
    [4, 8, 1, 4, 2, 2, 2, 1],
];

pub(crate) fn pairs_variant(shape: Int4Shape) -> Variant {
    Variant { shape, tokens: 8, sorted: false }
}

impl DownTile {
    fn shared_bytes(self, top_k: usize) -> usize {
        top_k * self.row_tiles * 16 * size_of::<f32>()
    }

    /// Row tiles of a warp that are loaded at once: two where blocks are few. Twice the scales of two would take too many registers.
    fn batch(self, shape: &Int4Shape, tokens: usize, top_k: usize) -> usize {
        let two = tokens == 1 && top_k * self.row_tiles > self.warps && unit(shape) == TILE_INPUTS;
        if two { 2 } else { 1 }
    }

    fn entry(self, shape: &Int4Shape, tokens: usize, top_k: usize) -> ProgramEntry {
        let shared_bytes = self.shared_bytes(top_k);
        let defines = [
            ("SCALE_TYPE", shape.scale_type()),
            ("GROUP_SIZE", shape.kernel_group_size()),
            ("UNIT", unit(shape)),
            ("ZEROS", usize::from(shape.zero_points)),
            ("TOP_K", top_k),
            ("TILE_WARPS", self.warps),
            ("TILE_ROW_TILES", self.row_tiles),
            ("TILE_K_TILES", self.k_tiles),
            ("TILE_BATCH", self.batch(shape, tokens, top_k)),
            ("TILE_SHARED_BYTES", shared_bytes),
        ];
        let zeros = if shape.zero_points { "" } else { "no " };
        ProgramEntry {
            program: Program::new("moe_int4_down.cu", defines),
            entry: DOWN,
            threads: 32 * self.warps as u32,
            shared_bytes,
            variant: format!(
                "down of {}, {}, {zeros}zero points, units of {}",
                if tokens == 1 { "a token" } else { "tokens" },
                shape.scales,
                unit(shape)
            ),
        }
    }
}

/// Every variant of a tile, for 8 experts a token.
pub fn programs(tile: &MoeInt4PairsTile, dims: MoeInt4Dims) -> Vec<ProgramEntry> {
    variants(dims)
        .into_iter()
        .flat_map(|dims| {
            let down = |tokens| tile.down.entry(&dims.down, tokens, 8);
            [tile.gate_up.entry(pairs_variant(dims.gate_up), &Limits::a100()), down(1), down(2)]
        })
        .collect()
}

/// Down and the weighted sum of few tokens.
pub(crate) struct Down<'a, D: Device> {
    pub(crate) tile: DownTile,
    /// `[pairs, columns]` bf16.
    pub(crate) x: &'a D::Buffer,
    pub(crate) columns: usize,
    pub(crate) weight: &'a PackedInt4<D>,
    pub(crate) topk_ids: &'a D::Buffer,
    pub(crate) topk_weights: &'a D::Buffer,
    pub(crate) shared: Option<&'a D::Buffer>,
    pub(crate) out: &'a D::Buffer,
    pub(crate) tokens: usize,
    pub(crate) top_k: usize,
}

impl<D: Device> Down<'_, D> {
    pub(crate) fn launch(&self, device: &D) -> Result<()> {
        let shape = self.weight.shape();
        let entry = self.tile.entry(shape, self.tokens, self.top_k);
        let blocks = shape.row_tiles().div_ceil(self.tile.row_tiles);
        let numbers = [
            self.weight.count(),
            self.columns,
            shape.k_tiles(),
            shape.row_tiles(),
            shape.groups(),
            shape.out_features,
            self.top_k,
            0,
        ];
        let mut args = vec![
            Arg::Buffer(self.x),
            Arg::Buffer(&self.weight.weight),
            Arg::Buffer(&self.weight.scales),
            self.weight.zeros.as_ref().map_or(Arg::Null, Arg::Buffer),
            Arg::Buffer(self.topk_ids),
            Arg::Buffer(self.topk_weights),
            self.shared.map_or(Arg::Null, Arg::Buffer),
            Arg::Buffer(self.out),
        ];
        args.extend(numbers.map(|number| Arg::I32(number as i32)));
        device.launch(&Launch {
            program: &entry.program,
            entry: entry.entry,
            grid: [self.tokens as u32, blocks as u32, 1],
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            shape: format!("{} tokens of {} experts, {shape:?}", self.tokens, self.top_k),
            args: &args,
        })
    }
}

/// A shape of scales and zero points that `programs` compiles for.
pub(crate) fn with(shape: Int4Shape, scales: DType, group_size: usize, zero_points: bool) -> Int4Shape {
    Int4Shape { scales, group_size, zero_points, ..shape }
}
