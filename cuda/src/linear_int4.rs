//! `linear_int4`: `out = x W^T` with a packed INT4 weight; and `swiglu_int4`, of a gate and an up projection.
//!
//! Two ways lead to the same result, up to the order of sums: for few tokens the weight streams past them once
//! (`kernels/linear_int4.cu`), many tokens share tiles of it in [`linear_int4_wide`](crate::linear_int4_wide). In both, blocks may
//! share out the inputs where there are too few of them; the last of them to finish adds up in a fixed order.

use dsa80_reference::{DType, DeviceTensor, Error, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::int4::{Int4Rows, Int4Shape, PackedInt4, TILE_INPUTS, TILE_ROWS};
pub use crate::linear_int4_wide::LinearInt4WideTile;
use crate::tensor::{CudaTensor, element_bytes};
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "linear_int4";
const SWIGLU: &str = "swiglu_int4";

/// Tokens of an accumulator fragment.
pub(crate) const TOKENS: usize = 8;

/// The constants of the kernel for few tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearInt4Tile {
    /// Warps of a block, which take turns at its inputs.
    pub warps: usize,
    /// Tiles of 16 features of a block at most: how many it has depends on how many blocks that makes.
    pub row_tiles: usize,
    /// Tiles of 8 tokens of a block.
    pub token_tiles: usize,
    /// Tiles of 64 inputs that a warp has under way at most: as many as shared memory holds.
    pub stages: usize,
    /// Blocks that a multiprocessor must have registers for.
    pub blocks: usize,
    /// Blocks a multiprocessor for which blocks share out the inputs; 0 if they never do.
    pub split_blocks: usize,
}

/// Few tokens, as far as they have tiles of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearInt4Tokens {
    /// 1 to 8.
    UpTo8,
    /// 9 to 16.
    UpTo16,
    /// 17 to 32.
    UpTo32,
}

impl Tile for LinearInt4Tile {
    const KERNEL: &'static str = KERNEL;
    type Dims = LinearInt4Tokens;

    fn safe(tokens: Self::Dims) -> Self {
        let token_tiles = tokens.token_tiles();
        Self { warps: 8, row_tiles: 1, token_tiles, stages: 2, blocks: 1, split_blocks: 1 }
    }

    fn candidates(tokens: Self::Dims, limits: &Limits) -> Vec<Self> {
        let token_tiles = tokens.token_tiles();
        let shapes: &[(usize, usize, usize, usize, usize)] = match tokens {
            LinearInt4Tokens::UpTo8 => &[
                (8, 4, 4, 2, 0),
                (8, 4, 8, 1, 0),
                (12, 4, 4, 1, 0),
                (16, 4, 3, 1, 0),
                (12, 3, 4, 1, 0),
                (8, 4, 4, 2, 1),
            ],
            LinearInt4Tokens::UpTo16 => &[
                (8, 3, 3, 2, 0),
                (8, 4, 3, 1, 0),
                (8, 4, 3, 1, 1),
                (12, 4, 3, 1, 0),
                (8, 3, 4, 1, 1),
                (12, 3, 3, 1, 1),
            ],
            LinearInt4Tokens::UpTo32 => &[(8, 3, 3, 1, 1), (8, 4, 2, 1, 0), (8, 4, 2, 1, 1), (8, 4, 3, 1, 1)],
        };
        let mut tiles = vec![Self::safe(tokens)];
        tiles.extend(shapes.iter().map(|&(warps, row_tiles, stages, blocks, split_blocks)| Self {
            warps,
            row_tiles,
            token_tiles,
            stages,
            blocks,
            split_blocks,
        }));
        tiles.retain(|tile| tile.validate(tokens, limits).is_ok());
        tiles
    }

