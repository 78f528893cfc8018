//! The tile of products of many tokens: `linear` and `absorb` share it.

use dsa80_reference::{DType, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Limits, Program, ProgramEntry};
use crate::linear::{LinearTokens, Need};
use crate::rows::{WEIGHTS, weight_type};
use crate::tile::{Tile, require, require_shared};

/// Columns of a step.
const COLUMNS: usize = 64;

/// How `linear` cuts a product of many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearTile {
    /// Tokens of a block.
    pub tokens: usize,
    /// Features of a block.
    pub features: usize,
    /// Warps that share the tokens.
    pub token_warps: usize,
    /// Warps that share the features.
    pub feature_warps: usize,
    /// Steps of 64 columns in shared memory.
    pub stages: usize,
    /// Blocks of a multiprocessor.
    pub blocks: usize,
    /// Whether a warp reads what it multiplies next while it multiplies.
    pub ahead: bool,
}

/// What is compiled apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variant {
    pub(crate) weight: DType,
    /// Rows are whole vectors of 16 bytes.
    pub(crate) vectors: bool,
    /// Gate and up projection in turns.
    pub(crate) swiglu: bool,
}

/// How many times more tiles than resident blocks may be shared between them.
const MAX_WAVES: usize = 4;

impl Tile for LinearTile {
    const KERNEL: &'static str = "linear";
    type Dims = LinearTokens;

    fn safe(tokens: LinearTokens) -> Self {
        match tokens {
            LinearTokens::Many => Self::of([128, 256, 2, 4, 3, 1], true),
            _ => Self::of([64, 64, 2, 4, 4, 2], true),
        }
    }

    fn candidates(tokens: LinearTokens, limits: &Limits) -> Vec<Self> {
        let shapes: &[([usize; 6], bool)] = match tokens {
            LinearTokens::Many => &[
                ([128, 256, 2, 4, 3, 1], true),
                ([128, 256, 2, 4, 3, 1], false),
                ([128, 128, 2, 4, 4, 1], true),
                ([128, 128, 2, 2, 2, 2], false),
                ([64, 128, 2, 4, 3, 2], true),
            ],
            _ => &[
                ([64, 64, 2, 2, 4, 2], true),
                ([64, 64, 2, 4, 4, 2], true),
                ([64, 128, 2, 4, 4, 1], true),
                ([64, 128, 2, 4, 6, 1], true),
                ([64, 256, 2, 4, 3, 1], true),
                ([128, 64, 4, 2, 4, 1], true),
                ([128, 64, 4, 2, 3, 2], true),
            ],
        };
        shapes
            .iter()
            .map(|&(shape, ahead)| Self::of(shape, ahead))
            .filter(|tile| tile.validate(tokens, limits).is_ok())
            .collect()
    }

    fn validate(&self, _tokens: LinearTokens, limits: &Limits) -> Result<()> {
        self.require(self, limits)
    }
}

impl LinearTile {
    pub(crate) const fn of(
        [tokens, features, token_warps, feature_warps, stages, blocks]: [usize; 6],
        ahead: bool,
    ) -> Self {
        Self { tokens, features, token_warps, feature_warps, stages, blocks, ahead }
    }

    /// Fails in the name of `tile` unless a kernel can run with this.
    pub(crate) fn require<T: Tile>(&self, tile: &T, limits: &Limits) -> Result<()> {
        let Self { tokens, features, token_warps, feature_warps, stages, blocks, .. } = *self;
        let warps = token_warps * feature_warps;
        require(tile, (1..=16).contains(&warps), || "a block has 1 to 16 warps".into())?;
        require(tile, tokens > 0 && tokens % (16 * token_warps) == 0 && tokens <= 256, || {
            format!("{tokens} tokens are not groups of 16 for each of {token_warps} warps, up to 256")
        })?;
        require(tile, matches!(features, 64 | 128 | 256), || "a tile has 64, 128 or 256 features".into())?;
        require(tile, features % (16 * feature_warps) == 0, || {
            format!("{features} features are not groups of 16 for each of {feature_warps} warps")
        })?;
        require(tile, (2..=8).contains(&stages), || "the ring has 2 to 8 steps".into())?;
        require(tile, (1..=8).contains(&blocks), || "1 to 8 blocks are resident".into())?;
        // Accumulators, two sets of fragments, and what else there is.
        let (m, n) = (tokens / token_warps / 16, features / feature_warps / 8);
        let registers = 4 * m * n + if self.ahead { 2 } else { 1 } * (4 * m + 2 * n) + 40;
        let most = (limits.registers_per_multiprocessor as usize / (32 * warps * blocks)).min(255);
        require(tile, registers <= most, || {
            format!("a lane needs about {registers} registers, {most} are there")
        })?;
        require_shared(tile, self.shared_bytes(DType::Bf16), limits)
    }

