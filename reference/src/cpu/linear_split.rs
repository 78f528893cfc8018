//! `linear_split`: two projections of the same `x` whose weights lie one below the other,
//! `first = x weight[..A]^T`, `second = x weight[A..]^T`.
//!
//! `x` `[T, in]` `Act`, `weight` `[A + B, in]` dense; `first` `[T, A]`, `second` `[T, B]`, both `Act` (rounded
//! once) or both `Float` (not rounded).

use super::checks::Check;
use super::linear::product;
use super::{Cpu, CpuTensor, Real};
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

pub(super) fn linear_split<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    first: &mut CpuTensor<F>,
    second: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("linear_split");
    let [rows, in_features] = x.dims(check.0, "x")?;
    let ([_, a], [_, b]) = (first.dims(check.0, "first")?, second.dims(check.0, "second")?);
    weight.expect_shape(check.0, "weight", &[a + b, in_features])?;
    first.expect_shape(check.0, "first", &[rows, a])?;
    second.expect_shape(check.0, "second", &[rows, b])?;
    if first.dtype() == DType::Act {
        check.act("second", second)?
    } else {
        check.float("second", second)?
    };
    let x = check.act("x", x)?;
    let mut both = CpuTensor::alloc(first.dtype(), &[rows, a + b])?;
    product(cpu, check.0, x, rows, weight, "first", &mut both)?;
    let both = both.reals(check.0, "first")?;
    for (out, name, start, width) in [(first, "first", 0, a), (second, "second", a, b)] {
        let out = out.reals_mut(check.0, name)?;
        for (out, row) in out.chunks_exact_mut(width.max(1)).zip(both.chunks_exact((a + b).max(1))) {
            out.copy_from_slice(&row[start..start + width]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{randoms, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::HostTensor;

    #[test]
    fn the_rows_of_the_weight_are_shared_out() {
        let cpu = Cpu::<f64>::rounding_to_bf16();
        let w: Vec<f32> = randoms(1, 5 * 4).iter().map(|&w| w as f32).collect();
        let upload = |rows: std::ops::Range<usize>| {
            let data = w[4 * rows.start..4 * rows.end].to_vec();
            cpu.upload(HostTensor::f32([rows.len(), 4], data)).unwrap()
        };
        let x = tensor(DType::Act, &[3, 4], &randoms(2, 12));
        for dtype in [DType::Act, DType::Float] {
            let empty = |columns: usize| tensor(dtype, &[3, columns], &vec![f64::NAN; 3 * columns]);
            let (mut first, mut second) = (empty(2), empty(3));
            cpu.linear_split(&x, &upload(0..5), &mut first, &mut second).unwrap();
            for (found, rows) in [(first, 0..2), (second, 2..5)] {
                let mut expected = empty(rows.len());
                cpu.linear(&x, &upload(rows), &mut expected).unwrap();
                assert_eq!(read(&found), read(&expected));
            }
        }
    }

    #[test]
    fn misfits_are_named() {
        let cpu = Cpu::<f32>::new();
        let weight = cpu.upload(HostTensor::f32([5, 4], vec![0.0; 20])).unwrap();
        let x = tensor(DType::Act, &[1, 4], &[0.0; 4]);
        let refused = |first: &[usize], second: &[usize], dtype| {
            let zeros = |shape: &[usize]| vec![0.0; shape.iter().product()];
            let mut first = tensor(DType::Act, first, &zeros(first));
            let mut second = tensor(dtype, second, &zeros(second));
            cpu.linear_split(&x, &weight, &mut first, &mut second).unwrap_err().to_string()
        };
        assert_eq!(
            refused(&[1, 2], &[1, 2], DType::Act),
            "linear_split: `weight` has shape [5, 4], expected [4, 4]"
        );
        assert_eq!(
            refused(&[1, 2], &[2, 3], DType::Act),
            "linear_split: `second` has shape [2, 3], expected [1, 3]"
        );
        assert!(refused(&[1, 2], &[1, 3], DType::Float).contains("`second` holds floats"));
    }
}
