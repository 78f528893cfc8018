//! `moe_int4`.

use super::{Cpu, CpuExperts, CpuTensor, Real};
use crate::error::{Error, Result};

pub(super) fn moe_int4<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    topk_ids: &CpuTensor<F>,
    topk_weights: &CpuTensor<F>,
    experts: &CpuExperts,
    shared: Option<&CpuTensor<F>>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, x, topk_ids, topk_weights, experts, shared, out);
    Err(Error::Backend { backend: "cpu", message: "moe_int4 has not landed".into() })
}
