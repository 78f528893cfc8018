//! `sample`: penalties, filters, the draw, and log-probabilities.
//!
//! All of it runs in f64, whatever `F` is: the vocabulary is wide, the work per token small, and a
//! temperature near zero overflows nothing.

use std::cmp::Ordering;

use super::checks::Check;
use super::order::rank;
use super::parallel::for_rows;
use super::{Cpu, CpuTensor, Real};
use crate::error::Result;
use crate::kernels::SampleOutput;
use crate::sampling::{SampleRow, SamplingParams, uniform};

/// No Gumbel noise exceeds this: `-ln(-ln(1 - 2^-24))` is 16.64.
const MAX_NOISE: f64 = 17.0;

/// Tokens that `top_p` sorts at first; most distributions are cut within them.
const TOP_P_BLOCK: usize = 64;

const CHECK: Check = Check("sample");

pub(super) fn sample<F: Real>(
    _cpu: &Cpu<F>,
    logits: &CpuTensor<F>,
    rows: &[SampleRow<'_>],
    out: &mut SampleOutput<CpuTensor<F>>,
) -> Result<()> {
    let check = CHECK;
    let [count, vocab] = logits.dims(check.0, "logits")?;
    check.shape("logits", logits, count == rows.len() && (vocab > 0 || count == 0), || {
        format!("[{}, V] with V at least 1", rows.len())
    })?;
    out.token_ids.expect_shape(check.0, "token_ids", &[count])?;
    out.logprobs.expect_shape(check.0, "logprobs", &[count])?;
    let [_, n] = out.top_ids.dims(check.0, "top_ids")?;
    out.top_ids.expect_shape(check.0, "top_ids", &[count, n])?;
    out.top_logprobs.expect_shape(check.0, "top_logprobs", &[count, n])?;
    rows.iter().try_for_each(|row| check_row(row, vocab))?;
    let logits = check.float("logits", logits)?;
    let token_ids = out.token_ids.indices_mut(check.0, "token_ids")?;
    let logprobs = check.float_mut("logprobs", &mut out.logprobs)?;
    let top_ids = out.top_ids.indices_mut(check.0, "top_ids")?;
    let top_logprobs = check.float_mut("top_logprobs", &mut out.top_logprobs)?;

    let mut choices = vec![Choice::default(); count];
    // Two exponentials, a comparison and a random number a token.
    for_rows(&mut choices, 1, count * vocab * 40, |i, choice| {
        choice[0] = choose_and_score(&logits[i * vocab..][..vocab], &rows[i], n);
    });
    for (i, choice) in choices.iter().enumerate() {
        token_ids[i] = choice.token as i32;
        logprobs[i] = F::of(choice.logprob);
        let top = choice.top.iter().map(|&(token, logprob)| (token as i32, logprob));
        let padded = top.chain(std::iter::repeat((-1, f64::NEG_INFINITY))).take(n);
        for (j, (token, logprob)) in padded.enumerate() {
            top_ids[i * n + j] = token;
            top_logprobs[i * n + j] = F::of(logprob);
        }
    }
    Ok(())
}

/// What a row's result is.
#[derive(Debug, Clone, Default)]
struct Choice {
    token: u32,
    logprob: f64,
    top: Vec<(u32, f64)>,
}

pub(crate) fn check_row(row: &SampleRow<'_>, vocab: usize) -> Result<()> {
    check_params(CHECK, row.params)?;
    let Some(token) = row.forced else { return Ok(()) };
    CHECK.value("forced", (token as usize) < vocab, || format!("a token below {vocab}"), token)
}

fn check_params(check: Check, params: &SamplingParams) -> Result<()> {
    let SamplingParams { temperature, top_p, min_p, repetition_penalty, .. } = *params;
    let at_least_0 = || "a number, 0 or more".into();
    let share = || "0 to 1".into();
    check.value("temperature", temperature.is_finite() && temperature >= 0.0, at_least_0, temperature)?;
    check.value("top_p", (0.0..=1.0).contains(&top_p), share, top_p)?;
    check.value("min_p", (0.0..=1.0).contains(&min_p), share, min_p)?;
    check.value(
        "repetition_penalty",
        repetition_penalty.is_finite() && repetition_penalty > 0.0,
        || "a positive number".into(),
        repetition_penalty,
    )?;
    for (name, value) in
        [("frequency_penalty", params.frequency_penalty), ("presence_penalty", params.presence_penalty)]
    {
        check.value(name, value.is_finite(), || "a finite number".into(), value)?;
    }
    match params.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
        None => Ok(()),
        Some((token, bias)) => {
            Err(check.bad_value("logit_bias", format!("a finite number for token {token}"), bias))
        }
    }
}

