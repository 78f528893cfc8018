//! `router`: which experts see a token.

use std::cmp::Ordering;

use super::checks::Check;
use super::order::rank;
use super::parallel::for_rows;
use super::{Cpu, CpuTensor, Real};
use crate::error::Result;
use crate::kernels::RouterParams;

/// Added to the sum that normalises the weights, as in HF: all-zero scores stay zero.
const NORM_EPS: f64 = 1e-20;

pub(super) fn router<F: Real>(
    _cpu: &Cpu<F>,
    logits: &CpuTensor<F>,
    bias: &CpuTensor<F>,
    params: RouterParams,
    topk_ids: &mut CpuTensor<F>,
    topk_weights: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("router");
    let RouterParams { n_group, topk_group, norm_topk_prob, routed_scaling_factor } = params;
    let [tokens, experts] = logits.dims(check.0, "logits")?;
    bias.expect_shape(check.0, "bias", &[experts])?;
    check.value(
        "n_group",
        n_group > 0 && experts.is_multiple_of(n_group),
        || format!("a divisor of {experts} experts"),
        n_group,
    )?;
    check.value(
        "topk_group",
        (1..=n_group).contains(&topk_group),
        || format!("1..={n_group}"),
        topk_group,
    )?;
    let group_size = experts / n_group;
    let [_, k] = topk_ids.dims(check.0, "topk_ids")?;
    topk_ids.expect_shape(check.0, "topk_ids", &[tokens, k])?;
    topk_weights.expect_shape(check.0, "topk_weights", &[tokens, k])?;
    check.shape("topk_ids", topk_ids, k <= topk_group * group_size, || {
        format!("at most the {} experts of {topk_group} groups", topk_group * group_size)
    })?;
    let logits = check.float("logits", logits)?;
    let bias: Vec<F> = bias.weights(check.0, "bias")?;
    let ids = topk_ids.indices_mut(check.0, "topk_ids")?;
    let weights = check.float_mut("topk_weights", topk_weights)?;
    let scaling = F::of(routed_scaling_factor);

    if k == 0 {
        return Ok(());
    }
    // A sigmoid and a comparison or two: some thirty multiply-adds an expert.
    let mut rows: Vec<_> = ids.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k)).collect();
    for_rows(&mut rows, 1, tokens * experts * 30, |t, row| {
        let (ids, weights) = &mut row[0];
        let scores: Vec<F> = logits[t * experts..][..experts].iter().map(|&x| sigmoid(x)).collect();
        let choice: Vec<F> = scores.iter().zip(&bias).map(|(&score, &bias)| score + bias).collect();
        let mut candidates: Vec<u32> = if topk_group == n_group {
            (0..experts as u32).collect()
        } else {
            let groups: Vec<F> = choice.chunks_exact(group_size).map(two_best).collect();
            let mut kept: Vec<u32> = (0..n_group as u32).collect();
            keep_best(&mut kept, topk_group, &groups);
            let size = group_size as u32;
            kept.iter().flat_map(|group| group * size..(group + 1) * size).collect()
        };
        keep_best(&mut candidates, k, &choice);
        for ((id, weight), &expert) in ids.iter_mut().zip(weights.iter_mut()).zip(&candidates) {
            *id = expert as i32;
            *weight = scores[expert as usize];
        }
        if norm_topk_prob {
            let total = weights.iter().copied().sum::<F>() + F::of(NORM_EPS);
            weights.iter_mut().for_each(|weight| *weight /= total);
        }
        weights.iter_mut().for_each(|weight| *weight *= scaling);
    });
    Ok(())
}

fn sigmoid<F: Real>(x: F) -> F {
    F::one() / (F::one() + (-x).exp())
}

/// The sum of a group's two best scores, or its only one; a NaN in the group is ranked last like everywhere.
fn two_best<F: Real>(group: &[F]) -> F {
    let mut best: Vec<u32> = (0..group.len() as u32).collect();
    keep_best(&mut best, group.len().min(2), group);
    best.iter().map(|&i| group[i as usize]).sum()
}

