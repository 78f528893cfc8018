//! The middle of several measurements, and how far they are apart.

use serde::{Deserialize, Serialize};

/// Median and percentiles.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) p10: f64,
    pub(super) p90: f64,
    pub(super) runs: usize,
}

impl Spread {
    /// Of what was measured, times `unit`; nothing of nothing.
    pub(super) fn of(measured: &[f64], unit: f64) -> Option<Self> {
        let mut sorted: Vec<f64> = measured.iter().map(|value| value * unit).collect();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let at = |share: f64| sorted[(share * last as f64).round() as usize];
        Some(Self { median: at(0.5), p10: at(0.1), p90: at(0.9), runs: sorted.len() })
    }

    /// `1.234 (1.230 - 1.250)`.
    pub(super) fn words(&self) -> String {
        format!("{} ({} - {})", digits(self.median), digits(self.p10), digits(self.p90))
    }
}

/// Four digits.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 999.95 => format!("{value:.0}"),
        v if v >= 99.995 => format!("{value:.1}"),
        v if v >= 9.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_in_another_unit() {
        let measured: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        let spread = Spread::of(&measured, 0.1).unwrap();
        assert_eq!((spread.p10, spread.median, spread.p90, spread.runs), (1.0, 5.0, 9.0, 101));
        assert_eq!(spread.words(), "5.000 (1.000 - 9.000)");
        assert_eq!(Spread::of(&[], 1.0), None);
    }

    #[test]
    fn four_digits() {
        assert_eq!(
            [1.23456, 12.3456, 123.456, 12345.6, 0.0].map(digits),
            ["1.235", "12.35", "123.5", "12346", "0.000"]
        );
    }
}
