//! Sums with a fixed order that the compiler can vectorise.
//!
//! Float addition is not associative, so the compiler keeps the order that is written. These keep [`LANES`]
//! partial sums, which map onto vector registers, and join them in a fixed tree: fast, more accurate than one
//! running sum, and the same bits whatever the number of threads or the neighbours in a batch.

use super::Real;

/// Partial sums of a reduction.
pub(crate) const LANES: usize = 8;

/// `sum_i x[i] * widen(w[i])`; `x` and `w` have the same length.
#[inline(always)]
pub(crate) fn dot<F: Real, W: Copy>(x: &[F], w: &[W], widen: impl Fn(W) -> F) -> F {
    debug_assert_eq!(x.len(), w.len());
    let mut lanes = [F::zero(); LANES];
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (w, w_tail) = w.as_chunks::<LANES>();
    for (x, w) in x.iter().zip(w) {
        for ((lane, &x), &w) in lanes.iter_mut().zip(x).zip(w) {
            *lane += x * widen(w);
        }
    }
    for (lane, (&x, &w)) in lanes.iter_mut().zip(x_tail.iter().zip(w_tail)) {
        *lane += x * widen(w);
    }
    join(lanes)
}

/// Four [`dot`]s against the same `x`, each with the bits of the single one; `x` is loaded once.
#[inline(always)]
pub(crate) fn dot4<F: Real>(x: &[F], w: [&[F]; 4]) -> [F; 4] {
    let mut lanes = [[F::zero(); LANES]; 4];
    let (x, x_tail) = x.as_chunks::<LANES>();
    let w = w.map(|w| w[..LANES * x.len() + x_tail.len()].as_chunks::<LANES>());
    for (i, x) in x.iter().enumerate() {
        for (lanes, w) in lanes.iter_mut().zip(&w) {
            for ((lane, &x), &w) in lanes.iter_mut().zip(x).zip(&w.0[i]) {
                *lane += x * w;
            }
        }
    }
    for (lanes, w) in lanes.iter_mut().zip(&w) {
        for (lane, (&x, &w)) in lanes.iter_mut().zip(x_tail.iter().zip(w.1)) {
            *lane += x * w;
        }
    }
    lanes.map(join)
}

/// `sum_i f(x[i])`.
#[inline(always)]
pub(crate) fn sum<F: Real>(x: &[F], f: impl Fn(F) -> F) -> F {
    let mut lanes = [F::zero(); LANES];
    let (x, tail) = x.as_chunks::<LANES>();
    for x in x {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += f(x);
    }
    join(lanes)
}

/// `out[i] += sum_j a[j] * widen(rows[j][i])`, summed over the rows in order; four rows share one pass over
/// `out`.
///
/// `row(j)` is the row of `a[j]`, as long as `out`.
#[inline(always)]
pub(crate) fn add_rows<'w, F: Real, W: Copy + 'w>(
    out: &mut [F],
    a: &[F],
    row: impl Fn(usize) -> &'w [W],
    widen: impl Fn(W) -> F,
) {
    let n = out.len();
    let (blocks, tail) = a.as_chunks::<4>();
    for (block, &[a0, a1, a2, a3]) in blocks.iter().enumerate() {
        let j = 4 * block;
        let (w0, w1, w2, w3) = (&row(j)[..n], &row(j + 1)[..n], &row(j + 2)[..n], &row(j + 3)[..n]);
        for i in 0..n {
            let sum = (a0 * widen(w0[i]) + a1 * widen(w1[i])) + (a2 * widen(w2[i]) + a3 * widen(w3[i]));
            out[i] += sum;
        }
    }
    for (offset, &a) in tail.iter().enumerate() {
        for (out, &w) in out.iter_mut().zip(row(4 * blocks.len() + offset)) {
            *out += a * widen(w);
        }
    }
}

/// A call on purpose: inlined, the tree leads LLVM to keep the sums of the loop before it as scalars.
#[inline(never)]
pub(crate) fn join<F: Real>(l: [F; LANES]) -> F {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Integers, so that any order of summation gives the same float.
    fn integers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + seed * 13) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn sums_of_any_length_match_plain_loops() {
        for n in 0..40 {
            let x = integers(n, 1);
            let w: Vec<_> = (2..6).map(|seed| integers(n, seed)).collect();
            let plain = |w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
            assert_eq!(dot(&x, &w[0], |w| w), plain(&w[0]));
            assert_eq!(dot4(&x, [&w[0], &w[1], &w[2], &w[3]]), [0, 1, 2, 3].map(|j| plain(&w[j])));
            assert_eq!(sum(&x, |x| x * x), x.iter().map(|x| x * x).sum::<f32>());
        }
    }

    #[test]
    fn rows_are_added_in_blocks_and_singly() {
        for count in 0..11 {
            let a = integers(count, 3);
            let rows: Vec<_> = (0..count).map(|j| integers(5, j)).collect();
            let mut out = vec![100.0; 5];
            add_rows(&mut out, &a, |j| &rows[j], |w| w);
            for (i, &out) in out.iter().enumerate() {
                assert_eq!(out, 100.0 + (0..count).map(|j| a[j] * rows[j][i]).sum::<f32>());
            }
        }
    }

    #[test]
    fn four_at_a_time_has_the_bits_of_one_at_a_time() {
        let values: Vec<f32> = (0..500).map(|i| (i as f32 * 0.37).sin() * 1e3).collect();
        let rows = [&values[100..199], &values[200..299], &values[300..399], &values[401..500]];
        let together = dot4(&values[..99], rows);
        for (row, together) in rows.iter().zip(together) {
            assert_eq!(dot(&values[..99], row, |w| w).to_bits(), together.to_bits());
        }
    }
}
