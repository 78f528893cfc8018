//! What a computed value may be, given what may go into it: bounds that follow a kernel's roundings.

use dsa80_reference::cpu::Real;
use dsa80_reference::wgpu::ActType;

/// All values from `lo` to `hi`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The least.
    pub lo: f64,
    /// The greatest.
    pub hi: f64,
}

impl Interval {
    /// What is at most `error` from `value`.
    pub fn around(value: f64, error: f64) -> Self {
        Self { lo: value - error, hi: value + error }
    }

    /// `f` of both ends, for an `f` that keeps the order.
    pub fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self { lo: f(self.lo), hi: f(self.hi) }
    }

    /// Rounded to bf16.
    pub fn round_bf16(self) -> Self {
        self.map(Real::round_bf16)
    }

    /// Stored as an activation: what a kernel computed, its roundings to f32 included, is stored in f32 as it is.
    pub fn stored(self, act: ActType) -> Self {
        match act {
            ActType::Bf16 => self.round_bf16(),
            ActType::F32 => self,
        }
    }

    /// `error` more on both sides.
    pub fn widened(self, error: f64) -> Self {
        Self { lo: self.lo - error, hi: self.hi + error }
    }

    /// The largest magnitude.
    pub fn magnitude(self) -> f64 {
        self.lo.abs().max(self.hi.abs())
    }

    /// The magnitudes.
    pub fn abs(self) -> Self {
        let lo = if self.lo <= 0.0 && self.hi >= 0.0 { 0.0 } else { self.lo.abs().min(self.hi.abs()) };
        Self { lo, hi: self.magnitude() }
    }

    /// Whether `value` is inside.
    pub fn contains(self, value: f64) -> bool {
        (self.lo..=self.hi).contains(&value)
    }

    /// How far a value of the interval can be from `value`.
    pub fn farthest(self, value: f64) -> f64 {
        (value - self.lo).abs().max((self.hi - value).abs())
    }

    /// How far a value of the interval can be from the oracle's, which must be one of them.
    #[track_caller]
    pub fn bound(self, oracle: f64) -> f64 {
        assert!(self.contains(oracle), "the bound misses the oracle: {self:?}, {oracle}");
        self.farthest(oracle)
    }
}

impl std::ops::Add for Interval {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { lo: self.lo + other.lo, hi: self.hi + other.hi }
    }
}

impl std::ops::Mul<f64> for Interval {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        let (a, b) = (self.lo * factor, self.hi * factor);
        Self { lo: a.min(b), hi: a.max(b) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_follow_the_operations() {
        let x = Interval { lo: -1.0, hi: 3.0 };
        assert_eq!(x * -2.0 + Interval::around(1.0, 0.5), Interval { lo: -5.5, hi: 3.5 });
        assert_eq!((x.abs(), x.magnitude(), x.farthest(0.0)), (Interval { lo: 0.0, hi: 3.0 }, 3.0, 3.0));
        assert_eq!((x * -1.0).widened(0.5).abs().hi, 3.5);
        assert_eq!(Interval { lo: -3.0, hi: -1.0 }.abs(), Interval { lo: 1.0, hi: 3.0 });
        let spacing = 1.0 / 128.0;
        assert_eq!(
            Interval::around(1.0 + 0.5 * spacing, 1e-9).round_bf16(),
            Interval { lo: 1.0, hi: 1.0 + spacing }
        );
    }
}
