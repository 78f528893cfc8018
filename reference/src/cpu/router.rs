//! `router`.

use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::kernels::RouterParams;

pub(super) fn router<F: Real>(
    cpu: &Cpu<F>,
    logits: &CpuTensor<F>,
    bias: &CpuTensor<F>,
    params: RouterParams,
    topk_ids: &mut CpuTensor<F>,
    topk_weights: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, logits, bias, params, topk_ids, topk_weights);
    Err(Error::Backend { backend: "cpu", message: "router has not landed".into() })
}
