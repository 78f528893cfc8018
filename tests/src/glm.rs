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

#[cfg(test)]
mod tests {
    use dsa80_model::config::{IndexerType, MlpLayerType};
    use dsa80_model::runner::WeightSource as _;

    use super::*;

    #[test]
    fn a_shard_is_two_layers_of_the_whole() {
        let (whole, weights) = (whole(), shard(256, 2048, 19360));
        let shard = weights.config();
        assert_eq!(
            (whole.num_hidden_layers, whole.num_full_layers(), whole.num_sparse_layers()),
            (78, 21, 75)
        );
        assert_eq!(shard.indexer_types, [IndexerType::Full, IndexerType::Shared]);
        assert_eq!(shard.mlp_layer_types, [MlpLayerType::Dense, MlpLayerType::Sparse]);
        assert_eq!(8 * shard.num_attention_heads, whole.num_attention_heads);
        assert_eq!(8 * shard.moe_intermediate_size, whole.moe_intermediate_size);
        assert_eq!(8 * shard.vocab_size, whole.vocab_size);
        assert_eq!((shard.kv_lora_rank, shard.rope_theta), (whole.kv_lora_rank, whole.rope_theta));
        let packed =
            |layer| shard.quantization.as_ref().is_some_and(|scheme| format!("{scheme:?}").contains(layer));
        assert!(packed("layers[.]0[.]mlp") && !packed("[0-2]"));
    }
}
