//! When requests come.

use std::time::Duration;

/// Random numbers that are the same for the same seed (splitmix64).
#[derive(Debug, Clone)]
pub(super) struct Dice(u64);

impl Dice {
    /// Independent of the dice of another `stream` of the same seed.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mixed = Self(seed).next();
        Self(Self(mixed ^ stream).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to below `bound`, which is at least 1.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        // The high half of a product: no multiple of a small bound is preferred by more than 2^-32 or so.
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// Above 0, up to 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

/// Moments of a Poisson process of so many a second, from its start; the first is at 0.
#[derive(Debug)]
pub(super) struct Arrivals {
    dice: Dice,
    rate: f64,
    at: f64,
}

impl Arrivals {
    pub(super) fn new(rate: f64, seed: u64) -> Self {
        Self { dice: Dice::new(seed, u64::MAX), rate, at: 0.0 }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let at = Duration::try_from_secs_f64(self.at).ok()?;
        self.at -= self.dice.unit().ln() / self.rate;
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_between_arrivals_are_exponential() {
        let arrivals: Vec<f64> =
            Arrivals::new(50.0, 7).take(20_001).map(|moment| moment.as_secs_f64()).collect();
        assert_eq!(arrivals[0], 0.0);
        let gaps: Vec<f64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((mean * 50.0 - 1.0).abs() < 0.03, "{mean}");
        // As many are longer than the mean as e says, and than twice the mean.
        for (times, share) in [(1.0, (-1.0_f64).exp()), (2.0, (-2.0_f64).exp())] {
            let longer = gaps.iter().filter(|gap| **gap > times / 50.0).count() as f64 / gaps.len() as f64;
            assert!((longer - share).abs() < 0.015, "{times}: {longer}, expected {share}");
        }
    }

    #[test]
    fn seeds_repeat_and_differ() {
        let first = |seed| Arrivals::new(3.0, seed).take(5).collect::<Vec<_>>();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
        let draws = |seed, stream| {
            let mut dice = Dice::new(seed, stream);
            [0; 8].map(|_| dice.below(1000))
        };
        assert_ne!(draws(1, 2), draws(2, 1));
    }

    #[test]
    fn every_number_below_the_bound_comes_about_equally_often() {
        let (mut dice, mut counts) = (Dice::new(0, 0), [0; 7]);
        (0..70_000).for_each(|_| counts[dice.below(7)] += 1);
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
    }
}
