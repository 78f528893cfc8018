//! `latent_rope`.

use super::{Cpu, CpuBatch, CpuTensor, Real};
use crate::error::{Error, Result};

pub(super) fn latent_rope<F: Real>(
    cpu: &Cpu<F>,
    batch: &CpuBatch,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    eps: f64,
    cos_sin: &CpuTensor<F>,
    cache: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, batch, x, weight, eps, cos_sin, cache);
    Err(Error::Backend { backend: "cpu", message: "latent_rope has not landed".into() })
}
