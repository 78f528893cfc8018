//! `latent_rope`: MLA's cache row.

use dsa80_reference::fp8::MlaRow;
use dsa80_reference::{DType, DeviceTensor, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::{self, WEIGHTS, require_rows, rotary_dim, slots, weight_type};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "latent_rope";

/// How a block takes rows: one warp each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentRopeTile {
    /// Rows of a block.
    pub warps: usize,
    /// Neighbouring columns that a lane holds.
    pub vector: usize,
}

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentRopeDims {
    /// Columns of the latent part.
    pub kv_lora_rank: usize,
    /// Columns of the rotary key part.
    pub rope: usize,
}

impl LatentRopeDims {
    fn row(self) -> MlaRow {
        MlaRow { kv_lora_rank: self.kv_lora_rank, rope: self.rope }
    }
}

impl Tile for LatentRopeTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = LatentRopeDims;

    fn safe(_dims: Self::Dims) -> Self {
        Self { warps: 4, vector: 4 }
    }

    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self> {
        rows::candidates(dims, limits, |warps, vector| Self { warps, vector })
    }

    fn validate(&self, dims: Self::Dims, _limits: &Limits) -> Result<()> {
        let LatentRopeDims { kv_lora_rank: rank, rope } = dims;
        // A lane keeps two floats a column: 128 registers, which eight warps of 255 can have.
        require_rows(self, self.warps, self.vector)?;
        require(self, rank > 0 && rank % 16 == 0 && rank <= 2048, || {
            format!("a latent of {rank} columns is not a multiple of 16 up to 2048, which a warp holds")
        })?;
        require(self, rope > 0 && rope % 8 == 0 && rope <= 256, || {
            format!("{rope} rotary columns are not a multiple of 8 up to 256")
        })
    }
}

impl LatentRopeTile {
    fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    fn program(&self, dims: LatentRopeDims, weight: DType, fp8: bool) -> Program {
        let mut defines = defines(dims, weight, fp8);
        defines.extend([("TILE_WARPS", self.warps.to_string()), ("TILE_VECTOR", self.vector.to_string())]);
        Program { source: "latent_rope.cu", defines }
    }
}

/// The constants of `latent_rope.cuh` but for its tile.
pub(crate) fn defines(dims: LatentRopeDims, weight: DType, fp8: bool) -> Vec<(&'static str, String)> {
    vec![
        ("RANK", dims.kv_lora_rank.to_string()),
        ("ROPE", dims.rope.to_string()),
        ("LATENT_WEIGHT_TYPE", weight_type(weight)),
        ("LATENT_FP8", u8::from(fp8).to_string()),
    ]
}

/// Every variant of a tile.
pub fn programs(tile: &LatentRopeTile, dims: LatentRopeDims) -> Vec<ProgramEntry> {
    let variants = WEIGHTS.into_iter().flat_map(|weight| [false, true].map(|fp8| (weight, fp8)));
    variants
        .map(|(weight, fp8)| ProgramEntry {
            program: tile.program(dims, weight, fp8),
            entry: KERNEL,
            threads: tile.threads(),
            shared_bytes: 0,
            variant: format!("{weight}, {} cache", if fp8 { "8-bit" } else { "bf16" }),
        })
        .collect()
}

/// What a launch over `rows` tokens moves; it has no tensor-core work.
pub fn cost(rows: usize, dims: LatentRopeDims, weight: DType, fp8: bool) -> Cost {
    let LatentRopeDims { kv_lora_rank: rank, rope } = dims;
    let out = if fp8 { dims.row().row_bytes() } else { 2 * (rank + rope) };
    let row = 2 * (rank + rope) + rope * size_of::<f32>() + size_of::<i64>() + out;
    let weights = rank * if weight == DType::F32 { 4 } else { 2 };
    Cost { bytes: (rows * row + weights) as f64, flops: 0.0 }
}

