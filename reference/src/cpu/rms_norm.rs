//! `rms_norm`.

use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};

pub(super) fn rms_norm<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    eps: f64,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, x, weight, eps, out);
    Err(Error::Backend { backend: "cpu", message: "rms_norm has not landed".into() })
}

pub(super) fn rms_norm_residual<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    residual: &mut CpuTensor<F>,
    weight: &CpuTensor<F>,
    eps: f64,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, x, residual, weight, eps, out);
    Err(Error::Backend { backend: "cpu", message: "rms_norm_residual has not landed".into() })
}
