//! `moe_int4`: routed experts, all of them INT4.
//!
//! Few tokens take two launches (`moe_int4_pairs`): gate-up of every pair of token and k, then down with the weighted sum. More tokens are
//! sorted by expert first; down then leaves a row for every pair, and a last launch adds these up in the order of k.

use dsa80_reference::{DType, Error, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::int4::{Int4Rows, Int4Shape};
use crate::moe_int4_grouped::{Next, Product, ProductTile, Variant};
use crate::moe_int4_pairs::{Down, MoeInt4PairsTile, pairs_variant, with};
use crate::moe_sort::{self, Sorted};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require};

pub use crate::moe_int4_experts::ExpertsInt4;

const KERNEL: &str = "moe_int4";
const SUM: &str = "moe_sum";

/// Tokens that are done at once: what the workspace has room for.
const CHUNK: usize = 4096;
/// Threads of a block of the sum, eight columns each.
const SUM_THREADS: usize = 128;
/// Bytes of what comes next that gate-up brings to the L2 at its end.
const EARLY_BYTES: usize = 16 << 20;
/// Tokens of an item at least.
const MIN_ITEM: usize = 8;

/// How many tokens an expert gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoeLoad {
    /// One or two.
    Few,
    /// Several.
    Some,
    /// Dozens and more.
    Many,
}

impl MoeLoad {
    /// Of steps of `pairs` pairs of token and k.
    pub fn of(pairs: usize, experts: usize) -> Self {
        match pairs / experts.max(1) {
            0..4 => Self::Few,
            4..24 => Self::Some,
            _ => Self::Many,
        }
    }
}

/// What the model and the step fix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeInt4Dims {
    /// Of an expert's gate and up together.
    pub gate_up: Int4Shape,
    /// Of its down.
    pub down: Int4Shape,
    /// How many tokens an expert gets.
    pub load: MoeLoad,
}

impl MoeInt4Dims {
    /// Dims whose shapes are all of one kind.
    pub fn new(
        (hidden, moe_intermediate): (usize, usize),
        group_size: usize,
        scales: DType,
        zero_points: bool,
        load: MoeLoad,
    ) -> Self {
        let shape = |rows, out_features, in_features: usize| Int4Shape {
            rows,
            out_features,
            in_features,
            group_size: group_size.min(in_features),
            scales,
            zero_points,
        };
        Self {
            gate_up: shape(Int4Rows::GateUp, moe_intermediate, hidden),
            down: shape(Int4Rows::One, hidden, moe_intermediate),
            load,
        }
    }

    /// Those of GLM-5.2 at TP=8, symmetric groups of 128.
    pub fn glm(load: MoeLoad) -> Self {
        Self::new((6144, 256), 128, DType::Bf16, false, load)
    }
}

/// The constants for tokens that are sorted by expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeInt4Tile {
    /// Tokens of an item: a multiple of 8.
    pub tokens: usize,
    /// Of the gate-up product.
    pub gate_up: ProductTile,
    /// Of the down product.
    pub down: ProductTile,
}

impl MoeInt4Tile {
    fn variant(&self, shape: Int4Shape) -> Variant {
        Variant { shape, tokens: self.tokens, sorted: true }
    }

    /// Of one list of numbers each, in the order of the fields.
    pub const fn of(tokens: usize, gate_up: [usize; 7], down: [usize; 7]) -> Self {
        const fn product(
            [warps_m, warps_k, row_tiles, k_tiles, stages, row_groups, blocks]: [usize; 7],
        ) -> ProductTile {
            ProductTile { warps_m, warps_k, row_tiles, k_tiles, stages, row_groups, blocks }
        }
        Self { tokens, gate_up: product(gate_up), down: product(down) }
    }
}

impl Tile for MoeInt4Tile {
    const KERNEL: &'static str = KERNEL;
    type Dims = MoeInt4Dims;

