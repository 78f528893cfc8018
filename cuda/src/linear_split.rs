//! `linear_split`: projections of the same activations in one launch, by the kernels of [`linear`](crate::linear).

use dsa80_reference::{DType, DeviceTensor, Error, Result};

use crate::device::Device;
use crate::linear::{LinearTiles, LinearWorkspace, OUTS, Product};
use crate::tensor::CudaTensor;

const KERNEL: &str = "linear_split";

/// What the contract calls each output.
const NAMES: [&str; OUTS] = ["outs[0]", "outs[1]", "outs[2]", "outs[3]"];

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
    outs: &mut [&mut CudaTensor<D>],
) -> Result<()> {
    let count = outs.len();
    if !(1..=OUTS).contains(&count) {
        let expected = format!("1 to {OUTS} tensors");
        return Err(Error::Value { kernel: KERNEL, name: "outs", expected, found: count.to_string() });
    }
    let product = Product::unchecked(KERNEL, x, None, weight, outs[0])?;
    let Product { tokens, features: most, columns, .. } = product;
    let (mut tensors, mut features) = ([None; OUTS], 0);
    for ((out, name), tensor) in outs.iter().zip(NAMES).zip(&mut tensors) {
        let [_, width] = out.dims(KERNEL, name)?;
        out.expect(KERNEL, name, out.shape() == [tokens, width], || format!("[{tokens}, {width}]"))?;
        out.expect_dtype(KERNEL, name, &[DType::Act, DType::Float], "activations or floats")?;
        *tensor = Some(&**out);
        features += width;
    }
    weight.expect(KERNEL, "weight", most >= features, || format!("[at least {features}, {columns}]"))?;
    Product { outs: tensors, features, ..product }.launch(device, tiles, workspace)
}
