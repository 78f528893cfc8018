//! Random models in memory: any dimensions, groups, share patterns and weight formats.

use dsa80_model::checkpoint::{CheckpointError, Shard};
use dsa80_model::config::{IndexerType, MlpLayerType, ModelConfig};
use dsa80_model::runner::WeightSource;
use dsa80_model::weights::{HostAttention, HostEnds, HostIndexer, HostLayer, HostMlp, HostMoe, HostSwiGlu};
use dsa80_reference::{HostExpert, HostInt4, HostLinear, HostTensor};
use proptest::prelude::*;
use serde_json::json;

/// A random model; weights are a function of `seed` alone.
#[derive(Debug, Clone)]
pub struct RandomModel {
    /// Its configuration.
    pub config: ModelConfig,
    /// Seeds the weights.
    pub seed: u64,
}

/// Draws small configurations of every kind that the model accepts.
pub fn random_model() -> impl Strategy<Value = RandomModel> {
    let attention = (1..=4usize, 1..=12usize, 1..=12usize, 1..=8usize, 1..=4usize, 1..=8usize);
    let indexer = (1..=6usize, 0..=8usize, 1..=12usize, any::<bool>());
    let experts = (1..=3usize, 1..=3usize, 0..=2usize, 1..=16usize, any::<bool>());
    let layers = proptest::collection::vec((any::<bool>(), any::<bool>()), 1..=4);
    (1..=24usize, attention, indexer, experts, layers, any::<u64>()).prop_map(
        |(hidden, attention, indexer, experts, layers, seed)| {
            let (heads, q_lora_rank, kv_lora_rank, nope, rope_pairs, v_head_dim) = attention;
            let (index_heads, index_pass, index_topk, index_interleave) = indexer;
            let (n_group, group_size, shared, intermediate, norm) = experts;
            let rope = 2 * rope_pairs;
            // A group is scored by the sum of its two best.
            let group_size = if n_group > 1 { group_size + 1 } else { group_size };
            let indexer_types: Vec<_> = layers
                .iter()
                .enumerate()
                .map(|(i, (full, _))| if *full || i == 0 { "full" } else { "shared" })
                .collect();
            let mlp_layer_types: Vec<_> =
                layers.iter().map(|(_, sparse)| if *sparse { "sparse" } else { "dense" }).collect();
            let topk_group = 1 + seed as usize % n_group;
            let text = json!({
                "model_type": "glm_moe_dsa",
                "hidden_size": hidden,
                "num_hidden_layers": layers.len(),
                "vocab_size": 19,
                "num_attention_heads": heads,
                "q_lora_rank": q_lora_rank,
                "kv_lora_rank": kv_lora_rank,
                "qk_nope_head_dim": nope,
                "qk_rope_head_dim": rope,
                "v_head_dim": v_head_dim,
                "index_n_heads": index_heads,
                "index_head_dim": rope + index_pass,
                "index_topk": index_topk,
                "indexer_types": indexer_types,
                "mlp_layer_types": mlp_layer_types,
                "rope_interleave": true,
                "indexer_rope_interleave": index_interleave,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "n_routed_experts": n_group * group_size,
                "num_experts_per_tok": 1 + seed as usize / 7 % (topk_group * group_size),
                "n_shared_experts": shared,
                "moe_intermediate_size": intermediate,
                "intermediate_size": intermediate + 3,
                "n_group": n_group,
                "topk_group": topk_group,
                "norm_topk_prob": norm,
                "routed_scaling_factor": 2.5,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "eos_token_id": 0,
                "tie_word_embeddings": false,
            });
            let config = ModelConfig::from_json(&text.to_string()).expect("every drawn config is valid");
            RandomModel { config, seed }
        },
    )
}

/// SplitMix64: a full-period generator that needs no state but its counter.
struct Weights(u64);

