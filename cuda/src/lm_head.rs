//! `lm_head`: the logits of chosen token rows, by the kernels of [`linear`](crate::linear).

use dsa80_reference::{DType, Result};

use crate::device::Device;
use crate::linear::{LinearTiles, LinearWorkspace, Product};
use crate::tensor::CudaTensor;

const KERNEL: &str = "lm_head";

/// The kernel of the contract's [`lm_head`](dsa80_reference::Kernels::lm_head). What a row outside `x` gives is undefined; nothing
/// outside `x` is read.
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn lm_head<D: Device>(
    device: &D,
    tiles: &LinearTiles,
    workspace: &LinearWorkspace<D>,
    x: &CudaTensor<D>,
    rows: &CudaTensor<D>,
    weight: &CudaTensor<D>,
    logits: &mut CudaTensor<D>,
) -> Result<()> {
    let product = Product::new(KERNEL, x, Some(rows), weight, "logits", logits)?;
    logits.expect_dtype(KERNEL, "logits", &[DType::Float], "floats")?;
    product.launch(device, tiles, workspace)
}
