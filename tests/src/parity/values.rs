//! Values that kernels stumble over.

use half::bf16;
use proptest::prelude::*;
use proptest::sample::select;

/// A distribution of values. The same `(seed, n)` gives the same values, every one of them exact in bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Standard normal.
    Normal,
    /// Few small integers: sums are exact and often equal.
    Ties,
    /// Magnitudes of 1e10 to 1e15: squares and their sums still fit an f32.
    Huge,
    /// Magnitudes up to 1e30, beside ordinary ones: nothing but a sum may be taken of them.
    Enormous,
    /// Magnitudes of 1e-30 to 1e-20.
    Tiny,
    /// Below zero.
    Negative,
    /// Zeros of both signs.
    Zeros,
    /// Normal with a few outliers of a thousand times that.
    Outliers,
}

impl Values {
    /// Every distribution whose squares fit an f32.
    pub const ORDINARY: [Values; 7] = [
        Values::Normal,
        Values::Ties,
        Values::Huge,
        Values::Tiny,
        Values::Negative,
        Values::Zeros,
        Values::Outliers,
    ];

    /// One of `choice`, [`Normal`](Self::Normal) half of the time.
    pub fn any_of(choice: &'static [Values]) -> impl Strategy<Value = Values> {
        prop_oneof![Just(Values::Normal), select(choice)]
    }

    /// The value with number `i` under `seed`.
    pub fn at(self, seed: u64, i: usize) -> f64 {
        let unit = |stream: u64| unit(seed ^ (stream << 62), i as u64);
        let sign = if unit(0) < 0.5 { -1.0 } else { 1.0 };
        let normal = || (-2.0 * unit(1).ln()).sqrt() * (std::f64::consts::TAU * unit(2)).cos();
        let power = |low: f64, high: f64| sign * 10.0_f64.powf(low + (high - low) * unit(1));
        let value = match self {
            Values::Normal => normal(),
            Values::Ties => (unit(1) * 7.0).floor() - 3.0,
            Values::Huge => power(10.0, 15.0),
            Values::Enormous => power(-1.0, 30.0),
            Values::Tiny => power(-30.0, -20.0),
            Values::Negative => -normal().abs() - 1e-3,
            Values::Zeros => 0.0 * sign,
            Values::Outliers if unit(3) < 0.02 => 1e3 * normal(),
            Values::Outliers => normal(),
        };
        bf16::from_f64(value).to_f64()
    }

    /// The first `n` values under `seed`.
    pub fn take(self, seed: u64, n: usize) -> Vec<f64> {
        (0..n).map(|i| self.at(seed, i)).collect()
    }
}

/// A number inside (0, 1): splitmix64 (Steele, Lea and Flood, OOPSLA 2014) of the place `i` under `seed`, cheap enough for large tensors.
fn unit(seed: u64, i: u64) -> f64 {
    let mut z = seed.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_what_their_names_say() {
        for values in Values::ORDINARY {
            assert_eq!(values.take(7, 50), values.take(7, 50));
            assert!(values.take(7, 2000).iter().all(|x| x.is_finite()));
        }
        let normal = Values::Normal.take(3, 20_000);
        let mean = normal.iter().sum::<f64>() / 20_000.0;
        let variance = normal.iter().map(|x| x * x).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        assert_ne!(normal[..100], Values::Normal.take(4, 100));
        assert!(Values::Negative.take(1, 1000).iter().all(|x| *x < 0.0));
        assert!(Values::Huge.take(1, 1000).iter().all(|x| (9e9..2e15).contains(&x.abs())));
        assert!(Values::Tiny.take(1, 1000).iter().all(|x| (9e-31..2e-20).contains(&x.abs())));
        assert!(Values::Ties.take(1, 1000).iter().all(|x| x.fract() == 0.0 && x.abs() <= 3.0));
        let zeros = Values::Zeros.take(1, 100);
        assert!(zeros.iter().all(|x| *x == 0.0) && zeros.iter().any(|x| x.is_sign_negative()));
    }
}
