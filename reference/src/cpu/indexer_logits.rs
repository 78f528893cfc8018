//! `indexer_logits`.

use super::{Cpu, CpuBatch, CpuTensor, Real};
use crate::error::{Error, Result};
use std::ops::Range;

pub(super) fn indexer_logits<F: Real>(
    cpu: &Cpu<F>,
    batch: &CpuBatch,
    rows: Range<usize>,
    q: &CpuTensor<F>,
    weights: &CpuTensor<F>,
    cache: &CpuTensor<F>,
    scale: f64,
    logits: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, batch, rows, q, weights, cache, scale, logits);
    Err(Error::Backend { backend: "cpu", message: "indexer_logits has not landed".into() })
}
