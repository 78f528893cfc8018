//! `linear` for few tokens: the weight is read once, at the memory's rate.

use dsa80_reference::{DType, Result};
use serde::{Deserialize, Serialize};

use crate::device::{BLOCK_RESERVED_SHARED, Limits, Program, ProgramEntry};
use crate::linear::{LinearTokens, Need};
use crate::router::{self, RouterDims};
use crate::rows::{WEIGHTS, weight_type};
use crate::tile::{Tile, require, require_shared};

pub(crate) const ENTRY: &str = "linear_few";

/// Classes of numbers of features: how many groups of 16 an A100's 108 multiprocessors, or the 132 of an H100, have each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearWidth {
    /// Up to 1024: a half at most, so blocks share them.
    UpTo1024,
    /// Up to 2112: one of an H100.
    UpTo2112,
    /// Up to 3456: two.
    UpTo3456,
    /// More.
    More,
}

impl LinearWidth {
    /// Every class.
    pub const ALL: [Self; 4] = [Self::UpTo1024, Self::UpTo2112, Self::UpTo3456, Self::More];

    /// The class of a number.
    pub fn of(features: usize) -> Self {
        match features {
            ..=1024 => Self::UpTo1024,
            1025..=2112 => Self::UpTo2112,
            2113..=3456 => Self::UpTo3456,
            _ => Self::More,
        }
    }
}

/// Classes of products of few tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearFewSize {
    /// [`LinearTokens::UpTo8`], or up to 32.
    pub tokens: LinearTokens,
    /// Of features.
    pub width: LinearWidth,
}

impl LinearFewSize {
    /// Every class.
    pub fn all() -> impl Iterator<Item = Self> {
        [LinearTokens::UpTo8, LinearTokens::UpTo32]
            .into_iter()
            .flat_map(|tokens| LinearWidth::ALL.map(|width| Self { tokens, width }))
    }

    /// Its name in tile files.
    pub fn class(self) -> &'static str {
        let of_tokens = usize::from(self.tokens != LinearTokens::UpTo8);
        CLASSES[LinearWidth::ALL.len() * of_tokens + self.width as usize]
    }

    /// The class of that name.
    pub(crate) fn named(class: &str) -> Self {
        let last = Self { tokens: LinearTokens::UpTo32, width: LinearWidth::More };
        Self::all().find(|size| size.class() == class).unwrap_or(last)
    }
}

/// The names of the classes, in their order.
pub(crate) const CLASSES: &[&str] = &[
    "tokens_8_features_1024",
    "tokens_8_features_2112",
    "tokens_8_features_3456",
    "tokens_8_features_more",
    "tokens_32_features_1024",
    "tokens_32_features_2112",
    "tokens_32_features_3456",
    "tokens_32_features_more",
];

/// How a block of `linear_few` takes the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearFewTile {
    /// Warps of a block: they share its columns.
    pub warps: usize,
    /// Groups of 16 features of a block.
    pub row_tiles: usize,
    /// Columns that a warp takes in one step.
    pub columns: usize,
    /// Steps that a warp has in shared memory.
    pub stages: usize,
    /// Blocks of a multiprocessor.
    pub blocks: usize,
}

/// What is compiled apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variant {
    pub(crate) weight: DType,
    /// Rows are whole vectors of 16 bytes.
    pub(crate) vectors: bool,
    /// Groups of 8 tokens.
    pub(crate) groups: usize,
    /// Gate and up projection in turns.
    pub(crate) swiglu: bool,
    /// The first blocks choose experts.
    pub(crate) routes: Option<router::Variant>,
}

/// How a launch is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Blocks along the features.
    pub(crate) blocks: usize,
    /// Blocks that share the columns.
    pub(crate) splits: usize,
}

/// Groups of 8 tokens that a program for `tokens` has.
pub(crate) fn groups(tokens: usize) -> usize {
    tokens.div_ceil(8).next_power_of_two()
}

impl Tile for LinearFewTile {
    const KERNEL: &'static str = ENTRY;
    type Dims = LinearFewSize;

