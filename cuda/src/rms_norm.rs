//! `rms_norm` and `rms_norm_residual`.

use dsa80_reference::{DType, DeviceTensor, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::{self, WEIGHTS, weight_type};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "rms_norm";

/// Columns of a row: 16 of them, with their weights and the next row's, are the registers of each of 1024 threads.
const MAX_WIDTH: usize = 16 * 1024;

/// How rows are laid over blocks, of which one takes a whole row at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RmsNormTile {
    /// Vectors of neighbouring columns that a thread holds; more where 1024 threads are not enough.
    pub vectors: usize,
    /// Blocks for every multiprocessor at most, which then take several rows.
    pub blocks: usize,
}

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RmsNormDims {
    /// Columns of a row.
    pub width: usize,
}

impl RmsNormTile {
    /// The class of shapes that a launch over `rows` rows belongs to.
    pub fn class(rows: usize, limits: &Limits) -> &'static str {
        if rows <= limits.multiprocessors as usize { "few" } else { "many" }
    }

    pub(crate) fn threads(&self, dims: RmsNormDims) -> usize {
        let vectors = dims.width / rows::vector(dims.width);
        32 * vectors.div_ceil(32 * self.vectors).clamp(1, 32)
    }

    /// What the warps summed, of two rows.
    pub(crate) fn shared_bytes(&self, dims: RmsNormDims) -> usize {
        2 * (self.threads(dims) / 32) * size_of::<f32>()
    }

    fn program(&self, dims: RmsNormDims, weight: DType, rows: Rows) -> Program {
        let mut defines = defines(self, dims, weight, rows);
        defines.push(("TILE_SHARED_BYTES", self.shared_bytes(dims).to_string()));
        Program { source: "rms_norm.cu", defines }
    }
}

/// The constants of `rms_norm.cuh`.
pub(crate) fn defines(
    tile: &RmsNormTile,
    dims: RmsNormDims,
    weight: DType,
    rows: Rows,
) -> Vec<(&'static str, String)> {
    vec![
        ("WIDTH", dims.width.to_string()),
        ("VECTOR", rows::vector(dims.width).to_string()),
        ("WEIGHT_TYPE", weight_type(weight)),
        ("X_FLOAT", u8::from(rows == Rows::Floats).to_string()),
        ("RESIDUAL", u8::from(rows == Rows::Residual).to_string()),
        ("TILE_VECTORS", tile.vectors.to_string()),
        ("TILE_THREADS", tile.threads(dims).to_string()),
    ]
}

impl Tile for RmsNormTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = RmsNormDims;

    fn safe(_dims: RmsNormDims) -> Self {
        Self { vectors: 1, blocks: 32 }
    }

    fn candidates(dims: RmsNormDims, limits: &Limits) -> Vec<Self> {
        let tiles =
            [1, 2, 3].into_iter().flat_map(|vectors| [2, 4, 8, 32].map(|blocks| Self { vectors, blocks }));
        tiles.filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: RmsNormDims, _limits: &Limits) -> Result<()> {
        require(self, (1..=4).contains(&self.vectors), || "a thread holds 1 to 4 vectors".into())?;
        require(self, (1..=32).contains(&self.blocks), || "a multiprocessor has 1 to 32 blocks".into())?;
        require(self, (1..=MAX_WIDTH).contains(&dims.width), || {
            format!("{} columns are not 1 to {MAX_WIDTH}, which the registers of a block hold", dims.width)
        })
    }
}

/// What is normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// Activations.
    Acts,
    /// Floats: the residual stream itself.
    Floats,
    /// The residual stream, once activations are added.
    Residual,
}

/// Every variant of a tile.
pub fn programs(tile: &RmsNormTile, dims: RmsNormDims) -> Vec<ProgramEntry> {
    let kinds = [(Rows::Acts, ""), (Rows::Floats, ", floats"), (Rows::Residual, ", residual")];
    let variants = WEIGHTS.into_iter().flat_map(|weight| kinds.map(|kind| (weight, kind)));
    variants
        .map(|(weight, (rows, words))| ProgramEntry {
            program: tile.program(dims, weight, rows),
            entry: KERNEL,
            threads: tile.threads(dims) as u32,
            shared_bytes: tile.shared_bytes(dims),
            variant: format!("{weight}{words}"),
        })
        .collect()
}

/// What a launch over `rows` rows moves.
pub fn cost(rows: usize, dims: RmsNormDims, weight: DType, residual: bool) -> Cost {
    let row = dims.width * if residual { 2 + 4 + 4 + 2 } else { 2 + 2 };
    let weight = dims.width * if weight == DType::F32 { 4 } else { 2 };
    Cost { bytes: (rows * row + weight) as f64, flops: 0.0 }
}