    fn safe(dims: Self::Dims) -> Self {
        match dims.load {
            MoeLoad::Few => Self::of(8, [1, 4, 4, 1, 4, 1, 2], [8, 1, 1, 4, 3, 4, 2]),
            MoeLoad::Some => Self::of(16, [2, 4, 2, 1, 3, 1, 1], [8, 1, 1, 2, 4, 4, 2]),
            MoeLoad::Many => Self::of(64, [4, 1, 2, 1, 4, 1, 2], [4, 1, 2, 1, 4, 4, 2]),
        }
    }

    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self> {
        let safe = Self::safe(dims);
        let all: &[Self] = match dims.load {
            MoeLoad::Few => &FEW,
            MoeLoad::Some => &SOME,
            MoeLoad::Many => &MANY,
        };
        let all = [safe].into_iter().chain(all.iter().copied());
        all.filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: Self::Dims, limits: &Limits) -> Result<()> {
        let tokens = self.tokens;
        require(self, tokens > 0 && tokens.is_multiple_of(8) && tokens <= 128, || {
            format!("items of {tokens} tokens are not a multiple of 8 up to 128")
        })?;
        self.gate_up.require(self, self.variant(dims.gate_up), limits)?;
        self.down.require(self, self.variant(dims.down), limits)
    }
}

const FEW: [MoeInt4Tile; 6] = [
    MoeInt4Tile::of(8, [1, 4, 2, 2, 4, 1, 2], [4, 1, 2, 4, 2, 2, 3]),
    MoeInt4Tile::of(8, [1, 4, 4, 2, 2, 1, 2], [4, 1, 2, 4, 2, 4, 3]),
    MoeInt4Tile::of(8, [1, 4, 2, 4, 2, 1, 2], [4, 1, 2, 4, 3, 2, 2]),
    MoeInt4Tile::of(8, [1, 8, 2, 2, 3, 1, 1], [4, 1, 2, 2, 4, 4, 3]),
    MoeInt4Tile::of(8, [1, 4, 4, 1, 4, 1, 2], [8, 1, 2, 4, 2, 2, 1]),
    MoeInt4Tile::of(8, [1, 4, 2, 2, 2, 1, 4], [2, 1, 2, 4, 3, 4, 4]),
];
const SOME: [MoeInt4Tile; 6] = [
    MoeInt4Tile::of(16, [4, 1, 2, 2, 4, 1, 3], [4, 1, 2, 2, 4, 4, 3]),
    MoeInt4Tile::of(16, [4, 2, 2, 2, 3, 1, 1], [8, 1, 2, 2, 3, 4, 1]),
    MoeInt4Tile::of(16, [4, 1, 2, 4, 2, 1, 3], [4, 1, 2, 4, 2, 2, 3]),
    MoeInt4Tile::of(16, [2, 2, 2, 2, 3, 1, 2], [4, 1, 2, 4, 2, 4, 3]),
    MoeInt4Tile::of(24, [4, 1, 2, 2, 3, 1, 3], [4, 1, 2, 2, 3, 8, 3]),
    MoeInt4Tile::of(16, [1, 4, 4, 1, 3, 1, 2], [2, 1, 2, 4, 3, 4, 3]),
];
const MANY: [MoeInt4Tile; 7] = [
    MoeInt4Tile::of(64, [4, 1, 2, 2, 2, 1, 3], [4, 1, 2, 1, 4, 4, 3]),
    MoeInt4Tile::of(64, [4, 1, 2, 2, 3, 1, 2], [4, 1, 2, 2, 3, 4, 2]),
    MoeInt4Tile::of(64, [4, 1, 2, 1, 4, 1, 3], [4, 1, 2, 1, 4, 8, 3]),
    MoeInt4Tile::of(96, [8, 1, 2, 2, 3, 1, 1], [8, 1, 2, 2, 3, 6, 1]),
    MoeInt4Tile::of(80, [8, 1, 2, 2, 3, 1, 1], [4, 1, 2, 2, 2, 4, 2]),
    MoeInt4Tile::of(80, [8, 1, 2, 2, 3, 2, 1], [8, 1, 2, 2, 3, 12, 1]),
    MoeInt4Tile::of(80, [4, 1, 2, 2, 2, 1, 2], [4, 1, 2, 2, 2, 8, 2]),
];

