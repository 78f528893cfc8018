//! `moe`.

use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::tensor::HostExpert;

pub(super) fn moe<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    topk_ids: &CpuTensor<F>,
    topk_weights: &CpuTensor<F>,
    experts: &CpuExperts,
    shared: Option<&CpuTensor<F>>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let _ = (cpu, x, topk_ids, topk_weights, experts, shared, out);
    Err(Error::Backend { backend: "cpu", message: "moe has not landed".into() })
}

/// Replaced shortly.
#[derive(Debug)]
pub struct CpuExperts {}
impl CpuExperts {
    pub(super) fn from_host(w: Vec<HostExpert>) -> Result<Self> {
        drop(w);
        Err(Error::Backend { backend: "cpu", message: "moe has not landed".into() })
    }
    pub(super) fn from_host_int4(w: Vec<HostExpert>) -> Result<Self> {
        drop(w);
        Err(Error::Backend { backend: "cpu", message: "moe has not landed".into() })
    }
}