    fn validate(&self, _tokens: Self::Dims, limits: &Limits) -> Result<()> {
        let Self { warps, row_tiles, token_tiles, stages, blocks, split_blocks } = *self;
        require(self, (1..=16).contains(&warps), || "a block has 1 to 16 warps".into())?;
        require(self, matches!(token_tiles, 1 | 2 | 4), || "a block has 1, 2 or 4 tiles of tokens".into())?;
        require(self, (1..=8).contains(&row_tiles), || "a block has 1 to 8 tiles of features".into())?;
        require(self, (1..=8).contains(&stages), || "a warp has 1 to 8 stages".into())?;
        require(self, split_blocks <= 8, || {
            "inputs are shared out for at most 8 blocks a multiprocessor".into()
        })?;
        // Sums, a group's products, a tile's activations, and what addresses take.
        let registers = 4 * row_tiles * token_tiles + 12 * token_tiles + 24;
        let held = limits.registers_per_multiprocessor as usize / (32 * warps * blocks.max(1));
        require(self, blocks > 0 && registers <= held.min(255), || {
            format!("a thread needs {registers} registers, {blocks} blocks leave {}", held.min(255))
        })?;
        // Scales of 32 bits and two groups a tile are the most.
        require_shared(self, self.warps * self.stage_bytes(8, 2).max(self.sums_bytes()), limits)
    }
}

impl LinearInt4Tokens {
    fn token_tiles(self) -> usize {
        match self {
            Self::UpTo8 => 1,
            Self::UpTo16 => 2,
            Self::UpTo32 => 4,
        }
    }
}

impl LinearInt4Tile {
    fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    /// Accumulator fragments of a block.
    fn fragments(&self) -> usize {
        self.row_tiles * self.token_tiles
    }

    /// A warp's words, activations, scales and zero points of a k tile.
    fn stage_bytes(&self, scale_bytes: usize, groups_per_tile: usize) -> usize {
        let groups = self.row_tiles * groups_per_tile * 32 * (scale_bytes + size_of::<u32>());
        self.row_tiles * 512 + self.token_tiles * 1024 + groups
    }

    /// A warp's fragments, which take the stages' place in the end.
    fn sums_bytes(&self) -> usize {
        self.fragments() * 32 * size_of::<[f32; 4]>()
    }

    fn shared_bytes(&self, variant: Variant) -> usize {
        let stage = self.stage_bytes(variant.scale_bytes(), variant.groups_per_tile());
        self.warps * (self.stages * stage).max(self.sums_bytes())
    }

    /// With as many tiles of features as are done soonest, and the stages that then fit.
    fn fitted(&self, tokens: usize, shape: &Int4Shape, variant: Variant, limits: &Limits) -> (Self, Blocks) {
        let (mut tile, blocks) = (1..=self.row_tiles)
            .map(|row_tiles| {
                let tile = Self { row_tiles, ..*self };
                (tile, tile.blocks(tokens, shape, limits))
            })
            .min_by_key(|(tile, blocks)| {
                // Activations cost about as much as the weight; adding up is done by one block for all.
                let waves = (blocks.groups() * blocks.splits).div_ceil(limits.multiprocessors as usize);
                let merged = if blocks.splits > 1 { blocks.splits * tile.fragments() / 4 } else { 0 };
                waves * blocks.k_tiles_per_split * (tile.row_tiles + tile.token_tiles) + merged
            })
            .unwrap_or_else(|| (*self, self.blocks(tokens, shape, limits)));
        let stage = tile.warps * tile.stage_bytes(variant.scale_bytes(), variant.groups_per_tile());
        tile.stages = tile.stages.min(limits.shared_per_block / stage).max(1);
        (tile, blocks)
    }

    fn program(&self, variant: Variant) -> Program {
        let tile = [
            ("TILE_WARPS", self.warps),
            ("TILE_ROW_TILES", self.row_tiles),
            ("TILE_TOKEN_TILES", self.token_tiles),
            ("TILE_STAGES", self.stages),
            ("TILE_BLOCKS", self.blocks),
            ("TILE_SHARED_BYTES", self.shared_bytes(variant)),
        ];
        Program::new("linear_int4.cu", variant.defines().into_iter().chain(tile))
    }

    fn blocks(&self, tokens: usize, shape: &Int4Shape, limits: &Limits) -> Blocks {
        let rows = shape.row_tiles().div_ceil(self.row_tiles);
        let tokens = tokens.div_ceil(TOKENS * self.token_tiles);
        let most = self.split_blocks * limits.multiprocessors as usize;
        Blocks::of(rows, tokens, shape.k_tiles(), most, self.warps)
    }
}

