//! `moe_int4`: routed experts, all of them INT4. On the CPU the same computation as [`moe`](super::moe),
//! which states it: what differs is that the upload has refused anything else.

use super::moe::routed;
use super::{Cpu, CpuExperts, CpuTensor, Real};
use crate::error::Result;

pub(super) fn moe_int4<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    topk_ids: &CpuTensor<F>,
    topk_weights: &CpuTensor<F>,
    experts: &CpuExperts,
    shared: Option<&CpuTensor<F>>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    routed(cpu, "moe_int4", x, topk_ids, topk_weights, experts, shared, out)
}
