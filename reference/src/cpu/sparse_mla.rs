//! `sparse_mla`.

use super::{Cpu, CpuBatch, CpuTensor, Real};
use crate::error::{Error, Result};

pub(super) fn sparse_mla<F: Real>(
    cpu: &Cpu<F>,
    batch: &CpuBatch,
    q: &CpuTensor<F>,
    cache: &CpuTensor<F>,
    topk_indices: &CpuTensor<F>,
    scale: f64,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, batch, q, cache, topk_indices, scale, out);
    Err(Error::Backend { backend: "cpu", message: "sparse_mla has not landed".into() })
}