/// What becomes of the products, as `kernels/linear_int4.cuh` counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Out {
    Act = 0,
    Float = 1,
    SwiGlu = 2,
}

/// What is compiled in beside the tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Variant {
    scale_type: usize,
    zero_points: bool,
    group_size: usize,
    out: Out,
    alignment: usize,
}

/// Group sizes that kernels know when they are compiled.
const GROUP_SIZES: [usize; 3] = [32, 64, 128];

impl Variant {
    fn of(shape: &Int4Shape, out: Out) -> Self {
        Self {
            scale_type: shape.scale_type(),
            zero_points: shape.zero_points,
            group_size: shape.kernel_group_size(),
            out,
            alignment: match shape.in_features {
                whole if whole.is_multiple_of(TILE_INPUTS) => 2,
                inner => usize::from(inner.is_multiple_of(8)),
            },
        }
    }

    pub(crate) fn defines(self) -> [(&'static str, usize); 6] {
        let known = GROUP_SIZES.contains(&self.group_size);
        [
            ("SCALE_TYPE", self.scale_type),
            ("ZERO_POINTS", usize::from(self.zero_points)),
            ("GROUP_SIZE", if known { self.group_size } else { 0 }),
            ("GROUPS_PER_TILE", if self.group_size.is_multiple_of(64) { 1 } else { 2 }),
            ("OUT", self.out as usize),
            ("ALIGNED", self.alignment),
        ]
    }

    /// Whether nothing takes registers beyond what every variant needs.
    pub(crate) fn is_plain(self) -> bool {
        self.scale_type == 0 && !self.zero_points && self.groups_per_tile() == 1 && self.alignment == 2
    }

    pub(crate) fn scale_bytes(self) -> usize {
        if self.scale_type == 2 { 8 } else { 4 }
    }

    pub(crate) fn groups_per_tile(self) -> usize {
        if self.group_size.is_multiple_of(64) { 1 } else { 2 }
    }

    /// Every constant in few programs: what a compile check looks at.
    pub(crate) fn all() -> Vec<(Self, String)> {
        [
            (0, false, 128, Out::Act, 2),
            (0, true, 32, Out::SwiGlu, 2),
            (1, false, 64, Out::Float, 2),
            (2, true, 96, Out::Float, 1),
            (1, true, 128, Out::Act, 0),
            (2, false, 6144, Out::SwiGlu, 2),
        ]
        .into_iter()
        .map(|(scale_type, zero_points, group_size, out, alignment)| {
            let words = format!(
                "groups of {group_size}, scale type {scale_type}, {}, {out:?} out, alignment {alignment}",
                if zero_points { "zero points" } else { "symmetric" },
            );
            (Self { scale_type, zero_points, group_size, out, alignment }, words)
        })
        .collect()
    }
}

/// Every variant of a tile, and the first with fewer tiles of features.
pub fn programs(tile: &LinearInt4Tile) -> Vec<ProgramEntry> {
    let entry = |tile: LinearInt4Tile, variant: Variant, words: String| {
        let most = Limits::a100().shared_per_block;
        let stage = tile.warps * tile.stage_bytes(variant.scale_bytes(), variant.groups_per_tile());
        let tile = LinearInt4Tile { stages: tile.stages.min(most / stage).max(1), ..tile };
        ProgramEntry {
            program: tile.program(variant),
            entry: KERNEL,
            threads: tile.threads(),
            shared_bytes: tile.shared_bytes(variant),
            variant: format!("{words}, {} row tiles", tile.row_tiles),
        }
    };
    let mut entries = Vec::new();
    for row_tiles in 1..=tile.row_tiles {
        let variants =
            Variant::all().into_iter().take(if row_tiles == tile.row_tiles { usize::MAX } else { 1 });
        entries.extend(
            variants.map(|(variant, words)| entry(LinearInt4Tile { row_tiles, ..*tile }, variant, words)),
        );
    }
    entries
}

/// Weight, activations and output once; the products of all inputs.
pub fn cost(tokens: usize, shape: &Int4Shape, out: DType) -> Cost {
    let Int4Shape { out_features, in_features, .. } = *shape;
    let products = tokens * in_features * shape.row_tiles() * TILE_ROWS;
    let weight = shape.weight_bytes() + shape.scales_bytes() + shape.zeros_bytes();
    let rows = tokens * (2 * in_features + element_bytes(out) * out_features);
    Cost { bytes: (weight + rows) as f64, flops: 2.0 * products as f64 }
}

/// How blocks share out a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Along the features.
    pub(crate) rows: usize,
    /// Along the tokens.
    pub(crate) tokens: usize,
    /// Along the inputs.
    pub(crate) splits: usize,
    pub(crate) k_tiles_per_split: usize,
}