    pub(crate) fn threads(&self) -> u32 {
        (32 * self.token_warps * self.feature_warps) as u32
    }

    pub(crate) fn shared_bytes(&self, weight: DType) -> usize {
        let weight_bytes = if weight == DType::F32 { 4 } else { 2 };
        let stage = COLUMNS * (2 * self.tokens + weight_bytes * self.features);
        let stretches_and_flag = 32;
        self.stages * stage + stretches_and_flag
    }

    /// Pieces take registers, f32 shared memory: with such weights a small tile serves.
    pub(crate) fn for_weight(&self, weight: DType) -> Self {
        let Self { tokens, features, token_warps, feature_warps, .. } = *self;
        let small = tokens / token_warps * (features / feature_warps) <= 32 * 32;
        match weight {
            DType::Bf16 => *self,
            _ if small && features <= 128 => Self { stages: 2, blocks: 1, ..*self },
            _ => Self::of([64, 128, 2, 4, 2, 1], true),
        }
    }

    pub(crate) fn program(&self, source: &'static str, variant: Variant, transposed: bool) -> Program {
        let Variant { weight, vectors, swiglu } = variant;
        Program {
            source,
            defines: vec![
                ("WEIGHT_TYPE", weight_type(weight)),
                ("VECTORS", u8::from(vectors).to_string()),
                ("TRANSPOSED", u8::from(transposed).to_string()),
                ("SWIGLU", u8::from(swiglu).to_string()),
                ("TILE_TOKENS", self.tokens.to_string()),
                ("TILE_FEATURES", self.features.to_string()),
                ("TILE_TOKEN_WARPS", self.token_warps.to_string()),
                ("TILE_FEATURE_WARPS", self.feature_warps.to_string()),
                ("TILE_STAGES", self.stages.to_string()),
                ("TILE_AHEAD", u8::from(self.ahead).to_string()),
                ("TILE_BLOCKS", if vectors { self.blocks } else { 1 }.to_string()),
                ("TILE_SHARED_BYTES", self.shared_bytes(weight).to_string()),
            ],
        }
    }

    /// Blocks of a launch, and what they need of a workspace: a tile each, or, where that leaves much of the last wave empty, as many as
    /// are resident, which then share tiles
    /// at the cost of eight steps.
    pub(crate) fn grid(
        &self,
        tokens: usize,
        features: usize,
        columns: usize,
        limits: &Limits,
    ) -> (usize, Need) {
        const SHARING: usize = 8;
        let multiprocessors = limits.multiprocessors as usize;
        let (tiles, steps) =
            (tokens.div_ceil(self.tokens) * features.div_ceil(self.features), columns.div_ceil(COLUMNS));
        let slots = self.slots(limits).min(tiles * steps);
        let apart = tiles.div_ceil(multiprocessors) * steps;
        let shared = (tiles * steps).div_ceil(multiprocessors) + SHARING;
        if shared < apart && tiles <= MAX_WAVES * slots {
            (slots, self.need(slots, tiles))
        } else {
            (tiles, Need::default())
        }
    }

    fn slots(&self, limits: &Limits) -> usize {
        self.blocks * limits.multiprocessors as usize
    }

    fn need(&self, blocks: usize, tiles: usize) -> Need {
        Need { part_bytes: blocks * 2 * 4 * self.tokens * self.features, arrivals: tiles }
    }

