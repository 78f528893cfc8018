//! `latent_rope`.

use super::launch::Launch;
use super::rope::rotary_dim;
use super::shader::{Shader, shader};
use super::slots::slots;
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuBatch, no_form};
use crate::error::Result;
use crate::fp8::MlaRow;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("latent_rope");

const KERNEL: &str = "latent_rope";

pub(super) fn latent_rope(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    x: &WgpuTensor,
    weight: &WgpuTensor,
    eps: f64,
    cos_sin: &WgpuTensor,
    cache: &mut WgpuTensor,
) -> Result<()> {
    let tokens = batch.host().num_tokens();
    let [rank] = weight.dims(KERNEL, "weight")?;
    weight.expect_weight(KERNEL, "weight")?;
    let rope = rotary_dim(KERNEL, cos_sin, tokens)?;
    x.expect(KERNEL, "x", x.shape() == [tokens, rank + rope], || format!("[{tokens}, {rank} + {rope}]"))?;
    x.expect_act(KERNEL, "x")?;
    x.expect_even(KERNEL, "x")?;
    let row_bytes = MlaRow { kv_lora_rank: rank, rope }.row_bytes();
    let slots = slots(KERNEL, cache, batch.host().page_size, rank + rope, row_bytes)?;
    if cache.dtype() == DType::Fp8 {
        return Err(no_form("latent_rope into an 8-bit cache"));
    }
    if tokens == 0 || slots == 0 {
        return Ok(());
    }
    wgpu.launch(&Launch {
        kernel: KERNEL,
        shader: &SHADER,
        entry: "main",
        constants: &[
            ("WORKGROUP", wgpu.workgroup(((rank + rope) / 2).min(256)).into()),
            ("WEIGHT", weight.weight_type()),
        ],
        bindings: &[batch.slot_mapping.reads(), x.reads(), weight.reads(), cos_sin.reads(), cache.writes()],
        params: &[tokens as u32, rank as u32, rope as u32, slots as u32, (eps as f32).to_bits()],
        groups: wgpu.fold(tokens),
        shape: format!("{tokens} tokens, {rank} + {rope} columns, {slots} slots"),
    })
}