    fn safe(size: LinearFewSize) -> Self {
        match (size.tokens, size.width) {
            (LinearTokens::UpTo8, _) => Self::of([4, 1, 64, 6, 2]),
            (_, LinearWidth::UpTo3456) => Self::of([4, 2, 64, 5, 1]),
            (_, LinearWidth::More) => Self::of([4, 1, 64, 3, 3]),
            _ => Self::of([4, 1, 64, 4, 2]),
        }
    }

    fn candidates(size: LinearFewSize, limits: &Limits) -> Vec<Self> {
        let shapes: &[[usize; 5]] = match size.tokens {
            LinearTokens::UpTo8 => &[
                [4, 1, 64, 6, 2],
                [4, 1, 128, 3, 3],
                [4, 2, 128, 4, 1],
                [8, 1, 64, 3, 3],
                [8, 1, 64, 4, 2],
                [8, 1, 64, 6, 1],
                [16, 1, 64, 3, 1],
            ],
            _ => &[
                [4, 1, 64, 3, 3],
                [4, 1, 64, 4, 2],
                [4, 1, 64, 6, 1],
                [8, 1, 64, 3, 1],
                [4, 2, 64, 3, 2],
                [4, 2, 64, 5, 1],
                [5, 2, 64, 4, 1],
                [6, 2, 64, 3, 1],
            ],
        };
        shapes
            .iter()
            .map(|&shape| Self::of(shape))
            .filter(|tile| tile.validate(size, limits).is_ok())
            .collect()
    }

    fn validate(&self, size: LinearFewSize, limits: &Limits) -> Result<()> {
        require(self, (1..=16).contains(&self.warps), || "a block has 1 to 16 warps".into())?;
        require(self, (1..=4).contains(&self.row_tiles), || {
            "a block has 1 to 4 groups of 16 features".into()
        })?;
        require(self, matches!(self.columns, 64 | 128), || "a step has 64 or 128 columns".into())?;
        require(self, (2..=8).contains(&self.stages), || "a warp holds 2 to 8 steps".into())?;
        require(self, (1..=8).contains(&self.blocks), || "1 to 8 blocks are resident".into())?;
        // Accumulators, weights and x of a step, and as much again for everything else.
        let groups = Self::max_groups(size.tokens);
        let registers = 4 * self.row_tiles * groups + 8 * self.row_tiles + 4 * groups + 40;
        let most = limits.registers_per_multiprocessor as usize / (32 * self.warps * self.blocks);
        require(self, registers <= most, || {
            format!("a lane needs about {registers} registers, {most} are there")
        })?;
        WEIGHTS.into_iter().try_for_each(|weight| {
            let variant = Variant { weight, vectors: true, groups, swiglu: false, routes: None };
            require_shared(self, self.shared_bytes(variant), limits)
        })
    }
}

impl LinearFewTile {
    const fn of([warps, row_tiles, columns, stages, blocks]: [usize; 5]) -> Self {
        Self { warps, row_tiles, columns, stages, blocks }
    }

    pub(crate) fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    /// Features of a block at most.
    pub(crate) fn features(&self) -> usize {
        16 * self.row_tiles
    }

    fn max_groups(tokens: LinearTokens) -> usize {
        if tokens == LinearTokens::UpTo8 { 1 } else { 4 }
    }

    /// Vectors of f32 are twice as many: half of the steps do.
    fn stages(&self, weight: DType) -> usize {
        if weight == DType::F32 { (self.stages / 2).max(2) } else { self.stages }
    }

    pub(crate) fn shared_bytes(&self, Variant { weight, groups, routes, .. }: Variant) -> usize {
        let weight_bytes = if weight == DType::F32 { 4 } else { 2 };
        let step = self.columns * (self.features() * weight_bytes + 8 * groups * 2);
        let ring = self.warps * self.stages(weight) * step;
        let parts = self.warps * 8 * groups * (self.features() + 4) * 4;
        let flag = 16;
        (ring.max(parts) + flag).max(routes.map_or(0, |routes| routes.shared_bytes(self.warps)))
    }