/// The kernel of the contract's [`rms_norm`](dsa80_reference::Kernels::rms_norm).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn rms_norm<D: Device>(
    device: &D,
    tile: &RmsNormTile,
    x: &CudaTensor<D>,
    weight: &CudaTensor<D>,
    eps: f64,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    launch(device, KERNEL, tile, x, None, weight, eps, out)
}

/// The kernel of the contract's [`rms_norm_residual`](dsa80_reference::Kernels::rms_norm_residual).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn rms_norm_residual<D: Device>(
    device: &D,
    tile: &RmsNormTile,
    x: &CudaTensor<D>,
    residual: &mut CudaTensor<D>,
    weight: &CudaTensor<D>,
    eps: f64,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    launch(device, "rms_norm_residual", tile, x, Some(residual), weight, eps, out)
}

fn launch<D: Device>(
    device: &D,
    kernel: &'static str,
    tile: &RmsNormTile,
    x: &CudaTensor<D>,
    residual: Option<&mut CudaTensor<D>>,
    weight: &CudaTensor<D>,
    eps: f64,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let [rows, width] = x.dims(kernel, "x")?;
    weight.expect(kernel, "weight", weight.shape() == [width], || format!("[{width}]"))?;
    weight.expect_dtype(kernel, "weight", &WEIGHTS, "weights")?;
    let (acts, floats, both) = (&[DType::Act][..], &[DType::Float][..], &[DType::Act, DType::Float][..]);
    // Activations alone are added to the residual stream; by itself it is normalised too.
    let of_x = if residual.is_some() { (acts, "activations") } else { (both, "activations or floats") };
    for (name, tensor, (dtypes, expected)) in [
        ("x", Some(x), of_x),
        ("residual", residual.as_deref(), (floats, "floats")),
        ("out", Some(&*out), (acts, "activations")),
    ] {
        let Some(tensor) = tensor else { continue };
        tensor.expect(kernel, name, tensor.shape() == [rows, width], || format!("[{rows}, {width}]"))?;
        tensor.expect_dtype(kernel, name, dtypes, expected)?;
    }
    let kind = match (&residual, x.dtype()) {
        (Some(_), _) => Rows::Residual,
        (None, DType::Float) => Rows::Floats,
        _ => Rows::Acts,
    };
    let dims = RmsNormDims { width };
    tile.validate(dims, device.limits())?;
    if rows == 0 {
        return Ok(());
    }
    let blocks = rows.min(tile.blocks * device.limits().multiprocessors as usize);
    device.launch(&Launch {
        program: &tile.program(dims, weight.dtype(), kind),
        entry: KERNEL,
        grid: [blocks as u32, 1, 1],
        threads: tile.threads(dims) as u32,
        shared_bytes: tile.shared_bytes(dims),
        shape: format!("{kernel}, {rows} rows of {width}, {}", weight.dtype()),
        args: &[
            Arg::Buffer(x.buffer()),
            residual.map_or(Arg::Null, |residual| Arg::Buffer(residual.buffer())),
            Arg::Buffer(weight.buffer()),
            Arg::Buffer(out.buffer()),
            Arg::I32(rows as i32),
            Arg::F32(eps as f32),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    const GLM: RmsNormDims = RmsNormDims { width: 6144 };

    #[test]
    fn refusals_say_why() {
        let safe = RmsNormTile::safe(GLM);
        for (tile, width, reason) in [
            (RmsNormTile { vectors: 5, ..safe }, 6144, "1 to 4 vectors"),
            (RmsNormTile { blocks: 0, ..safe }, 6144, "1 to 32 blocks"),
            (safe, 0, "0 columns"),
            (safe, MAX_WIDTH + 1, "16385 columns"),
        ] {
            let error = tile.validate(RmsNormDims { width }, &Limits::a100()).unwrap_err().to_string();
            assert!(error.starts_with("rms_norm: ") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn threads_are_enough_for_a_row() {
        for (width, vectors, threads) in [
            (6144, 1, 768),
            (6144, 3, 256),
            (2048, 1, 256),
            (512, 1, 64),
            (32, 1, 32),
            (6147, 1, 1024),
            (16384, 1, 1024),
        ] {
            let tile = RmsNormTile { vectors, blocks: 1 };
            assert_eq!(tile.threads(RmsNormDims { width }), threads, "{width}");
        }
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        assert_distinct(&programs(&RmsNormTile::safe(GLM), GLM));
    }
}
