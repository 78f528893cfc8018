//! `rope`.

use super::{Cpu, CpuBatch, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::kernels::RopeLayout;

pub(super) fn rope_table<F: Real>(
    cpu: &Cpu<F>,
    batch: &CpuBatch,
    theta: f64,
    cos_sin: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, batch, theta, cos_sin);
    Err(Error::Backend { backend: "cpu", message: "rope_table has not landed".into() })
}

pub(super) fn rope<F: Real>(
    cpu: &Cpu<F>,
    x: &mut CpuTensor<F>,
    offset: usize,
    layout: RopeLayout,
    cos_sin: &CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, x, offset, layout, cos_sin);
    Err(Error::Backend { backend: "cpu", message: "rope has not landed".into() })
}
