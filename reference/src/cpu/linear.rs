//! `linear`: `out = x weight^T` with a dense weight.
//!
//! `x` `[T, in]` `Act`, `weight` `[out, in]` bf16, f16 or f32, `out` `[T, out]` `Act` (rounded once) or
//! `Float` (not rounded). With `T = 0` nothing is written.

use std::ops::Range;

use super::checks::Check;
use super::matmul::{Dense, matmul};
use super::tensor::Storage;
use super::{Cpu, CpuTensor, Real};
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

pub(super) fn linear<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let [_, in_features] = weight.dims("linear", "weight")?;
    let [rows, _] = x.dims("linear", "x")?;
    x.expect_shape("linear", "x", &[rows, in_features])?;
    let x = Check("linear").act("x", x)?;
    product(cpu, "linear", x, rows, weight, "out", out)
}

/// `out = x weight^T` for the rows of `x`, `[rows, in]`; checks `weight` and `out`, which the contract calls
/// `name`.
pub(super) fn product<F: Real>(
    cpu: &Cpu<F>,
    kernel: &'static str,
    x: &[F],
    rows: usize,
    weight: &CpuTensor<F>,
    name: &'static str,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let [out_features, _] = weight.dims(kernel, "weight")?;
    rows_product(cpu, kernel, x, rows, weight, 0..out_features, name, out)
}

