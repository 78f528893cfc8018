//! `absorb`.

use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};

pub(super) fn absorb_query<F: Real>(
    cpu: &Cpu<F>,
    q: &CpuTensor<F>,
    kv_b: &CpuTensor<F>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, q, kv_b, out);
    Err(Error::Backend { backend: "cpu", message: "absorb_query has not landed".into() })
}

pub(super) fn absorb_output<F: Real>(
    cpu: &Cpu<F>,
    o: &CpuTensor<F>,
    kv_b: &CpuTensor<F>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, o, kv_b, out);
    Err(Error::Backend { backend: "cpu", message: "absorb_output has not landed".into() })
}