/// What a contract calls the arguments.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    pub(crate) kernel: &'static str,
    pub(crate) x: &'static str,
    pub(crate) weight: &'static str,
}

/// The dims of arguments that fit, and the cache's slots.
pub(crate) fn check<D: Device>(
    names: Names,
    batch: &CudaBatch<D>,
    x: &CudaTensor<D>,
    weight: &CudaTensor<D>,
    rope: usize,
    cache: &CudaTensor<D>,
) -> Result<(LatentRopeDims, i32)> {
    let Names { kernel, x: x_name, weight: weight_name } = names;
    let rows = batch.host().num_tokens();
    let [x_rows, width] = x.dims(kernel, x_name)?;
    let [rank] = weight.dims(kernel, weight_name)?;
    weight.expect_dtype(kernel, weight_name, &WEIGHTS, "weights")?;
    x.expect(kernel, x_name, x_rows == rows && width == rank + rope, || {
        format!("[{rows}, {rank} + {rope}]")
    })?;
    x.expect_dtype(kernel, x_name, &[DType::Act], "activations")?;
    let dims = LatentRopeDims { kv_lora_rank: rank, rope };
    Ok((dims, slots(kernel, cache, batch.host().page_size, width, dims.row().row_bytes())?))
}

/// The kernel of the contract's [`latent_rope`](dsa80_reference::Kernels::latent_rope).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn latent_rope<D: Device>(
    device: &D,
    tile: &LatentRopeTile,
    batch: &CudaBatch<D>,
    x: &CudaTensor<D>,
    weight: &CudaTensor<D>,
    eps: f64,
    cos_sin: &CudaTensor<D>,
    cache: &mut CudaTensor<D>,
) -> Result<()> {
    let rows = batch.host().num_tokens();
    let rope = rotary_dim(KERNEL, cos_sin, rows)?;
    let names = Names { kernel: KERNEL, x: "x", weight: "weight" };
    let (dims, slots) = check(names, batch, x, weight, rope, cache)?;
    let LatentRopeDims { kv_lora_rank: rank, .. } = dims;
    tile.validate(dims, device.limits())?;
    if rows == 0 {
        return Ok(());
    }
    let fp8 = cache.dtype() == DType::Fp8;
    device.launch(&Launch {
        program: &tile.program(dims, weight.dtype(), fp8),
        entry: KERNEL,
        grid: [rows.div_ceil(tile.warps) as u32, 1, 1],
        threads: tile.threads(),
        shared_bytes: 0,
        shape: format!("{rows} rows of {rank} + {rope}, {}, {}", weight.dtype(), cache.dtype()),
        args: &[
            Arg::Buffer(x.buffer()),
            Arg::Buffer(weight.buffer()),
            Arg::Buffer(cos_sin.buffer()),
            Arg::Buffer(&batch.slot_mapping),
            Arg::Buffer(cache.buffer()),
            Arg::I32(slots),
            Arg::I32(rows as i32),
            Arg::F32(eps as f32),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::{LatentRopeDims as Dims, LatentRopeTile as RowTile, *};
    use crate::rows::tests::{assert_candidates_and_refusals, assert_distinct};

    const GLM: Dims = Dims { kv_lora_rank: 512, rope: 64 };

    #[test]
    fn candidates_fit_an_a100_and_refusals_say_why() {
        let safe = RowTile::safe(GLM);
        assert_candidates_and_refusals(
            GLM,
            &[
                (RowTile { vector: 2, ..safe }, GLM, "4 or 8 columns"),
                (RowTile { warps: 0, ..safe }, GLM, "1 to 8 warps"),
                (safe, Dims { kv_lora_rank: 40, ..GLM }, "multiple of 16"),
                (safe, Dims { kv_lora_rank: 4096, ..GLM }, "up to 2048"),
                (safe, Dims { rope: 12, ..GLM }, "12 rotary columns"),
            ],
        );
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        assert_distinct(&programs(&RowTile::safe(GLM), GLM));
    }
}
