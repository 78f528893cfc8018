//! The order in which the oracle ranks scores.

use super::Real;

/// A score as an integer that ranks as the contract wants: numbers as usual, `-0.0` equal to `+0.0`, NaN
/// below all of them.
#[inline]
pub(crate) fn rank<F: Real>(score: F) -> u64 {
    if score.is_nan() {
        return 0;
    }
    // Adding zero turns -0.0 into +0.0 and changes nothing else.
    let bits = (score.wide() + 0.0).to_bits();
    if bits >> 63 == 1 { !bits } else { bits | 1 << 63 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_follow_the_numbers() {
        let ascending = [
            f32::NAN,
            f32::NEG_INFINITY,
            f32::MIN,
            -1.5,
            -f32::MIN_POSITIVE,
            -f32::from_bits(1),
            0.0,
            f32::from_bits(1),
            1.0,
            f32::MAX,
            f32::INFINITY,
        ];
        assert!(ascending.windows(2).all(|pair| rank(pair[0]) < rank(pair[1])));
        assert!(ascending.windows(2).all(|pair| rank(f64::from(pair[0])) < rank(f64::from(pair[1]))));
        assert_eq!(rank(-0.0f32), rank(0.0f32));
        assert_eq!(rank(-f32::NAN), rank(f32::NAN));
    }
}