impl Blocks {
    /// Splits as far as there are then at most `most` blocks and `least` k tiles for each.
    pub(crate) fn of(rows: usize, tokens: usize, k_tiles: usize, most: usize, least: usize) -> Self {
        let wanted = (most / (rows * tokens).max(1)).min(k_tiles / least.max(1)).max(1);
        let k_tiles_per_split = k_tiles.div_ceil(wanted).max(1);
        Self { rows, tokens, splits: k_tiles.div_ceil(k_tiles_per_split).max(1), k_tiles_per_split }
    }

    /// Blocks that add up to one each.
    fn groups(self) -> usize {
        self.rows * self.tokens
    }
}

/// The tiles of both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearInt4Tiles {
    /// For up to 8 tokens,
    pub few_8: LinearInt4Tile,
    /// up to 16,
    pub few_16: LinearInt4Tile,
    /// and up to [`few_tokens`](Self::few_tokens), in blocks of 32.
    pub few_32: LinearInt4Tile,
    /// For up to [`medium_tokens`](Self::medium_tokens),
    pub medium: LinearInt4WideTile,
    /// and for more.
    pub many: LinearInt4WideTile,
    /// Tokens up to which the weight streams.
    pub few_tokens: usize,
    /// Tokens up to which blocks have few of them.
    pub medium_tokens: usize,
}

impl LinearInt4Tiles {
    /// Tiles that fit any device.
    pub fn safe() -> Self {
        Self {
            few_8: LinearInt4Tile::safe(LinearInt4Tokens::UpTo8),
            few_16: LinearInt4Tile::safe(LinearInt4Tokens::UpTo16),
            few_32: LinearInt4Tile::safe(LinearInt4Tokens::UpTo32),
            medium: LinearInt4WideTile::safe(()),
            many: LinearInt4WideTile::safe(()),
            few_tokens: 32,
            medium_tokens: 256,
        }
    }

    fn few(&self, tokens: usize) -> &LinearInt4Tile {
        match tokens {
            0..=8 => &self.few_8,
            9..=16 => &self.few_16,
            _ => &self.few_32,
        }
    }

    fn wide(&self, tokens: usize) -> &LinearInt4WideTile {
        if tokens <= self.medium_tokens { &self.medium } else { &self.many }
    }
}

/// What blocks that share out the inputs hand to the last of them.
#[derive(Debug)]
pub struct LinearInt4Workspace<D: Device> {
    partials: D::Buffer,
    tickets: D::Buffer,
    /// Bytes of `partials`.
    partial_bytes: usize,
    /// Blocks of all splits.
    blocks: usize,
}

impl<D: Device> LinearInt4Workspace<D> {
    /// For steps of any size with `tiles`: 4 bytes for each sum of as many blocks as a tile lets share out inputs. That is, for each
    /// multiprocessor, `512 * row_tiles * token_tiles * split_blocks` bytes of a tile for few tokens, and `4 * split_blocks` times
    /// features and tokens of a block of one for many, whichever is the most.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, tiles: &LinearInt4Tiles) -> Result<Self> {
        let limits = device.limits();
        let multiprocessors = limits.multiprocessors as usize;
        let few = [&tiles.few_8, &tiles.few_16, &tiles.few_32]
            .map(|tile| (tile.split_blocks, tile.fragments() * TILE_ROWS * TOKENS));
        let wide =
            [&tiles.medium, &tiles.many].map(|tile| (tile.split_blocks, tile.features() * tile.tokens()));
        let (mut blocks, mut partial_bytes) = (0, 0);
        for (split_blocks, sums) in few.into_iter().chain(wide) {
            blocks = blocks.max(split_blocks * multiprocessors);
            partial_bytes = partial_bytes.max(split_blocks * multiprocessors * sums * size_of::<f32>());
        }
        let tickets = device.alloc("linear_int4 tickets", blocks * size_of::<u32>())?;
        device.write(&tickets, 0, &vec![0; blocks * size_of::<u32>()])?;
        let partials = device.alloc("linear_int4 partials", partial_bytes)?;
        Ok(Self { partials, tickets, partial_bytes, blocks })
    }

    fn require(&self, blocks: Blocks, sums: usize) -> Result<()> {
        let (count, bytes) =
            (blocks.groups() * blocks.splits, blocks.groups() * blocks.splits * sums * size_of::<f32>());
        if blocks.splits > 1 && (count > self.blocks || bytes > self.partial_bytes) {
            let shape = vec![blocks.groups(), blocks.splits, sums];
            return Err(Error::Capacity { shape, elements: bytes, capacity: self.partial_bytes });
        }
        Ok(())
    }
}