/// [`product`] with the rows `of_weight` of `weight` alone.
pub(super) fn rows_product<F: Real>(
    cpu: &Cpu<F>,
    kernel: &'static str,
    x: &[F],
    rows: usize,
    weight: &CpuTensor<F>,
    of_weight: Range<usize>,
    name: &'static str,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let [_, in_features] = weight.dims(kernel, "weight")?;
    let out_features = of_weight.len();
    out.expect_shape(kernel, name, &[rows, out_features])?;
    let rounds = out.dtype() == DType::Act;
    let finish = |value| if rounds { cpu.act(value) } else { value };
    let elements = of_weight.start * in_features..of_weight.end * in_features;
    let out = out.reals_mut(kernel, name)?;
    if out.is_empty() {
        return Ok(());
    }
    match &weight.storage {
        Storage::Bf16(w) => {
            matmul(x, &Dense { elements: &w[elements], out_features, in_features }, out, finish)
        }
        Storage::F16(w) => {
            matmul(x, &Dense { elements: &w[elements], out_features, in_features }, out, finish)
        }
        Storage::F32(w) => {
            matmul(x, &Dense { elements: &w[elements], out_features, in_features }, out, finish)
        }
        _ => return Err(weight.wrong_dtype(kernel, "weight", "a weight (bf16, f16 or f32)")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::cpu::testing::{on_one_and_four_threads, randoms, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::{DType, HostData, HostTensor};

    #[test]
    fn matches_values_worked_by_hand_in_every_weight_type() {
        let cpu = Cpu::<f64>::new();
        let x = tensor(DType::Act, &[2, 3], &[1.0, 2.0, 3.0, -1.0, 0.5, 0.0]);
        let w = [1.0, 10.0, 100.0, 0.25, 0.0, -1.0_f32];
        for data in [
            HostData::Bf16(w.map(bf16::from_f32).to_vec().into()),
            HostData::F16(w.map(f16::from_f32).to_vec().into()),
            HostData::F32(w.to_vec().into()),
        ] {
            let weight = cpu.upload(HostTensor { shape: vec![2, 3], data }).unwrap();
            let mut out = tensor(DType::Act, &[2, 2], &[f64::NAN; 4]);
            linear(&cpu, &x, &weight, &mut out).unwrap();
            assert_eq!(read(&out), [321.0, -2.75, 4.0, -0.25]);
        }
    }

    /// Sums in f64, in another order than the kernel's.
    #[test]
    fn matches_plain_sums_at_any_shape() {
        let cpu = Cpu::<f64>::new();
        for (rows, out_features, inner) in
            [(1, 1, 1), (1, 7, 8), (2, 5, 17), (5, 33, 40), (9, 18, 3), (4, 16, 64)]
        {
            let (x, w) = (randoms(1, rows * inner), randoms(2, out_features * inner));
            let w: Vec<f32> = w.iter().map(|&x| x as f32).collect();
            let mut out = tensor(DType::Float, &[rows, out_features], &vec![f64::NAN; rows * out_features]);
            let weight = cpu.upload(HostTensor::f32([out_features, inner], w.clone())).unwrap();
            linear(&cpu, &tensor(DType::Act, &[rows, inner], &x), &weight, &mut out).unwrap();
            for (i, found) in read(&out).into_iter().enumerate() {
                let (t, o) = (i / out_features, i % out_features);
                let expected: f64 =
                    (0..inner).rev().map(|i| x[t * inner + i] * f64::from(w[o * inner + i])).sum();
                assert!(
                    (found - expected).abs() < 1e-14 * inner as f64,
                    "{rows} {out_features} {inner}: {i}"
                );
            }
        }
    }

    #[test]
    fn a_row_alone_has_the_bits_that_it_has_in_any_batch_on_any_number_of_threads() {
        let cpu = Cpu::<f32>::new();
        // Large enough to be shared out, and no multiple of any block.
        let (rows, out_features, inner) = (7, 203, 519);
        let x = randoms(1, rows * inner);
        let w = randoms(2, out_features * inner).iter().map(|&x| bf16::from_f64(x)).collect();
        let weight = cpu.upload(HostTensor::bf16([out_features, inner], w)).unwrap();
        let run = |x: &[f64]| {
            let rows = x.len() / inner;
            let mut out = tensor(DType::Act, &[rows, out_features], &vec![f64::NAN; rows * out_features]);
            linear(&cpu, &tensor(DType::Act, &[rows, inner], x), &weight, &mut out).unwrap();
            read(&out)
        };
        let [together, on_four] = on_one_and_four_threads(|| run(&x));
        assert_eq!(together, on_four);
        for t in 0..rows {
            assert_eq!(
                run(&x[t * inner..][..inner]),
                together[t * out_features..][..out_features],
                "row {t}"
            );
        }
        assert_eq!(run(&x[2 * inner..]), together[2 * out_features..]);
    }

    #[test]
    fn activations_are_rounded_and_floats_are_not() {
        let cpu = Cpu::<f32>::rounding_to_bf16();
        let weight = cpu.upload(HostTensor::f32([1, 1], vec![1.0 + 1.0 / 1024.0])).unwrap();
        let x = tensor(DType::Act, &[1, 1], &[1.0]);
        let (mut rounded, mut kept) =
            (tensor(DType::Act, &[1, 1], &[0.0]), tensor(DType::Float, &[1, 1], &[0.0]));
        linear(&cpu, &x, &weight, &mut rounded).unwrap();
        linear(&cpu, &x, &weight, &mut kept).unwrap();
        assert_eq!((read(&rounded), read(&kept)), (vec![1.0], vec![1.0 + 1.0 / 1024.0]));
    }

    #[test]
    fn an_empty_step_is_fine_and_arguments_are_checked() {
        let cpu = Cpu::<f32>::new();
        let weight = cpu.upload(HostTensor::f32([2, 3], vec![0.0; 6])).unwrap();
        linear(&cpu, &tensor(DType::Act, &[0, 3], &[]), &weight, &mut tensor(DType::Act, &[0, 2], &[]))
            .unwrap();
        let x = tensor(DType::Act, &[1, 3], &[0.0; 3]);
        let refused = |x: &CpuTensor<f32>, weight: &CpuTensor<f32>, columns: usize| {
            let mut out = tensor(DType::Act, &[1, columns], &vec![0.0; columns]);
            linear(&cpu, x, weight, &mut out).unwrap_err().to_string()
        };
        assert_eq!(refused(&x, &weight, 3), "linear: `out` has shape [1, 3], expected [1, 2]");
        assert_eq!(
            refused(&tensor(DType::Act, &[1, 2], &[0.0; 2]), &weight, 2),
            "linear: `x` has shape [1, 2], expected [1, 3]"
        );
        assert_eq!(
            refused(&tensor(DType::Float, &[1, 3], &[0.0; 3]), &weight, 2),
            "linear: `x` holds floats, expected activations"
        );
        assert_eq!(
            refused(&x, &tensor(DType::Act, &[2, 3], &[0.0; 6]), 2),
            "linear: `weight` holds activations, expected a weight (bf16, f16 or f32)"
        );
    }
}
