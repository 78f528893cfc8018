//! One rank's share of GLM-5.2 at TP=8, two layers of it: the shapes that the kernels were made for, with random weights.

use dsa80_model::checkpoint::{CheckpointError, Shard};
use dsa80_model::config::{MlpLayerType, ModelConfig};
use dsa80_model::runner::WeightSource;
use dsa80_model::weights::{HostAttention, HostEnds, HostIndexer, HostLayer, HostMlp, HostMoe, HostSwiGlu};
use dsa80_reference::{HostExpert, HostInt4, HostLinear, HostTensor};
use half::bf16;
use serde_json::json;

/// A dense layer with an indexer, and a sparse one that shares its selection; experts in INT4, asymmetric, g32, all else bf16.
#[derive(Debug, Clone)]
pub struct GlmShard {
    config: ModelConfig,
}

impl GlmShard {
    /// With so many experts, selected positions and tokens of the vocabulary; GLM-5.2 has 256, 2048 and 19360.
    ///
    /// # Panics
    /// The config is refused.
    pub fn new(n_routed_experts: usize, index_topk: usize, vocab_size: usize) -> Self {
        let text = json!({
            "model_type": "glm_moe_dsa",
            "hidden_size": 6144,
            "num_hidden_layers": 2,
            "vocab_size": vocab_size,
            "num_attention_heads": 8,
            "q_lora_rank": 2048,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "index_n_heads": 32,
            "index_head_dim": 128,
            "index_topk": index_topk,
            "indexer_types": ["full", "shared"],
            "mlp_layer_types": ["dense", "sparse"],
            "rope_interleave": true,
            "indexer_rope_interleave": true,
            "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
            "n_routed_experts": n_routed_experts,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "moe_intermediate_size": 256,
            "intermediate_size": 1536,
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
        });
        Self { config: ModelConfig::from_json(&text.to_string()).expect("GLM-5.2's own numbers") }
    }
}

/// SplitMix64.
struct Weights(u64);

impl Weights {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `centre` +- `spread`.
    fn tensor(&mut self, shape: &[usize], centre: f32, spread: f32) -> HostTensor {
        // A table: there are hundreds of millions of them.
        let table: [bf16; 256] =
            std::array::from_fn(|i| bf16::from_f32(centre + spread * (i as f32 - 127.5) / 128.0));
        let mut values = vec![bf16::ZERO; shape.iter().product()];
        for chunk in values.chunks_mut(8) {
            for (value, byte) in chunk.iter_mut().zip(self.word().to_le_bytes()) {
                *value = table[usize::from(byte)];
            }
        }
        HostTensor::bf16(shape, values)
    }

    /// Outputs of about the size `gain` for inputs of the size 1.
    fn dense(&mut self, out_features: usize, in_features: usize, gain: f32) -> HostLinear {
        let spread = gain * (3.0 / in_features as f32).sqrt();
        HostLinear::Dense(self.tensor(&[out_features, in_features], 0.0, spread))
    }

    fn int4(&mut self, out_features: usize, in_features: usize, gain: f32) -> HostLinear {
        const GROUP: usize = 32;
        let words = |count: usize, weights: &mut Self| (0..count).map(|_| weights.word() as u32).collect();
        // The difference of two random nibbles has a variance of 42.
        let scale = gain / (42.0 * in_features as f32).sqrt();
        HostLinear::Int4(HostInt4 {
            out_features,
            in_features,
            group_size: GROUP,
            weight_packed: words(out_features * in_features / 8, self),
            scales: self.tensor(&[out_features, in_features / GROUP], scale, 0.2 * scale),
            zero_points: Some(words(out_features / 8 * (in_features / GROUP), self)),
        })
    }

    fn norm(&mut self, size: usize) -> HostTensor {
        self.tensor(&[size], 1.0, 0.3)
    }
}

impl WeightSource for GlmShard {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load_layer(&self, layer: usize, _: Shard) -> Result<HostLayer, CheckpointError> {
        let c = &self.config;
        let (hidden, heads) = (c.hidden_size, c.num_attention_heads);
        let mut w = Weights(layer as u64 + 1);
        // What is added to the residual stream is a quarter of it: one rounding more or less stays one.
        const ADDED: f32 = 0.25;
        let indexer = (layer == 0).then(|| HostIndexer {
            wq_b: w.dense(c.index_n_heads * c.index_head_dim, c.q_lora_rank, 1.0),
            wk: w.dense(c.index_head_dim, hidden, 1.0),
            k_norm_weight: w.norm(c.index_head_dim),
            k_norm_bias: w.tensor(&[c.index_head_dim], 0.0, 0.3),
            weights_proj: w.dense(c.index_n_heads, hidden, 1.0),
        });
        let kv_b_shape = [heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank];
        let attention = HostAttention {
            q_a_proj: w.dense(c.q_lora_rank, hidden, 1.0),
            q_a_layernorm: w.norm(c.q_lora_rank),
            q_b_proj: w.dense(heads * c.qk_head_dim(), c.q_lora_rank, 1.0),
            kv_a_proj_with_mqa: w.dense(c.latent_dim(), hidden, 1.0),
            kv_a_layernorm: w.norm(c.kv_lora_rank),
            kv_b_proj: w.tensor(&kv_b_shape, 0.0, (3.0 / c.kv_lora_rank as f32).sqrt()),
            o_proj: w.dense(hidden, heads * c.v_head_dim, ADDED),
            indexer,
        };
        let mlp = match c.mlp_layer_types[layer] {
            MlpLayerType::Dense => HostMlp::Dense(HostSwiGlu {
                gate_proj: w.dense(c.intermediate_size, hidden, 1.0),
                up_proj: w.dense(c.intermediate_size, hidden, 1.0),
                down_proj: w.dense(hidden, c.intermediate_size, ADDED),
            }),
            MlpLayerType::Sparse => HostMlp::Sparse(HostMoe {
                gate: w.dense(c.n_routed_experts, hidden, 1.0),
                e_score_correction_bias: w.tensor(&[c.n_routed_experts], 0.0, 0.2),
                experts: (0..c.n_routed_experts)
                    .map(|_| HostExpert {
                        gate_proj: w.int4(c.moe_intermediate_size, hidden, 1.0),
                        up_proj: w.int4(c.moe_intermediate_size, hidden, 1.0),
                        down_proj: w.int4(hidden, c.moe_intermediate_size, ADDED),
                    })
                    .collect(),
                shared_experts: Some(HostSwiGlu {
                    gate_proj: w.dense(c.moe_intermediate_size, hidden, 1.0),
                    up_proj: w.dense(c.moe_intermediate_size, hidden, 1.0),
                    down_proj: w.dense(hidden, c.moe_intermediate_size, ADDED),
                }),
            }),
        };
        Ok(HostLayer {
            input_layernorm: w.norm(hidden),
            post_attention_layernorm: w.norm(hidden),
            attention,
            mlp,
        })
    }

    fn load_ends(&self, _: Shard) -> Result<HostEnds, CheckpointError> {
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let mut w = Weights(0);
        Ok(HostEnds {
            embed_tokens: w.tensor(&[vocab, hidden], 0.0, 1.0),
            vocab_start: 0,
            norm: w.norm(hidden),
            lm_head: w.tensor(&[vocab, hidden], 0.0, (3.0 / hidden as f32).sqrt()),
        })
    }
}