/// The kernel of the contract's [`linear_int4`](dsa80_reference::Kernels::linear_int4).
///
/// # Errors
/// A shape, element type or tile that does not fit; a workspace for other tiles; the device.
pub fn linear_int4<D: Device>(
    device: &D,
    tiles: &LinearInt4Tiles,
    workspace: &LinearInt4Workspace<D>,
    x: &CudaTensor<D>,
    weight: &PackedInt4<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    out.expect_dtype(KERNEL, "out", &[DType::Act, DType::Float], "activations or floats")?;
    let into = if out.dtype() == DType::Float { Out::Float } else { Out::Act };
    launch(KERNEL, device, tiles, workspace, x, weight, into, out)
}

/// The contract's [`swiglu`](dsa80_reference::Kernels::swiglu) of a gate and an up projection that lie in one weight
/// ([`Int4Rows::GateUp`]): `out = silu(x gate^T) * (x up^T)`, rounded once.
///
/// # Errors
/// As for [`linear_int4`].
pub fn swiglu_int4<D: Device>(
    device: &D,
    tiles: &LinearInt4Tiles,
    workspace: &LinearInt4Workspace<D>,
    x: &CudaTensor<D>,
    weight: &PackedInt4<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    out.expect_dtype(SWIGLU, "out", &[DType::Act], "activations")?;
    launch(SWIGLU, device, tiles, workspace, x, weight, Out::SwiGlu, out)
}