fn choose_and_score<F: Real>(logits: &[F], row: &SampleRow<'_>, n: usize) -> Choice {
    let logits: Vec<f64> = logits.iter().map(|x| x.wide()).collect();
    let token = row.forced.unwrap_or_else(|| choose(&logits, row));
    let log_softmax = LogSoftmax::new(&logits);
    let mut top: Vec<u32> = Vec::new();
    if n > 0 {
        top.extend(0..logits.len() as u32);
        keep_best(&mut top, n, &logits);
    }
    let top = top.into_iter().map(|id| (id, log_softmax.of(logits[id as usize]))).collect();
    Choice { token, logprob: log_softmax.of(logits[token as usize]), top }
}

/// `x - ln(sum exp)` over the raw logits.
struct LogSoftmax {
    max: f64,
    ln_total: f64,
}

impl LogSoftmax {
    fn new(logits: &[f64]) -> Self {
        let max = logits[best(logits) as usize];
        let total: f64 = logits.iter().map(|&x| below(x, max).exp()).sum();
        Self { max, ln_total: total.ln() }
    }

    fn of(&self, logit: f64) -> f64 {
        if self.max.is_nan() { f64::NAN } else { below(logit, self.max) - self.ln_total }
    }
}

/// `x - max`, also for infinities; negative infinity for NaN.
fn below(x: f64, max: f64) -> f64 {
    if x == max {
        0.0
    } else if x.is_nan() {
        f64::NEG_INFINITY
    } else {
        x - max
    }
}

/// The token for a row that is not forced.
fn choose(logits: &[f64], row: &SampleRow<'_>) -> u32 {
    let params = row.params;
    let mut adjusted = logits.to_vec();
    // 1 to 4: banned tokens, `logit_bias`, repetition penalty, frequency and presence penalties.
    adjust(&mut adjusted, row);
    let greedy = best(&adjusted);
    let max = adjusted[greedy as usize];
    if max.is_nan() || max == f64::NEG_INFINITY {
        // Nothing is left to choose.
        return best(logits);
    }
    if params.temperature == 0.0 {
        return greedy;
    }
    // 5: temperature. Measured from the best token, which changes no probability and no draw, and cannot
    // overflow.
    let temperature = f64::from(params.temperature);
    let scaled: Vec<f64> = adjusted.iter().map(|&x| below(x, max) / temperature).collect();
    // 6 to 8: `min_p`, `top_k`, `top_p`.
    let kept = keep(&scaled, params);
    // 9: the draw.
    draw(&scaled, &kept, greedy, row)
}

/// Bans, biases and penalties, each on what the one before left.
fn adjust(logits: &mut [f64], row: &SampleRow<'_>) {
    let params = row.params;
    for &token in row.banned {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f64::NEG_INFINITY;
        }
    }
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += f64::from(bias);
        }
    }
    if params.repetition_penalty != 1.0 {
        let penalty = f64::from(params.repetition_penalty);
        let counts = count(logits.len(), row.prompt.iter().chain(row.output));
        for (logit, _) in logits.iter_mut().zip(counts).filter(|(_, count)| *count > 0) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
    if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
        let (frequency, presence) = (f64::from(params.frequency_penalty), f64::from(params.presence_penalty));
        let counts = count(logits.len(), row.output.iter());
        for (logit, count) in logits.iter_mut().zip(counts).filter(|(_, count)| *count > 0) {
            *logit -= frequency * f64::from(count) + presence;
        }
    }
}

/// How often each token of the vocabulary occurs.
fn count<'a>(vocab: usize, tokens: impl Iterator<Item = &'a u32>) -> Vec<u32> {
    let mut counts = vec![0; vocab];
    for &token in tokens {
        if let Some(count) = counts.get_mut(token as usize) {
            *count += 1;
        }
    }
    counts
}