impl Weights {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (-1, 1).
    fn value(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn tensor(&mut self, shape: &[usize], centre: f32, spread: f32) -> HostTensor {
        let values = (0..shape.iter().product()).map(|_| centre + spread * self.value()).collect::<Vec<_>>();
        if self.word().is_multiple_of(2) {
            HostTensor::f32(shape, values)
        } else {
            HostTensor::bf16(shape, values.into_iter().map(half::bf16::from_f32).collect())
        }
    }

    fn norm(&mut self, size: usize) -> HostTensor {
        self.tensor(&[size], 1.0, 0.3)
    }

    /// A matrix with outputs of about the size of its inputs, dense or INT4.
    fn linear(&mut self, out_features: usize, in_features: usize) -> HostLinear {
        let gain = 1.7 / (in_features as f32).sqrt();
        if self.word().is_multiple_of(2) {
            return HostLinear::Dense(self.tensor(&[out_features, in_features], 0.0, gain));
        }
        let group_size = [8, 16, 32, in_features][self.word() as usize % 4];
        let groups = in_features.div_ceil(group_size);
        let symmetric = self.word().is_multiple_of(2);
        let words = |count: usize, weights: &mut Self| (0..count).map(|_| weights.word() as u32).collect();
        HostLinear::Int4(HostInt4 {
            out_features,
            in_features,
            group_size,
            weight_packed: words(out_features * in_features.div_ceil(8), self),
            scales: self.tensor(&[out_features, groups], 0.2 * gain, 0.05 * gain),
            zero_points: (!symmetric).then(|| words(out_features.div_ceil(8) * groups, self)),
        })
    }

    fn swiglu(&mut self, intermediate: usize, hidden: usize) -> HostSwiGlu {
        HostSwiGlu {
            gate_proj: self.linear(intermediate, hidden),
            up_proj: self.linear(intermediate, hidden),
            down_proj: self.linear(hidden, intermediate),
        }
    }
}

impl RandomModel {
    /// The weights of a layer, whole.
    pub fn layer(&self, layer: usize) -> HostLayer {
        let c = &self.config;
        let mut w = Weights(self.seed ^ (layer as u64 + 1) << 32);
        let hidden = c.hidden_size;
        let indexer = (c.indexer_types[layer] == IndexerType::Full).then(|| HostIndexer {
            wq_b: w.linear(c.index_n_heads * c.index_head_dim, c.q_lora_rank),
            wk: w.linear(c.index_head_dim, hidden),
            k_norm_weight: w.norm(c.index_head_dim),
            k_norm_bias: w.tensor(&[c.index_head_dim], 0.0, 0.3),
            weights_proj: w.linear(c.index_n_heads, hidden),
        });
        let attention = HostAttention {
            q_a_proj: w.linear(c.q_lora_rank, hidden),
            q_a_layernorm: w.norm(c.q_lora_rank),
            q_b_proj: w.linear(c.num_attention_heads * c.qk_head_dim(), c.q_lora_rank),
            kv_a_proj_with_mqa: w.linear(c.latent_dim(), hidden),
            kv_a_layernorm: w.norm(c.kv_lora_rank),
            kv_b_proj: w.tensor(
                &[c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank],
                0.0,
                1.7 / (c.kv_lora_rank as f32).sqrt(),
            ),
            o_proj: w.linear(hidden, c.num_attention_heads * c.v_head_dim),
            indexer,
        };
        let mlp = match c.mlp_layer_types[layer] {
            MlpLayerType::Dense => HostMlp::Dense(w.swiglu(c.intermediate_size, hidden)),
            MlpLayerType::Sparse => HostMlp::Sparse(HostMoe {
                gate: w.linear(c.n_routed_experts, hidden),
                e_score_correction_bias: w.tensor(&[c.n_routed_experts], 0.0, 0.2),
                experts: (0..c.n_routed_experts)
                    .map(|_| {
                        let expert = w.swiglu(c.moe_intermediate_size, hidden);
                        HostExpert {
                            gate_proj: expert.gate_proj,
                            up_proj: expert.up_proj,
                            down_proj: expert.down_proj,
                        }
                    })
                    .collect(),
                shared_experts: (c.n_shared_experts > 0)
                    .then(|| w.swiglu(c.shared_intermediate_size(), hidden)),
            }),
        };
        HostLayer {
            input_layernorm: w.norm(hidden),
            post_attention_layernorm: w.norm(hidden),
            attention,
            mlp,
            draft: None,
        }
    }

    /// Embedding, final norm and output projection, whole.
    pub fn ends(&self) -> HostEnds {
        let mut w = Weights(self.seed);
        let shape = [self.config.vocab_size, self.config.hidden_size];
        HostEnds {
            embed_tokens: w.tensor(&shape, 0.0, 1.0),
            vocab_start: 0,
            norm: w.norm(self.config.hidden_size),
            lm_head: w.tensor(&shape, 0.0, 1.0),
        }
    }
}

impl WeightSource for RandomModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load_layer(&self, layer: usize, _: Shard) -> Result<HostLayer, CheckpointError> {
        Ok(self.layer(layer))
    }

    fn load_ends(&self, _: Shard) -> Result<HostEnds, CheckpointError> {
        Ok(self.ends())
    }
}
