//! `linear_split`: two projections of the same activations in one launch, by the kernels of [`linear`](crate::linear).

use dsa80_reference::{DType, DeviceTensor, Result};

use crate::device::Device;
use crate::linear::{LinearTiles, LinearWorkspace, Product};
use crate::tensor::CudaTensor;

const KERNEL: &str = "linear_split";

/// The kernel of the contract's [`linear_split`](dsa80_reference::Kernels::linear_split).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn linear_split<D: Device>(
    device: &D,
    tiles: &LinearTiles,
    workspace: &LinearWorkspace<D>,
    x: &CudaTensor<D>,
    weight: &CudaTensor<D>,
    first: &mut CudaTensor<D>,
    second: &mut CudaTensor<D>,
) -> Result<()> {
    let product = Product::unchecked(KERNEL, x, None, weight, first)?;
    let Product { tokens, features, columns, .. } = product;
    let ([_, a], [_, b]) = (first.dims(KERNEL, "first")?, second.dims(KERNEL, "second")?);
    weight.expect(KERNEL, "weight", features == a + b, || format!("[{}, {columns}]", a + b))?;
    for (name, tensor, width) in [("first", &*first, a), ("second", &*second, b)] {
        tensor.expect(KERNEL, name, tensor.shape() == [tokens, width], || format!("[{tokens}, {width}]"))?;
    }
    first.expect_dtype(KERNEL, "first", &[DType::Act, DType::Float], "activations or floats")?;
    let same = if first.dtype() == DType::Act { "activations" } else { "floats" };
    second.expect_dtype(KERNEL, "second", &[first.dtype()], same)?;
    Product { second: Some(second), ..product }.launch(device, tiles, workspace)
}
