//! DeepSeek Sparse Attention the slow way, to judge the kernels by: f64, contiguous arrays, one plain loop
//! after the other.
//!
//! Nothing is absorbed, paged, gathered or batched. Keys and values of every head are made from the latent;
//! selection is a full stable sort; attention runs over the whole context with a mask. Arrays are row-major;
//! `T` are the new tokens of one sequence, `S` its context.

use crate::kernels::RopeLayout;

/// The dimensions of [`mla`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaDims {
    /// Heads of this rank.
    pub heads: usize,
    /// Columns of a head's query and key without rotary embedding.
    pub qk_nope_head_dim: usize,
    /// Columns with it; the key part is shared by all heads.
    pub qk_rope_head_dim: usize,
    /// Columns of a head's value.
    pub v_head_dim: usize,
    /// Columns of the latent.
    pub kv_lora_rank: usize,
}

/// RoPE of one head at `position`, in place: pair `j` of `x` turns by `position * theta^(-2j / x.len())`.
pub fn rope(x: &mut [f64], position: usize, theta: f64, layout: RopeLayout) {
    let dim = x.len();
    for j in 0..dim / 2 {
        let angle = position as f64 * theta.powf(-2.0 * j as f64 / dim as f64);
        let (first, second) = match layout {
            RopeLayout::Interleaved => (2 * j, 2 * j + 1),
            RopeLayout::Half => (j, j + dim / 2),
        };
        let (a, b) = (x[first], x[second]);
        x[first] = a * angle.cos() - b * angle.sin();
        x[second] = b * angle.cos() + a * angle.sin();
    }
}

/// The lightning indexer: `scores[t, s] = sum_h weights[t, h] * relu(q[t, h] . keys[s]) * scale`, for every
/// `s`, visible or not.
///
/// `q` `[T, HI, D]` and `keys` `[S, D]` with RoPE applied, `weights` `[T, HI]`; returns `[T, S]`.
pub fn indexer_scores(
    q: &[f64],
    weights: &[f64],
    keys: &[f64],
    heads: usize,
    head_dim: usize,
    scale: f64,
) -> Vec<f64> {
    let mut scores = Vec::new();
    for (q, weights) in q.chunks(heads * head_dim).zip(weights.chunks(heads)) {
        for key in keys.chunks(head_dim) {
            let mut score = 0.0;
            for (q, weight) in q.chunks(head_dim).zip(weights) {
                score += weight * dot(q, key).max(0.0) * scale;
            }
            scores.push(score);
        }
    }
    scores
}

/// The attention mask of a selection: for the token at `positions[t]`, the `k` best of its scores
/// `0..=positions[t]`, ties to the lower position. `scores` `[T, S]` without NaN; returns `[T, S]`.
pub fn select(scores: &[f64], positions: &[usize], k: usize) -> Vec<bool> {
    let mut mask = vec![false; scores.len()];
    if positions.is_empty() {
        return mask;
    }
    let context = scores.len() / positions.len();
    for (t, &position) in positions.iter().enumerate() {
        let scores = &scores[t * context..][..context];
        let mut order: Vec<usize> = (0..=position).collect();
        // Not `total_cmp`, which ranks -0.0 below +0.0.
        order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap_or(std::cmp::Ordering::Equal));
        for &s in order.iter().take(k) {
            mask[t * context + s] = true;
        }
    }
    mask
}

