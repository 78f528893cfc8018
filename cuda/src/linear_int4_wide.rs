//! `linear_int4` for many tokens: blocks of features x tokens.

use dsa80_reference::Result;
use serde::{Deserialize, Serialize};

use crate::device::{Limits, Program, ProgramEntry};
use crate::int4::{Int4Shape, TILE_ROWS};
use crate::linear_int4::{Blocks, TOKENS, Variant};
use crate::tile::{Tile, require, require_shared};

const KERNEL: &str = "linear_int4_wide";

/// The constants of the kernel for many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearInt4WideTile {
    /// Warps along the features.
    pub warps_rows: usize,
    /// Warps along the tokens.
    pub warps_tokens: usize,
    /// Tiles of 16 features of a warp.
    pub row_tiles: usize,
    /// Tiles of 8 tokens of a warp.
    pub token_tiles: usize,
    /// Stages of shared memory.
    pub stages: usize,
    /// Tiles of 64 inputs of a stage.
    pub steps: usize,
    /// Blocks that a multiprocessor must have registers for.
    pub blocks: usize,
    /// Blocks a multiprocessor for which blocks share out the inputs; 0 if they never do.
    pub split_blocks: usize,
}

impl Tile for LinearInt4WideTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = ();

    fn safe((): ()) -> Self {
        Self {
            warps_rows: 4,
            warps_tokens: 2,
            row_tiles: 2,
            token_tiles: 4,
            stages: 3,
            steps: 1,
            blocks: 1,
            split_blocks: 1,
        }
    }

    fn candidates((): (), limits: &Limits) -> Vec<Self> {
        let mut tiles = vec![Self::safe(())];
        for (warps_rows, warps_tokens, row_tiles, token_tiles, stages, steps, blocks) in [
            (4, 1, 2, 12, 3, 1, 2),
            (4, 1, 2, 12, 2, 2, 2),
            (4, 1, 2, 8, 3, 1, 3),
            (4, 1, 2, 8, 2, 2, 3),
            (4, 1, 3, 8, 2, 2, 2),
            (4, 2, 2, 8, 2, 2, 1),
            (4, 1, 2, 4, 3, 2, 2),
        ] {
            tiles.push(Self {
                warps_rows,
                warps_tokens,
                row_tiles,
                token_tiles,
                stages,
                steps,
                blocks,
                split_blocks: blocks.min(2),
            });
        }
        tiles.retain(|tile| tile.validate((), limits).is_ok());
        tiles
    }

    fn validate(&self, (): (), limits: &Limits) -> Result<()> {
        let Self { warps_rows, warps_tokens, row_tiles, token_tiles, stages, steps, blocks, split_blocks } =
            *self;
        let warps = warps_rows * warps_tokens;
        require(self, (1..=16).contains(&warps), || "a block has 1 to 16 warps".into())?;
        require(self, (1..=4).contains(&row_tiles), || "a warp has 1 to 4 tiles of features".into())?;
        require(self, matches!(token_tiles, 2 | 4 | 8 | 12 | 16), || {
            "a warp has 2, 4, 8, 12 or 16 tiles of tokens".into()
        })?;
        require(self, (2..=8).contains(&stages), || "a block has 2 to 8 stages".into())?;
        require(self, (1..=2).contains(&steps), || "a stage has 1 or 2 steps".into())?;
        require(self, split_blocks <= 2, || {
            "inputs are shared out for at most 2 blocks a multiprocessor".into()
        })?;
        // Sums, a step's fragments, the products of one or two tiles of tokens and their activations.
        let registers = 4 * row_tiles * token_tiles + 28 * row_tiles + 36;
        let held = limits.registers_per_multiprocessor as usize / (32 * warps * blocks.max(1)).max(1);
        require(self, blocks > 0 && registers.min(255) <= held, || {
            format!("a thread needs {registers} registers, {blocks} blocks leave {held}")
        })?;
        // Scales of 32 bits and two groups a step are the most.
        require_shared(self, self.shared_bytes_of(8, 2), limits)
    }
}

