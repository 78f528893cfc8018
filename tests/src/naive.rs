//! The whole model on top of [`dsa80_reference::cpu::naive`], as naively as it can be written: f64, one
//! sequence, no cache, no pages, no absorption; attention is dense with a mask. It shares nothing with the
//! kernels.
//!
//! Source: Hugging Face transformers 5.17, `models/glm_moe_dsa/modeling_glm_moe_dsa.py`.

use std::collections::BTreeMap;

use dsa80_model::config::{INDEXER_NORM_EPS, ModelConfig};
use dsa80_model::weights::{HostAttention, HostIndexer, HostMlp, HostMoe, HostSwiGlu};
use dsa80_reference::cpu::naive::{MlaDims, indexer_scores, mla, rope};
use dsa80_reference::{HostLinear, HostTensor, RopeLayout};

use crate::random_model::RandomModel;

/// A row of numbers.
type Row = Vec<f64>;

/// What the naive model computes.
#[derive(Debug, Default)]
pub struct Naive {
    /// `[T][vocab]`.
    pub logits: Vec<Row>,
    /// By full layer `[T]`: the selected positions, ascending.
    pub selections: BTreeMap<usize, Vec<Vec<usize>>>,
    /// The smallest non-zero distance between a choice (key, expert, group) and the best one that was not
    /// chosen.
    pub narrowest: f64,
}

/// Runs `tokens` through `model`.
pub fn forward(model: &RandomModel, tokens: &[u32]) -> Naive {
    let config = &model.config;
    let ends = model.ends();
    let embedding = matrix(&HostLinear::Dense(ends.embed_tokens));
    let mut naive = Naive { narrowest: f64::INFINITY, ..Naive::default() };
    let mut residual: Vec<Row> = tokens.iter().map(|&token| embedding[token as usize].clone()).collect();
    let mut selection = Vec::new();
    for index in 0..config.num_hidden_layers {
        let layer = model.layer(index);
        let normed = rms_norms(&residual, &layer.input_layernorm, config.rms_norm_eps);
        let q_latent = rms_norms(
            &times(&normed, &layer.attention.q_a_proj),
            &layer.attention.q_a_layernorm,
            config.latent_norm_eps,
        );
        if let Some(indexer) = &layer.attention.indexer {
            selection = select(config, indexer, &normed, &q_latent, &mut naive.narrowest);
            naive.selections.insert(index, selection.clone());
        }
        add(&mut residual, &attention(config, &layer.attention, &normed, &q_latent, &selection));
        let normed = rms_norms(&residual, &layer.post_attention_layernorm, config.rms_norm_eps);
        let delta = match &layer.mlp {
            HostMlp::Dense(mlp) => swiglu(mlp, &normed),
            HostMlp::Sparse(moe) => mixture(config, moe, &normed, &mut naive.narrowest),
        };
        add(&mut residual, &delta);
    }
    let normed = rms_norms(&residual, &ends.norm, config.rms_norm_eps);
    naive.logits = times(&normed, &HostLinear::Dense(ends.lm_head));
    naive
}

fn values(tensor: &HostTensor) -> Row {
    tensor.to_f32().into_iter().map(f64::from).collect()
}

