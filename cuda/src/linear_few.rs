//! `linear` for few tokens: the weight is read once, at the memory's rate.

use dsa80_reference::{DType, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Limits, Program, ProgramEntry};
use crate::linear::{LinearTokens, Need};
use crate::rows::{WEIGHTS, weight_type};
use crate::tile::{Tile, require, require_shared};

pub(crate) const ENTRY: &str = "linear_few";

/// How a block of `linear_few` takes the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearFewTile {
    /// Warps of a block: they share its columns.
    pub warps: usize,
    /// Groups of 16 features of a block.
    pub row_tiles: usize,
    /// Groups of 32 columns that a warp takes in one step.
    pub halves: usize,
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
    type Dims = LinearTokens;

    fn safe(tokens: LinearTokens) -> Self {
        match tokens {
            LinearTokens::UpTo8 => Self::of([4, 2, 2, 4, 2]),
            _ => Self::of([8, 2, 1, 3, 1]),
        }
    }

    fn candidates(tokens: LinearTokens, limits: &Limits) -> Vec<Self> {
        let shapes: &[[usize; 5]] = match tokens {
            LinearTokens::UpTo8 => &[
                [8, 1, 2, 4, 1],
                [8, 1, 2, 6, 1],
                [8, 1, 2, 3, 2],
                [4, 2, 2, 4, 2],
                [8, 2, 1, 4, 1],
                [8, 2, 1, 6, 1],
                [8, 2, 2, 3, 1],
                [8, 3, 1, 4, 1],
            ],
            _ => &[
                [8, 1, 1, 4, 1],
                [4, 2, 1, 4, 2],
                [8, 2, 1, 3, 1],
                [8, 2, 1, 4, 1],
                [8, 3, 1, 3, 1],
                [4, 3, 1, 4, 1],
                [8, 4, 1, 3, 1],
            ],
        };
        shapes
            .iter()
            .map(|&shape| Self::of(shape))
            .filter(|tile| tile.validate(tokens, limits).is_ok())
            .collect()
    }

    fn validate(&self, tokens: LinearTokens, limits: &Limits) -> Result<()> {
        require(self, (1..=16).contains(&self.warps), || "a block has 1 to 16 warps".into())?;
        require(self, (1..=4).contains(&self.row_tiles), || {
            "a block has 1 to 4 groups of 16 features".into()
        })?;
        require(self, matches!(self.halves, 1 | 2), || "a step has 32 or 64 columns".into())?;
        require(self, (2..=8).contains(&self.stages), || "a warp holds 2 to 8 steps".into())?;
        require(self, (1..=8).contains(&self.blocks), || "1 to 8 blocks are resident".into())?;
        // Accumulators, weights and x of a step, and as much again for everything else.
        let groups = Self::max_groups(tokens);
        let registers = 4 * self.row_tiles * groups + 8 * self.row_tiles + 4 * groups + 40;
        let most = limits.registers_per_multiprocessor as usize / (32 * self.warps * self.blocks);
        require(self, registers <= most, || {
            format!("a lane needs about {registers} registers, {most} are there")
        })?;
        WEIGHTS.into_iter().try_for_each(|weight| {
            let variant = Variant { weight, vectors: true, groups, swiglu: false };
            require_shared(self, self.shared_bytes(variant), limits)
        })
    }
}

impl LinearFewTile {
    const fn of([warps, row_tiles, halves, stages, blocks]: [usize; 5]) -> Self {
        Self { warps, row_tiles, halves, stages, blocks }
    }

    pub(crate) fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    /// Features of a block at most.
    fn features(&self) -> usize {
        16 * self.row_tiles
    }

    fn max_groups(tokens: LinearTokens) -> usize {
        if tokens == LinearTokens::UpTo8 { 1 } else { 4 }
    }

    /// Vectors of f32 are twice as many: half of the steps do.
    fn stages(&self, weight: DType) -> usize {
        if weight == DType::F32 { (self.stages / 2).max(2) } else { self.stages }
    }

    pub(crate) fn shared_bytes(&self, Variant { weight, groups, .. }: Variant) -> usize {
        let row_vectors = if weight == DType::F32 { 2 } else { 1 };
        let step = self.halves * (2 * self.row_tiles * row_vectors + groups) * 32 * 16;
        let ring = self.warps * self.stages(weight) * step;
        let parts = self.warps * 8 * groups * (self.features() + 4) * 4;
        let flag = 16;
        ring.max(parts) + flag
    }

    pub(crate) fn program(&self, variant: Variant) -> Program {
        let Variant { weight, vectors, groups, swiglu } = variant;
        Program {
            source: "linear_few.cu",
            defines: vec![
                ("WEIGHT_TYPE", weight_type(weight)),
                ("VECTORS", u8::from(vectors).to_string()),
                ("TOKEN_GROUPS", groups.to_string()),
                ("SWIGLU", u8::from(swiglu).to_string()),
                ("TILE_WARPS", self.warps.to_string()),
                ("TILE_ROW_TILES", self.row_tiles.to_string()),
                ("TILE_HALVES", self.halves.to_string()),
                ("TILE_STAGES", self.stages(weight).to_string()),
                // Pieces take registers: blocks of other weights need not be as many.
                ("TILE_BLOCKS", if weight == DType::Bf16 && vectors { self.blocks } else { 1 }.to_string()),
                ("TILE_SHARED_BYTES", self.shared_bytes(variant).to_string()),
            ],
        }
    }

    /// Blocks that are resident at a time.
    fn slots(&self, limits: &Limits) -> usize {
        self.blocks * limits.multiprocessors as usize
    }

