//! The oracle's float: f64 to judge, f32 to serve.

use half::{bf16, f16};

/// f32 or f64.
pub trait Real:
    num_traits::Float + num_traits::NumAssign + std::iter::Sum + std::fmt::Debug + Default + Send + Sync + 'static
{
    /// Converts from f64, rounding to nearest.
    fn of(value: f64) -> Self;
    /// Widens to f64 (exact).
    fn wide(self) -> f64;
    /// Widens a bf16 (exact).
    fn of_bf16(value: bf16) -> Self;
    /// Widens an f16 (exact).
    fn of_f16(value: f16) -> Self;
    /// Widens an f32 (exact).
    fn of_f32(value: f32) -> Self;
    /// Rounds to bf16, to nearest even, and back.
    fn round_bf16(self) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn of_bf16(value: bf16) -> Self {
        // A shift: `half` would test for NaN and subnormals, which a widening does not need.
        f32::from_bits(u32::from(value.to_bits()) << 16)
    }
    #[inline(always)]
    fn of_f16(value: f16) -> Self {
        value.to_f32()
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn round_bf16(self) -> Self {
        bf16::from_f32(self).to_f32()
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    #[inline(always)]
    fn of_bf16(value: bf16) -> Self {
        f64::from(f32::of_bf16(value))
    }
    #[inline(always)]
    fn of_f16(value: f16) -> Self {
        value.to_f64()
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        f64::from(value)
    }
    #[inline(always)]
    fn round_bf16(self) -> Self {
        bf16::from_f64(self).to_f64()
    }
}
