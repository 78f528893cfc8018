//! `rope_table` and `rope`: rotary position embedding.

use super::checks::Check;
use super::parallel::for_rows;
use super::{Cpu, CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;
use crate::kernels::RopeLayout;

pub(super) fn rope_table<F: Real>(
    _cpu: &Cpu<F>,
    batch: &Batch,
    theta: f64,
    cos_sin: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("rope_table");
    let [rows, pairs, two] = cos_sin.dims(check.0, "cos_sin")?;
    let tokens = batch.num_tokens();
    check.batch(batch)?;
    check.shape("cos_sin", cos_sin, rows == tokens && two == 2, || format!("[{tokens}, dim / 2, 2]"))?;
    check.value("theta", theta.is_finite() && theta > 0.0, || "a positive number".into(), theta)?;
    let dim = 2 * pairs;
    let frequencies: Vec<f64> = (0..pairs).map(|j| theta.powf(-2.0 * j as f64 / dim as f64)).collect();
    let out = check.float_mut("cos_sin", cos_sin)?;
    // A sine costs some twenty multiply-adds.
    for_rows(out, dim, tokens * dim * 20, |t, row| {
        let position = f64::from(batch.positions[t]);
        for (pair, frequency) in row.chunks_exact_mut(2).zip(&frequencies) {
            let (sin, cos) = (position * frequency).sin_cos();
            pair[0] = F::of(cos);
            pair[1] = F::of(sin);
        }
    });
    Ok(())
}

pub(super) fn rope<F: Real>(
    cpu: &Cpu<F>,
    x: &mut CpuTensor<F>,
    offset: usize,
    layout: RopeLayout,
    cos_sin: &CpuTensor<F>,
) -> Result<()> {
    let check = Check("rope");
    let [tokens, heads, width] = x.dims(check.0, "x")?;
    let dim = rotary_dim(check, cos_sin, tokens)?;
    check.value(
        "offset",
        dim <= width && offset <= width - dim,
        || format!("room for {dim} columns in {width}"),
        offset,
    )?;
    let cos_sin = check.float("cos_sin", cos_sin)?;
    let x = check.act_mut("x", x)?;
    for_rows(x, heads * width, tokens * heads * dim * 2, |t, row| {
        for head in row.chunks_exact_mut(width) {
            rotate(cpu, &mut head[offset..offset + dim], layout, &cos_sin[t * dim..][..dim]);
        }
    });
    Ok(())
}

/// The rotary dimension of a table for `tokens` rows.
pub(super) fn rotary_dim<F: Real>(check: Check, cos_sin: &CpuTensor<F>, tokens: usize) -> Result<usize> {
    let [rows, pairs, two] = cos_sin.dims(check.0, "cos_sin")?;
    check.shape("cos_sin", cos_sin, rows == tokens && two == 2, || format!("[{tokens}, dim / 2, 2]"))?;
    Ok(2 * pairs)
}

/// Rotates one head, in place; `cos_sin` has as many elements as `x`.
pub(super) fn rotate<F: Real>(cpu: &Cpu<F>, x: &mut [F], layout: RopeLayout, cos_sin: &[F]) {
    let half = x.len() / 2;
    for (j, pair) in cos_sin.chunks_exact(2).enumerate() {
        let (first, second) = match layout {
            RopeLayout::Interleaved => (2 * j, 2 * j + 1),
            RopeLayout::Half => (j, j + half),
        };
        let (a, b, cos, sin) = (x[first], x[second], pair[0], pair[1]);
        x[first] = cpu.act(a * cos - b * sin);
        x[second] = cpu.act(b * cos + a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{assert_close, batch, message, poisoned, randoms, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::DType;

    const THETA: f64 = 8e6;

    fn table<F: Real>(batch: &Batch, dim: usize) -> CpuTensor<F> {
        let mut cos_sin = poisoned(DType::Float, &[batch.num_tokens(), dim / 2, 2]);
        rope_table(&Cpu::new(), batch, THETA, &mut cos_sin).unwrap();
        cos_sin
    }

    /// The rotation of `x` at every position of `positions`.
    fn rotated(x: &[f64], positions: &[usize], layout: RopeLayout) -> Vec<Vec<f64>> {
        let pages: Vec<_> = positions.iter().map(|&position| (position, 1)).collect();
        let longest = positions.iter().max().unwrap() + 1;
        let batch = batch(longest, positions.len(), &pages, 0);
        let cos_sin = table::<f64>(&batch, x.len());
        let mut heads = tensor(DType::Act, &[positions.len(), 1, x.len()], &x.repeat(positions.len()));
        rope(&Cpu::new(), &mut heads, 0, layout, &cos_sin).unwrap();
        read(&heads).chunks(x.len()).map(<[f64]>::to_vec).collect()
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn position_zero_is_the_identity_and_norms_are_kept() {
        let x = randoms(1, 64);
        for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
            let rows = rotated(&x, &[0, 1, 77, 1_000_003], layout);
            assert_eq!(rows[0], x);
            for row in &rows {
                assert!((dot(row, row) - dot(&x, &x)).abs() < 1e-12);
            }
            assert!(rows[1].iter().zip(&x).all(|(a, b)| a != b));
        }
    }

    #[test]
    fn a_quarter_turn_by_hand() {
        let cos_sin = tensor(DType::Float, &[1, 2, 2], &[0.0, 1.0, 1.0, 0.0]);
        for (layout, expected) in [
            (RopeLayout::Interleaved, [9.0, -2.0, 1.0, 3.0, 4.0, 9.0]),
            (RopeLayout::Half, [9.0, -3.0, 2.0, 1.0, 4.0, 9.0]),
        ] {
            let mut x = tensor::<f64>(DType::Act, &[1, 1, 6], &[9.0, 1.0, 2.0, 3.0, 4.0, 9.0]);
            rope(&Cpu::new(), &mut x, 1, layout, &cos_sin).unwrap();
            assert_eq!(read(&x), expected);
        }
    }

    #[test]
    fn layouts_differ_by_a_permutation() {
        let x = randoms(2, 32);
        let halves: Vec<f64> = x.iter().step_by(2).chain(x.iter().skip(1).step_by(2)).copied().collect();
        let interleaved = &rotated(&x, &[1234], RopeLayout::Interleaved)[0];
        let half = &rotated(&halves, &[1234], RopeLayout::Half)[0];
        for j in 0..16 {
            assert_eq!((interleaved[2 * j], interleaved[2 * j + 1]), (half[j], half[j + 16]));
        }
    }

    #[test]
    fn a_dot_product_depends_on_the_distance_alone() {
        let (q, k) = (randoms(3, 64), randoms(4, 64));
        let q = rotated(&q, &[5, 105, 900_005], RopeLayout::Interleaved);
        let k = rotated(&k, &[2, 102, 900_002], RopeLayout::Interleaved);
        let dots: Vec<f64> = q.iter().zip(&k).map(|(q, k)| dot(q, k)).collect();
        assert_close(&dots, &[dots[0]; 3], 1e-8);
        assert!((dots[0] - dot(&q[0], &k[1])).abs() > 1e-3);
    }

    #[test]
    fn far_positions_are_accurate() {
        let position = 1_000_003;
        let batch = batch(position + 1, 1, &[(position, 1)], 0);
        let (wide, narrow) = (read(&table::<f64>(&batch, 64)), read(&table::<f32>(&batch, 64)));
        // Independent of any angle reduction: the rotation of one step, raised to the power by squaring.
        let expected: Vec<f64> = (0..32)
            .flat_map(|j| {
                let (mut square, mut power) = (THETA.powf(-j as f64 / 32.0).sin_cos(), (0.0, 1.0));
                let times = |a: (f64, f64), b: (f64, f64)| (a.0 * b.1 + a.1 * b.0, a.1 * b.1 - a.0 * b.0);
                let mut n = position;
                while n > 0 {
                    if n % 2 == 1 {
                        power = times(power, square);
                    }
                    square = times(square, square);
                    n /= 2;
                }
                [power.1, power.0]
            })
            .collect();
        assert_close(&wide, &expected, 1e-8);
        assert_close(&narrow, &expected, 1e-7);
    }

    #[test]
    fn rounds_to_bf16_on_request_and_leaves_other_columns() {
        let batch = batch(16, 1, &[(3, 2)], 0);
        let cos_sin = table::<f64>(&batch, 4);
        let values = randoms(5, 2 * 3 * 8);
        let mut exact = tensor(DType::Act, &[2, 3, 8], &values);
        let mut rounding = exact.clone();
        rope(&Cpu::new(), &mut exact, 4, RopeLayout::Interleaved, &cos_sin).unwrap();
        Cpu::rounding_to_bf16().rope(&mut rounding, 4, RopeLayout::Interleaved, &cos_sin).unwrap();
        for (i, (exact, rounded)) in read(&exact).iter().zip(read(&rounding)).enumerate() {
            if i % 8 < 4 {
                assert_eq!((*exact, rounded), (values[i], values[i]));
            } else {
                assert_eq!(rounded, exact.round_bf16());
            }
        }
    }

    #[test]
    fn misfits_are_named() {
        let batch = batch(16, 1, &[(0, 2)], 0);
        let cos_sin = table::<f32>(&batch, 8);
        let mut x = poisoned(DType::Act, &[2, 1, 12]);
        let cpu = Cpu::new();
        for offset in [5, usize::MAX] {
            let text = message(rope(&cpu, &mut x, offset, RopeLayout::Half, &cos_sin));
            assert!(text.contains("rope: `offset`") && text.contains("8 columns in 12"), "{text}");
        }
        let mut other = poisoned(DType::Act, &[3, 1, 12]);
        assert!(message(rope(&cpu, &mut other, 0, RopeLayout::Half, &cos_sin)).contains("`cos_sin`"));
        let mut float = poisoned(DType::Float, &[2, 1, 12]);
        assert!(message(rope(&cpu, &mut float, 0, RopeLayout::Half, &cos_sin)).contains("`x` holds floats"));
        let mut act = poisoned(DType::Act, &[2, 4, 2]);
        assert!(message(rope_table(&cpu, &batch, THETA, &mut act)).contains("`cos_sin` holds activations"));
        let mut table = poisoned(DType::Float, &[2, 4, 2]);
        assert!(message(rope_table(&cpu, &batch, 0.0, &mut table)).contains("`theta`"));
    }
}
