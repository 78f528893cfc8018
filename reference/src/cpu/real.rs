//! The oracle's float: f64 to judge, f32 to serve.

use std::cmp::Ordering;

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
    /// Converts a small integer (exact).
    fn of_i8(value: i8) -> Self;
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
        // `half` asks for the machine's features on every call, which keeps a loop over a row from being
        // vectorised. Moving the exponent and fraction into place and scaling by 2^(127 - 15) is right for
        // subnormals too; infinity and NaN keep an exponent of all ones.
        let bits = u32::from(value.to_bits());
        let magnitude = (bits & 0x7fff) << 13;
        let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
        let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(scaled.to_bits() | special | ((bits & 0x8000) << 16))
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn of_i8(value: i8) -> Self {
        f32::from(value)
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
        f64::from(f32::of_f16(value))
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        f64::from(value)
    }
    #[inline(always)]
    fn of_i8(value: i8) -> Self {
        f64::from(value)
    }
    #[inline(always)]
    fn round_bf16(self) -> Self {
        // `bf16::from_f64` looks at the upper half of the bits alone. Rounding to f32 first, towards the
        // neighbour with an odd last bit, keeps the knowledge that something was cut off.
        let near = self as f32;
        let odd = match f64::from(near).abs().partial_cmp(&self.abs()) {
            Some(Ordering::Less) => near.to_bits() | 1,
            Some(Ordering::Greater) if near.to_bits() & 1 == 0 => near.to_bits() - 1,
            _ => near.to_bits(),
        };
        bf16::from_f32(f32::from_bits(odd)).to_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_and_f16_widens_as_half_widens_it() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            if b.is_nan() {
                assert!(f32::of_bf16(b).is_nan() && f64::of_bf16(b).is_nan());
            } else {
                assert_eq!(f32::of_bf16(b).to_bits(), b.to_f32().to_bits());
                assert_eq!(f64::of_bf16(b).to_bits(), b.to_f64().to_bits());
            }
            if h.is_nan() {
                assert!(f32::of_f16(h).is_nan() && f64::of_f16(h).is_nan());
            } else {
                assert_eq!(f32::of_f16(h).to_bits(), h.to_f32().to_bits());
                assert_eq!(f64::of_f16(h).to_bits(), h.to_f64().to_bits());
            }
        }
    }

    #[test]
    fn rounding_to_bf16_goes_to_nearest_even() {
        // bf16 has 8 significant bits: between 1 and 2 its spacing is 2^-7.
        let spacing = 1.0 / 128.0;
        for (value, rounded) in [
            (1.0 + 0.5 * spacing, 1.0),
            (1.0 + 1.5 * spacing, 1.0 + 2.0 * spacing),
            (1.0 + 0.75 * spacing, 1.0 + spacing),
            (-1.0 - 0.5 * spacing, -1.0),
        ] {
            assert_eq!((value as f32).round_bf16(), rounded as f32);
            assert_eq!(value.round_bf16(), rounded);
        }
    }

    #[test]
    fn rounding_f64_to_bf16_rounds_once() {
        let spacing = 1.0 / 128.0;
        let (tie, bit) = (1.0 + 0.5 * spacing, 2.0_f64.powi(-40));
        // Through an f32 on the way these would become ties, and go to 1.
        assert_eq!((tie + bit).round_bf16(), 1.0 + spacing);
        assert_eq!((tie - bit).round_bf16(), 1.0);
        assert_eq!((-tie - bit).round_bf16(), -1.0 - spacing);
        let tie = 1.0 + 1.5 * spacing;
        assert_eq!((tie - bit).round_bf16(), 1.0 + spacing);
        assert_eq!((tie + bit).round_bf16(), 1.0 + 2.0 * spacing);
        assert!(f64::NAN.round_bf16().is_nan());
        assert_eq!(1e300.round_bf16(), f64::INFINITY);
        assert_eq!(f64::MIN_POSITIVE.round_bf16(), 0.0);
        assert!((-f64::MIN_POSITIVE).round_bf16().is_sign_negative());
        assert_eq!(f64::NEG_INFINITY.round_bf16(), f64::NEG_INFINITY);
        for bits in (0..=u16::MAX).step_by(7) {
            let value = bf16::from_bits(bits).to_f64();
            assert!(value.is_nan() || value.round_bf16().to_bits() == value.to_bits());
        }
    }
}
