//! The product of `moe_int4`: weights of experts with the rows of the tokens that chose them.

use dsa80_reference::Result;
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::int4::{Int4Rows, Int4Shape, PackedInt4, TILE_INPUTS};
use crate::tensor::element_bytes;
use crate::tile::{Tile, require, require_shared};

const KERNEL: &str = "moe_int4";

/// How a block shares out a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProductTile {
    /// Warps that share a row group.
    pub warps_m: usize,
    /// Columns of such warps, which share out the inputs.
    pub warps_k: usize,
    /// Tiles of 16 rows of a warp.
    pub row_tiles: usize,
    /// Tiles of 64 inputs of a stage.
    pub k_tiles: usize,
    /// Stages of a column in shared memory.
    pub stages: usize,
    /// Row groups that a block does one after the other.
    pub row_groups: usize,
    /// Blocks that a multiprocessor must be able to hold.
    pub blocks: usize,
}

/// What is compiled in beside the tile.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variant {
    pub(crate) shape: Int4Shape,
    /// Tokens of an item.
    pub(crate) tokens: usize,
    /// Items come from `moe_sort`; a pair is an item if not.
    pub(crate) sorted: bool,
}

impl Variant {
    /// Whether blocks take one share of work after the other; kernels for more tokens take one.
    fn streams(&self) -> bool {
        self.sorted && self.tokens <= 32
    }
}

/// Inputs that surely share a scale.
pub(crate) fn unit(shape: &Int4Shape) -> usize {
    if shape.kernel_group_size().is_multiple_of(TILE_INPUTS) { TILE_INPUTS } else { TILE_INPUTS / 2 }
}

impl ProductTile {
    fn threads(&self) -> u32 {
        (32 * self.warps_m * self.warps_k) as u32
    }

    /// Row tiles of a row group.
    fn group_tiles(&self) -> usize {
        self.warps_m * self.row_tiles
    }

    /// Whether down packs what it gives, two row tiles at a time.
    pub(crate) fn packs(&self) -> bool {
        self.row_tiles.is_multiple_of(2)
    }

    /// Whether every stage is full, and every row ends with one.
    fn whole(&self, shape: &Int4Shape) -> bool {
        shape.in_features.is_multiple_of(TILE_INPUTS * self.warps_k * self.k_tiles)
    }

    fn shared_bytes(&self, variant: Variant) -> usize {
        let Variant { shape, tokens, sorted } = variant;
        let pieces = self.group_tiles() * self.k_tiles;
        let units = TILE_INPUTS / unit(&shape);
        let (weight, x) = (pieces * 512, self.k_tiles * if sorted { tokens } else { 1 } * 128);
        let scales = pieces * units * 16 * element_bytes(shape.scales);
        let zeros = if shape.zero_points { pieces * units * 8 } else { 0 };
        let stage = (weight + x + scales + zeros).next_multiple_of(16);
        let sums = if self.warps_k > 1 { self.warps_k * self.group_tiles() * tokens / 8 * 512 } else { 0 };
        self.warps_k * self.stages * stage + sums
    }

    /// Sums, a tile's fragments, and what addresses and copies take.
    fn registers(&self, variant: Variant) -> usize {
        self.row_tiles * (variant.tokens / 2 + 16 + 4) + 48
    }

    /// Blocks of a multiprocessor: where they stream, up to twice as many as it must hold, if it holds them.
    fn resident(&self, variant: Variant, limits: &Limits) -> usize {
        if !variant.streams() {
            return self.blocks;
        }
        // The shares that come next are kept, and where their tokens' rows are.
        let registers = (self.registers(variant) + 16 + variant.tokens) as u32;
        let resident = limits.resident_blocks(self.threads(), registers, self.shared_bytes(variant));
        (resident as usize).clamp(self.blocks, 2 * self.blocks)
    }

    pub(crate) fn entry(&self, variant: Variant, limits: &Limits) -> ProgramEntry {
        let Variant { shape, tokens, sorted } = variant;
        let gate_up = shape.rows == Int4Rows::GateUp;
        let shared_bytes = self.shared_bytes(variant);
        let defines = [
            ("GATE_UP", usize::from(gate_up)),
            ("SORTED", usize::from(sorted)),
            ("SCALE_TYPE", shape.scale_type()),
            ("GROUP_SIZE", shape.kernel_group_size()),
            ("UNIT", unit(&shape)),
            ("ZEROS", usize::from(shape.zero_points)),
            ("WHOLE", usize::from(self.whole(&shape))),
            ("ALL_ROW_TILES", shape.row_tiles()),
            ("ALL_K_TILES", shape.k_tiles()),
            ("GROUPS", shape.groups()),
            ("PACKED", usize::from(!gate_up && self.packs())),
            ("TILE_WARPS_M", self.warps_m),
            ("TILE_WARPS_K", self.warps_k),
            ("TILE_ROW_TILES", self.row_tiles),
            ("TILE_TOKENS", tokens),
            ("TILE_K_TILES", self.k_tiles),
            ("TILE_STAGES", self.stages),
            ("TILE_BLOCKS", self.resident(variant, limits)),
            ("TILE_SHARED_BYTES", shared_bytes),
        ];
        let product = if gate_up { "gate-up" } else { "down" };
        let zeros = if shape.zero_points { "" } else { "no " };
        ProgramEntry {
            program: Program::new("moe_int4.cu", defines),
            entry: KERNEL,
            threads: self.threads(),
            shared_bytes,
            variant: format!("{product}, {}, {zeros}zero points, units of {}", shape.scales, unit(&shape)),
        }
    }

