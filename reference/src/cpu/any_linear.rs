//! A projection in the format that its checkpoint module has, as `moe` and `swiglu` share it.

use super::Real;
use super::linear_int4::CpuInt4;
use super::matmul::{Dense, matmul};
use crate::error::Result;
use crate::tensor::{HostData, HostLinear, HostTensor};

#[derive(Debug, Clone, PartialEq)]
pub(super) enum AnyLinear {
    Dense(HostTensor),
    Int4(CpuInt4),
}

impl AnyLinear {
    pub(super) fn from_host(weight: HostLinear) -> Result<Self> {
        match weight {
            HostLinear::Int4(weight) => Ok(AnyLinear::Int4(CpuInt4::from_host(&weight)?)),
            HostLinear::Dense(weight) => Ok(AnyLinear::Dense(weight)),
            HostLinear::Random(weight) => Self::from_host(weight.make()),
        }
    }

    /// `(out_features, in_features)`.
    pub(super) fn dims(&self) -> (usize, usize) {
        match self {
            AnyLinear::Int4(weight) => weight.dims(),
            AnyLinear::Dense(HostTensor { shape, .. }) => (shape[0], shape[1]),
        }
    }

    /// `out = x weight^T`, unrounded; `x` has as many rows as `out`.
    pub(super) fn apply<F: Real>(&self, x: &[F], out: &mut [F]) {
        fn dense<'a, E>(elements: &'a [E], shape: &[usize]) -> Dense<'a, E> {
            Dense { elements, out_features: shape[0], in_features: shape[1] }
        }
        match self {
            AnyLinear::Int4(weight) => matmul(x, weight, out, |value| value),
            AnyLinear::Dense(HostTensor { shape, data }) => match data {
                HostData::Bf16(w) => matmul(x, &dense(w, shape), out, |value| value),
                HostData::F16(w) => matmul(x, &dense(w, shape), out, |value| value),
                HostData::F32(w) => matmul(x, &dense(w, shape), out, |value| value),
            },
        }
    }
}