/// The tiles of every way through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeInt4Tiles {
    /// Few tokens.
    pub pairs: MoeInt4PairsTile,
    /// One or two tokens an expert.
    pub few: MoeInt4Tile,
    /// Several.
    pub some: MoeInt4Tile,
    /// Dozens and more.
    pub many: MoeInt4Tile,
}

impl MoeInt4Tiles {
    /// The tiles that fit any device.
    pub fn safe(dims: MoeInt4Dims) -> Self {
        let safe = |load| MoeInt4Tile::safe(MoeInt4Dims { load, ..dims });
        Self {
            pairs: MoeInt4PairsTile::safe(dims),
            few: safe(MoeLoad::Few),
            some: safe(MoeLoad::Some),
            many: safe(MoeLoad::Many),
        }
    }

    fn of(&self, load: MoeLoad) -> &MoeInt4Tile {
        match load {
            MoeLoad::Few => &self.few,
            MoeLoad::Some => &self.some,
            MoeLoad::Many => &self.many,
        }
    }
}

/// The kinds of scales, groups and zero points that a compile check looks at.
pub(crate) fn variants(dims: MoeInt4Dims) -> Vec<MoeInt4Dims> {
    [(DType::Bf16, 128, false), (DType::Bf16, 32, true), (DType::F16, 64, false), (DType::F32, 32, true)]
        .map(|(scales, group_size, zero_points)| MoeInt4Dims {
            gate_up: with(dims.gate_up, scales, group_size, zero_points),
            down: with(dims.down, scales, group_size, zero_points),
            ..dims
        })
        .into()
}

/// Every variant of a tile.
pub fn programs(tile: &MoeInt4Tile, dims: MoeInt4Dims) -> Vec<ProgramEntry> {
    let mut entries: Vec<_> = variants(dims)
        .into_iter()
        .flat_map(|dims| {
            let entry = |product: &ProductTile, shape| product.entry(tile.variant(shape), &Limits::a100());
            [entry(&tile.gate_up, dims.gate_up), entry(&tile.down, dims.down)]
        })
        .collect();
    entries.extend(moe_sort::programs(256));
    entries.push(sum_entry(tile.down.packs()));
    entries
}

/// What a step moves and computes in which the tokens chose `active` experts.
pub fn cost(tokens: usize, top_k: usize, active: usize, dims: &MoeInt4Dims) -> Cost {
    let weights: usize = [dims.gate_up, dims.down]
        .iter()
        .map(|shape| shape.weight_bytes() + shape.scales_bytes() + shape.zeros_bytes())
        .sum();
    let (hidden, intermediate) = (dims.down.out_features, dims.down.in_features);
    let rows = 2 * (2 * tokens * hidden) + tokens * top_k * 8;
    Cost {
        bytes: (active * weights + rows) as f64,
        flops: (2 * tokens * top_k * 3 * hidden * intermediate) as f64,
    }
}

/// Room for what is between the launches of a step.
#[derive(Debug)]
pub struct MoeInt4Workspace<D: Device> {
    pairs: usize,
    hidden: usize,
    columns: usize,
    experts: usize,
    /// `[pairs, moe_intermediate]` bf16, padded to a multiple of 8.
    activated: D::Buffer,
    /// `[pairs, hidden]` f32.
    parts: D::Buffer,
    sorted: Sorted<D>,
}