fn launch<D: Device>(
    kernel: &'static str,
    device: &D,
    tiles: &LinearInt4Tiles,
    workspace: &LinearInt4Workspace<D>,
    x: &CudaTensor<D>,
    weight: &PackedInt4<D>,
    into: Out,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let shape = weight.shape();
    let Int4Shape { out_features, in_features, .. } = *shape;
    let [tokens, width] = x.dims(kernel, "x")?;
    x.expect(kernel, "x", width == in_features, || format!("[T, {in_features}]"))?;
    x.expect_dtype(kernel, "x", &[DType::Act], "activations")?;
    out.expect(kernel, "out", out.shape() == [tokens, out_features], || {
        format!("[{tokens}, {out_features}]")
    })?;
    let (rows, expected) = match into {
        Out::SwiGlu => (Int4Rows::GateUp, "a gate and its up projection"),
        Out::Act | Out::Float => (Int4Rows::One, "one weight"),
    };
    if weight.count() != 1 || shape.rows != rows {
        let found = format!("{} of {:?}", weight.count(), shape.rows);
        return Err(Error::Value { kernel, name: "weight", expected: expected.into(), found });
    }
    if tokens == 0 || out_features == 0 {
        return Ok(());
    }
    // Bytes of activations and of the weight are counted in 32 bits.
    let most = (2 * tokens * in_features).max(tokens * out_features).max(shape.weight_bytes());
    if most >= 1 << 32 {
        let found = format!("{tokens} x {in_features} x {out_features}");
        let expected = "less than 2^32 bytes of activations, and of a weight".into();
        return Err(Error::Value { kernel, name: "dims", expected, found });
    }
    let variant = Variant::of(shape, into);
    let limits = device.limits();
    let (program, entry, threads, shared_bytes, blocks, grid, sums);
    if tokens <= tiles.few_tokens {
        let tile = tiles.few(tokens);
        tile.validate(LinearInt4Tokens::UpTo32, limits)?;
        let (tile, fitted) = tile.fitted(tokens, shape, variant, limits);
        blocks = fitted;
        (program, entry) = (tile.program(variant), KERNEL);
        (threads, shared_bytes) = (tile.threads(), tile.shared_bytes(variant));
        grid = [blocks.rows, blocks.splits, blocks.tokens];
        sums = tile.fragments() * TILE_ROWS * TOKENS;
    } else {
        let tile = tiles.wide(tokens);
        tile.validate((), limits)?;
        let tile = tile.fitted(variant);
        blocks = tile.blocks(tokens, shape, limits);
        (program, entry) = (tile.program(variant), LinearInt4WideTile::KERNEL);
        (threads, shared_bytes) = (tile.threads(), tile.shared_bytes(variant));
        grid = [blocks.rows, blocks.tokens, blocks.splits];
        sums = tile.features() * tile.tokens();
    }
    workspace.require(blocks, sums)?;
    device.launch(&Launch {
        program: &program,
        entry,
        grid: grid.map(|blocks| blocks as u32),
        threads,
        shared_bytes,
        shape: format!("{tokens} tokens, {in_features} to {out_features}, {blocks:?}, {variant:?}"),
        args: &[
            Arg::Buffer(x.buffer()),
            Arg::Buffer(&weight.weight),
            Arg::Buffer(&weight.scales),
            weight.zeros.as_ref().map_or(Arg::Null, Arg::Buffer),
            Arg::Buffer(out.buffer()),
            Arg::Buffer(&workspace.partials),
            Arg::Buffer(&workspace.tickets),
            Arg::I32(tokens as i32),
            Arg::I32(in_features as i32),
            Arg::I32(out_features as i32),
            Arg::I32(shape.groups() as i32),
            Arg::I32(variant.group_size as i32),
            Arg::I32(blocks.k_tiles_per_split as i32),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_fit_an_a100_and_refusals_say_why() {
        let limits = Limits::a100();
        for tokens in [LinearInt4Tokens::UpTo8, LinearInt4Tokens::UpTo16, LinearInt4Tokens::UpTo32] {
            let safe = LinearInt4Tile::safe(tokens);
            let candidates = LinearInt4Tile::candidates(tokens, &limits);
            assert!(candidates.contains(&safe) && candidates.len() >= 5, "{candidates:?}");
            for (tile, reason) in [
                (LinearInt4Tile { warps: 17, ..safe }, "1 to 16 warps"),
                (LinearInt4Tile { token_tiles: 3, ..safe }, "1, 2 or 4 tiles of tokens"),
                (LinearInt4Tile { row_tiles: 9, ..safe }, "1 to 8 tiles of features"),
                (LinearInt4Tile { stages: 9, ..safe }, "1 to 8 stages"),
                (LinearInt4Tile { split_blocks: 9, ..safe }, "at most 8 blocks"),
                (LinearInt4Tile { warps: 16, blocks: 4, ..safe }, "registers"),
            ] {
                let error = tile.validate(tokens, &limits).unwrap_err().to_string();
                assert!(error.contains(reason), "{error}");
            }
        }
    }

    #[test]
    fn inputs_are_shared_out_among_too_few_blocks() {
        let blocks =
            |rows, tokens, splits, k_tiles_per_split| Blocks { rows, tokens, splits, k_tiles_per_split };
        assert_eq!(Blocks::of(32, 1, 96, 132, 8), blocks(32, 1, 4, 24));
        assert_eq!(Blocks::of(384, 1, 32, 132, 8), blocks(384, 1, 1, 32));
        assert_eq!(Blocks::of(1, 1, 96, 132, 8), blocks(1, 1, 12, 8));
        assert_eq!(Blocks::of(1, 1, 3, 132, 8), blocks(1, 1, 1, 3));
        assert_eq!(Blocks::of(30, 1, 32, 264, 3), blocks(30, 1, 8, 4));
        assert_eq!(Blocks::of(32, 1, 96, 0, 8), blocks(32, 1, 1, 96));
    }
}