/// Multi-head latent attention before any absorption: per head `h`, `key[s] = [K_h latent[s], rope_key[s]]`,
/// `value[s] = V_h latent[s]` with `[K_h; V_h] = kv_b[h]`, and softmax attention over the positions that
/// `mask` allows. A token that sees nothing gives zeros.
///
/// `q` `[T, H, nope + rope]` and `rope_keys` `[S, rope]` with RoPE applied; `latents` `[S, kv_lora_rank]`
/// normalised; `kv_b` `[H, nope + v, kv_lora_rank]`; `mask` `[T, S]`; returns `[T, H, v]`.
pub fn mla(
    dims: MlaDims,
    q: &[f64],
    latents: &[f64],
    rope_keys: &[f64],
    kv_b: &[f64],
    mask: &[bool],
    scale: f64,
) -> Vec<f64> {
    let MlaDims { heads, qk_nope_head_dim: nope, qk_rope_head_dim: rope, v_head_dim: v, kv_lora_rank: rank } =
        dims;
    let context = latents.len() / rank;
    let mut out = Vec::new();
    for (t, q) in q.chunks(heads * (nope + rope)).enumerate() {
        for h in 0..heads {
            let q = &q[h * (nope + rope)..][..nope + rope];
            let kv_b = &kv_b[h * (nope + v) * rank..][..(nope + v) * rank];
            let mut scores = Vec::new();
            let mut values = Vec::new();
            for s in 0..context {
                if !mask[t * context + s] {
                    continue;
                }
                let latent = &latents[s * rank..][..rank];
                let mut up: Vec<f64> = kv_b.chunks(rank).map(|row| dot(row, latent)).collect();
                let value = up.split_off(nope);
                let key = [&up[..], &rope_keys[s * rope..][..rope]].concat();
                scores.push(dot(q, &key) * scale);
                values.push(value);
            }
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for column in 0..v {
                let sum: f64 =
                    weights.iter().zip(&values).map(|(weight, value)| weight * value[column]).sum();
                out.push(if weights.is_empty() { 0.0 } else { sum / total });
            }
        }
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn select_breaks_ties_downwards_and_sees_no_later_position() {
        let scores = [1.0, 1.0, 0.0, 9.0, -0.0, 0.0, 5.0, 5.0];
        let mask = select(&scores, &[2, 3], 2);
        assert_eq!(mask, [true, true, false, false, false, false, true, true]);
        let mask = select(&[-0.0, 0.0, -1.0], &[2], 1);
        assert_eq!(mask, [true, false, false]);
    }

    #[test]
    fn mla_by_hand() {
        // One head, all dimensions 1: key = [2 c, r], value = 3 c.
        let dims =
            MlaDims { heads: 1, qk_nope_head_dim: 1, qk_rope_head_dim: 1, v_head_dim: 1, kv_lora_rank: 1 };
        let (latents, rope_keys) = ([1.0, -1.0, 5.0], [0.0, 2.0, 1.0]);
        // Scores of q = [1, 1] are 2 and 0; the third position is masked.
        let mask = [true, true, false];
        let out = mla(dims, &[1.0, 1.0], &latents, &rope_keys, &[2.0, 3.0], &mask, 1.0);
        let e = 2f64.exp();
        assert!((out[0] - (3.0 * e - 3.0) / (e + 1.0)).abs() < 1e-15);
        assert_eq!(mla(dims, &[1.0, 1.0], &latents, &rope_keys, &[2.0, 3.0], &[false; 3], 1.0), [0.0]);
    }

    #[test]
    fn indexer_scores_by_hand() {
        // Two heads of one column: relu(2 k) - 3 relu(-k).
        let scores = indexer_scores(&[2.0, -1.0], &[1.0, -3.0], &[1.0, -1.0, 0.0], 2, 1, 0.5);
        assert_eq!(scores, [1.0, -1.5, 0.0]);
    }

    #[test]
    fn rope_turns_the_first_pair_by_the_position() {
        let mut x = [1.0, 0.0, 0.0, 0.0];
        rope(&mut x, 2, 1e4, RopeLayout::Interleaved);
        assert_eq!(x, [2f64.cos(), 2f64.sin(), 0.0, 0.0]);
        let mut x = [0.0, 1.0, 0.0, 0.0];
        rope(&mut x, 2, 1e4, RopeLayout::Half);
        assert_eq!(x, [0.0, (0.02f64).cos(), 0.0, (0.02f64).sin()]);
    }
}