/// The tokens that may be drawn, at least one; `scaled` are log-probabilities relative to the best token's.
fn keep(scaled: &[f64], params: &SamplingParams) -> Vec<u32> {
    let min_p = f64::from(params.min_p);
    let mut ids: Vec<u32> = (0..scaled.len() as u32)
        .filter(|&id| {
            let x = scaled[id as usize];
            x > f64::NEG_INFINITY && (min_p == 0.0 || x.exp() >= min_p)
        })
        .collect();
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < ids.len() {
        keep_best(&mut ids, top_k, scaled);
        // Back in order, so that the sum below does not depend on how a selection permutes.
        ids.sort_unstable();
    }
    if params.top_p < 1.0 {
        keep_top_p(&mut ids, f64::from(params.top_p), scaled);
    }
    ids
}

/// Cuts `ids` to the smallest set of best tokens that holds `top_p` of the probability that `ids` share, best
/// first.
///
/// Sorts block after block of the best ones that are left, until the sum is reached.
fn keep_top_p(ids: &mut Vec<u32>, top_p: f64, scaled: &[f64]) {
    let enough = top_p * ids.iter().map(|&id| scaled[id as usize].exp()).sum::<f64>();
    let by_score = best_first(scaled);
    let (mut kept, mut sum, mut block) = (0, 0.0, TOP_P_BLOCK);
    'blocks: while kept < ids.len() {
        let rest = &mut ids[kept..];
        let n = block.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, &by_score);
        }
        let head = &mut rest[..n];
        head.sort_unstable_by(&by_score);
        for &id in &*head {
            kept += 1;
            sum += scaled[id as usize].exp();
            if sum >= enough {
                break 'blocks;
            }
        }
        block *= 4;
    }
    ids.truncate(kept);
}

/// Gumbel-max over `kept`: each token's noise depends on seed, position and token alone, never on the others
/// that are kept.
fn draw(scaled: &[f64], kept: &[u32], greedy: u32, row: &SampleRow<'_>) -> u32 {
    let noisy = |token: u32| {
        let u = f64::from(uniform(row.params.seed, row.position, token));
        scaled[token as usize] - (-u.ln()).ln()
    };
    // The best token is always kept; from its value on, tokens too improbable for any noise need no random
    // number.
    let (mut chosen, mut highest) = (greedy, noisy(greedy));
    for &token in kept {
        if scaled[token as usize] + MAX_NOISE < highest {
            continue;
        }
        let value = noisy(token);
        if value > highest || (value == highest && token < chosen) {
            (chosen, highest) = (token, value);
        }
    }
    chosen
}

/// The highest logit, ties to the lower id, NaN below all.
fn best(logits: &[f64]) -> u32 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if rank(logit) > rank(logits[best]) {
            best = id;
        }
    }
    best as u32
}

/// Cuts `ids` to the `k` (or all) with the highest scores, best first, ties to the lower id; `k` is at least
/// 1.
fn keep_best(ids: &mut Vec<u32>, k: usize, scores: &[f64]) {
    let by_score = best_first(scores);
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, &by_score);
        ids.truncate(k);
    }
    ids.sort_unstable_by(&by_score);
}

