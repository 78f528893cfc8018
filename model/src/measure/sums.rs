//! What ranks sum and gather to be checked, and what it must come to.

use dsa80_reference::random;

/// Whether ranks have computed the right sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Check {
    /// The same on every rank, bit for bit.
    pub identical: bool,
    /// The same when it is done again (from a graph, where there are any), bit for bit.
    pub repeats: bool,
    /// The largest error, as a share of what rounding explains.
    pub worst: f64,
}

impl Check {
    /// Whether the times beside it count.
    pub fn holds(&self) -> bool {
        self.identical && self.repeats && self.worst <= 1.0
    }
}

/// A sum over `ranks` of `rows` of `hidden` elements, all of which bf16 holds exactly.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sums {
    pub(super) rows: usize,
    pub(super) hidden: usize,
    pub(super) ranks: usize,
}

/// A gathering over `ranks` of `rows` of so many `columns`, of which every rank brings its part.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gathering {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) ranks: usize,
}

impl Gathering {
    /// Columns of a rank.
    pub(super) fn share(self) -> usize {
        self.columns / self.ranks
    }

    /// What a rank brings.
    pub(super) fn part(self, rank: usize) -> Vec<f64> {
        (0..self.rows * self.share()).map(|i| element(i, rank as u32)).collect()
    }

    /// What all must have.
    pub(super) fn whole(self) -> Vec<f64> {
        let share = self.share();
        let row = |row: usize| {
            (0..self.columns)
                .map(move |column| element(row * share + column % share, (column / share) as u32))
        };
        (0..self.rows).flat_map(row).collect()
    }
}

/// Half of the last place of a bf16, relative to it.
const BF16_UNIT: f64 = 1.0 / 256.0;

impl Sums {
    /// What a rank brings: below 16.
    pub(super) fn part(&self, rank: usize) -> Vec<f64> {
        (0..self.rows * self.hidden).map(|i| element(i, rank as u32)).collect()
    }

    /// What it is added to, alike on every rank.
    pub(super) fn residual(&self) -> Vec<f64> {
        (0..self.rows * self.hidden).map(|i| element(i, RESIDUAL)).collect()
    }

    /// What the norm is scaled with.
    pub(super) fn weight(&self) -> Vec<f32> {
        (0..self.hidden).map(|i| 1.0 + element(i, WEIGHT) as f32 / 64.0).collect()
    }

    /// The largest error of the sums, or of their norms with `eps`, as a share of what rounding explains: each of the sums on the way, the
    /// result, and for a norm also that of the sum that went into it.
    pub(super) fn worst(&self, found: &[f64], norm: Option<f64>) -> f64 {
        if found.len() != self.rows * self.hidden {
            return f64::INFINITY;
        }
        let weight = self.weight();
        let mut worst = 0.0_f64;
        for (row, found) in found.chunks(self.hidden.max(1)).enumerate() {
            let at = row * self.hidden;
            let parts = |i: usize| (0..self.ranks).map(move |rank| element(at + i, rank as u32));
            let of = |i: usize| {
                let (sum, size) = parts(i).fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                (sum, (self.ranks - 1).max(1) as f64 * BF16_UNIT * size)
            };
            let share = |found: f64, expected: f64, bound: f64| {
                let error = (found - expected).abs();
                // Also where it is not a number.
                if error <= bound { error / bound.max(f64::MIN_POSITIVE) } else { f64::INFINITY }
            };
            let Some(eps) = norm else {
                let shares = found.iter().enumerate().map(|(i, &found)| {
                    let (sum, bound) = of(i);
                    share(found, sum, bound)
                });
                worst = shares.fold(worst, f64::max);
                continue;
            };
            let residual = |i: usize| element(at + i, RESIDUAL) + of(i).0;
            let squares: f64 = (0..self.hidden).map(|i| residual(i).powi(2)).sum();
            let scale = 1.0 / (squares / self.hidden as f64 + eps).sqrt();
            let shares = found.iter().enumerate().map(|(i, &found)| {
                let factor = scale * f64::from(weight[i]);
                let expected = residual(i) * factor;
                // The scale too is of sums that were rounded.
                share(found, expected, of(i).1 * factor.abs() + 2.0 * BF16_UNIT * expected.abs())
            });
            worst = shares.fold(worst, f64::max);
        }
        worst
    }
}

const RESIDUAL: u32 = 1 << 16;
const WEIGHT: u32 = RESIDUAL + 1;

/// Seven bits of either sign, and one of four exponents: sums have to be rounded.
fn element(index: usize, seed: u32) -> f64 {
    let drawn = random::word(index as u64, seed);
    let (digits, exponent) = ((drawn % 255) as i32 - 127, drawn >> 30);
    f64::from(digits << exponent) / 64.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUMS: Sums = Sums { rows: 3, hidden: 40, ranks: 4 };

    #[test]
    fn a_gathering_has_every_ranks_columns_in_rank_order() {
        let of = Gathering { rows: 2, columns: 6, ranks: 3 };
        let parts = [0, 1, 2].map(|rank| of.part(rank));
        let [a, b, c] = &parts;
        let whole = [&a[..2], &b[..2], &c[..2], &a[2..], &b[2..], &c[2..]].concat();
        assert_eq!(of.whole(), whole);
    }

    fn exact() -> Vec<f64> {
        let parts: Vec<Vec<f64>> = (0..4).map(|rank| SUMS.part(rank)).collect();
        (0..120).map(|i| parts.iter().map(|part| part[i]).sum()).collect()
    }

    fn normed(sums: &[f64]) -> Vec<f64> {
        let (residual, weight) = (SUMS.residual(), SUMS.weight());
        let added: Vec<f64> = residual.iter().zip(sums).map(|(r, x)| r + x).collect();
        let row = |row: &[f64]| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + 1e-5).sqrt();
            row.iter().zip(&weight).map(|(x, w)| x * scale * f64::from(*w)).collect::<Vec<f64>>()
        };
        added.chunks(40).flat_map(row).collect()
    }

    #[test]
    fn sums_that_are_right_or_rounded_pass_and_others_do_not() {
        let (sums, rounded) = (exact(), |x: &f64| half(*x));
        let norms = normed(&sums);
        for (right, norm) in [(&sums, None), (&norms, Some(1e-5))] {
            assert_eq!(SUMS.worst(right, norm).max(1e-9), 1e-9);
            let rounded: Vec<f64> = right.iter().map(rounded).collect();
            let worst = SUMS.worst(&rounded, norm);
            assert!(worst > 0.0 && worst <= 1.0, "{worst}");
        }
        // A rank that is missing, one that is there twice, rows that are swapped, a number that is none.
        let (last, mut swapped, mut none) = (SUMS.part(3), sums.clone(), sums.clone());
        swapped.rotate_left(40);
        none[119] = f64::NAN;
        let with =
            |share: f64| sums.iter().zip(&last).map(|(x, part)| x + share * part).collect::<Vec<f64>>();
        for wrong in [with(-1.0), with(1.0), swapped, none] {
            assert!(SUMS.worst(&wrong, None) > 1.0);
            assert!(SUMS.worst(&normed(&wrong), Some(1e-5)) > 1.0);
        }
        assert!(SUMS.worst(&sums[1..], None) > 1.0);
    }

    /// To a bf16.
    fn half(x: f64) -> f64 {
        f64::from(f32::from_bits(((x as f32).to_bits() + 0x8000) & 0xffff_0000))
    }
}
