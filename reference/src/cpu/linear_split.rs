//! `linear_split`: projections of the same `x` whose weights lie one below the other.
//!
//! `x` `[T, in]` `Act`, `weight` `[at least the columns of all outs, in]` dense; `outs` each `Act` (rounded once) or
//! `Float` (not rounded).

use super::checks::Check;
use super::linear::rows_product;
use super::{Cpu, CpuTensor, Real};
use crate::error::Result;

/// What the contract calls each output.
const OUTS: [&str; 4] = ["outs[0]", "outs[1]", "outs[2]", "outs[3]"];

pub(super) fn linear_split<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    outs: &mut [&mut CpuTensor<F>],
) -> Result<()> {
    let check = Check("linear_split");
    let [rows, in_features] = x.dims(check.0, "x")?;
    let [features, weight_columns] = weight.dims(check.0, "weight")?;
    let count = outs.len();
    check.value("outs", (1..=OUTS.len()).contains(&count), || "1 to 4 tensors".into(), count)?;
    let mut ends = vec![0];
    for (out, name) in outs.iter().zip(OUTS) {
        let [_, columns] = out.dims(check.0, name)?;
        out.expect_shape(check.0, name, &[rows, columns])?;
        ends.push(ends[ends.len() - 1] + columns);
    }
    let all = ends[count];
    check.shape("weight", weight, features >= all && weight_columns == in_features, || {
        format!("[at least {all}, {in_features}]")
    })?;
    let x = check.act("x", x)?;
    for ((out, name), bounds) in outs.iter_mut().zip(OUTS).zip(ends.windows(2)) {
        rows_product(cpu, check.0, x, rows, weight, bounds[0]..bounds[1], name, out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{randoms, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::{DType, HostTensor};

    #[test]
    fn the_rows_of_the_weight_are_shared_out() {
        let cpu = Cpu::<f64>::rounding_to_bf16();
        let w: Vec<f32> = randoms(1, 5 * 4).iter().map(|&w| w as f32).collect();
        let upload = |rows: std::ops::Range<usize>| {
            let data = w[4 * rows.start..4 * rows.end].to_vec();
            cpu.upload(HostTensor::f32([rows.len(), 4], data)).unwrap()
        };
        let x = tensor(DType::Act, &[3, 4], &randoms(2, 12));
        let empty = |columns: usize, dtype| tensor(dtype, &[3, columns], &vec![f64::NAN; 3 * columns]);
        let types = [DType::Act, DType::Float, DType::Act];
        for rows in [&[0..2, 2..5][..], &[0..1, 1..4, 4..5], &[0..3, 3..3], &[0..0, 0..5]] {
            let mut outs: Vec<_> = rows.iter().zip(types).map(|(r, dtype)| empty(r.len(), dtype)).collect();
            cpu.linear_split(&x, &upload(0..5), &mut outs.iter_mut().collect::<Vec<_>>()).unwrap();
            for ((found, rows), dtype) in outs.iter().zip(rows).zip(types) {
                let mut expected = empty(rows.len(), dtype);
                cpu.linear(&x, &upload(rows.clone()), &mut expected).unwrap();
                assert_eq!(read(found), read(&expected));
            }
        }
    }

    #[test]
    fn misfits_are_named() {
        let cpu = Cpu::<f32>::new();
        let weight = cpu.upload(HostTensor::f32([5, 4], vec![0.0; 20])).unwrap();
        let x = tensor(DType::Act, &[1, 4], &[0.0; 4]);
        let refused = |shapes: &[[usize; 2]], dtype| {
            let zeros = |shape: &[usize; 2]| tensor(dtype, shape, &vec![0.0; shape.iter().product()]);
            let mut outs: Vec<_> = shapes.iter().map(zeros).collect();
            cpu.linear_split(&x, &weight, &mut outs.iter_mut().collect::<Vec<_>>()).unwrap_err().to_string()
        };
        assert_eq!(
            refused(&[[1, 2], [1, 4]], DType::Act),
            "linear_split: `weight` has shape [5, 4], expected [at least 6, 4]"
        );
        assert_eq!(
            refused(&[[1, 2], [2, 3]], DType::Act),
            "linear_split: `outs[1]` has shape [2, 3], expected [1, 3]"
        );
        let mut index = CpuTensor::alloc(DType::Index, &[1, 2]).unwrap();
        let error = cpu.linear_split(&x, &weight, &mut [&mut index]).unwrap_err().to_string();
        assert!(error.contains("`outs[0]` holds indices"), "{error}");
        for count in [0, 5] {
            assert!(refused(&vec![[1, 1]; count], DType::Act).contains("1 to 4 tensors"));
        }
    }
}
