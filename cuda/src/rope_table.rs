//! `rope_table`: the turns of a step's positions.

use dsa80_reference::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::rotary_dim;
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "rope_table";

/// How angles are laid over blocks: a thread each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeTableTile {
    /// Warps of a block.
    pub warps: usize,
}

impl RopeTableTile {
    fn threads(&self) -> usize {
        32 * self.warps
    }

    fn program(&self) -> Program {
        Program::new("rope_table.cu", [("TILE_WARPS", self.warps)])
    }
}

impl Tile for RopeTableTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = ();

    fn safe((): ()) -> Self {
        Self { warps: 4 }
    }

    fn candidates((): (), _limits: &Limits) -> Vec<Self> {
        [1, 2, 4, 8].map(|warps| Self { warps }).into()
    }

    fn validate(&self, (): (), _limits: &Limits) -> Result<()> {
        require(self, (1..=32).contains(&self.warps), || "a block has 1 to 32 warps".into())
    }
}

/// The one program of a tile.
pub fn programs(tile: &RopeTableTile) -> Vec<ProgramEntry> {
    vec![ProgramEntry {
        program: tile.program(),
        entry: KERNEL,
        threads: tile.threads() as u32,
        shared_bytes: 0,
        variant: "any".into(),
    }]
}

/// What a launch over `rows` tokens moves.
pub fn cost(rows: usize, dim: usize) -> Cost {
    Cost { bytes: (rows * (size_of::<i32>() + dim * size_of::<f32>())) as f64, flops: 0.0 }
}

/// The kernel of the contract's [`rope_table`](dsa80_reference::Kernels::rope_table).
///
/// # Errors
/// A shape, element type, value or tile that does not fit; the device.
pub fn rope_table<D: Device>(
    device: &D,
    tile: &RopeTableTile,
    batch: &CudaBatch<D>,
    theta: f64,
    cos_sin: &mut CudaTensor<D>,
) -> Result<()> {
    let rows = batch.host().num_tokens();
    let pairs = rotary_dim(KERNEL, cos_sin, rows)? / 2;
    if !(theta.is_finite() && theta > 0.0) {
        let (expected, found) = ("a positive number".into(), theta.to_string());
        return Err(Error::Value { kernel: KERNEL, name: "theta", expected, found });
    }
    tile.validate((), device.limits())?;
    let angles = rows * pairs;
    if angles == 0 {
        return Ok(());
    }
    device.launch(&Launch {
        program: &tile.program(),
        entry: KERNEL,
        grid: [angles.div_ceil(tile.threads()) as u32, 1, 1],
        threads: tile.threads() as u32,
        shared_bytes: 0,
        shape: format!("{rows} rows of {pairs} pairs"),
        args: &[
            Arg::Buffer(&batch.positions),
            Arg::Buffer(cos_sin.buffer()),
            Arg::I32(rows as i32),
            Arg::I32(pairs as i32),
            Arg::F64(theta.powf(-1.0 / pairs as f64)),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_why() {
        for warps in [0, 33] {
            let error = RopeTableTile { warps }.validate((), &Limits::a100()).unwrap_err().to_string();
            assert!(error.starts_with("rope_table: ") && error.contains("1 to 32 warps"), "{error}");
        }
    }
}
