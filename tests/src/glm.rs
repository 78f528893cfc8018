//! GLM-5.2's dimensions: in full, and one rank's share at TP=8 with random weights.

use dsa80_model::config::ModelConfig;
use dsa80_model::dummy::{DummyWeights, GLM_5_2};
use serde_json::{Value, json};

/// One rank's share at TP=8, two layers of it: a dense layer with an indexer, and a sparse one that shares its selection; experts in INT4,
/// asymmetric, g32, all else bf16. With so many experts, selected positions and tokens of the vocabulary; GLM-5.2 has 256, 2048 and 19360.
///
/// # Panics
/// The config is refused.
pub fn shard(n_routed_experts: usize, index_topk: usize, vocab_size: usize) -> DummyWeights {
    let own = json!({
        "num_hidden_layers": 2,
        "vocab_size": vocab_size,
        "num_attention_heads": 8,
        "index_topk": index_topk,
        "indexer_types": ["full", "shared"],
        "mlp_layer_types": ["dense", "sparse"],
        "n_routed_experts": n_routed_experts,
        "moe_intermediate_size": 256,
        "intermediate_size": 1536,
    });
    let mut text: Value = serde_json::from_str(GLM_5_2).expect("it is JSON");
    if let (Some(text), Value::Object(own)) = (text.as_object_mut(), own) {
        // Its layers are told one by one.
        for name in ["index_topk_freq", "index_skip_topk_offset", "first_k_dense_replace"] {
            text.remove(name);
        }
        text.extend(own);
    }
    text["quantization_config"]["ignore"][3] = json!("re:model[.]layers[.]0[.]mlp.*");
    DummyWeights::new(ModelConfig::from_json(&text.to_string()).expect("GLM-5.2's own numbers"), 0)
}

/// All of GLM-5.2 as cyankiwi/GLM-5.2-AWQ-INT4 has it: experts in INT4, asymmetric, g32, all else bf16.
///
/// # Panics
/// The config is refused.
pub fn whole() -> ModelConfig {
    ModelConfig::from_json(GLM_5_2).expect("GLM-5.2's own numbers")
}