fn best_first(scores: &[f64]) -> impl Fn(&u32, &u32) -> Ordering {
    |&a, &b| rank(scores[b as usize]).cmp(&rank(scores[a as usize])).then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::testing::{
        assert_close, message, on_one_and_four_threads, poisoned, randoms, read, read_index, tensor,
    };
    use crate::tensor::DType;

    fn row(params: &SamplingParams) -> SampleRow<'_> {
        SampleRow { params, prompt: &[], output: &[], banned: &[], position: 0, forced: None }
    }

    fn output<F: Real>(count: usize, n: usize) -> SampleOutput<CpuTensor<F>> {
        SampleOutput {
            token_ids: poisoned(DType::Index, &[count]),
            logprobs: poisoned(DType::Float, &[count]),
            top_ids: poisoned(DType::Index, &[count, n]),
            top_logprobs: poisoned(DType::Float, &[count, n]),
        }
    }

    fn run(logits: &[f64], rows: &[SampleRow<'_>], n: usize) -> SampleOutput<CpuTensor<f32>> {
        let logits = tensor(DType::Float, &[rows.len(), logits.len() / rows.len()], logits);
        let mut out = output(rows.len(), n);
        sample(&Cpu::new(), &logits, rows, &mut out).unwrap();
        out
    }

    fn token(logits: &[f64], row: SampleRow<'_>) -> i32 {
        read_index(&run(logits, &[row], 0).token_ids)[0]
    }

    fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..Default::default() }
    }

    fn softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
        let e: Vec<f64> = logits.iter().map(|x| (x / temperature).exp()).collect();
        let total: f64 = e.iter().sum();
        e.iter().map(|e| e / total).collect()
    }

    /// How often each token comes out of `draws` positions.
    fn frequencies(logits: &[f64], params: &SamplingParams, draws: u32) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..draws {
            counts[choose(logits, &SampleRow { position, ..row(params) }) as usize] += 1.0;
        }
        counts
    }

    /// Pearson's statistic of `draws` counts against `p`, over the tokens that `p` allows.
    fn chi_square(counts: &[f64], p: &[f64], draws: f64) -> f64 {
        counts
            .iter()
            .zip(p)
            .map(|(&count, &p)| {
                assert!(p > 0.0 || count == 0.0, "a token without probability was drawn");
                if p > 0.0 { (count - draws * p).powi(2) / (draws * p) } else { 0.0 }
            })
            .sum()
    }

    #[test]
    fn greedy_takes_the_highest_and_the_lower_of_equals() {
        let params = greedy();
        assert_eq!(token(&[1.0, 3.0, 2.0, 3.0], row(&params)), 1);
        assert_eq!(token(&[-0.0, 0.0], row(&params)), 0);
        assert_eq!(token(&[f64::NAN, -5.0, f64::NAN], row(&params)), 1);
        assert_eq!(token(&[f64::NEG_INFINITY, f64::INFINITY, 3.0], row(&params)), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = randoms(1, 24).iter().map(|x| 3.0 * x).collect::<Vec<_>>();
        for (temperature, seed) in [(1.0, 11), (0.5, 12), (2.0, 13)] {
            let params = SamplingParams { temperature, seed, ..Default::default() };
            let counts = frequencies(&logits, &params, 20_000);
            let p = softmax(&logits, f64::from(temperature));
            // 23 degrees of freedom: 52 is exceeded once in two thousand; the seeds are fixed.
            let chi = chi_square(&counts, &p, 20_000.0);
            assert!(chi < 52.0, "{chi}");
        }
    }

    #[test]
    fn draws_follow_the_renormalised_kept_set() {
        // Probabilities 0.4, 0.3, 0.2, 0.1 in mixed order.
        let logits = [0.2f64.ln(), 0.4f64.ln(), 0.1f64.ln(), 0.3f64.ln()];
        let default = SamplingParams { seed: 5, ..Default::default() };
        for (params, p) in [
            (SamplingParams { top_k: 2, ..default.clone() }, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]),
            (SamplingParams { top_p: 0.65, ..default.clone() }, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]),
            (SamplingParams { top_p: 0.75, ..default.clone() }, [2.0 / 9.0, 4.0 / 9.0, 0.0, 3.0 / 9.0]),
            (SamplingParams { min_p: 0.45, ..default.clone() }, [2.0 / 9.0, 4.0 / 9.0, 0.0, 3.0 / 9.0]),
            // Of what top_k leaves, the first holds 4/7 = 0.571.
            (SamplingParams { top_k: 2, top_p: 0.57, ..default.clone() }, [0.0, 1.0, 0.0, 0.0]),
            (SamplingParams { min_p: 0.7, top_p: 0.58, ..default }, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]),
        ] {
            let chi = chi_square(&frequencies(&logits, &params, 10_000), &p, 10_000.0);
            assert!(chi < 16.0, "{params:?}: {chi}");
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours_their_order_or_threads() {
        let vocab = 3000;
        let params: Vec<_> = (0..16)
            .map(|i| SamplingParams {
                seed: i / 2,
                top_p: if i % 3 == 0 { 0.9 } else { 1.0 },
                top_k: if i % 5 == 0 { 40 } else { 0 },
                ..Default::default()
            })
            .collect();
        let rows: Vec<_> =
            (0..).zip(&params).map(|(position, params)| SampleRow { position, ..row(params) }).collect();
        let logits = randoms(3, 16 * vocab);
        let [one, four] = on_one_and_four_threads(|| {
            let out = run(&logits, &rows, 3);
            (
                read_index(&out.token_ids),
                read(&out.logprobs),
                read_index(&out.top_ids),
                read(&out.top_logprobs),
            )
        });
        assert_eq!(one, four);
        let reversed_rows: Vec<_> = rows.iter().rev().copied().collect();
        let reversed: Vec<f64> = logits.chunks(vocab).rev().flatten().copied().collect();
        let mut tokens = read_index(&run(&reversed, &reversed_rows, 0).token_ids);
        tokens.reverse();
        assert_eq!(tokens, one.0);
        for (i, row) in rows.iter().enumerate() {
            assert_eq!(token(&logits[i * vocab..][..vocab], *row), one.0[i]);
        }
    }

    #[test]
    fn the_draw_is_gumbel_max_whatever_is_skipped() {
        for seed in 0..200 {
            let params = SamplingParams { seed, temperature: 0.3, ..Default::default() };
            let logits: Vec<f64> = randoms(seed, 200).iter().map(|x| 8.0 * x).collect();
            let value = |token: u32| {
                let u = f64::from(uniform(seed, 9, token));
                logits[token as usize] / f64::from(0.3f32) - (-u.ln()).ln()
            };
            let expected = (0..200).max_by(|&a, &b| value(a).total_cmp(&value(b))).unwrap();
            assert_eq!(choose(&logits, &SampleRow { position: 9, ..row(&params) }), expected);
        }
    }

    #[test]
    fn noise_has_the_stated_bound() {
        let largest = 1.0 - 2f64.powi(-24);
        assert!(-(-largest.ln()).ln() < MAX_NOISE);
    }

    proptest! {
        #[test]
        fn kept_sets_match_sorts(
            logits in prop::collection::vec(
                prop_oneof![
                    3 => (-4..4i32).prop_map(f64::from),
                    3 => -9.0..9.0f64,
                    1 => Just(f64::NEG_INFINITY),
                ],
                1..300,
            ),
            top_k in 0..40u32,
            top_p in prop_oneof![Just(1.0f32), Just(0.0), 0.0..1.0f32],
            min_p in prop_oneof![Just(0.0f32), Just(1.0), 0.0..1.0f32],
        ) {
            prop_assume!(logits.iter().any(|x| x.is_finite()));
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let params = SamplingParams { top_k, top_p, min_p, ..Default::default() };
            let scaled: Vec<f64> = logits.iter().map(|x| x - max).collect();
            let mut actual = keep(&scaled, &params);
            actual.sort_unstable();

            let mut expected: Vec<u32> = (0..logits.len() as u32).collect();
            let p = |id: &u32| (logits[*id as usize] - max).exp();
            expected.retain(|id| p(id) > 0.0 && p(id) >= f64::from(min_p));
            expected.sort_by(|a, b| p(b).partial_cmp(&p(a)).unwrap());
            if top_k > 0 {
                expected.truncate(top_k as usize);
            }
            let total: f64 = expected.iter().map(p).sum();
            let mut n = 0;
            let mut sum = 0.0;
            // Rounding may move the cut when the sum meets the bound to the last bits; the case is dropped.
            for id in &expected {
                n += 1;
                sum += p(id);
                prop_assume!((sum / total - f64::from(top_p)).abs() > 1e-12 || top_p == 1.0);
                if top_p < 1.0 && sum >= f64::from(top_p) * total {
                    break;
                }
            }
            expected.truncate(n);
            expected.sort_unstable();
            prop_assert!(!actual.is_empty());
            prop_assert_eq!(actual, expected);
        }
    }

    #[test]
    fn penalties_by_hand() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            logit_bias: vec![(0, 1.0), (4, -8.0), (4, 3.0)],
            ..Default::default()
        };
        let row = SampleRow { prompt: &[0, 1, 0], output: &[1, 2, 2], banned: &[3], ..row(&params) };
        let mut logits = [3.0, -1.0, 2.0, 9.0, 7.0];
        adjust(&mut logits, &row);
        assert_eq!(
            logits,
            [
                (3.0 + 1.0) / 2.0, // in the prompt twice: divided once, after the bias
                -2.0 - 0.5 - 0.25, // negative: multiplied; once in the output
                2.0 / 2.0 - 2.0 * 0.5 - 0.25,
                f64::NEG_INFINITY,
                7.0 - 8.0 + 3.0,
            ]
        );
    }

    #[test]
    fn a_ban_survives_a_bias_and_unknown_ids_do_nothing() {
        let params = SamplingParams {
            logit_bias: vec![(1, 100.0), (u32::MAX, 1.0)],
            repetition_penalty: 1.5,
            presence_penalty: 1.0,
            ..greedy()
        };
        let far = [7, u32::MAX];
        let row = SampleRow { prompt: &far, output: &far, banned: &[1, 99], ..row(&params) };
        assert_eq!(token(&[1.0, 5.0, 2.0], row), 2);
    }

    #[test]
    fn with_nothing_left_the_highest_raw_logit_is_taken() {
        for params in [greedy(), SamplingParams::default()] {
            let row = SampleRow { banned: &[0, 1, 2], ..row(&params) };
            assert_eq!(token(&[1.0, 5.0, 2.0], row), 1);
            let all_but_nan = SampleRow { banned: &[1], ..row };
            assert_eq!(token(&[f64::NAN, 5.0, f64::NAN], all_but_nan), 1);
        }
    }

    #[test]
    fn broken_logits_are_not_drawn() {
        for seed in 0..300 {
            let params = SamplingParams { seed, temperature: 5.0, ..Default::default() };
            let logits = [f64::NAN, 0.0, f64::NEG_INFINITY, 0.5, f64::NAN];
            assert!([1, 3].contains(&token(&logits, row(&params))));
            assert!([0, 2].contains(&token(&[f64::INFINITY, 1e30, f64::INFINITY], row(&params))));
            assert_eq!(token(&[f64::NAN; 3], row(&params)), 0);
        }
        let nan = run(&[f64::NAN; 3], &[row(&greedy())], 2);
        assert!(read(&nan.logprobs)[0].is_nan() && read(&nan.top_logprobs)[0].is_nan());
    }

    #[test]
    fn extreme_parameters_stay_defined() {
        let logits = [1.0, 1.5, 1.4999];
        let cold = SamplingParams { temperature: f32::from_bits(1), ..Default::default() };
        assert_eq!(token(&logits, row(&cold)), 1);
        let hot = SamplingParams { temperature: f32::MAX, ..Default::default() };
        let counts = frequencies(&logits, &hot, 3000);
        assert!(chi_square(&counts, &[1.0 / 3.0; 3], 3000.0) < 14.0, "{counts:?}");
        for one in [
            SamplingParams { top_p: 0.0, ..Default::default() },
            SamplingParams { top_k: 1, ..Default::default() },
            SamplingParams { min_p: 1.0, ..Default::default() },
        ] {
            assert_eq!(frequencies(&logits, &one, 100)[1], 100.0);
        }
        let wide = SamplingParams { top_k: u32::MAX, ..Default::default() };
        assert!(frequencies(&logits, &wide, 200).iter().all(|&count| count > 0.0));
    }

    #[test]
    fn log_probabilities_are_of_the_raw_logits() {
        let logits: Vec<f64> = randoms(1, 10).iter().map(|x| 5.0 * x).collect();
        let params =
            SamplingParams { temperature: 0.1, top_k: 1, logit_bias: vec![(3, 50.0)], ..Default::default() };
        let out = run(&logits, &[row(&params)], 4);
        let expected: Vec<f64> = softmax(&logits, 1.0).iter().map(|p| p.ln()).collect();
        assert_eq!(read_index(&out.token_ids), [3]);
        assert_close(&read(&out.logprobs), &expected[3..4], 1e-6);
        let mut order: Vec<usize> = (0..10).collect();
        order.sort_by(|&a, &b| expected[b].total_cmp(&expected[a]));
        assert_eq!(read_index(&out.top_ids), order[..4].iter().map(|&id| id as i32).collect::<Vec<_>>());
        assert_close(
            &read(&out.top_logprobs),
            &order[..4].iter().map(|&id| expected[id]).collect::<Vec<_>>(),
            1e-6,
        );
    }

    #[test]
    fn top_tokens_break_ties_downwards_and_are_padded() {
        let out = run(&[1.0, 2.0, 2.0, f64::NAN], &[row(&greedy())], 6);
        assert_eq!(read_index(&out.top_ids), [1, 2, 0, 3, -1, -1]);
        let logprobs = read(&out.top_logprobs);
        assert_eq!(logprobs[0], logprobs[1]);
        assert_eq!(logprobs[3..], [f64::NEG_INFINITY; 3]);
        let total: f64 = logprobs.iter().map(|x| x.exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
    }

    #[test]
    fn log_probabilities_of_large_logits_do_not_overflow() {
        let out = run(&[1e4, 1e4, -1e4], &[row(&greedy())], 3);
        assert_close(&read(&out.top_logprobs), &[-(2f64.ln()), -(2f64.ln()), -2e4 - 2f64.ln()], 1e-6);
        let out = run(&[f64::INFINITY, 0.0], &[row(&greedy())], 2);
        assert_eq!(read(&out.top_logprobs), [0.0, f64::NEG_INFINITY]);
    }

    #[test]
    fn a_forced_row_reports_its_token() {
        let params = SamplingParams::default();
        let forced = SampleRow { forced: Some(2), banned: &[2], ..row(&params) };
        let out = run(&[1.0, 5.0, 2.0], &[forced], 0);
        assert_eq!(read_index(&out.token_ids), [2]);
        assert_close(&read(&out.logprobs), &[softmax(&[1.0, 5.0, 2.0], 1.0)[2].ln()], 1e-6);
    }

    #[test]
    fn what_means_nothing_is_refused_by_name() {
        let logits = tensor::<f32>(DType::Float, &[1, 3], &[0.0; 3]);
        let refuse = |params: SamplingParams, forced| {
            let row = SampleRow { forced, ..row(&params) };
            message(sample(&Cpu::new(), &logits, &[row], &mut output(1, 0)))
        };
        let default = SamplingParams::default;
        assert!(refuse(default(), Some(3)).contains("sample: `forced` is 3"));
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(refuse(SamplingParams { temperature, ..default() }, None).contains("`temperature`"));
        }
        assert!(refuse(SamplingParams { top_p: 1.5, ..default() }, None).contains("`top_p`"));
        assert!(refuse(SamplingParams { min_p: f32::NAN, ..default() }, None).contains("`min_p`"));
        let zero = SamplingParams { repetition_penalty: 0.0, ..default() };
        assert!(refuse(zero, None).contains("`repetition_penalty`"));
        let nan = SamplingParams { presence_penalty: f32::NAN, ..default() };
        assert!(refuse(nan, None).contains("`presence_penalty`"));
        let infinite = SamplingParams { logit_bias: vec![(1, f32::INFINITY)], ..default() };
        assert!(refuse(infinite, None).contains("`logit_bias`"));
    }

    #[test]
    fn misfits_are_named() {
        let logits = tensor::<f32>(DType::Float, &[2, 3], &[0.0; 6]);
        let params = SamplingParams::default();
        let rows = [row(&params); 2];
        let cpu = Cpu::new();
        assert!(message(sample(&cpu, &logits, &rows[..1], &mut output(1, 0))).contains("`logits`"));
        assert!(message(sample(&cpu, &logits, &rows, &mut output(3, 0))).contains("`token_ids`"));
        let mut wide = output(2, 2);
        wide.top_logprobs = poisoned(DType::Float, &[2, 3]);
        assert!(message(sample(&cpu, &logits, &rows, &mut wide)).contains("`top_logprobs`"));
        let empty = tensor::<f32>(DType::Float, &[2, 0], &[]);
        assert!(message(sample(&cpu, &empty, &rows, &mut output(2, 0))).contains("at least 1"));
        let none = tensor::<f32>(DType::Float, &[0, 3], &[]);
        sample(&cpu, &none, &[], &mut output(0, 2)).unwrap();
    }
}
