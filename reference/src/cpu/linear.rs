//! `linear`.

use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};

pub(super) fn linear<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, x, weight, out);
    Err(Error::Backend { backend: "cpu", message: "linear has not landed".into() })
}