    /// What any launch needs, with any weight.
    pub(crate) fn needs(&self, limits: &Limits) -> Need {
        let both = [DType::Bf16, DType::F32].map(|weight| {
            let tile = self.for_weight(weight);
            let slots = tile.slots(limits);
            tile.need(slots, MAX_WAVES * slots)
        });
        Need {
            part_bytes: both[0].part_bytes.max(both[1].part_bytes),
            arrivals: both[0].arrivals.max(both[1].arrivals),
        }
    }
}

/// The variants of `source` with a tile.
pub(crate) fn entries(
    tile: &LinearTile,
    source: &'static str,
    entry: &'static str,
    transposed: bool,
) -> Vec<ProgramEntry> {
    let mut entries = Vec::new();
    for weight in WEIGHTS {
        let tile = tile.for_weight(weight);
        for vectors in [true, false] {
            let layout = if transposed { ", transposed" } else { "" };
            let variants = [false, true].map(|swiglu| Variant { weight, vectors, swiglu });
            // Of a SwiGLU the common one: it differs from the others only in how sums are stored.
            let swiglus = usize::from(weight == DType::Bf16 && vectors && entry == "linear");
            entries.extend(variants[..=swiglus].iter().map(|&variant| ProgramEntry {
                program: tile.program(source, variant, transposed),
                entry,
                threads: tile.threads(),
                shared_bytes: tile.shared_bytes(weight),
                variant: format!(
                    "{weight}, {}{layout}{}",
                    if vectors { "vectors" } else { "elements" },
                    if variant.swiglu { ", swiglu" } else { "" }
                ),
            }));
        }
    }
    entries
}

/// Every variant of a tile.
pub fn programs(tile: &LinearTile) -> Vec<ProgramEntry> {
    entries(tile, "linear.cu", "linear", false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    const CLASSES: [LinearTokens; 2] = [LinearTokens::Middle, LinearTokens::Many];

    #[test]
    fn refusals_say_why() {
        let limits = Limits::a100();
        let safe = LinearTile::safe(LinearTokens::Many);
        for (tile, reason) in [
            (LinearTile { token_warps: 5, feature_warps: 4, ..safe }, "1 to 16 warps"),
            (LinearTile { tokens: 72, ..safe }, "72 tokens"),
            (LinearTile { features: 192, ..safe }, "64, 128 or 256 features"),
            (LinearTile { features: 64, feature_warps: 8, token_warps: 1, ..safe }, "64 features"),
            (LinearTile { stages: 1, ..safe }, "2 to 8 steps"),
            (LinearTile { blocks: 9, ..safe }, "1 to 8 blocks"),
            (LinearTile { blocks: 4, ..safe }, "registers"),
            (LinearTile { stages: 8, ..safe }, "shared memory"),
        ] {
            let error = tile.validate(LinearTokens::Many, &limits).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        for tokens in CLASSES {
            assert_distinct(&programs(&LinearTile::safe(tokens)));
        }
    }

    #[test]
    fn other_weights_fit_and_a_launch_needs_no_more_than_the_workspace_has() {
        let limits = Limits::a100();
        for tokens in CLASSES {
            for tile in LinearTile::candidates(tokens, &limits) {
                let most = tile.needs(&limits);
                for weight in WEIGHTS {
                    let tile = tile.for_weight(weight);
                    assert!(tile.shared_bytes(weight) <= limits.shared_per_block);
                    for (rows, features, columns) in [
                        (33, 16, 6144),
                        (1024, 2624, 6144),
                        (8192, 2624, 6144),
                        (64, 19360, 6144),
                        (40, 70, 8),
                    ] {
                        let (blocks, need) = tile.grid(rows, features, columns, &limits);
                        assert!(blocks > 0 && need.part_bytes <= most.part_bytes);
                        assert!(need.arrivals <= most.arrivals, "{tile:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_share_tiles_where_the_last_wave_would_be_empty() {
        let (limits, tile) = (Limits::a100(), LinearTile::of([128, 128, 2, 2, 2, 2], false));
        let slots = 2 * limits.multiprocessors as usize;
        // 168 tiles on 108 multiprocessors, and 108.
        assert_eq!(tile.grid(1024, 2624, 6144, &limits).0, slots);
        assert_eq!(tile.grid(128, 108 * 128, 6144, &limits), (108, Need::default()));
    }
}
