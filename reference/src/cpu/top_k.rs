//! `top_k`.

use super::{Cpu, CpuBatch, CpuTensor, Real};
use crate::error::{Error, Result};
use std::ops::Range;

pub(super) fn top_k<F: Real>(
    cpu: &Cpu<F>,
    batch: &CpuBatch,
    rows: Range<usize>,
    logits: &CpuTensor<F>,
    topk_indices: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, batch, rows, logits, topk_indices);
    Err(Error::Backend { backend: "cpu", message: "top_k has not landed".into() })
}
