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
