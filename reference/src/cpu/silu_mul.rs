//! `silu_mul`: SwiGLU, `out = silu(gate) * up` with `silu(x) = x / (1 + exp(-x))`.
//!
//! `gate`, `up`, `out` `[T, I]` `Act`; rounds once. Where `exp(-x)` overflows, `silu` is -0 as its limit is.

use super::checks::Check;
use super::parallel::for_rows;
use super::{Cpu, CpuTensor, Real};
use crate::error::Result;
use crate::tensor::DeviceTensor;

/// What an exponential costs, in multiply-adds.
pub(super) const EXP_OPS: usize = 16;

pub(super) fn silu_mul<F: Real>(
    cpu: &Cpu<F>,
    gate: &CpuTensor<F>,
    up: &CpuTensor<F>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("silu_mul");
    let [_, columns] = gate.dims("silu_mul", "gate")?;
    up.expect_shape("silu_mul", "up", gate.shape())?;
    out.expect_shape("silu_mul", "out", gate.shape())?;
    let (gate, up) = (check.act("gate", gate)?, check.act("up", up)?);
    let out = check.act_mut("out", out)?;
    for_rows(out, columns, EXP_OPS * gate.len(), |t, out| {
        let row = t * columns..t * columns + out.len();
        swiglu(cpu, &gate[row.clone()], &up[row], out);
    });
    Ok(())
}

/// `out = act(silu(gate) * up)`, element by element.
pub(super) fn swiglu<F: Real>(cpu: &Cpu<F>, gate: &[F], up: &[F], out: &mut [F]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = cpu.act(gate / (F::one() + (-gate).exp()) * up);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{read, tensor};
    use crate::tensor::DType;

    #[test]
    fn matches_values_worked_by_hand() {
        let cpu = Cpu::<f64>::new();
        // silu(ln 3) = ln 3 / (1 + 1/3).
        let gate = tensor(DType::Act, &[1, 4], &[0.0, 3.0_f64.ln(), -1000.0, 1000.0]);
        let up = tensor(DType::Act, &[1, 4], &[5.0, 2.0, 7.0, 0.5]);
        let mut out = tensor(DType::Act, &[1, 4], &[f64::NAN; 4]);
        silu_mul(&cpu, &gate, &up, &mut out).unwrap();
        let found = read(&out);
        assert_eq!((found[0], found[2], found[3]), (0.0, 0.0, 500.0));
        assert!((found[1] - 1.5 * 3.0_f64.ln()).abs() < 1e-15, "{found:?}");
    }

    #[test]
    fn rounds_once() {
        let cpu = Cpu::<f64>::rounding_to_bf16();
        let gate = tensor(DType::Act, &[1, 1], &[1000.0]);
        let up = tensor(DType::Act, &[1, 1], &[1.0 + 1.0 / 128.0]);
        let mut out = tensor(DType::Act, &[1, 1], &[f64::NAN]);
        silu_mul(&cpu, &gate, &up, &mut out).unwrap();
        // 1007.8125 between the bf16 neighbours 1004 and 1008.
        assert_eq!(read(&out), [1008.0]);
    }

    #[test]
    fn an_empty_step_is_fine_and_shapes_are_checked() {
        let cpu = Cpu::<f32>::new();
        let empty = tensor(DType::Act, &[0, 4], &[]);
        silu_mul(&cpu, &empty, &empty, &mut tensor(DType::Act, &[0, 4], &[])).unwrap();
        let error = silu_mul(
            &cpu,
            &empty,
            &tensor(DType::Act, &[1, 4], &[0.0; 4]),
            &mut tensor(DType::Act, &[0, 4], &[]),
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "silu_mul: `up` has shape [1, 4], expected [0, 4]");
    }
}
