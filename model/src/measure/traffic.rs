//! What a step reads and computes, from the model's dimensions and what the step chose.

use dsa80_reference::{Batch, DType};
use serde::{Deserialize, Serialize};

use super::seen::Seen;
use crate::config::ModelConfig;
use crate::engine::StepLimits;
use crate::plan::Plan;
use crate::runner::CacheWidths;

/// Bytes that a step must read at least, once each: weights and rows of the caches. Activations, which the L2 mostly has, are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReadBytes {
    /// Attention, indexers, routers, shared experts, dense layers, norms.
    pub weights: u64,
    /// Routed experts that the step's tokens are sent to.
    pub experts: u64,
    /// The output projection, where a token is wanted.
    pub lm_head: u64,
    /// Latent rows that are selected.
    pub latents: u64,
    /// Keys that the indexers score.
    pub index_keys: u64,
}

impl ReadBytes {
    /// What a step reads that has `seen` so much; `act_bytes` is the width of a cache that is not fp8.
    pub fn of(
        config: &ModelConfig,
        plan: &Plan,
        limits: &StepLimits,
        act_bytes: usize,
        batch: &Batch,
        seen: &Seen,
        sampled: bool,
    ) -> Self {
        let weights = &plan.weights;
        let layers = config.num_hidden_layers;
        let scores = batch.max_context_len > config.index_topk;
        // Where all keys are selected only those of new tokens are made: nothing is scored.
        let new_keys = 2 * (config.num_full_layers() * config.index_head_dim * config.hidden_size) as u64;
        let indexer = if scores { weights.indexer } else { weights.indexer.min(new_keys) };
        let sent_to: usize = seen.experts.values().sum();
        let all = (config.num_sparse_layers() * config.n_routed_experts).max(1);
        let CacheWidths { mla, indexer: key } =
            CacheWidths::new(config, limits.cache_dtype, limits.page_size);
        let width = if limits.cache_dtype == DType::Fp8 { 1 } else { act_bytes };
        let rows: usize = (0..layers).map(|layer| seen.rows_of(layer)).sum();
        let contexts: usize = batch.context_lens.iter().map(|&len| len as usize).sum();
        let keys = if scores { contexts * config.num_full_layers() } else { 0 };
        Self {
            weights: weights.attention
                + indexer
                + weights.router
                + weights.shared_experts
                + weights.dense_mlp
                + weights.norms,
            experts: (weights.experts as f64 * sent_to as f64 / all as f64) as u64,
            lm_head: if sampled { weights.embeddings / 2 } else { 0 },
            latents: (rows * mla * width) as u64,
            index_keys: (keys * key * width) as u64,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        let Self { weights, experts, lm_head, latents, index_keys } = self;
        weights + experts + lm_head + latents + index_keys
    }
}

/// Bytes that a token takes in the caches of a rank; `act_bytes` is the width of a cache that is not fp8.
pub fn cache_bytes_per_token(config: &ModelConfig, limits: &StepLimits, act_bytes: usize) -> usize {
    let width = if limits.cache_dtype == DType::Fp8 { 1 } else { act_bytes };
    CacheWidths::new(config, limits.cache_dtype, limits.page_size).per_token(config) * width
}

/// Multiplications and additions of a rank's products for a batch, `sampled` rows of which are projected to logits.
pub fn flops(config: &ModelConfig, tp: usize, batch: &Batch, sampled: usize) -> f64 {
    let c = config;
    let (layers, full, sparse) = (c.num_hidden_layers, c.num_full_layers(), c.num_sparse_layers());
    let (heads, latent) = (c.num_attention_heads / tp, c.kv_lora_rank + c.qk_rope_head_dim);
    let attention = c.hidden_size * (c.q_lora_rank + latent)
        + c.q_lora_rank * heads * c.qk_head_dim()
        + heads * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        + heads * c.v_head_dim * c.hidden_size;
    let scores = batch.max_context_len > c.index_topk;
    let keys = c.hidden_size * c.index_head_dim;
    let queries = c.q_lora_rank * c.index_n_heads * c.index_head_dim + c.hidden_size * c.index_n_heads;
    let indexer = if scores { keys + queries } else { keys };
    let dense = 3 * c.hidden_size * c.intermediate_size / tp;
    let experts = c.hidden_size * c.n_routed_experts
        + 3 * c.hidden_size
            * (c.moe_intermediate_size * c.num_experts_per_tok + c.shared_intermediate_size())
            / tp;
    let token = layers * attention + full * indexer + (layers - sparse) * dense + sparse * experts;
    let of_token = |row: usize| {
        let visible = batch.visible(row);
        let attended = layers * heads * visible.min(c.index_topk) * (latent + c.kv_lora_rank);
        let scored = if scores { full * visible * c.index_n_heads * c.index_head_dim } else { 0 };
        (token + attended + scored) as f64
    };
    let tokens: f64 = (0..batch.num_tokens()).map(of_token).sum();
    2.0 * (tokens + (sampled * c.hidden_size * c.vocab_size / tp) as f64)
}