    pub(crate) fn program(&self, variant: Variant) -> Program {
        let Variant { weight, vectors, groups, swiglu, routes } = variant;
        let mut program = Program {
            source: "linear_few.cu",
            defines: vec![
                ("WEIGHT_TYPE", weight_type(weight)),
                ("VECTORS", u8::from(vectors).to_string()),
                ("TOKEN_GROUPS", groups.to_string()),
                ("SWIGLU", u8::from(swiglu).to_string()),
                ("ROUTES", u8::from(routes.is_some()).to_string()),
                ("TILE_WARPS", self.warps.to_string()),
                ("TILE_ROW_TILES", self.row_tiles.to_string()),
                ("TILE_COLUMNS", self.columns.to_string()),
                ("TILE_STAGES", self.stages(weight).to_string()),
                // Pieces take registers: blocks of other weights need not be as many.
                ("TILE_BLOCKS", if weight == DType::Bf16 && vectors { self.blocks } else { 1 }.to_string()),
                ("TILE_SHARED_BYTES", self.shared_bytes(variant).to_string()),
            ],
        };
        program.defines.extend(routes.iter().flat_map(router::Variant::defines));
        program
    }

    /// Blocks that are resident at a time.
    fn slots(&self, groups: usize, limits: &Limits) -> usize {
        let variant = Variant { weight: DType::Bf16, vectors: true, groups, swiglu: false, routes: None };
        let bytes = self.shared_bytes(variant) + BLOCK_RESERVED_SHARED;
        let most = (limits.shared_per_multiprocessor / bytes).max(1);
        self.blocks.min(most) * limits.multiprocessors as usize
    }

    /// Blocks along the features and along the columns. The memory brings the weight, and the L2 x to every block at three times the rate; a
    /// multiprocessor takes no more than its share of that rate. Sharing an output costs as much as a multiprocessor's share of 14 KiB,
    /// for every four blocks that do.
    pub(crate) fn grid(&self, [tokens, columns, features]: [usize; 3], limits: &Limits) -> Grid {
        const SHARING: usize = 14 * 1024;
        let multiprocessors = limits.multiprocessors as usize;
        let steps = columns.div_ceil(self.columns);
        let step_bytes = 2 * self.columns;
        let blocks = features.div_ceil(self.features());
        let most = (self.slots(groups(tokens), limits) / blocks).min(steps.div_ceil(self.warps)).max(1);
        let all = 3 * features + blocks * tokens;
        let cost = |splits: usize| {
            let of_busiest = (blocks * splits).div_ceil(multiprocessors) * (self.features() + tokens);
            let shared =
                (multiprocessors * of_busiest * steps.div_ceil(splits)).max(all * steps) * step_bytes;
            let sharing = if splits > 1 { splits.div_ceil(4) * SHARING } else { 0 };
            shared + 3 * multiprocessors * sharing
        };
        Grid { blocks, splits: (1..=most).min_by_key(|&splits| cost(splits)).unwrap_or(1) }
    }

    pub(crate) fn need(&self, blocks: usize, groups: usize) -> Need {
        Need { part_bytes: blocks * 4 * 8 * groups * self.features(), arrivals: blocks }
    }

    /// What any launch needs.
    pub(crate) fn needs(&self, limits: &Limits, size: LinearFewSize) -> Need {
        let groups = Self::max_groups(size.tokens);
        // With fewer groups of tokens there is room for more blocks.
        self.need(self.blocks * limits.multiprocessors as usize, groups)
    }
}

