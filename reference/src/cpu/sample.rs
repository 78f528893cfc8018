//! `sample`.

use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::kernels::SampleOutput;
use crate::sampling::SampleRow;

pub(super) fn sample<F: Real>(
    cpu: &Cpu<F>,
    logits: &CpuTensor<F>,
    rows: &[SampleRow<'_>],
    out: &mut SampleOutput<CpuTensor<F>>,
) -> Result<()> {
    let _ = (cpu, logits, rows, out);
    Err(Error::Backend { backend: "cpu", message: "sample has not landed".into() })
}