impl LinearInt4WideTile {
    pub(crate) fn threads(&self) -> u32 {
        32 * (self.warps_rows * self.warps_tokens) as u32
    }

    /// Features of a block.
    pub(crate) fn features(&self) -> usize {
        self.warps_rows * self.row_tiles * TILE_ROWS
    }

    /// Tokens of a block.
    pub(crate) fn tokens(&self) -> usize {
        self.warps_tokens * self.token_tiles * TOKENS
    }

    /// What it is where a variant takes more registers than the plainest: less at a time.
    pub(crate) fn fitted(&self, variant: Variant) -> Self {
        if variant.is_plain() {
            return *self;
        }
        Self { row_tiles: self.row_tiles.min(2), blocks: (self.blocks - 1).max(1), ..*self }
    }

    /// Stages of activations, words, scales and zero points.
    fn shared_bytes_of(&self, scale_bytes: usize, groups_per_tile: usize) -> usize {
        let groups = groups_per_tile * 8 * (scale_bytes + size_of::<u8>());
        let stage = self.tokens() * 128 + self.warps_rows * self.row_tiles * (512 + groups);
        self.stages * self.steps * stage.next_multiple_of(16)
    }

    pub(crate) fn shared_bytes(&self, variant: Variant) -> usize {
        self.shared_bytes_of(variant.scale_bytes(), variant.groups_per_tile())
    }

    pub(crate) fn program(&self, variant: Variant) -> Program {
        let tile = [
            ("TILE_WARPS_ROWS", self.warps_rows),
            ("TILE_WARPS_TOKENS", self.warps_tokens),
            ("TILE_ROW_TILES", self.row_tiles),
            ("TILE_TOKEN_TILES", self.token_tiles),
            ("TILE_STAGES", self.stages),
            ("TILE_STEPS", self.steps),
            ("TILE_BLOCKS", self.blocks),
            ("TILE_SHARED_BYTES", self.shared_bytes(variant)),
        ];
        Program::new("linear_int4_wide.cu", variant.defines().into_iter().chain(tile))
    }

    pub(crate) fn blocks(&self, tokens: usize, shape: &Int4Shape, limits: &Limits) -> Blocks {
        let rows = shape.row_tiles().div_ceil(self.warps_rows * self.row_tiles);
        let tokens = tokens.div_ceil(self.tokens());
        let most = self.split_blocks * limits.multiprocessors as usize;
        Blocks::of(rows, tokens, shape.k_tiles(), most, self.stages * self.steps)
    }
}

/// Every variant of a tile.
pub fn programs(tile: &LinearInt4WideTile) -> Vec<ProgramEntry> {
    let entry = |(variant, words)| {
        let tile = tile.fitted(variant);
        ProgramEntry {
            program: tile.program(variant),
            entry: KERNEL,
            threads: tile.threads(),
            shared_bytes: tile.shared_bytes(variant),
            variant: words,
        }
    };
    Variant::all().into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_fit_an_a100_and_refusals_say_why() {
        let limits = Limits::a100();
        let safe = LinearInt4WideTile::safe(());
        let candidates = LinearInt4WideTile::candidates((), &limits);
        assert!(candidates.contains(&safe) && candidates.len() == 8, "{candidates:?}");
        for (tile, reason) in [
            (LinearInt4WideTile { warps_rows: 9, ..safe }, "1 to 16 warps"),
            (LinearInt4WideTile { row_tiles: 5, ..safe }, "1 to 4 tiles of features"),
            (LinearInt4WideTile { token_tiles: 3, ..safe }, "2, 4, 8, 12 or 16 tiles of tokens"),
            (LinearInt4WideTile { steps: 3, ..safe }, "1 or 2 steps"),
            (LinearInt4WideTile { stages: 1, ..safe }, "2 to 8 stages"),
            (LinearInt4WideTile { blocks: 3, ..safe }, "registers"),
            (
                LinearInt4WideTile { warps_tokens: 4, token_tiles: 8, stages: 8, warps_rows: 2, ..safe },
                "shared memory",
            ),
        ] {
            let error = tile.validate((), &limits).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