impl<D: Device> MoeInt4Workspace<D> {
    /// For steps of up to `max_tokens` tokens with `top_k` experts each. With P = top_k * min(max_tokens, 4096) pairs it takes
    /// P * (2 * moe_intermediate + 4 * hidden + 4) + 16 * (experts + P / 8) bytes.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(
        device: &D,
        max_tokens: usize,
        top_k: usize,
        hidden: usize,
        moe_intermediate: usize,
        experts: usize,
    ) -> Result<Self> {
        let pairs = top_k * max_tokens.min(CHUNK);
        let columns = moe_intermediate.next_multiple_of(8);
        Ok(Self {
            pairs,
            hidden,
            columns,
            experts,
            activated: device.alloc("moe activated", pairs * columns * 2)?,
            parts: device.alloc("moe parts", pairs * hidden.next_multiple_of(16) * size_of::<f32>())?,
            sorted: Sorted::alloc(device, pairs, experts, MIN_ITEM)?,
        })
    }

    fn require(&self, tokens: usize, top_k: usize, experts: &ExpertsInt4<D>) -> Result<()> {
        let pairs = top_k * tokens.min(CHUNK);
        let columns = experts.moe_intermediate().next_multiple_of(8);
        let fits = pairs <= self.pairs
            && experts.hidden() <= self.hidden
            && columns <= self.columns
            && experts.count() <= self.experts;
        if fits {
            return Ok(());
        }
        let (shape, capacity) = (vec![pairs, experts.hidden()], self.pairs * self.hidden);
        Err(Error::Capacity { shape, elements: pairs * experts.hidden(), capacity })
    }
}

/// The kernel of the contract's [`moe_int4`](dsa80_reference::Kernels::moe_int4).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn moe_int4<D: Device>(
    device: &D,
    tiles: &MoeInt4Tiles,
    workspace: &MoeInt4Workspace<D>,
    x: &CudaTensor<D>,
    topk_ids: &CudaTensor<D>,
    topk_weights: &CudaTensor<D>,
    experts: &ExpertsInt4<D>,
    shared: Option<&CudaTensor<D>>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let hidden = experts.hidden();
    let [tokens, top_k] = check(KERNEL, x, topk_ids, topk_weights, hidden, shared, out)?;
    if !hidden.is_multiple_of(8) {
        let expected = "a multiple of 8".into();
        return Err(Error::Value { kernel: KERNEL, name: "hidden", expected, found: hidden.to_string() });
    }
    let chunk = tokens.min(CHUNK);
    let load = MoeLoad::of(chunk * top_k, experts.count());
    let dims = MoeInt4Dims { gate_up: *experts.gate_up.shape(), down: *experts.down.shape(), load };
    let few = tokens <= tiles.pairs.max_tokens;
    if few {
        tiles.pairs.validate(dims, device.limits())?;
    } else {
        tiles.of(load).validate(dims, device.limits())?;
    }
    workspace.require(tokens, top_k, experts)?;
    if tokens == 0 {
        return Ok(());
    }
    let step = Step { workspace, x, topk_ids, topk_weights, experts, shared, out, top_k, dims };
    if few {
        return step.pairs(device, &tiles.pairs, tokens);
    }
    (0..tokens)
        .step_by(CHUNK)
        .try_for_each(|first| step.sorted(device, tiles.of(load), first, (tokens - first).min(CHUNK)))
}

struct Step<'a, D: Device> {
    workspace: &'a MoeInt4Workspace<D>,
    x: &'a CudaTensor<D>,
    topk_ids: &'a CudaTensor<D>,
    topk_weights: &'a CudaTensor<D>,
    experts: &'a ExpertsInt4<D>,
    shared: Option<&'a CudaTensor<D>>,
    out: &'a CudaTensor<D>,
    top_k: usize,
    dims: MoeInt4Dims,
}

