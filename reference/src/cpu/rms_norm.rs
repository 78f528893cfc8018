//! `rms_norm`: `out = weight * x / sqrt(mean(x^2) + eps)`, with and without the residual add before it.
//!
//! `x` `[T, D]` `Act` (alone, `Float` as well), `residual` `Float`, `out` `Act`; `weight` `[D]` bf16, f16 or f32.
//! The norm rounds once, at the end; the residual is not rounded.

use super::checks::Check;
use super::parallel::for_rows;
use super::vector::sum;
use super::{Cpu, CpuTensor, Real};
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

pub(super) fn rms_norm<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    eps: f64,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("rms_norm");
    let [_, columns] = x.dims("rms_norm", "x")?;
    out.expect_shape("rms_norm", "out", x.shape())?;
    weight.expect_shape("rms_norm", "weight", &[columns])?;
    let weight = weight.weights("rms_norm", "weight")?;
    let x = if x.dtype() == DType::Float { check.float("x", x)? } else { check.act("x", x)? };
    normalise(cpu, x, &weight, eps, check.act_mut("out", out)?);
    Ok(())
}

pub(super) fn rms_norm_residual<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    residual: &mut CpuTensor<F>,
    weight: &CpuTensor<F>,
    eps: f64,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("rms_norm_residual");
    let [_, columns] = x.dims("rms_norm_residual", "x")?;
    residual.expect_shape("rms_norm_residual", "residual", x.shape())?;
    out.expect_shape("rms_norm_residual", "out", x.shape())?;
    weight.expect_shape("rms_norm_residual", "weight", &[columns])?;
    let weight = weight.weights("rms_norm_residual", "weight")?;
    let x = check.act("x", x)?;
    // The residual is in place: everything is checked before it is touched.
    let out = check.act_mut("out", out)?;
    let residual = check.float_mut("residual", residual)?;
    for_rows(residual, columns, x.len(), |t, residual| {
        for (residual, &x) in residual.iter_mut().zip(&x[t * columns..]) {
            *residual += x;
        }
    });
    normalise(cpu, residual, &weight, eps, out);
    Ok(())
}

/// The norm of every row of `x`, `[T, weight.len()]`.
fn normalise<F: Real>(cpu: &Cpu<F>, x: &[F], weight: &[F], eps: f64, out: &mut [F]) {
    let columns = weight.len();
    let (eps, count) = (F::of(eps), F::of(columns as f64));
    for_rows(out, columns, 2 * x.len(), |t, out| {
        let x = &x[t * columns..][..columns];
        let scale = F::one() / (sum(x, |x| x * x) / count + eps).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = cpu.act(weight * (x * scale));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{randoms, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::HostTensor;

    #[test]
    fn matches_a_row_worked_by_hand() {
        let cpu = Cpu::<f64>::new();
        // mean(x^2) = (1 + 49) / 2 = 25 and eps = 11 make sqrt(36).
        let x = tensor(DType::Act, &[2, 2], &[1.0, 7.0, 0.0, 0.0]);
        let weight = cpu.upload(HostTensor::f32([2], vec![12.0, 3.0])).unwrap();
        let mut out = tensor(DType::Act, &[2, 2], &[f64::NAN; 4]);
        rms_norm(&cpu, &x, &weight, 11.0, &mut out).unwrap();
        for (found, expected) in read(&out).into_iter().zip([2.0, 3.5, 0.0, 0.0]) {
            assert!((found - expected).abs() < 1e-15, "{found} {expected}");
        }
    }

    #[test]
    fn the_residual_is_not_rounded_and_the_norm_is() {
        let cpu = Cpu::<f64>::rounding_to_bf16();
        // Neither 257 nor 257 / 256.5 is a bf16.
        let x = tensor(DType::Act, &[1, 2], &[1.0, 0.0]);
        let mut residual = tensor(DType::Float, &[1, 2], &[256.0, 256.0]);
        let weight = cpu.upload(HostTensor::f32([2], vec![1.0, 1.0])).unwrap();
        let mut out = tensor(DType::Act, &[1, 2], &[f64::NAN; 2]);
        rms_norm_residual(&cpu, &x, &mut residual, &weight, 0.0, &mut out).unwrap();
        assert_eq!(read(&residual), [257.0, 256.0]);
        assert_eq!(read(&out), [1.0, 1.0]);
        rms_norm(&cpu, &residual, &weight, 0.0, &mut out).unwrap();
        assert_eq!(read(&out), [1.0, 1.0]);
    }

    #[test]
    fn the_residual_form_is_the_sum_and_then_the_norm() {
        let cpu = Cpu::<f32>::new();
        let (a, b) = (randoms(1, 3 * 50), randoms(2, 3 * 50));
        let weight =
            cpu.upload(HostTensor::f32([50], randoms(3, 50).iter().map(|&x| x as f32).collect())).unwrap();
        let x = tensor(DType::Act, &[3, 50], &a);
        let mut residual = tensor(DType::Float, &[3, 50], &b);
        let mut fused = tensor(DType::Act, &[3, 50], &[f64::NAN; 150]);
        rms_norm_residual(&cpu, &x, &mut residual, &weight, 1e-5, &mut fused).unwrap();
        let sums: Vec<f64> = a.iter().zip(&b).map(|(&a, &b)| f64::from(b as f32 + a as f32)).collect();
        assert_eq!(read(&residual), sums);
        let mut apart = tensor(DType::Act, &[3, 50], &[f64::NAN; 150]);
        rms_norm(&cpu, &tensor(DType::Act, &[3, 50], &sums), &weight, 1e-5, &mut apart).unwrap();
        assert_eq!(read(&fused), read(&apart));
    }

    #[test]
    fn a_refused_call_leaves_the_residual_alone() {
        let cpu = Cpu::<f32>::new();
        let x = tensor(DType::Act, &[1, 2], &[1.0, 1.0]);
        let mut residual = tensor(DType::Float, &[1, 2], &[5.0, 5.0]);
        let weight = cpu.upload(HostTensor::f32([3], vec![1.0; 3])).unwrap();
        let mut out = tensor(DType::Act, &[1, 2], &[0.0; 2]);
        let error = rms_norm_residual(&cpu, &x, &mut residual, &weight, 1e-5, &mut out).unwrap_err();
        assert_eq!(error.to_string(), "rms_norm_residual: `weight` has shape [3], expected [2]");
        assert_eq!(read(&residual), [5.0, 5.0]);
    }

    #[test]
    fn an_empty_step_is_fine() {
        let cpu = Cpu::<f32>::new();
        let weight = cpu.upload(HostTensor::f32([2], vec![1.0; 2])).unwrap();
        let (x, mut out) = (tensor(DType::Act, &[0, 2], &[]), tensor(DType::Act, &[0, 2], &[]));
        rms_norm(&cpu, &x, &weight, 1e-5, &mut out).unwrap();
    }
}
