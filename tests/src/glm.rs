//! GLM-5.2's dimensions: in full, and one rank's share at TP=8 with random weights.

use dsa80_model::config::ModelConfig;
use dsa80_model::dummy::DummyWeights;
use serde_json::{Value, json};

/// One rank's share at TP=8, two layers of it: a dense layer with an indexer, and a sparse one that shares its selection; experts in INT4,
/// asymmetric, g32, all else bf16. With so many experts, selected positions and tokens of the vocabulary; GLM-5.2 has 256, 2048 and 19360.
///
/// # Panics
/// The config is refused.
pub fn shard(n_routed_experts: usize, index_topk: usize, vocab_size: usize) -> DummyWeights {
    let config = config(
        json!({
            "num_hidden_layers": 2,
            "vocab_size": vocab_size,
            "num_attention_heads": 8,
            "index_topk": index_topk,
            "indexer_types": ["full", "shared"],
            "mlp_layer_types": ["dense", "sparse"],
            "n_routed_experts": n_routed_experts,
            "moe_intermediate_size": 256,
            "intermediate_size": 1536,
        }),
        "re:model[.]layers[.]0[.]mlp.*",
    );
    DummyWeights::new(config, 0)
}

/// All of GLM-5.2 as cyankiwi/GLM-5.2-AWQ-INT4 has it: experts in INT4, asymmetric, g32, all else bf16.
///
/// # Panics
/// The config is refused.
pub fn whole() -> ModelConfig {
    config(
        json!({
            "num_hidden_layers": 78,
            "vocab_size": 154_880,
            "num_attention_heads": 64,
            "index_topk": 2048,
            "index_topk_freq": 4,
            "index_skip_topk_offset": 3,
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "intermediate_size": 12288,
            "first_k_dense_replace": 3,
        }),
        "re:model[.]layers[.][0-2][.]mlp.*",
    )
}

/// What a shard and the whole have in common, and `own`; `dense` are the dense layers.
fn config(own: Value, dense: &str) -> ModelConfig {
    let mut text = json!({
        "model_type": "glm_moe_dsa",
        "hidden_size": 6144,
        "q_lora_rank": 2048,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "rope_interleave": true,
        "indexer_rope_interleave": true,
        "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": true,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1_048_576,
        "eos_token_id": 0,
        "tie_word_embeddings": false,
        "quantization_config": experts_in_int4(dense),
    });
    if let (Some(text), Value::Object(own)) = (text.as_object_mut(), own) {
        text.extend(own);
    }
    ModelConfig::from_json(&text.to_string()).expect("GLM-5.2's own numbers")
}

/// Asymmetric, in groups of 32; `dense` are the dense layers.
fn experts_in_int4(dense: &str) -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", dense],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": false, "group_size": 32, "strategy": "group"},
        }},
    })
}