impl<D: Device> Step<'_, D> {
    /// Columns of an activated row: whole tiles of eight features.
    fn columns(&self) -> usize {
        self.experts.moe_intermediate().next_multiple_of(8)
    }

    fn pairs(&self, device: &D, tile: &MoeInt4PairsTile, tokens: usize) -> Result<()> {
        let Self { workspace, experts, top_k, .. } = *self;
        let bytes = tokens * top_k * experts.down.shape().weight_bytes();
        let share = 256 * EARLY_BYTES / bytes.max(EARLY_BYTES);
        Product {
            tile: &tile.gate_up,
            variant: pairs_variant(self.dims.gate_up),
            x: self.x.buffer(),
            columns: experts.hidden(),
            weight: &experts.gate_up,
            items: self.topk_ids.buffer(),
            item_count: tokens * top_k,
            order: None,
            out: &workspace.activated,
            out_columns: self.columns(),
            top_k,
            first_token: 0,
            next: Some(Next { weight: &experts.down, late_items: 1, share }),
        }
        .launch(device)?;
        Down {
            tile: tile.down,
            x: &workspace.activated,
            columns: self.columns(),
            weight: &experts.down,
            topk_ids: self.topk_ids.buffer(),
            topk_weights: self.topk_weights.buffer(),
            shared: self.shared.map(CudaTensor::buffer),
            out: self.out.buffer(),
            tokens,
            top_k,
        }
        .launch(device)
    }

    fn sorted(&self, device: &D, tile: &MoeInt4Tile, first_token: usize, tokens: usize) -> Result<()> {
        let Self { workspace, experts, top_k, .. } = *self;
        let sorted = &workspace.sorted;
        let pairs = (first_token * top_k, tokens * top_k);
        let item_count = sorted.sort(device, self.topk_ids.buffer(), pairs, &experts.gate_up, tile.tokens)?;
        let late_items = EARLY_BYTES / experts.down.shape().weight_bytes().max(1);
        let product = Product {
            tile: &tile.gate_up,
            variant: tile.variant(self.dims.gate_up),
            x: self.x.buffer(),
            columns: experts.hidden(),
            weight: &experts.gate_up,
            items: &sorted.items,
            item_count,
            order: Some(&sorted.order),
            out: &workspace.activated,
            out_columns: self.columns(),
            top_k,
            first_token,
            next: Some(Next { weight: &experts.down, late_items, share: 256 }),
        };
        product.launch(device)?;
        Product {
            tile: &tile.down,
            variant: tile.variant(self.dims.down),
            x: &workspace.activated,
            columns: self.columns(),
            weight: &experts.down,
            out: &workspace.parts,
            out_columns: experts.hidden(),
            next: None,
            ..product
        }
        .launch(device)?;
        self.sum(device, tile.down.packs(), first_token, tokens)
    }

    fn sum(&self, device: &D, packed: bool, first_token: usize, tokens: usize) -> Result<()> {
        let (entry, hidden) = (sum_entry(packed), self.experts.hidden());
        let vectors = if packed { hidden.div_ceil(32) * 4 } else { hidden / 8 };
        let numbers = [self.experts.count(), hidden, self.top_k, first_token];
        let mut args = vec![
            Arg::Buffer(&self.workspace.parts),
            Arg::Buffer(self.topk_ids.buffer()),
            Arg::Buffer(self.topk_weights.buffer()),
            self.shared.map_or(Arg::Null, |shared| Arg::Buffer(shared.buffer())),
            Arg::Buffer(self.out.buffer()),
        ];
        args.extend(numbers.map(|number| Arg::I32(number as i32)));
        device.launch(&Launch {
            program: &entry.program,
            entry: entry.entry,
            grid: [tokens as u32, vectors.div_ceil(SUM_THREADS) as u32, 1],
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            shape: format!("{tokens} tokens of {} experts, hidden {hidden}", self.top_k),
            args: &args,
        })
    }
}

fn sum_entry(packed: bool) -> ProgramEntry {
    let defines = [("PACKED", usize::from(packed)), ("TILE_THREADS", SUM_THREADS)];
    ProgramEntry {
        program: Program::new("moe_sum.cu", defines),
        entry: SUM,
        threads: SUM_THREADS as u32,
        shared_bytes: 0,
        variant: if packed { "sum of packed parts" } else { "sum" }.into(),
    }
}

