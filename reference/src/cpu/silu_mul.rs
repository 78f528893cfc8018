//! `silu_mul`.

use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};

pub(super) fn silu_mul<F: Real>(
    cpu: &Cpu<F>,
    gate: &CpuTensor<F>,
    up: &CpuTensor<F>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, gate, up, out);
    Err(Error::Backend { backend: "cpu", message: "silu_mul has not landed".into() })
}
