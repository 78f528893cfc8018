//! `layer_norm_rope`.

use super::launch::Launch;
use super::rope::rotary_dim;
use super::shader::{Shader, shader};
use super::slots::slots;
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuBatch, no_form};
use crate::error::Result;
use crate::kernels::RopeLayout;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("layer_norm_rope");

const KERNEL: &str = "layer_norm_rope";

pub(super) fn layer_norm_rope(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    x: &WgpuTensor,
    weight: &WgpuTensor,
    bias: &WgpuTensor,
    eps: f64,
    layout: RopeLayout,
    cos_sin: &WgpuTensor,
    cache: &mut WgpuTensor,
) -> Result<()> {
    let tokens = batch.host().num_tokens();
    let [rows, width] = x.dims(KERNEL, "x")?;
    x.expect(KERNEL, "x", rows == tokens && width > 0, || format!("[{tokens}, D]"))?;
    x.expect_act(KERNEL, "x")?;
    x.expect_even(KERNEL, "x")?;
    for (name, tensor) in [("weight", weight), ("bias", bias)] {
        tensor.expect_shape(KERNEL, name, &[width])?;
        tensor.expect_weight(KERNEL, name)?;
    }
    let dim = rotary_dim(KERNEL, cos_sin, tokens)?;
    cos_sin.expect(KERNEL, "cos_sin", dim <= width, || format!("at most {width} rotary columns"))?;
    let slots = slots(KERNEL, cache, batch.host().page_size, width, width + 4)?;
    if cache.dtype() == DType::Fp8 {
        return Err(no_form("layer_norm_rope into an 8-bit cache"));
    }
    if tokens == 0 || slots == 0 {
        return Ok(());
    }
    wgpu.launch(&Launch {
        kernel: KERNEL,
        shader: &SHADER,
        entry: "main",
        constants: &[
            ("WORKGROUP", wgpu.workgroup((width / 2).min(128)).into()),
            ("WEIGHT", weight.weight_type()),
            ("BIAS", bias.weight_type()),
            ("WIDTH", width as f64),
            ("DIM", dim as f64),
            ("HALF", (layout == RopeLayout::Half).into()),
        ],
        bindings: &[
            batch.slot_mapping.reads(),
            x.reads(),
            weight.reads(),
            bias.reads(),
            cos_sin.reads(),
            cache.writes(),
        ],
        params: &[tokens as u32, slots as u32, (eps as f32).to_bits()],
        groups: wgpu.fold(tokens),
        shape: format!("{tokens} tokens of {width}, {dim} rotary, {slots} slots"),
    })
}
