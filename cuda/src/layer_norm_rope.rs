//! `layer_norm_rope`: the indexer's keys.

use dsa80_reference::fp8::IndexerPage;
use dsa80_reference::{DType, DeviceTensor, Error, IndexKeys, Result, RopeLayout};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::{self, WEIGHTS, require_rows, rotary_dim, slots, weight_type};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "layer_norm_rope";

/// How a block takes rows: one warp each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNormRopeTile {
    /// Rows of a block.
    pub warps: usize,
    /// Neighbouring columns that a lane holds.
    pub vector: usize,
}

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerNormRopeDims {
    /// Columns of a key.
    pub width: usize,
    /// Columns that rotate.
    pub rope: usize,
}

/// What is compiled in beside tile and dims.
#[derive(Debug, Clone, Copy)]
struct Variant {
    weight: DType,
    bias: DType,
    layout: RopeLayout,
    fp8: bool,
}

impl Tile for LayerNormRopeTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = LayerNormRopeDims;

    fn safe(_dims: Self::Dims) -> Self {
        Self { warps: 4, vector: 4 }
    }

    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self> {
        rows::candidates(dims, limits, |warps, vector| Self { warps, vector })
    }

    fn validate(&self, dims: Self::Dims, limits: &Limits) -> Result<()> {
        let LayerNormRopeDims { width, rope } = dims;
        // A lane keeps five floats a column: 160 registers, which eight warps of 255 can have.
        require_rows(self, self.warps, self.vector)?;
        require(self, width > 0 && width % 16 == 0 && width <= 1024, || {
            format!("a key of {width} columns is not a multiple of 16 up to 1024, which a warp holds")
        })?;
        require(self, rope > 0 && rope % 2 == 0 && rope <= width, || {
            format!("{rope} rotary columns are not pairs inside {width}")
        })?;
        require_shared(self, self.shared_bytes(dims, RopeLayout::Half), limits)
    }
}

impl LayerNormRopeTile {
    fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    /// The rotary columns of every row, where a pair's halves are apart.
    pub(crate) fn shared_bytes(&self, dims: LayerNormRopeDims, layout: RopeLayout) -> usize {
        match layout {
            RopeLayout::Interleaved => 0,
            RopeLayout::Half => self.warps * dims.rope * size_of::<f32>(),
        }
    }

    fn program(&self, dims: LayerNormRopeDims, variant: Variant) -> Program {
        let Variant { weight, bias, layout, fp8 } = variant;
        let mut defines = defines(dims.width, [weight, bias], layout, fp8);
        defines.extend([
            ("ROPE", dims.rope.to_string()),
            ("TILE_WARPS", self.warps.to_string()),
            ("TILE_VECTOR", self.vector.to_string()),
            ("TILE_SHARED_BYTES", self.shared_bytes(dims, layout).to_string()),
        ]);
        Program { source: "layer_norm_rope.cu", defines }
    }
}

/// The constants of `layer_norm_rope.cuh` but for its tile and `ROPE`.
pub(crate) fn defines(
    width: usize,
    [weight, bias]: [DType; 2],
    layout: RopeLayout,
    fp8: bool,
) -> Vec<(&'static str, String)> {
    vec![
        ("KEY_WIDTH", width.to_string()),
        ("KEY_WEIGHT_TYPE", weight_type(weight)),
        ("KEY_BIAS_TYPE", weight_type(bias)),
        ("HALF", u8::from(layout == RopeLayout::Half).to_string()),
        ("KEY_FP8", u8::from(fp8).to_string()),
    ]
}

/// Every variant of a tile, with weight and bias of one type.
pub fn programs(tile: &LayerNormRopeTile, dims: LayerNormRopeDims) -> Vec<ProgramEntry> {
    let mut entries = Vec::new();
    for weight in WEIGHTS {
        for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
            for fp8 in [false, true] {
                entries.push(ProgramEntry {
                    program: tile.program(dims, Variant { weight, bias: weight, layout, fp8 }),
                    entry: KERNEL,
                    threads: tile.threads(),
                    shared_bytes: tile.shared_bytes(dims, layout),
                    variant: format!("{layout:?}, {weight}, {} cache", if fp8 { "8-bit" } else { "bf16" }),
                });
            }
        }
    }
    entries
}

/// What a launch over `rows` tokens moves; it has no tensor-core work.
pub fn cost(rows: usize, dims: LayerNormRopeDims, weight: DType, fp8: bool) -> Cost {
    let LayerNormRopeDims { width, rope } = dims;
    let out = if fp8 { width + size_of::<f32>() } else { 2 * width };
    let row = 2 * width + rope * size_of::<f32>() + size_of::<i64>() + out;
    let weights = 2 * width * if weight == DType::F32 { 4 } else { 2 };
    Cost { bytes: (rows * row + weights) as f64, flops: 0.0 }
}

