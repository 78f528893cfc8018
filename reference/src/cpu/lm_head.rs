//! `lm_head`: logits of chosen token rows over a vocabulary shard, `logits[i] = weight x[rows[i]]`.
//!
//! `x` `[T, hidden]` `Act`, `rows` `[R]` `Index`, `weight` `[V_local, hidden]` dense, `logits` `[R, V_local]`
//! `Float`, not rounded. Rows may repeat; one outside `x` is an error.

use super::checks::Check;
use super::linear::product;
use super::{Cpu, CpuTensor, Real};
use crate::error::Result;

pub(super) fn lm_head<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    rows: &CpuTensor<F>,
    weight: &CpuTensor<F>,
    logits: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("lm_head");
    let [_, hidden] = weight.dims("lm_head", "weight")?;
    let [tokens, _] = x.dims("lm_head", "x")?;
    let [count] = rows.dims("lm_head", "rows")?;
    x.expect_shape("lm_head", "x", &[tokens, hidden])?;
    let (x, rows) = (check.act("x", x)?, rows.indices("lm_head", "rows")?);
    let mut chosen = Vec::with_capacity(count * hidden);
    for &row in rows {
        let index = usize::try_from(row).ok().filter(|&row| row < tokens);
        let index =
            index.ok_or_else(|| check.bad_value("rows", format!("a token row below {tokens}"), row))?;
        chosen.extend_from_slice(&x[index * hidden..][..hidden]);
    }
    check.float_mut("logits", logits)?;
    product(cpu, "lm_head", &chosen, count, weight, "logits", logits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{index, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::{DType, HostTensor};

    #[test]
    fn takes_the_rows_that_are_asked_for() {
        let cpu = Cpu::<f64>::rounding_to_bf16();
        let x = tensor(DType::Act, &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let weight = cpu.upload(HostTensor::f32([2, 2], vec![1.0, 10.0, 100.0, 0.125])).unwrap();
        let mut logits = tensor(DType::Float, &[3, 2], &[f64::NAN; 6]);
        lm_head(&cpu, &x, &index(&[3], &[2, 0, 2]), &weight, &mut logits).unwrap();
        // 500.75 has ten significant bits: it would not survive a rounding to bf16.
        assert_eq!(read(&logits), [65.0, 500.75, 21.0, 100.25, 65.0, 500.75]);
    }

    #[test]
    fn refuses_a_row_outside_the_step_and_rounded_logits() {
        let cpu = Cpu::<f32>::new();
        let x = tensor(DType::Act, &[2, 1], &[1.0, 2.0]);
        let weight = cpu.upload(HostTensor::f32([1, 1], vec![1.0])).unwrap();
        for row in [2, -1] {
            let mut logits = tensor(DType::Float, &[1, 1], &[0.0]);
            let error = lm_head(&cpu, &x, &index(&[1], &[row]), &weight, &mut logits).unwrap_err();
            assert_eq!(error.to_string(), format!("lm_head: `rows` is {row}, expected a token row below 2"));
        }
        let mut logits = tensor(DType::Act, &[1, 1], &[0.0]);
        let error = lm_head(&cpu, &x, &index(&[1], &[0]), &weight, &mut logits).unwrap_err();
        assert_eq!(error.to_string(), "lm_head: `logits` holds activations, expected floats");
    }
}