fn matrix(weight: &HostLinear) -> Vec<Row> {
    let (rows, columns) = weight.dims();
    match weight {
        HostLinear::Random(random) => matrix(&random.make()),
        HostLinear::Dense(tensor) => values(tensor).chunks(columns).map(<[f64]>::to_vec).collect(),
        HostLinear::Int4(packed) => {
            let scales = values(&packed.scales);
            let element = |o: usize, i: usize| {
                let group = i / packed.group_size;
                let centred = f64::from(packed.q(o, i)) - f64::from(packed.zero_point(o, group));
                centred * scales[o * packed.groups() + group]
            };
            (0..rows).map(|o| (0..columns).map(|i| element(o, i)).collect()).collect()
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn times(rows: &[Row], weight: &HostLinear) -> Vec<Row> {
    let matrix = matrix(weight);
    rows.iter().map(|row| matrix.iter().map(|weights| dot(row, weights)).collect()).collect()
}

fn add(to: &mut [Row], rows: &[Row]) {
    for (to, row) in to.iter_mut().zip(rows) {
        for (to, value) in to.iter_mut().zip(row) {
            *to += value;
        }
    }
}

fn rms_norms(rows: &[Row], weight: &HostTensor, eps: f64) -> Vec<Row> {
    let weight = values(weight);
    let norm = |row: &Row| {
        let scale = 1.0 / (dot(row, row) / row.len() as f64 + eps).sqrt();
        row.iter().zip(&weight).map(|(value, weight)| value * scale * weight).collect()
    };
    rows.iter().map(norm).collect()
}

/// The positions with the `k` largest scores, ties to the lower one; notes how narrow the choice was.
fn best(scores: &[f64], k: usize, narrowest: &mut f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).expect("no NaN").then(a.cmp(&b)));
    if k < order.len() {
        let gap = scores[order[k - 1]] - scores[order[k]];
        if gap > 0.0 {
            *narrowest = narrowest.min(gap);
        }
    }
    order.truncate(k);
    order
}

fn select(
    config: &ModelConfig,
    indexer: &HostIndexer,
    normed: &[Row],
    q_latent: &[Row],
    narrowest: &mut f64,
) -> Vec<Vec<usize>> {
    let (dim, rotated) = (config.index_head_dim, config.qk_rope_head_dim);
    let layout = if config.indexer_rope_interleave { RopeLayout::Interleaved } else { RopeLayout::Half };
    let (weight, bias) = (values(&indexer.k_norm_weight), values(&indexer.k_norm_bias));
    let layer_norm = |row: &Row| -> Row {
        let mean = row.iter().sum::<f64>() / dim as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
        let scale = 1.0 / (variance + INDEXER_NORM_EPS).sqrt();
        row.iter().zip(weight.iter().zip(&bias)).map(|(x, (w, b))| (x - mean) * scale * w + b).collect()
    };
    let mut keys: Vec<Row> = times(normed, &indexer.wk).iter().map(layer_norm).collect();
    let mut queries = times(q_latent, &indexer.wq_b);
    for (position, (key, query)) in keys.iter_mut().zip(&mut queries).enumerate() {
        for head in std::iter::once(&mut key[..]).chain(query.chunks_mut(dim)) {
            rope(&mut head[..rotated], position, config.rope_theta, layout);
        }
    }
    let head_weights = times(normed, &indexer.weights_proj);
    let scale = 1.0 / ((config.index_n_heads * dim) as f64).sqrt();
    let (queries, head_weights, keys) = (queries.concat(), head_weights.concat(), keys.concat());
    let scores = indexer_scores(&queries, &head_weights, &keys, config.index_n_heads, dim, scale);
    scores
        .chunks(normed.len())
        .enumerate()
        .map(|(t, scores)| {
            let mut chosen = best(&scores[..=t], config.index_topk.min(t + 1), narrowest);
            chosen.sort_unstable();
            chosen
        })
        .collect()
}

fn attention(
    config: &ModelConfig,
    weights: &HostAttention,
    normed: &[Row],
    q_latent: &[Row],
    selection: &[Vec<usize>],
) -> Vec<Row> {
    let dims = MlaDims {
        heads: config.num_attention_heads,
        qk_nope_head_dim: config.qk_nope_head_dim,
        qk_rope_head_dim: config.qk_rope_head_dim,
        v_head_dim: config.v_head_dim,
        kv_lora_rank: config.kv_lora_rank,
    };
    let turn = |x: &mut [f64], position| rope(x, position, config.rope_theta, RopeLayout::Interleaved);
    let mut latents = times(normed, &weights.kv_a_proj_with_mqa);
    let mut rope_keys: Vec<Row> = latents.iter_mut().map(|row| row.split_off(config.kv_lora_rank)).collect();
    let latents = rms_norms(&latents, &weights.kv_a_layernorm, config.latent_norm_eps);
    let mut queries = times(q_latent, &weights.q_b_proj);
    for (position, (key, query)) in rope_keys.iter_mut().zip(&mut queries).enumerate() {
        turn(key, position);
        for head in query.chunks_mut(config.qk_head_dim()) {
            turn(&mut head[config.qk_nope_head_dim..], position);
        }
    }
    let mask: Vec<bool> =
        selection.iter().flat_map(|chosen| (0..normed.len()).map(|s| chosen.contains(&s))).collect();
    let scale = 1.0 / (config.qk_head_dim() as f64).sqrt();
    let kv_b = values(&weights.kv_b_proj);
    let out = mla(dims, &queries.concat(), &latents.concat(), &rope_keys.concat(), &kv_b, &mask, scale);
    let heads: Vec<Row> = out.chunks(dims.heads * dims.v_head_dim).map(<[f64]>::to_vec).collect();
    times(&heads, &weights.o_proj)
}

fn swiglu(mlp: &HostSwiGlu, rows: &[Row]) -> Vec<Row> {
    feed_forward([&mlp.gate_proj, &mlp.up_proj, &mlp.down_proj], rows)
}

fn feed_forward([gate, up, down]: [&HostLinear; 3], rows: &[Row]) -> Vec<Row> {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let inner: Vec<Row> = times(rows, gate)
        .iter()
        .zip(times(rows, up))
        .map(|(gate, up)| gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up).collect())
        .collect();
    times(&inner, down)
}

fn mixture(config: &ModelConfig, moe: &HostMoe, rows: &[Row], narrowest: &mut f64) -> Vec<Row> {
    let bias = values(&moe.e_score_correction_bias);
    let group_size = config.n_routed_experts / config.n_group;
    let mut out = match &moe.shared_experts {
        Some(shared) => swiglu(shared, rows),
        None => vec![vec![0.0; config.hidden_size]; rows.len()],
    };
    for (t, logits) in times(rows, &moe.gate).iter().enumerate() {
        let scores: Row = logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
        let biased: Row = scores.iter().zip(&bias).map(|(score, bias)| score + bias).collect();
        // Which two of a group are its best does not matter, only their sum: a narrow choice is none.
        let mut ignored = f64::INFINITY;
        let group_scores: Row = biased
            .chunks(group_size)
            .map(|group| best(group, group_size.min(2), &mut ignored).iter().map(|&e| group[e]).sum())
            .collect();
        let groups = best(&group_scores, config.topk_group, narrowest);
        let allowed: Vec<usize> =
            (0..config.n_routed_experts).filter(|expert| groups.contains(&(expert / group_size))).collect();
        let allowed_scores: Row = allowed.iter().map(|&expert| biased[expert]).collect();
        let chosen: Vec<usize> = best(&allowed_scores, config.num_experts_per_tok, narrowest)
            .into_iter()
            .map(|index| allowed[index])
            .collect();
        let sum: f64 = chosen.iter().map(|&expert| scores[expert]).sum();
        let divisor = if config.norm_topk_prob { sum + 1e-20 } else { 1.0 };
        for expert in chosen {
            let weight = scores[expert] / divisor * config.routed_scaling_factor;
            let expert = &moe.experts[expert];
            let y = feed_forward(
                [&expert.gate_proj, &expert.up_proj, &expert.down_proj],
                std::slice::from_ref(&rows[t]),
            );
            for (out, y) in out[t].iter_mut().zip(&y[0]) {
                *out += weight * y;
            }
        }
    }
    out
}