/// What a contract calls the arguments.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    pub(crate) kernel: &'static str,
    pub(crate) x: &'static str,
    pub(crate) weight: &'static str,
    pub(crate) bias: &'static str,
}

/// The slots of the cache of arguments that fit.
pub(crate) fn check<D: Device>(
    names: Names,
    batch: &CudaBatch<D>,
    keys: &IndexKeys<'_, CudaTensor<D>>,
) -> Result<i32> {
    let (rows, page_size) = (batch.host().num_tokens(), batch.host().page_size);
    let (Names { kernel, .. }, IndexKeys { x, cache, .. }) = (names, keys);
    let [x_rows, width] = x.dims(kernel, names.x)?;
    x.expect(kernel, names.x, x_rows == rows, || format!("[{rows}, D]"))?;
    x.expect_dtype(kernel, names.x, &[DType::Act], "activations")?;
    for (name, tensor) in [(names.weight, keys.weight), (names.bias, keys.bias)] {
        tensor.expect(kernel, name, tensor.shape() == [width], || format!("[{width}]"))?;
        tensor.expect_dtype(kernel, name, &WEIGHTS, "weights")?;
    }
    if cache.dtype() == DType::Fp8 && page_size % 4 != 0 {
        let expected = "a multiple of 4 for an 8-bit indexer cache".into();
        return Err(Error::Value { kernel, name: "page_size", expected, found: page_size.to_string() });
    }
    slots(kernel, cache, page_size, width, IndexerPage { page_size, width }.row_bytes())
}

/// The kernel of the contract's [`layer_norm_rope`](dsa80_reference::Kernels::layer_norm_rope).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn layer_norm_rope<D: Device>(
    device: &D,
    tile: &LayerNormRopeTile,
    batch: &CudaBatch<D>,
    x: &CudaTensor<D>,
    weight: &CudaTensor<D>,
    bias: &CudaTensor<D>,
    eps: f64,
    layout: RopeLayout,
    cos_sin: &CudaTensor<D>,
    cache: &mut CudaTensor<D>,
) -> Result<()> {
    let (rows, page_size) = (batch.host().num_tokens(), batch.host().page_size);
    let keys = IndexKeys { x, weight, bias, eps, layout, cache };
    let slots = check(Names { kernel: KERNEL, x: "x", weight: "weight", bias: "bias" }, batch, &keys)?;
    let IndexKeys { cache, .. } = keys;
    let (width, fp8) = (x.shape()[1], cache.dtype() == DType::Fp8);
    let rope = rotary_dim(KERNEL, cos_sin, rows)?;
    let dims = LayerNormRopeDims { width, rope };
    tile.validate(dims, device.limits())?;
    if rows == 0 {
        return Ok(());
    }
    let variant = Variant { weight: weight.dtype(), bias: bias.dtype(), layout, fp8 };
    device.launch(&Launch {
        program: &tile.program(dims, variant),
        entry: KERNEL,
        grid: [rows.div_ceil(tile.warps) as u32, 1, 1],
        threads: tile.threads(),
        shared_bytes: tile.shared_bytes(dims, layout),
        shape: format!("{rows} rows of {width}, {rope} rotary, {variant:?}"),
        args: &[
            Arg::Buffer(x.buffer()),
            Arg::Buffer(weight.buffer()),
            Arg::Buffer(bias.buffer()),
            Arg::Buffer(cos_sin.buffer()),
            Arg::Buffer(&batch.slot_mapping),
            Arg::Buffer(cache.buffer()),
            Arg::I32(slots),
            Arg::I32(page_size as i32),
            Arg::I32(rows as i32),
            Arg::F32(eps as f32),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::{LayerNormRopeDims as Dims, LayerNormRopeTile as RowTile, *};
    use crate::rows::tests::{assert_candidates_and_refusals, assert_distinct};

    const GLM: Dims = Dims { width: 128, rope: 64 };

    #[test]
    fn candidates_fit_an_a100_and_refusals_say_why() {
        let safe = RowTile::safe(GLM);
        assert_candidates_and_refusals(
            GLM,
            &[
                (RowTile { vector: 2, ..safe }, GLM, "4 or 8 columns"),
                (RowTile { warps: 9, ..safe }, GLM, "1 to 8 warps"),
                (safe, Dims { width: 120, ..GLM }, "multiple of 16"),
                (safe, Dims { width: 2048, ..GLM }, "up to 1024"),
                (safe, Dims { rope: 63, ..GLM }, "63 rotary columns"),
                (safe, Dims { rope: 130, ..GLM }, "inside 128"),
            ],
        );
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        assert_distinct(&programs(&RowTile::safe(GLM), GLM));
    }
}
