//! `qkv_norm_rope`: the kernels that it is made of, one after the other.

use super::latent_rope::latent_rope;
use super::layer_norm_rope::layer_norm_rope;
use super::rms_norm::rms_norm;
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuBatch};
use crate::error::Result;
use crate::kernels::IndexKeys;

pub(super) fn qkv_norm_rope(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    q_a: &WgpuTensor,
    q_weight: &WgpuTensor,
    q_latent: &mut WgpuTensor,
    kv_a: &WgpuTensor,
    kv_weight: &WgpuTensor,
    cache: &mut WgpuTensor,
    eps: f64,
    cos_sin: &WgpuTensor,
    keys: Option<IndexKeys<'_, WgpuTensor>>,
) -> Result<()> {
    rms_norm(wgpu, q_a, q_weight, eps, q_latent)?;
    latent_rope(wgpu, batch, kv_a, kv_weight, eps, cos_sin, cache)?;
    let Some(IndexKeys { x, weight, bias, eps, layout, cache }) = keys else { return Ok(()) };
    layer_norm_rope(wgpu, batch, x, weight, bias, eps, layout, cos_sin, cache)
}
