//! The dimensions of one rank's share of the model.

use crate::checkpoint::layout::share_of_gathered;
use crate::config::{MlpLayerType, ModelConfig};

/// What workspace, caches and kernels are sized by. Names are the config's; `heads`, `max_intermediate` and
/// what ends in `shard` are this rank's share.
#[derive(Debug, Clone)]
pub(crate) struct RankShape {
    pub(crate) hidden_size: usize,
    pub(crate) vocab_size: usize,
    pub(crate) vocab_shard: usize,
    pub(crate) heads: usize,
    pub(crate) q_lora_rank: usize,
    pub(crate) q_a_shard: usize,
    pub(crate) kv_a_shard: usize,
    pub(crate) kv_lora_rank: usize,
    pub(crate) qk_nope_head_dim: usize,
    pub(crate) qk_rope_head_dim: usize,
    pub(crate) v_head_dim: usize,
    pub(crate) index_n_heads: usize,
    pub(crate) index_head_dim: usize,
    pub(crate) index_topk: usize,
    pub(crate) max_intermediate: usize,
    pub(crate) n_routed_experts: usize,
    pub(crate) num_experts_per_tok: usize,
}

impl RankShape {
    /// One rank's share of `config` among `world_size`, which divides it (`ModelConfig::check_tp`).
    pub(crate) fn new(config: &ModelConfig, world_size: usize) -> Self {
        let dense = config.mlp_layer_types.contains(&MlpLayerType::Dense);
        let shared = config.moe_intermediate_size * config.n_shared_experts;
        let widest = if dense { config.intermediate_size.max(shared) } else { shared };
        Self {
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            vocab_shard: config.vocab_size / world_size,
            heads: config.num_attention_heads / world_size,
            q_lora_rank: config.q_lora_rank,
            q_a_shard: share_of_gathered(config.q_lora_rank, world_size),
            kv_a_shard: share_of_gathered(config.latent_dim(), world_size),
            kv_lora_rank: config.kv_lora_rank,
            qk_nope_head_dim: config.qk_nope_head_dim,
            qk_rope_head_dim: config.qk_rope_head_dim,
            v_head_dim: config.v_head_dim,
            index_n_heads: config.index_n_heads,
            index_head_dim: config.index_head_dim,
            index_topk: config.index_topk,
            max_intermediate: widest / world_size,
            n_routed_experts: config.n_routed_experts,
            num_experts_per_tok: config.num_experts_per_tok,
        }
    }
}
