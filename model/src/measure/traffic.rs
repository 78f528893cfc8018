//! What a step reads and computes, from the model's dimensions and what the step chose.

use dsa80_reference::{Batch, DType};
use serde::{Deserialize, Serialize};

use super::seen::Seen;
use crate::checkpoint::layout::share_of_gathered;
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
    let gathered = share_of_gathered(c.q_lora_rank, tp) + share_of_gathered(latent, tp);
    let attention = c.hidden_size * gathered
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

/// Columns of what ranks gather in every layer before its norms, each having made its part: of `q_a_proj` and of `kv_a_proj_with_mqa`, as far as
/// the ranks divide them.
pub fn gathered(config: &ModelConfig, tp: usize) -> Vec<usize> {
    let mut columns = vec![config.q_lora_rank, config.latent_dim()];
    columns.retain(|&columns| share_of_gathered(columns, tp) < columns);
    columns
}

#[cfg(test)]
mod tests {
    use dsa80_reference::SequenceSlice;

    use super::*;
    use crate::dummy::GLM_5_2;

    fn limits() -> StepLimits {
        StepLimits {
            page_size: 64,
            num_pages: 1 << 20,
            cache_dtype: DType::Act,
            max_batch_tokens: 4096,
            max_batch_seqs: 32,
            max_model_len: 1 << 20,
            vocab_size: 154_880,
            max_logprobs: 0,
        }
    }

    fn decode(sequences: usize, context: usize) -> Batch {
        let pages: Vec<u32> = (0..context.div_ceil(64) as u32).collect();
        let slice = SequenceSlice { token_ids: &[1], computed_len: context - 1, pages: &pages };
        Batch::new(64, &vec![slice; sequences]).unwrap()
    }

    /// A decode of GLM-5.2 in which every sequence selects all it may, and every token has experts of its own.
    fn read(config: &ModelConfig, sequences: usize, context: usize) -> ReadBytes {
        let plan = Plan::from_config(config, 8).unwrap();
        let batch = decode(sequences, context);
        let mut seen = Seen::of(&batch);
        let experts = (sequences * config.num_experts_per_tok).min(config.n_routed_experts);
        seen.experts.extend((3..78).map(|layer| (layer, experts)));
        seen.rows.insert(0, sequences * context.min(config.index_topk));
        ReadBytes::of(config, &plan, &limits(), 2, &batch, &seen, true)
    }

    #[test]
    fn ranks_gather_what_they_divide() {
        let config = ModelConfig::from_json(GLM_5_2).unwrap();
        assert_eq!(gathered(&config, 8), [2048, 576]);
        assert_eq!(gathered(&config, 1), [0; 0]);
        assert_eq!(gathered(&config, 128), [2048]);
    }

    #[test]
    fn a_rank_of_eight_reads_seven_gigabytes_for_a_token() {
        let config = ModelConfig::from_json(GLM_5_2).unwrap();
        let one = read(&config, 1, 8192);
        let gigabytes = one.total() as f64 / 1e9;
        assert!((6.4..7.2).contains(&gigabytes), "{gigabytes}: {one:?}");
        assert_eq!(one.latents, 78 * 2048 * 576 * 2);
        assert_eq!(one.index_keys, 21 * 8192 * 128 * 2);
        assert_eq!(one.lm_head, 154_880 * 6144 * 2 / 8);
        // Eight of 256 experts of 3 x 6144 x 256 weights of 4 bits, with 20 bits for every 32 of them.
        let expert = 3 * 6144 * 256_u64;
        assert_eq!(one.experts, 75 * 8 * (expert / 2 + expert / 32 * 20 / 8));
        let many = read(&config, 32, 8192);
        assert_eq!((many.weights, many.experts), (one.weights, 32 * one.experts));
    }

    #[test]
    fn what_is_selected_whole_is_not_scored() {
        let config = ModelConfig::from_json(GLM_5_2).unwrap();
        let (short, long) = (read(&config, 1, 2048), read(&config, 1, 2049));
        assert_eq!(short.index_keys, 0);
        assert!(long.index_keys > 0 && short.weights < long.weights);
        assert_eq!(short.latents, 78 * 2048 * 576 * 2);
    }

    #[test]
    fn a_token_is_multiplied_with_the_active_parameters() {
        let config = ModelConfig::from_json(GLM_5_2).unwrap();
        let active = Plan::from_config(&config, 1).unwrap().parameters.active as f64;
        let whole = flops(&config, 1, &decode(1, 4096), 1);
        let attended = 2.0 * (78.0 * 64.0 * 2048.0 * (576.0 + 512.0) + 21.0 * 4096.0 * 32.0 * 128.0);
        assert!(((whole - attended) / (2.0 * active) - 1.0).abs() < 0.01, "{whole} {active}");
        let rank = flops(&config, 8, &decode(1, 4096), 1);
        // Routers and indexers are on every rank.
        assert!((whole / 8.0..whole / 6.0).contains(&rank), "{rank} of {whole}");
        assert_eq!(flops(&config, 8, &decode(2, 4096), 2), 2.0 * rank);
    }
}
