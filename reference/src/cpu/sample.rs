//! `sample`: penalties, filters, the draw, and log-probabilities.
//!
//! All of it runs in f64, whatever `F` is: the vocabulary is wide, the work per token small, and a temperature near zero
//! overflows nothing.

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

pub(super) fn sample<F: Real>(
    _cpu: &Cpu<F>,
    logits: &CpuTensor<F>,
    rows: &[SampleRow<'_>],
    out: &mut SampleOutput<CpuTensor<F>>,
) -> Result<()> {
    let check = Check("sample");
    let [count, vocab] = logits.dims(check.0, "logits")?;
    check.shape("logits", logits, count == rows.len() && (vocab > 0 || count == 0), || {
        format!("[{}, V] with V at least 1", rows.len())
    })?;
    out.token_ids.expect_shape(check.0, "token_ids", &[count])?;
    out.logprobs.expect_shape(check.0, "logprobs", &[count])?;
    let [_, n] = out.top_ids.dims(check.0, "top_ids")?;
    out.top_ids.expect_shape(check.0, "top_ids", &[count, n])?;
    out.top_logprobs.expect_shape(check.0, "top_logprobs", &[count, n])?;
    for row in rows {
        check_params(check, row.params)?;
        if let Some(token) = row.forced {
            check.value("forced", (token as usize) < vocab, || format!("a token below {vocab}"), token)?;
        }
    }
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
    // 5: temperature. Measured from the best token, which changes no probability and no draw, and cannot overflow.
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

/// Cuts `ids` to the smallest set of best tokens that holds `top_p` of the probability that `ids` share, best first.
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

/// Gumbel-max over `kept`: each token's noise depends on seed, position and token alone, never on the others that are kept.
fn draw(scaled: &[f64], kept: &[u32], greedy: u32, row: &SampleRow<'_>) -> u32 {
    let noisy = |token: u32| {
        let u = f64::from(uniform(row.params.seed, row.position, token));
        scaled[token as usize] - (-u.ln()).ln()
    };
    // The best token is always kept; from its value on, tokens too improbable for any noise need no random number.
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

/// Cuts `ids` to the `k` (or all) with the highest scores, best first, ties to the lower id; `k` is at least 1.
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