/// Tokens and experts of each, where all tensors fit.
pub(crate) fn check<D: Device>(
    kernel: &'static str,
    x: &CudaTensor<D>,
    topk_ids: &CudaTensor<D>,
    topk_weights: &CudaTensor<D>,
    hidden: usize,
    shared: Option<&CudaTensor<D>>,
    out: &CudaTensor<D>,
) -> Result<[usize; 2]> {
    let [tokens, top_k] = topk_ids.dims(kernel, "topk_ids")?;
    topk_ids.expect_dtype(kernel, "topk_ids", &[DType::Index], "indices")?;
    topk_ids.expect(kernel, "topk_ids", (1..=64).contains(&top_k), || "[T, 1 to 64 experts]".into())?;
    let rows = [Some(("x", x)), shared.map(|shared| ("shared", shared)), Some(("out", out))];
    for (name, tensor) in rows.into_iter().flatten() {
        let [found_tokens, found_hidden] = tensor.dims(kernel, name)?;
        tensor.expect(kernel, name, (found_tokens, found_hidden) == (tokens, hidden), || {
            format!("[{tokens}, {hidden}]")
        })?;
        tensor.expect_dtype(kernel, name, &[DType::Act], "activations")?;
    }
    let [weight_tokens, weight_k] = topk_weights.dims(kernel, "topk_weights")?;
    topk_weights.expect(kernel, "topk_weights", (weight_tokens, weight_k) == (tokens, top_k), || {
        format!("[{tokens}, {top_k}]")
    })?;
    topk_weights.expect_dtype(kernel, "topk_weights", &[DType::Float], "floats")?;
    Ok([tokens, top_k])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_fit_an_a100_and_refusals_say_why() {
        let limits = Limits::a100();
        for load in [MoeLoad::Few, MoeLoad::Some, MoeLoad::Many] {
            let dims = MoeInt4Dims::glm(load);
            let candidates = MoeInt4Tile::candidates(dims, &limits);
            assert_eq!(
                candidates.len(),
                if load == MoeLoad::Many { 8 } else { 7 },
                "{load:?} {candidates:?}"
            );
            assert_eq!(candidates[0], MoeInt4Tile::safe(dims));
        }
        let dims = MoeInt4Dims::glm(MoeLoad::Few);
        let safe = MoeInt4Tile::safe(dims);
        let gate_up = |gate_up| MoeInt4Tile { gate_up, ..safe };
        for (tile, reason) in [
            (MoeInt4Tile { tokens: 12, ..safe }, "multiple of 8"),
            (gate_up(ProductTile { warps_m: 8, warps_k: 4, ..safe.gate_up }), "8 x 4 warps"),
            (gate_up(ProductTile { stages: 1, ..safe.gate_up }), "2 to 16 stages"),
            (gate_up(ProductTile { row_tiles: 16, ..safe.gate_up }), "registers"),
            (gate_up(ProductTile { k_tiles: 3, ..safe.gate_up }), "power of 2"),
            (gate_up(ProductTile { k_tiles: 4, stages: 8, ..safe.gate_up }), "bytes of shared memory"),
            (gate_up(ProductTile { blocks: 4, ..safe.gate_up }), "4 blocks"),
        ] {
            let error = tile.validate(dims, &limits).unwrap_err().to_string();
            assert!(error.starts_with("moe_int4: ") && error.contains(reason), "{error}");
        }
        let pairs = MoeInt4PairsTile::candidates(dims, &limits);
        assert!(pairs.contains(&MoeInt4PairsTile::safe(dims)) && pairs.len() == 8, "{pairs:?}");
    }

    #[test]
    fn loads_and_costs() {
        assert_eq!(MoeLoad::of(64 * 8, 256), MoeLoad::Few);
        assert_eq!(MoeLoad::of(256 * 8, 256), MoeLoad::Some);
        assert_eq!(MoeLoad::of(2048 * 8, 256), MoeLoad::Many);
        let cost = cost(1, 8, 8, &MoeInt4Dims::glm(MoeLoad::Few));
        let weights = 3.0 * 6144.0 * 256.0 * (0.5 + 2.0 / 128.0);
        assert_eq!(cost.bytes, 8.0 * weights + 4.0 * 6144.0 + 64.0);
        assert_eq!(cost.flops, 2.0 * 8.0 * 3.0 * 6144.0 * 256.0);
    }
}
