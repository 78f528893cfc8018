//! `embed`.

use super::{Cpu, CpuBatch, CpuTensor, Real};
use crate::error::{Error, Result};

pub(super) fn embed<F: Real>(
    cpu: &Cpu<F>,
    batch: &CpuBatch,
    table: &CpuTensor<F>,
    vocab_start: usize,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, batch, table, vocab_start, out);
    Err(Error::Backend { backend: "cpu", message: "embed has not landed".into() })
}