    /// Blocks along the features and along the columns. The memory brings the weight, and the L2 x to every block at three times the rate; a
    /// multiprocessor takes no more than its share of that rate. Sharing an output costs as much as a multiprocessor's share of 44 KiB.
    pub(crate) fn grid(&self, [tokens, columns, features]: [usize; 3], limits: &Limits) -> Grid {
        const SHARING: usize = 44 * 1024;
        let multiprocessors = limits.multiprocessors as usize;
        let steps = columns.div_ceil(32 * self.halves);
        let step_bytes = 2 * 32 * self.halves;
        let blocks = features.div_ceil(self.features());
        let most = (self.slots(limits) / blocks).min(steps.div_ceil(self.warps)).max(1);
        let all = 3 * features + blocks * tokens;
        let cost = |splits: usize| {
            let of_busiest = (blocks * splits).div_ceil(multiprocessors) * (self.features() + tokens);
            let shared =
                (multiprocessors * of_busiest * steps.div_ceil(splits)).max(all * steps) * step_bytes;
            shared + if splits > 1 { 3 * multiprocessors * SHARING } else { 0 }
        };
        Grid { blocks, splits: (1..=most).min_by_key(|&splits| cost(splits)).unwrap_or(1) }
    }

    pub(crate) fn need(&self, blocks: usize, groups: usize) -> Need {
        Need { part_bytes: blocks * 4 * 8 * groups * self.features(), arrivals: blocks }
    }

    /// What any launch needs.
    pub(crate) fn needs(&self, limits: &Limits, tokens: LinearTokens) -> Need {
        self.need(self.slots(limits), Self::max_groups(tokens))
    }
}

/// Every variant of a tile.
pub fn programs(tile: &LinearFewTile, tokens: LinearTokens) -> Vec<ProgramEntry> {
    let groups: &[usize] = if tokens == LinearTokens::UpTo8 { &[1] } else { &[2, 4] };
    let mut entries = Vec::new();
    for weight in WEIGHTS {
        for vectors in [true, false] {
            for &groups in groups {
                let variants = [false, true].map(|swiglu| Variant { weight, vectors, groups, swiglu });
                // Of a SwiGLU the common one: it differs from the others only in how sums are stored.
                let swiglus = usize::from(weight == DType::Bf16 && vectors);
                entries.extend(variants[..=swiglus].iter().map(|&variant| ProgramEntry {
                    program: tile.program(variant),
                    entry: ENTRY,
                    threads: tile.threads(),
                    shared_bytes: tile.shared_bytes(variant),
                    variant: format!(
                        "{weight}, {} tokens, {}{}",
                        8 * groups,
                        if vectors { "vectors" } else { "elements" },
                        if variant.swiglu { ", swiglu" } else { "" }
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

    const CLASSES: [LinearTokens; 2] = [LinearTokens::UpTo8, LinearTokens::UpTo32];

    #[test]
    fn refusals_say_why() {
        let limits = Limits::a100();
        let (tokens, safe) = (LinearTokens::UpTo32, LinearFewTile::safe(LinearTokens::UpTo32));
        for (tile, reason) in [
            (LinearFewTile { warps: 17, ..safe }, "1 to 16 warps"),
            (LinearFewTile { row_tiles: 5, ..safe }, "1 to 4 groups of 16 features"),
            (LinearFewTile { halves: 3, ..safe }, "32 or 64 columns"),
            (LinearFewTile { stages: 1, ..safe }, "2 to 8 steps"),
            (LinearFewTile { blocks: 9, ..safe }, "1 to 8 blocks"),
            (LinearFewTile { blocks: 8, ..safe }, "registers"),
            (LinearFewTile { stages: 8, halves: 2, ..safe }, "shared memory"),
        ] {
            let error = tile.validate(tokens, &limits).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        for tokens in CLASSES {
            assert_distinct(&programs(&LinearFewTile::safe(tokens), tokens));
        }
    }

    #[test]
    fn a_launch_needs_no_more_than_the_workspace_has() {
        let limits = Limits::a100();
        for tokens in CLASSES {
            for tile in LinearFewTile::candidates(tokens, &limits) {
                let most = tile.needs(&limits, tokens);
                for (features, columns) in [(16, 6144), (512, 65536), (2624, 6144), (19360, 6144), (70, 8)] {
                    let grid = tile.grid([8, columns, features], &limits);
                    let Grid { blocks, splits } = grid;
                    assert!(blocks * tile.features() >= features && splits >= 1);
                    let need = tile.need(blocks * splits, LinearFewTile::max_groups(tokens));
                    let fits = need.part_bytes <= most.part_bytes && need.arrivals <= most.arrivals;
                    assert!(splits == 1 || fits, "{tile:?} {grid:?}");
                }
            }
        }
    }

    #[test]
    fn blocks_share_an_output_where_there_are_few() {
        let limits = Limits { multiprocessors: 132, ..Limits::a100() };
        let tile = LinearFewTile::of([8, 2, 1, 4, 1]);
        let grid = |tokens, columns, features| tile.grid([tokens, columns, features], &limits);
        // Half of the multiprocessors already take what the memory brings.
        assert_eq!(grid(1, 6144, 2624), Grid { blocks: 82, splits: 1 });
        assert_eq!(grid(32, 2048, 2048), Grid { blocks: 64, splits: 1 });
        assert!(grid(1, 6144, 256).splits >= 4 && grid(1, 6144, 64).splits >= 8);
    }
}
