//! `x w^T` for weights that are widened on the way, as `linear`, `linear_int4`, `lm_head` and `moe` share it.
//!
//! A few rows of the weight at a time are widened into a buffer that stays in the first caches, and meet
//! every row of `x` there: a weight is read once a call, never widened whole. The eight partial sums of an
//! output element and the tree that joins them are written out, so the result depends neither on the
//! instruction set that the machine turns out to have nor on what else is computed in the call.

use half::{bf16, f16};
use multiversion::multiversion;

use super::Real;
use super::parallel::for_rows;
use super::vector::{LANES, join};

/// Weight rows that are widened together.
const WIDENED: usize = 4;

/// Weight rows of one task; a task allocates its buffer once.
const TASK_ROWS: usize = 4 * WIDENED;

/// A weight `[out_features, in_features]` of any format.
pub(super) trait Weight<F>: Sync {
    /// Output features.
    fn out_features(&self) -> usize;
    /// Input features.
    fn in_features(&self) -> usize;
    /// Writes row `row`, widened, to `out`, which has `in_features` elements.
    fn widen(&self, row: usize, out: &mut [F]);
}

/// An element of a dense weight.
pub(super) trait Element: Copy + Send + Sync {
    /// Widens (exact).
    fn widen<F: Real>(self) -> F;
}

impl Element for bf16 {
    #[inline(always)]
    fn widen<F: Real>(self) -> F {
        F::of_bf16(self)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen<F: Real>(self) -> F {
        F::of_f16(self)
    }
}

impl Element for f32 {
    #[inline(always)]
    fn widen<F: Real>(self) -> F {
        F::of_f32(self)
    }
}

/// A dense weight, row-major.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dense<'a, E> {
    pub(super) elements: &'a [E],
    pub(super) out_features: usize,
    pub(super) in_features: usize,
}

impl<F: Real, E: Element> Weight<F> for Dense<'_, E> {
    fn out_features(&self) -> usize {
        self.out_features
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    #[inline(always)]
    fn widen(&self, row: usize, out: &mut [F]) {
        let elements = &self.elements[row * self.in_features..][..self.in_features];
        for (out, element) in out.iter_mut().zip(elements) {
            *out = element.widen();
        }
    }
}

/// `out[t, o] = finish(sum_i x[t, i] w[o, i])`; `x` is `[T, in_features]`, `out` `[T, out_features]`.
pub(super) fn matmul<F: Real>(
    x: &[F],
    weight: &impl Weight<F>,
    out: &mut [F],
    finish: impl Fn(F) -> F + Send + Sync,
) {
    let (out_features, in_features) = (weight.out_features(), weight.in_features());
    let rows = out.len().checked_div(out_features).unwrap_or(0);
    debug_assert_eq!(x.len(), rows * in_features);
    let ops = out.len() * in_features;
    let mut transposed = Vec::new();
    // `[out_features, T]`, so that a task's part lies in one piece; one token needs no transposition.
    let columns: &mut [F] = if rows == 1 {
        &mut *out
    } else {
        transposed.resize(out.len(), F::zero());
        &mut transposed
    };
    for_rows(columns, TASK_ROWS * rows, ops, |task, columns| {
        weight_rows(x, rows, weight, task * TASK_ROWS, columns);
    });
    if rows == 1 {
        out.iter_mut().for_each(|value| *value = finish(*value));
    } else {
        for_rows(out, out_features, rows * out_features, |t, out| {
            for (o, out) in out.iter_mut().enumerate() {
                *out = finish(transposed[o * rows + t]);
            }
        });
    }
}

/// The products of `x` with the weight rows from `first` on: `out` is `[weight rows, T]`.
///
/// AVX2 without FMA: contracting would change the results from machine to machine.
#[multiversion(targets("x86_64+avx2"))]
fn weight_rows<F: Real, W: Weight<F>>(x: &[F], rows: usize, weight: &W, first: usize, out: &mut [F]) {
    let n = weight.in_features();
    let mut widened = vec![F::zero(); WIDENED * n];
    for (block, out) in out.chunks_mut(WIDENED * rows).enumerate() {
        let count = out.len() / rows;
        for (row, widened) in widened.chunks_exact_mut(n).take(count).enumerate() {
            weight.widen(first + block * WIDENED + row, widened);
        }
        let w = |row: usize| &widened[row * n..][..n];
        let x = |t: usize| &x[t * n..][..n];
        let mut t = 0;
        while t < rows {
            if t + 4 <= rows {
                for row in (0..count).step_by(2) {
                    let pair = [w(row), w(if row + 1 < count { row + 1 } else { row })];
                    let sums = tile([x(t), x(t + 1), x(t + 2), x(t + 3)], pair);
                    for (i, sums) in sums.iter().enumerate() {
                        out[row * rows + t + i] = sums[0];
                        if row + 1 < count {
                            out[(row + 1) * rows + t + i] = sums[1];
                        }
                    }
                }
                t += 4;
            } else {
                let sums = tile([x(t)], [w(0), w(1), w(2), w(3)]);
                for (row, &sum) in sums[0].iter().take(count).enumerate() {
                    out[row * rows + t] = sum;
                }
                t += 1;
            }
        }
    }
}

/// All dot products between the rows of `x` and `w`, every one summed in the same order.
#[inline(always)]
fn tile<F: Real, const T: usize, const O: usize>(x: [&[F]; T], w: [&[F]; O]) -> [[F; O]; T] {
    let mut sums = [[[F::zero(); LANES]; O]; T];
    let n = w[0].len();
    let x = x.map(|x| x[..n].as_chunks::<LANES>());
    let w = w.map(|w| w[..n].as_chunks::<LANES>());
    for i in 0..n / LANES {
        for t in 0..T {
            for o in 0..O {
                for ((sum, &x), &w) in sums[t][o].iter_mut().zip(&x[t].0[i]).zip(&w[o].0[i]) {
                    *sum += x * w;
                }
            }
        }
    }
    finish_sums(&sums, x.map(|x| x.1), w.map(|w| w.1))
}

/// Adds what is left of rows that are not a multiple of [`LANES`], and joins the partial sums.
///
/// A call on purpose: inlined, the tree of [`join`] leads LLVM to keep the sums of the loop before it as
/// scalars, four times slower.
#[inline(never)]
fn finish_sums<F: Real, const T: usize, const O: usize>(
    sums: &[[[F; LANES]; O]; T],
    x: [&[F]; T],
    w: [&[F]; O],
) -> [[F; O]; T] {
    let mut joined = [[F::zero(); O]; T];
    for t in 0..T {
        for o in 0..O {
            let mut sums = sums[t][o];
            for (sum, (&x, &w)) in sums.iter_mut().zip(x[t].iter().zip(w[o])) {
                *sum += x * w;
            }
            joined[t][o] = join(sums);
        }
    }
    joined
}
