//! `linear_and_router`: a product and a choice of experts that know nothing of each other, in one launch.

use dsa80_reference::{DType, Result, RouterParams};

use crate::device::Device;
use crate::linear::{LinearTiles, LinearWorkspace, Product};
use crate::router::{Choice, RouterTile};
use crate::tensor::CudaTensor;

const KERNEL: &str = "linear_and_router";

/// The contract's [`linear_and_router`](dsa80_reference::Kernels::linear_and_router) with a dense weight: one launch for few tokens.
///
/// # Errors
/// A shape, element type, parameter or tile that does not fit; the device.
pub fn linear_and_router<D: Device>(
    device: &D,
    (tiles, workspace): (&LinearTiles, &LinearWorkspace<D>),
    router_tile: &RouterTile,
    x: &CudaTensor<D>,
    weight: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
    logits: &CudaTensor<D>,
    bias: &CudaTensor<D>,
    params: RouterParams,
    topk_ids: &mut CudaTensor<D>,
    topk_weights: &mut CudaTensor<D>,
) -> Result<()> {
    let product = Product::new(KERNEL, x, None, weight, "out", out)?;
    out.expect_dtype(KERNEL, "out", &[DType::Act, DType::Float], "activations or floats")?;
    let choice = Choice::new(logits, bias, params, topk_ids, topk_weights)?;
    if product.is_few() && !choice.is_empty() {
        choice.check_dims(router_tile, device)?;
        return product.launch_few(device, tiles, workspace, Some(&choice));
    }
    product.launch(device, tiles, workspace)?;
    choice.launch(device, router_tile)
}