    /// Fails unless `tile`, which this is part of, runs with it.
    pub(crate) fn require<T: Tile>(&self, tile: &T, variant: Variant, limits: &Limits) -> Result<()> {
        let sizes = [self.warps_m, self.warps_k, self.row_tiles, self.k_tiles, self.row_groups, self.blocks];
        require(tile, sizes.iter().all(|size| (1..=64).contains(size)), || "sizes are 1 to 64".into())?;
        let warps = self.warps_m * self.warps_k;
        require(tile, warps <= 16 && (self.warps_k < 16 || self.warps_m == 1), || {
            format!("a block of {} x {} warps is more than 16", self.warps_m, self.warps_k)
        })?;
        require(tile, self.k_tiles.is_power_of_two() && self.k_tiles <= 4 * self.warps_m, || {
            format!("{} tiles of inputs are no power of 2 up to 4 a warp", self.k_tiles)
        })?;
        require(tile, (2..=16).contains(&self.stages), || "there are 2 to 16 stages".into())?;
        let registers = self.registers(variant);
        require(tile, registers <= 255, || {
            format!(
                "{} tiles of rows x {} tokens are more than registers hold",
                self.row_tiles, variant.tokens
            )
        })?;
        let resident = limits.resident_blocks(self.threads(), registers as u32, self.shared_bytes(variant));
        require_shared(tile, self.shared_bytes(variant), limits)?;
        require(tile, resident as usize >= self.blocks, || {
            format!("{} blocks of {warps} warps do not fit a multiprocessor", self.blocks)
        })
    }
}

/// What the next launch reads, and what of it is worth having in the L2 early.
#[derive(Debug)]
pub(crate) struct Next<'a, D: Device> {
    pub(crate) weight: &'a PackedInt4<D>,
    /// Items at the end that bring some of it.
    pub(crate) late_items: usize,
    /// What one of them brings, in 256ths of an expert's weights.
    pub(crate) share: usize,
}

/// Weights that a kernel brings to the L2: their arrays, and the bytes of one expert's.
pub(crate) fn next_args<D: Device>(weight: Option<&PackedInt4<D>>) -> [Arg<'_, D::Buffer>; 6] {
    let zeros = weight.and_then(|weight| weight.zeros.as_ref());
    let buffer = |buffer: Option<_>| buffer.map_or(Arg::Null, Arg::Buffer);
    let bytes = |of: fn(&Int4Shape) -> usize| Arg::I32(weight.map_or(0, |weight| of(weight.shape())) as i32);
    [
        buffer(weight.map(|weight| &weight.weight)),
        buffer(weight.map(|weight| &weight.scales)),
        buffer(zeros),
        bytes(Int4Shape::weight_bytes),
        bytes(Int4Shape::scales_bytes),
        bytes(Int4Shape::zeros_bytes),
    ]
}

/// One product over items.
pub(crate) struct Product<'a, D: Device> {
    pub(crate) tile: &'a ProductTile,
    pub(crate) variant: Variant,
    pub(crate) x: &'a D::Buffer,
    /// Columns of a row of `x`.
    pub(crate) columns: usize,
    pub(crate) weight: &'a PackedInt4<D>,
    /// Items of `moe_sort`, or topk_ids.
    pub(crate) items: &'a D::Buffer,
    pub(crate) item_count: usize,
    pub(crate) order: Option<&'a D::Buffer>,
    pub(crate) out: &'a D::Buffer,
    /// Columns of a row of `out`.
    pub(crate) out_columns: usize,
    pub(crate) top_k: usize,
    pub(crate) first_token: usize,
    /// What the next launch reads of the same experts.
    pub(crate) next: Option<Next<'a, D>>,
}

impl<D: Device> Product<'_, D> {
    pub(crate) fn launch(&self, device: &D) -> Result<()> {
        let shape = &self.variant.shape;
        let entry = self.tile.entry(self.variant, device.limits());
        let ranges = shape.row_tiles().div_ceil(self.tile.group_tiles()).div_ceil(self.tile.row_groups);
        let (ranges, items) = (ranges as u32, self.item_count as u32);
        let grid = if self.variant.streams() {
            let resident = self.tile.resident(self.variant, device.limits()) as u32;
            [(resident * device.limits().multiprocessors).min(ranges * items), 1, 1]
        } else if self.variant.sorted && shape.rows == Int4Rows::GateUp {
            [ranges, items, 1]
        } else {
            [items, ranges, 1]
        };
        let numbers = [
            self.weight.count(),
            self.columns,
            self.out_columns,
            self.top_k,
            self.first_token,
            self.tile.row_groups,
            ranges as usize,
            self.item_count,
            self.next.as_ref().map_or(0, |next| next.late_items.min(self.item_count)),
        ];
        let mut args = vec![
            Arg::Buffer(self.x),
            Arg::Buffer(&self.weight.weight),
            Arg::Buffer(&self.weight.scales),
            self.weight.zeros.as_ref().map_or(Arg::Null, Arg::Buffer),
            Arg::Buffer(self.items),
            self.order.map_or(Arg::Null, Arg::Buffer),
            Arg::Buffer(self.out),
        ];
        args.extend(numbers.map(|number| Arg::I32(number as i32)));
        args.extend(next_args(self.next.as_ref().map(|next| next.weight)));
        args.push(Arg::I32(self.next.as_ref().map_or(0, |next| next.share) as i32));
        device.launch(&Launch {
            program: &entry.program,
            entry: entry.entry,
            grid,
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            shape: format!("{items} items of {} experts, {shape:?}", self.weight.count()),
            args: &args,
        })
    }
}
