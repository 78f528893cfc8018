//! `layer_norm_rope`.

use super::{Cpu, CpuBatch, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::kernels::RopeLayout;

pub(super) fn layer_norm_rope<F: Real>(
    cpu: &Cpu<F>,
    batch: &CpuBatch,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    bias: &CpuTensor<F>,
    eps: f64,
    layout: RopeLayout,
    cos_sin: &CpuTensor<F>,
    cache: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, batch, x, weight, bias, eps, layout, cos_sin, cache);
    Err(Error::Backend { backend: "cpu", message: "layer_norm_rope has not landed".into() })
}