/// Cuts `ids` down to the `k` with the best scores, best first, ties to the lower id. `1 <= k <= ids.len()`.
fn keep_best<F: Real>(ids: &mut Vec<u32>, k: usize, scores: &[F]) {
    let by_score = |&a: &u32, &b: &u32| -> Ordering {
        rank(scores[b as usize]).cmp(&rank(scores[a as usize])).then(a.cmp(&b))
    };
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, by_score);
        ids.truncate(k);
    }
    ids.sort_unstable_by(by_score);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::testing::{
        assert_close, message, on_one_and_four_threads, poisoned, randoms, read, read_index, tensor,
    };
    use crate::tensor::DType;

    const PLAIN: RouterParams =
        RouterParams { n_group: 1, topk_group: 1, norm_topk_prob: true, routed_scaling_factor: 2.5 };

    fn route<F: Real>(logits: &[f64], bias: &[f64], k: usize, params: RouterParams) -> (Vec<i32>, Vec<f64>) {
        let tokens = logits.len() / bias.len();
        let logits = tensor::<F>(DType::Float, &[tokens, bias.len()], logits);
        let bias = tensor(DType::Float, &[bias.len()], bias);
        let mut ids = poisoned(DType::Index, &[tokens, k]);
        let mut weights = poisoned(DType::Float, &[tokens, k]);
        router(&Cpu::new(), &logits, &bias, params, &mut ids, &mut weights).unwrap();
        (read_index(&ids), read(&weights))
    }

    /// The contract in plain sorts.
    fn naive(logits: &[f64], bias: &[f64], k: usize, params: RouterParams) -> (Vec<i32>, Vec<f64>) {
        let s: Vec<f64> = logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
        let choice: Vec<f64> = s.iter().zip(bias).map(|(s, b)| s + b).collect();
        let size = bias.len() / params.n_group;
        let mut groups: Vec<usize> = (0..params.n_group).collect();
        let score = |group: usize| {
            let mut group = choice[group * size..][..size].to_vec();
            group.sort_by(|a, b| b.partial_cmp(a).unwrap());
            group.iter().take(2).sum::<f64>()
        };
        groups.sort_by(|&a, &b| score(b).partial_cmp(&score(a)).unwrap());
        groups.truncate(params.topk_group);
        let mut experts: Vec<usize> = (0..bias.len()).filter(|e| groups.contains(&(e / size))).collect();
        experts.sort_by(|&a, &b| choice[b].partial_cmp(&choice[a]).unwrap());
        experts.truncate(k);
        let total = experts.iter().map(|&e| s[e]).sum::<f64>() + 1e-20;
        let divisor = if params.norm_topk_prob { total } else { 1.0 };
        let weights = experts.iter().map(|&e| s[e] / divisor * params.routed_scaling_factor).collect();
        (experts.iter().map(|&e| e as i32).collect(), weights)
    }

    #[test]
    fn bias_chooses_but_does_not_weigh() {
        // Sigmoids 1/2, 3/4, 1/4 of logits 0, ln 3, -ln 3; the bias lifts the last over all.
        let ln3 = 3f64.ln();
        let (ids, weights) = route::<f64>(&[0.0, ln3, -ln3], &[0.0, 0.0, 1.0], 2, PLAIN);
        assert_eq!(ids, [2, 1]);
        assert_close(&weights, &[2.5 * 0.25, 2.5 * 0.75], 1e-15);
        let raw = RouterParams { norm_topk_prob: false, ..PLAIN };
        let (_, weights) = route::<f64>(&[0.0, ln3, -ln3], &[0.0, 0.0, 1.0], 1, raw);
        assert_close(&weights, &[2.5 * 0.25], 1e-15);
    }

    #[test]
    fn ties_go_to_the_lower_expert_and_group() {
        assert_eq!(route::<f32>(&[1.0; 6], &[0.0; 6], 3, PLAIN).0, [0, 1, 2]);
        let grouped = RouterParams { n_group: 3, topk_group: 2, ..PLAIN };
        assert_eq!(route::<f32>(&[1.0; 6], &[0.0; 6], 4, grouped).0, [0, 1, 2, 3]);
        // Group 1 ties with group 2 for the second place; the best expert of all stands in group 0.
        assert_eq!(route::<f32>(&[5.0, 1.0, 0.5, 2.0, 2.0, 0.5], &[0.0; 6], 4, grouped).0, [0, 3, 1, 2]);
    }

    #[test]
    fn a_dropped_group_stays_dropped_when_all_scores_are_negative() {
        let grouped = RouterParams { n_group: 2, topk_group: 1, ..PLAIN };
        let (ids, _) = route::<f64>(&[0.0, 0.0, -9.0, 9.0], &[-2.0, -2.0, -9.0, -2.0], 2, grouped);
        assert_eq!(ids, [0, 1]);
    }

    #[test]
    fn extreme_logits_and_nan_never_panic() {
        let extreme = [f64::NEG_INFINITY, -1e30, 1e30, f64::INFINITY];
        let (ids, weights) = route::<f32>(&extreme, &[0.0; 4], 4, PLAIN);
        assert_eq!(ids, [2, 3, 0, 1]);
        assert_eq!(weights, [1.25, 1.25, 0.0, 0.0]);
        // All scores zero: the sum + 1e-20 keeps the weights at zero.
        assert_eq!(route::<f32>(&[f64::NEG_INFINITY; 3], &[0.0; 3], 2, PLAIN), (vec![0, 1], vec![0.0, 0.0]));
        let (ids, weights) = route::<f32>(&[f64::NAN, 0.0, f64::NAN, 0.0], &[0.0; 4], 2, PLAIN);
        assert_eq!((ids, weights), (vec![1, 3], vec![1.25, 1.25]));
        let grouped = RouterParams { n_group: 2, topk_group: 1, ..PLAIN };
        assert_eq!(route::<f32>(&[f64::NAN; 4], &[0.0; 4], 2, grouped).0, [0, 1]);
        assert_eq!(route::<f32>(&[f64::NAN, 9.0, 0.0, 0.0], &[0.0; 4], 2, grouped).0, [2, 3]);
    }

    proptest! {
        #[test]
        fn matches_plain_sorts(
            n_group in 1..5usize,
            group_size in 1..7usize,
            kept in 0..5usize,
            k in 0..40usize,
            norm_topk_prob: bool,
            seed: u64,
            coarse: bool,
        ) {
            let experts = n_group * group_size;
            let topk_group = 1 + kept % n_group;
            let k = 1 + k % (topk_group * group_size);
            let params = RouterParams { n_group, topk_group, norm_topk_prob, routed_scaling_factor: 1.5 };
            // Coarse logits and a constant bias make ties, whose sums are equal bit for bit.
            let round = |x: f64| if coarse { (2.0 * x).round() } else { 4.0 * x };
            let logits: Vec<f64> = randoms(seed, 3 * experts).into_iter().map(round).collect();
            let bias = if coarse { vec![0.25; experts] } else { randoms(seed ^ 1, experts) };
            let (ids, weights) = route::<f64>(&logits, &bias, k, params);
            for (t, logits) in logits.chunks(experts).enumerate() {
                let (expected_ids, expected_weights) = naive(logits, &bias, k, params);
                prop_assert_eq!(&ids[t * k..][..k], &expected_ids[..]);
                assert_close(&weights[t * k..][..k], &expected_weights, 1e-14);
            }
        }
    }

    #[test]
    fn rows_are_the_same_on_any_number_of_threads_and_alone() {
        // Enough work to reach the pool.
        let (logits, bias) = (randoms(1, 128 * 128), randoms(2, 128));
        let params = RouterParams { n_group: 8, topk_group: 3, ..PLAIN };
        let [one, four] = on_one_and_four_threads(|| route::<f32>(&logits, &bias, 6, params));
        assert_eq!(one, four);
        let alone = route::<f32>(&logits[128 * 5..128 * 6], &bias, 6, params);
        assert_eq!((&alone.0[..], &alone.1[..]), (&one.0[30..36], &one.1[30..36]));
    }

    #[test]
    fn misfits_are_named() {
        let logits = poisoned::<f32>(DType::Float, &[2, 6]);
        let bias = poisoned(DType::Float, &[6]);
        let mut weights = poisoned(DType::Float, &[2, 3]);
        let mut run = |k, params| {
            let mut ids = poisoned(DType::Index, &[2, k]);
            message(router(&Cpu::new(), &logits, &bias, params, &mut ids, &mut weights))
        };
        assert!(run(3, RouterParams { n_group: 4, ..PLAIN }).contains("`n_group` is 4"));
        assert!(run(3, RouterParams { n_group: 0, ..PLAIN }).contains("`n_group` is 0"));
        assert!(run(3, RouterParams { topk_group: 2, ..PLAIN }).contains("`topk_group` is 2"));
        assert!(run(3, RouterParams { n_group: 3, ..PLAIN }).contains("`topk_ids`"));
        assert!(run(2, PLAIN).contains("`topk_weights`"));
    }
}
