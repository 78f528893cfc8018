//! `embed`: token rows of a vocabulary shard.

use dsa80_reference::{DType, DeviceTensor, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::{self, WEIGHTS, weight_type};
use crate::tensor::{CudaTensor, element_bytes};
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "embed";

/// How a token's row is laid over a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbedTile {
    /// Warps of a block at most: fewer where a row has less work.
    pub warps: usize,
}

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbedDims {
    /// Columns of a row.
    pub width: usize,
}

impl EmbedTile {
    fn warps(&self, dims: EmbedDims) -> usize {
        (dims.width / rows::vector(dims.width)).div_ceil(32).clamp(1, self.warps)
    }

    fn program(&self, dims: EmbedDims, table: DType, out: DType) -> Program {
        Program {
            source: "embed.cu",
            defines: vec![
                ("VECTOR", rows::vector(dims.width).to_string()),
                ("TABLE_TYPE", weight_type(table)),
                ("FLOATS", u8::from(out == DType::Float).to_string()),
                ("TILE_WARPS", self.warps(dims).to_string()),
            ],
        }
    }
}

impl Tile for EmbedTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = EmbedDims;

    fn safe(_dims: EmbedDims) -> Self {
        Self { warps: 8 }
    }

    fn candidates(dims: EmbedDims, limits: &Limits) -> Vec<Self> {
        let tiles = [2, 4, 8, 16, 24].into_iter().map(|warps| Self { warps });
        tiles.filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: EmbedDims, _limits: &Limits) -> Result<()> {
        require(self, (1..=32).contains(&self.warps), || "a block has 1 to 32 warps".into())?;
        require(self, dims.width < 1 << 30, || format!("a row of {} columns", dims.width))
    }
}

/// Every variant of a tile.
pub fn programs(tile: &EmbedTile, dims: EmbedDims) -> Vec<ProgramEntry> {
    let outs = [DType::Act, DType::Float];
    WEIGHTS
        .into_iter()
        .flat_map(|table| outs.map(|out| (table, out)))
        .map(|(table, out)| ProgramEntry {
            program: tile.program(dims, table, out),
            entry: KERNEL,
            threads: 32 * tile.warps(dims) as u32,
            shared_bytes: 0,
            variant: format!("{table} to {out}"),
        })
        .collect()
}

/// What a launch moves whose tokens are all of this shard.
pub fn cost(rows: usize, dims: EmbedDims, table: DType, out: DType) -> Cost {
    let row = dims.width * (element_bytes(out) + element_bytes(table)) + size_of::<i32>();
    Cost { bytes: (rows * row) as f64, flops: 0.0 }
}

/// The kernel of the contract's [`embed`](dsa80_reference::Kernels::embed).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn embed<D: Device>(
    device: &D,
    tile: &EmbedTile,
    batch: &CudaBatch<D>,
    table: &CudaTensor<D>,
    vocab_start: usize,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let rows = batch.host().num_tokens();
    let [vocab, width] = table.dims(KERNEL, "table")?;
    table.expect_dtype(KERNEL, "table", &WEIGHTS, "weights")?;
    out.expect(KERNEL, "out", out.shape() == [rows, width], || format!("[{rows}, {width}]"))?;
    out.expect_dtype(KERNEL, "out", &[DType::Act, DType::Float], "activations or floats")?;
    let dims = EmbedDims { width };
    tile.validate(dims, device.limits())?;
    if rows * width == 0 {
        return Ok(());
    }
    device.launch(&Launch {
        program: &tile.program(dims, table.dtype(), out.dtype()),
        entry: KERNEL,
        grid: [rows as u32, 1, 1],
        threads: 32 * tile.warps(dims) as u32,
        shared_bytes: 0,
        shape: format!("{rows} rows of {width}, {}", table.dtype()),
        args: &[
            Arg::Buffer(&batch.token_ids),
            Arg::Buffer(table.buffer()),
            Arg::Buffer(out.buffer()),
            Arg::I64(i64::try_from(vocab_start).unwrap_or(i64::MAX)),
            Arg::I64(vocab as i64),
            Arg::I32(width as i32),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    const GLM: EmbedDims = EmbedDims { width: 6144 };

    #[test]
    fn refusals_say_why() {
        for (warps, width, reason) in [(0, 8, "1 to 32 warps"), (1, 1 << 30, "1073741824 columns")] {
            let error = EmbedTile { warps }.validate(EmbedDims { width }, &Limits::a100()).unwrap_err();
            let error = error.to_string();
            assert!(error.starts_with("embed: ") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        assert_distinct(&programs(&EmbedTile::safe(GLM), GLM));
    }
}
