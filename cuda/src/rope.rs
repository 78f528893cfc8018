//! `rope`: rotation of some columns of every head, in place.

use dsa80_reference::{DType, Error, Result, RopeLayout};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::rotary_dim;
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "rope";

/// How the heads of a token are laid over a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeTile {
    /// Warps of a block at most: fewer where a token has less work.
    pub warps: usize,
}

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RopeDims {
    /// Heads of a token.
    pub heads: usize,
    /// Columns of a head.
    pub width: usize,
    /// Columns before those that rotate.
    pub offset: usize,
    /// Columns that rotate.
    pub rope: usize,
    /// Which are pairs.
    pub layout: RopeLayout,
}

impl RopeDims {
    /// Neighbouring columns of a load: up to 16 bytes, aligned in every head.
    fn vector(self) -> usize {
        let (most, run) = match self.layout {
            RopeLayout::Interleaved => (8, self.rope),
            RopeLayout::Half => (4, self.rope / 2),
        };
        let fits = |vector: usize| [self.width, self.offset, run].iter().all(|n| n.is_multiple_of(vector));
        [8, 4, 2].into_iter().find(|&vector| vector <= most && fits(vector)).unwrap_or(1)
    }

    /// Pairs that a thread rotates at once.
    fn group(self) -> usize {
        match self.layout {
            RopeLayout::Interleaved => self.vector().div_ceil(2),
            RopeLayout::Half => self.vector(),
        }
    }
}

impl RopeTile {
    fn warps(&self, dims: RopeDims) -> usize {
        let threads = dims.heads * dims.rope / 2 / dims.group();
        threads.div_ceil(32).clamp(1, self.warps)
    }

    fn program(&self, dims: RopeDims) -> Program {
        let constants = [
            ("PAIRS", dims.rope / 2),
            ("VECTOR", dims.vector()),
            ("HALF", usize::from(dims.layout == RopeLayout::Half)),
            ("TILE_WARPS", self.warps(dims)),
        ];
        Program::new("rope.cu", constants)
    }
}

impl Tile for RopeTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = RopeDims;

    fn safe(_dims: RopeDims) -> Self {
        Self { warps: 8 }
    }

    fn candidates(dims: RopeDims, limits: &Limits) -> Vec<Self> {
        let tiles = [1, 2, 4, 8].into_iter().map(|warps| Self { warps });
        tiles.filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, _dims: RopeDims, _limits: &Limits) -> Result<()> {
        require(self, (1..=32).contains(&self.warps), || "a block has 1 to 32 warps".into())
    }
}

/// Both layouts of a tile.
pub fn programs(tile: &RopeTile, dims: RopeDims) -> Vec<ProgramEntry> {
    [RopeLayout::Interleaved, RopeLayout::Half]
        .into_iter()
        .map(|layout| {
            let dims = RopeDims { layout, ..dims };
            ProgramEntry {
                program: tile.program(dims),
                entry: KERNEL,
                threads: 32 * tile.warps(dims) as u32,
                shared_bytes: 0,
                variant: format!("{layout:?}"),
            }
        })
        .collect()
}

/// What a launch over `rows` tokens moves.
pub fn cost(rows: usize, dims: RopeDims) -> Cost {
    let row = 2 * 2 * dims.heads * dims.rope + size_of::<f32>() * dims.rope;
    Cost { bytes: (rows * row) as f64, flops: 0.0 }
}

/// The kernel of the contract's [`rope`](dsa80_reference::Kernels::rope).
///
/// # Errors
/// A shape, element type, value or tile that does not fit; the device.
pub fn rope<D: Device>(
    device: &D,
    tile: &RopeTile,
    x: &mut CudaTensor<D>,
    offset: usize,
    layout: RopeLayout,
    cos_sin: &CudaTensor<D>,
) -> Result<()> {
    let [rows, heads, width] = x.dims(KERNEL, "x")?;
    x.expect_dtype(KERNEL, "x", &[DType::Act], "activations")?;
    let rope = rotary_dim(KERNEL, cos_sin, rows)?;
    if rope > width || offset > width - rope {
        let (expected, found) = (format!("room for {rope} columns in {width}"), offset.to_string());
        return Err(Error::Value { kernel: KERNEL, name: "offset", expected, found });
    }
    let dims = RopeDims { heads, width, offset, rope, layout };
    tile.validate(dims, device.limits())?;
    if rows * heads * rope == 0 {
        return Ok(());
    }
    device.launch(&Launch {
        program: &tile.program(dims),
        entry: KERNEL,
        grid: [rows as u32, 1, 1],
        threads: 32 * tile.warps(dims) as u32,
        shared_bytes: 0,
        shape: format!("{rows} rows, {dims:?}"),
        args: &[
            Arg::Buffer(x.buffer()),
            Arg::Buffer(cos_sin.buffer()),
            Arg::I32(heads as i32),
            Arg::I32(width as i32),
            Arg::I32(offset as i32),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    const GLM: RopeDims =
        RopeDims { heads: 8, width: 256, offset: 192, rope: 64, layout: RopeLayout::Interleaved };

    #[test]
    fn loads_are_aligned_in_every_head() {
        let half = RopeDims { layout: RopeLayout::Half, ..GLM };
        for (dims, vector, group) in [
            (GLM, 8, 4),
            (RopeDims { offset: 4, ..GLM }, 4, 2),
            (RopeDims { width: 254, ..GLM }, 2, 1),
            (RopeDims { offset: 1, ..GLM }, 1, 1),
            (RopeDims { rope: 6, ..GLM }, 2, 1),
            (half, 4, 4),
            (RopeDims { offset: 4, ..half }, 4, 4),
            (RopeDims { rope: 4, ..half }, 2, 2),
            (RopeDims { rope: 6, ..half }, 1, 1),
            (RopeDims { width: 255, ..half }, 1, 1),
        ] {
            assert_eq!((dims.vector(), dims.group()), (vector, group), "{dims:?}");
        }
    }

    #[test]
    fn blocks_are_no_larger_than_a_tokens_work() {
        let tile = RopeTile { warps: 8 };
        for (heads, warps) in [(1, 1), (8, 2), (32, 8), (64, 8)] {
            assert_eq!(tile.warps(RopeDims { heads, ..GLM }), warps);
        }
    }

    #[test]
    fn refusals_say_why() {
        let error = RopeTile { warps: 33 }.validate(GLM, &Limits::a100()).unwrap_err().to_string();
        assert!(error.starts_with("rope: ") && error.contains("1 to 32 warps"), "{error}");
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        assert_distinct(&programs(&RopeTile::safe(GLM), GLM));
    }
}
