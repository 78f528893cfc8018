//! `swiglu`: `out = silu(x gate_proj^T) * (x up_proj^T)`.
//!
//! `x` `[T, in]`, `out` `[T, I]` `Act`. Rounds once, at the end: what the projections give is not rounded.

use super::any_linear::AnyLinear;
use super::checks::Check;
use super::silu_mul::swiglu as activate;
use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::tensor::HostLinear;

/// The projections of a SwiGLU, each in its own format.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuSwiGlu {
    gate_proj: AnyLinear,
    up_proj: AnyLinear,
}

impl CpuSwiGlu {
    pub(super) fn from_host(gate_proj: HostLinear, up_proj: HostLinear) -> Result<Self> {
        for (tensor, weight) in [("gate_proj", &gate_proj), ("up_proj", &up_proj)] {
            weight.check("upload_swiglu", tensor)?;
        }
        if gate_proj.dims() != up_proj.dims() {
            let ((out, inner), (found_out, found_inner)) = (gate_proj.dims(), up_proj.dims());
            return Err(Error::Shape {
                kernel: "upload_swiglu",
                tensor: "up_proj",
                expected: format!("{:?}", [out, inner]),
                found: vec![found_out, found_inner],
            });
        }
        Ok(Self { gate_proj: AnyLinear::from_host(gate_proj)?, up_proj: AnyLinear::from_host(up_proj)? })
    }
}

pub(super) fn swiglu<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    weights: &CpuSwiGlu,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("swiglu");
    let (intermediate, in_features) = weights.gate_proj.dims();
    let [rows, _] = x.dims(check.0, "x")?;
    x.expect_shape(check.0, "x", &[rows, in_features])?;
    out.expect_shape(check.0, "out", &[rows, intermediate])?;
    let x = check.act("x", x)?;
    let out = check.act_mut("out", out)?;
    let mut gate = vec![F::zero(); rows * intermediate];
    let mut up = gate.clone();
    weights.gate_proj.apply(x, &mut gate);
    weights.up_proj.apply(x, &mut up);
    activate(cpu, &gate, &up, out);
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::testing::{int4, randoms, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::{DType, HostTensor};

    fn projection(seed: u64, quantised: bool) -> HostLinear {
        let weight = int4(12, 20, 8, true, seed);
        if quantised { HostLinear::Int4(weight) } else { HostLinear::Dense(weight.dequantise()) }
    }

    #[test]
    fn matches_its_parts_without_their_roundings() {
        let (exact, rounding) = (Cpu::<f64>::new(), Cpu::<f64>::rounding_to_bf16());
        let x = tensor(DType::Act, &[3, 20], &randoms(1, 60));
        for formats in [(true, true), (false, false), (true, false)] {
            let (gate_proj, up_proj) = (projection(1, formats.0), projection(2, formats.1));
            let dense = |weight: &HostLinear| exact.upload(weight.clone().dense()).unwrap();
            let empty = || tensor(DType::Act, &[3, 12], &[f64::NAN; 36]);
            let (mut gate, mut up, mut expected) = (empty(), empty(), empty());
            exact.linear(&x, &dense(&gate_proj), &mut gate).unwrap();
            exact.linear(&x, &dense(&up_proj), &mut up).unwrap();
            rounding.silu_mul(&gate, &up, &mut expected).unwrap();
            let weights = rounding.upload_swiglu(gate_proj, up_proj).unwrap();
            let mut found = empty();
            rounding.swiglu(&x, &weights, &mut found).unwrap();
            assert_eq!(read(&found), read(&expected), "{formats:?}");
        }
    }

    #[test]
    fn misfits_are_named() {
        let cpu = Cpu::<f32>::new();
        let other = HostLinear::Dense(HostTensor::bf16([12, 19], vec![bf16::ONE; 228]));
        let error = cpu.upload_swiglu(projection(1, true), other).unwrap_err();
        assert_eq!(error.to_string(), "upload_swiglu: `up_proj` has shape [12, 19], expected [12, 20]");
        let flat = HostLinear::Dense(HostTensor::f32([3], vec![0.0; 3]));
        let error = cpu.upload_swiglu(flat, projection(1, true)).unwrap_err().to_string();
        assert_eq!(
            error,
            "upload_swiglu: `gate_proj` has shape [3], expected the two dimensions of 3 elements"
        );
        let weights = cpu.upload_swiglu(projection(1, true), projection(2, false)).unwrap();
        let mut out = tensor(DType::Act, &[2, 11], &[0.0; 22]);
        let x = tensor(DType::Act, &[2, 20], &[0.0; 40]);
        let error = cpu.swiglu(&x, &weights, &mut out).unwrap_err();
        assert_eq!(error.to_string(), "swiglu: `out` has shape [2, 11], expected [2, 12]");
    }
}
