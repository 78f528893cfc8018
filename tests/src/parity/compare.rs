//! Two error measures at once, equal masks of what is not finite, and a report that says where.

use std::fmt::Write;

/// Elements that a report lists.
const LISTED: usize = 8;

/// How far a result is from the oracle's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// `|found - expected| / |expected|` over the finite elements.
    pub relative_l2: f64,
    /// The largest `|found - expected| / bound` of an element; above 1 is a failure.
    pub worst: f64,
}

/// Compares `found` with `expected`, rows of `width` elements: the relative L2 error is at most `relative_l2`, every element is within
/// `bound(i)` of its expected value, infinities and NaN stand in the same places.
///
/// # Errors
/// The report: the measures, and the row and column of the elements that are furthest off.
pub fn compare(
    what: &str,
    width: usize,
    found: &[f64],
    expected: &[f64],
    relative_l2: f64,
    bound: impl Fn(usize) -> f64,
) -> Result<Measured, String> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} elements, expected {}", found.len(), expected.len()));
    }
    let (mut error, mut norm, mut wrong) = (0.0, 0.0, Vec::new());
    let mut worst = 0.0_f64;
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        if !found.is_finite() || !expected.is_finite() {
            if found != expected && !(found.is_nan() && expected.is_nan()) {
                wrong.push((f64::INFINITY, i, 0.0));
            }
            continue;
        }
        let (distance, bound) = ((found - expected).abs(), bound(i));
        error += distance * distance;
        norm += expected * expected;
        let share = if distance == 0.0 { 0.0 } else { distance / bound };
        worst = worst.max(share);
        if share > 1.0 || bound.is_nan() {
            wrong.push((share, i, bound));
        }
    }
    let relative = if error == 0.0 { 0.0 } else { (error / norm).sqrt() };
    if wrong.is_empty() && relative <= relative_l2 {
        return Ok(Measured { relative_l2: relative, worst });
    }
    wrong.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut report = format!(
        "{what}: relative L2 error {relative:.3e} (at most {relative_l2:.3e}), {} of {} elements out of bounds",
        wrong.len(),
        found.len()
    );
    for &(_, i, bound) in wrong.iter().take(LISTED) {
        let (row, column) = (i / width.max(1), i % width.max(1));
        let _ = write!(
            report,
            "\n  row {row}, column {column}: found {:e}, expected {:e}, bound {bound:.3e}",
            found[i], expected[i]
        );
    }
    Err(report)
}

/// [`compare`], or a panic with its report.
#[track_caller]
pub fn assert_close(
    what: &str,
    width: usize,
    found: &[f64],
    expected: &[f64],
    relative_l2: f64,
    bound: impl Fn(usize) -> f64,
) -> Measured {
    compare(what, width, found, expected, relative_l2, bound).unwrap_or_else(|report| panic!("{report}"))
}

/// Panics at the first elements that differ, rows of `width`: for integers, and for runs that must agree to the bit.
#[track_caller]
pub fn assert_same<T: PartialEq + std::fmt::Debug>(what: &str, width: usize, found: &[T], expected: &[T]) {
    assert_eq!(found.len(), expected.len(), "{what}: the number of elements");
    let wrong: Vec<usize> = (0..found.len()).filter(|&i| found[i] != expected[i]).collect();
    if wrong.is_empty() {
        return;
    }
    let mut report = format!("{what}: {} of {} elements differ", wrong.len(), found.len());
    for &i in wrong.iter().take(LISTED) {
        let (row, column) = (i / width.max(1), i % width.max(1));
        let _ = write!(
            report,
            "\n  row {row}, column {column}: found {:?}, expected {:?}",
            found[i], expected[i]
        );
    }
    panic!("{report}");
}

/// Half the spacing of bf16 at `value`: what rounding to bf16 adds.
pub fn half_ulp_bf16(value: f64) -> f64 {
    // Eight significant bits; below 2^-126 the spacing stays.
    let exponent = value.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor();
    (exponent - 8.0).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_and_passes_what_is_within_both_bounds() {
        let measured = compare("x", 2, &[3.0, 4.5], &[3.0, 4.0], 0.1, |_| 1.0).unwrap();
        assert_eq!(measured, Measured { relative_l2: 0.1, worst: 0.5 });
        let same = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0];
        assert_eq!(compare("x", 4, &same, &same, 0.0, |_| 0.0).unwrap().worst, 0.0);
    }

    #[test]
    fn says_where_and_by_how_much() {
        let report =
            compare("logits", 2, &[1.0, 2.0, 3.0, 9.0], &[1.0, 2.0, 3.0, 4.0], 1e-6, |_| 0.5).unwrap_err();
        assert!(report.contains("logits: relative L2 error 9.129e-1 (at most 1.000e-6), 1 of 4"), "{report}");
        assert!(report.contains("row 1, column 1: found 9e0, expected 4e0, bound 5.000e-1"), "{report}");
    }

    #[test]
    fn many_small_errors_fail_the_norm_and_one_large_error_the_bound() {
        let expected = [1.0; 1000];
        let mut found = [1.001; 1000];
        assert!(compare("x", 10, &found, &expected, 1e-4, |_| 1e-2).unwrap_err().contains("0 of 1000"));
        found = expected;
        found[500] = 1.1;
        assert!(
            compare("x", 10, &found, &expected, 1e-2, |_| 1e-2).unwrap_err().contains("row 50, column 0")
        );
    }

    #[test]
    fn masks_of_what_is_not_finite_must_match() {
        let values = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.0];
        for (i, &found) in values.iter().enumerate() {
            for (j, &expected) in values.iter().enumerate() {
                assert_eq!(compare("x", 1, &[found], &[expected], 1e9, |_| 1e9).is_ok(), i == j);
            }
        }
        assert!(compare("x", 1, &[1.0], &[2.0], 1e9, |_| f64::NAN).is_err());
        assert!(compare("x", 1, &[1.0], &[1.0, 2.0], 1e9, |_| 1e9).is_err());
    }

    #[test]
    fn the_spacing_of_bf16() {
        assert_eq!(
            [half_ulp_bf16(1.0), half_ulp_bf16(-1.99), half_ulp_bf16(2.0)],
            [1.0 / 256.0, 1.0 / 256.0, 1.0 / 128.0]
        );
        assert_eq!(half_ulp_bf16(0.0), 2.0_f64.powi(-134));
    }
}
