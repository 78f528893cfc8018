//! `silu_mul`: SwiGLU.

use dsa80_reference::{DType, DeviceTensor, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "silu_mul";

/// Elements of a vector.
const VECTOR: usize = 8;

/// How elements are laid over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiluMulTile {
    /// Warps of a block.
    pub warps: usize,
    /// Vectors of eight elements that a thread has under way.
    pub vectors: usize,
}

impl SiluMulTile {
    fn threads(&self) -> usize {
        32 * self.warps
    }

    fn program(&self) -> Program {
        Program::new("silu_mul.cu", [("TILE_WARPS", self.warps), ("TILE_VECTORS", self.vectors)])
    }
}

impl Tile for SiluMulTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = ();

    fn safe((): ()) -> Self {
        Self { warps: 4, vectors: 1 }
    }

    fn candidates((): (), _limits: &Limits) -> Vec<Self> {
        [1, 2, 4, 8].into_iter().flat_map(|warps| [1, 2, 4].map(|vectors| Self { warps, vectors })).collect()
    }

    fn validate(&self, (): (), _limits: &Limits) -> Result<()> {
        require(self, (1..=32).contains(&self.warps), || "a block has 1 to 32 warps".into())?;
        require(self, (1..=4).contains(&self.vectors), || "a thread has 1 to 4 vectors under way".into())
    }
}

/// The one program of a tile.
pub fn programs(tile: &SiluMulTile) -> Vec<ProgramEntry> {
    vec![ProgramEntry {
        program: tile.program(),
        entry: KERNEL,
        threads: tile.threads() as u32,
        shared_bytes: 0,
        variant: "any".into(),
    }]
}

/// What a launch over `count` elements moves.
pub fn cost(count: usize) -> Cost {
    Cost { bytes: (3 * 2 * count) as f64, flops: 0.0 }
}

/// The kernel of the contract's [`silu_mul`](dsa80_reference::Kernels::silu_mul).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn silu_mul<D: Device>(
    device: &D,
    tile: &SiluMulTile,
    gate: &CudaTensor<D>,
    up: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let [rows, width] = gate.dims(KERNEL, "gate")?;
    for (name, tensor) in [("gate", gate), ("up", up), ("out", &*out)] {
        tensor.expect(KERNEL, name, tensor.shape() == [rows, width], || format!("[{rows}, {width}]"))?;
        tensor.expect_dtype(KERNEL, name, &[DType::Act], "activations")?;
    }
    tile.validate((), device.limits())?;
    let count = rows * width;
    if count == 0 {
        return Ok(());
    }
    device.launch(&Launch {
        program: &tile.program(),
        entry: KERNEL,
        grid: [count.div_ceil(tile.threads() * tile.vectors * VECTOR) as u32, 1, 1],
        threads: tile.threads() as u32,
        shared_bytes: 0,
        shape: format!("{rows} rows of {width}"),
        args: &[
            Arg::Buffer(gate.buffer()),
            Arg::Buffer(up.buffer()),
            Arg::Buffer(out.buffer()),
            Arg::I64(count as i64),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_why() {
        for (warps, vectors, reason) in [(0, 1, "1 to 32 warps"), (1, 5, "1 to 4 vectors")] {
            let tile = SiluMulTile { warps, vectors };
            let error = tile.validate((), &Limits::a100()).unwrap_err().to_string();
            assert!(error.starts_with("silu_mul: ") && error.contains(reason), "{error}");
        }
    }
}
