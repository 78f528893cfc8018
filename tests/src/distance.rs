//! Distances between log-probabilities.

/// `log_softmax` of one row.
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln();
    logits.iter().map(|logit| logit - max - log_sum).collect()
}

/// The index of the largest value; the lower one of equals.
pub fn argmax(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// |delta logprob| at every position between two `[positions, vocab]` logits.
pub struct LogprobDelta {
    /// Of the target: the prompt's next token, at the last position the judge's best.
    pub target: Vec<f64>,
    /// Of the token where it is largest.
    pub worst: Vec<f64>,
}

impl LogprobDelta {
    /// Compares `logits` with the judge's.
    pub fn new(logits: &[f64], judge: &[f64], tokens: &[u32]) -> Self {
        assert_eq!(logits.len(), judge.len(), "as many logits as the judge has");
        let vocab_size = judge.len() / tokens.len();
        let (mut target, mut worst) = (Vec::new(), Vec::new());
        for (position, (row, judge)) in logits.chunks(vocab_size).zip(judge.chunks(vocab_size)).enumerate() {
            let next = tokens.get(position + 1).map_or_else(|| argmax(judge), |&token| token as usize);
            let deltas: Vec<f64> =
                log_softmax(row).iter().zip(log_softmax(judge)).map(|(a, b)| (a - b).abs()).collect();
            target.push(deltas[next]);
            // NaN must win, so that it fails every bound.
            worst.push(deltas.iter().copied().fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a }));
        }
        Self { target, worst }
    }
}

/// The share of `values` that are at most `bound` (NaN is not).
pub fn share_within(values: &[f64], bound: f64) -> f64 {
    values.iter().filter(|value| **value <= bound).count() as f64 / values.len() as f64
}

/// The largest of `values`; NaN if there is one.
pub fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

/// The mean of `values`.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The `q`-quantile of `values`, linearly interpolated as numpy does.
pub fn percentile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = q * (sorted.len() - 1) as f64;
    let (low, share) = (place as usize, place.fract());
    sorted[low] + share * (sorted[(low + 1).min(sorted.len() - 1)] - sorted[low])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_sums_to_one_and_survives_large_logits() {
        let logprobs = log_softmax(&[1000.0, 1001.0, 999.0]);
        assert!((logprobs.iter().map(|l| l.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn percentiles_interpolate() {
        assert_eq!(percentile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(percentile(&[0.0, 10.0], 0.99), 9.9);
    }

    #[test]
    fn a_nan_fails_every_bound() {
        let delta = LogprobDelta::new(&[f64::NAN, 0.0], &[0.0, 0.0], &[0]);
        assert!(largest(&delta.worst).is_nan());
        assert_eq!(share_within(&delta.worst, 1e9), 0.0);
    }
}