/// Every variant of a tile.
pub fn programs(tile: &LinearFewTile, size: LinearFewSize) -> Vec<ProgramEntry> {
    let groups: &[usize] = if size.tokens == LinearTokens::UpTo8 { &[1] } else { &[2, 4] };
    let mut entries = Vec::new();
    for weight in WEIGHTS {
        for vectors in [true, false] {
            for &groups in groups {
                let plain = Variant { weight, vectors, groups, swiglu: false, routes: None };
                let mut variants = vec![plain];
                // Of a SwiGLU, and of a choice of experts, the common one: both add little to any.
                if weight == DType::Bf16 && vectors {
                    let dims = RouterDims { experts: 256, groups: 1 };
                    let routes = router::Variant { dims, bias: DType::F32, grouped: false };
                    variants.push(Variant { swiglu: true, ..plain });
                    variants.push(Variant { routes: Some(routes), ..plain });
                }
                entries.extend(variants.into_iter().map(|variant| ProgramEntry {
                    program: tile.program(variant),
                    entry: ENTRY,
                    threads: tile.threads(),
                    shared_bytes: tile.shared_bytes(variant),
                    variant: format!(
                        "{weight}, {} tokens, {}{}{}",
                        8 * groups,
                        if vectors { "vectors" } else { "elements" },
                        if variant.swiglu { ", swiglu" } else { "" },
                        if variant.routes.is_some() { ", router" } else { "" }
                    ),
                }));
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    const LAST: LinearFewSize = LinearFewSize { tokens: LinearTokens::UpTo32, width: LinearWidth::More };

    #[test]
    fn every_class_has_a_name_of_its_own() {
        assert_eq!(LinearFewSize::all().map(LinearFewSize::class).collect::<Vec<_>>(), CLASSES);
        for size in LinearFewSize::all() {
            assert_eq!(LinearFewSize::named(size.class()), size);
        }
        assert_eq!([512, 2048, 2624, 6144].map(LinearWidth::of), LinearWidth::ALL);
    }

    #[test]
    fn refusals_say_why() {
        let limits = Limits::a100();
        let safe = LinearFewTile::of([8, 2, 64, 3, 1]);
        for (tile, reason) in [
            (LinearFewTile { warps: 17, ..safe }, "1 to 16 warps"),
            (LinearFewTile { row_tiles: 5, ..safe }, "1 to 4 groups of 16 features"),
            (LinearFewTile { columns: 32, ..safe }, "64 or 128 columns"),
            (LinearFewTile { stages: 1, ..safe }, "2 to 8 steps"),
            (LinearFewTile { blocks: 9, ..safe }, "1 to 8 blocks"),
            (LinearFewTile { blocks: 8, ..safe }, "registers"),
            (LinearFewTile { stages: 8, ..safe }, "shared memory"),
        ] {
            let error = tile.validate(LAST, &limits).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        for size in LinearFewSize::all() {
            assert_distinct(&programs(&LinearFewTile::safe(size), size));
        }
    }

    #[test]
    fn a_launch_needs_no_more_than_the_workspace_has() {
        let limits = Limits::a100();
        for size in LinearFewSize::all() {
            for tile in LinearFewTile::candidates(size, &limits) {
                let most = tile.needs(&limits, size);
                for (features, columns) in [(16, 6144), (512, 65536), (2624, 6144), (19360, 6144), (70, 8)] {
                    let grid = tile.grid([8, columns, features], &limits);
                    let Grid { blocks, splits } = grid;
                    assert!(blocks * tile.features() >= features && splits >= 1);
                    let need = tile.need(blocks * splits, LinearFewTile::max_groups(size.tokens));
                    let fits = need.part_bytes <= most.part_bytes && need.arrivals <= most.arrivals;
                    assert!(splits == 1 || fits, "{tile:?} {grid:?}");
                }
            }
        }
    }

    #[test]
    fn blocks_share_an_output_where_there_are_few() {
        let limits = Limits { multiprocessors: 132, ..Limits::a100() };
        let tile = LinearFewTile::of([8, 2, 64, 2, 1]);
        let grid = |tokens, columns, features| tile.grid([tokens, columns, features], &limits);
        // Half of the multiprocessors already take what the memory brings.
        assert_eq!(grid(1, 6144, 2624), Grid { blocks: 82, splits: 1 });
        assert_eq!(grid(32, 2048, 2048), Grid { blocks: 64, splits: 1 });
        assert!(grid(1, 6144, 256).splits >= 4 && grid(1, 6144, 64).splits >= 8);
    }
}
