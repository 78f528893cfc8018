//! What products may be.

use dsa80_reference::DType;
use dsa80_reference::wgpu::ActType;
use dsa80_tests::parity::contract::Backend;
use dsa80_tests::parity::{F32_UNIT, Interval, assert_close};

/// What a product is stored in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Stored {
    Floats,
    As(ActType),
}

impl Stored {
    pub(crate) fn of<K>(kernels: &Backend<'_, K>, dtype: DType) -> Self {
        if dtype == DType::Float { Self::Floats } else { Self::As(kernels.act()) }
    }

    fn is_bf16(self) -> bool {
        self == Self::As(ActType::Bf16)
    }
}

/// Compares `found`, rows of `features`, with the products of rows of `x` and of `weight`, both of `columns`.
pub(crate) fn assert_products(
    what: &str,
    found: &[f64],
    expected: &[f64],
    x: &[f64],
    weight: &[f64],
    [columns, features]: [usize; 2],
    stored: Stored,
) {
    let intervals: Vec<Interval> = found
        .iter()
        .enumerate()
        .map(|(i, _)| {
            let (x, weight) =
                (&x[i / features * columns..][..columns], &weight[i % features * columns..][..columns]);
            of(x.iter().copied().zip(weight.iter().copied()), stored)
        })
        .collect();
    assert_within(what, features, found, expected, &intervals, stored);
}

/// What a sum of products may be, in any order.
pub(crate) fn of(pairs: impl Iterator<Item = (f64, f64)>, stored: Stored) -> Interval {
    let (mut sum, mut magnitudes, mut count) = (0.0, 0.0, 0.0);
    for (x, weight) in pairs {
        sum += x * weight;
        magnitudes += (x * weight).abs();
        count += 1.0;
    }
    // A product, and the additions of one lane and of the lanes; more than these are not in one chain.
    let error = 1.01 * F32_UNIT * (f64::min(count, 400.0) + 4.0) * magnitudes + 1e-37;
    let interval = Interval::around(sum, error);
    if stored.is_bf16() { interval.round_bf16() } else { interval }
}

/// Compares `found` with the oracle's, by what it may be.
pub(crate) fn assert_within(
    what: &str,
    width: usize,
    found: &[f64],
    expected: &[f64],
    intervals: &[Interval],
    stored: Stored,
) {
    // Where sums cancel, their error is that of what cancelled: the bound of each element holds alone.
    let relative = if stored.is_bf16() { 2e-2 } else { 1e-3 };
    assert_close(what, width, found, expected, relative, |i| {
        let slack = 1e-9 * intervals[i].magnitude();
        assert!(
            intervals[i].widened(slack).contains(expected[i]),
            "the bound misses the oracle: {:?}",
            intervals[i]
        );
        intervals[i].farthest(expected[i])
    });
}
