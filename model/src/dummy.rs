//! Weights that nobody trained: a model's real shapes and formats, filled with random numbers where they are needed. From a config alone,
//! for measurements and for tests.

use std::sync::{Arc, OnceLock};

use dsa80_reference::{
    DType, HostExpert, HostLinear, HostTensor, RandomFormat, RandomLinear, RandomTensor, random,
};

use crate::checkpoint::format::described;
use crate::checkpoint::layout::{
    self, AttentionSpecs, DraftSpecs, IndexerSpecs, LinearSpec, MlpSpecs, MoeSpecs, SwiGluSpecs, TensorSpec,
};
use crate::checkpoint::shard::Split;
use crate::checkpoint::{Checkpoint, CheckpointError, LinearFormat, Shard};
use crate::config::ModelConfig;
use crate::runner::WeightSource;
use crate::weights::{
    HostAttention, HostDraft, HostEnds, HostIndexer, HostLayer, HostMlp, HostMoe, HostSwiGlu,
};

/// `config.json` of GLM-5.2 as cyankiwi/GLM-5.2-AWQ-INT4 has it: experts in INT4, asymmetric, in groups of 32; all else in bf16.
pub const GLM_5_2: &str = include_str!("glm_5_2.json");

/// What is added to the residual stream is a quarter of it, so that no layer makes activations grow, and one rounding more or less stays
/// one.
const ADDED: f32 = 0.25;

/// Random weights in the formats that a config describes.
///
/// A linear layer's outputs are about as large as its inputs (a deviation of `fan_in^-0.5`), those that are added to the residual stream a
/// quarter of that. Numbers are a function of the seed, the module's name and, where ranks share a weight, the shard: what every rank has
/// whole is the same on all of them.
#[derive(Clone)]
pub struct DummyWeights {
    config: ModelConfig,
    seed: u32,
    /// Whose formats they have, where that is not what the config describes.
    like: Option<Arc<Checkpoint>>,
    valid_tp: OnceLock<Vec<usize>>,
}

impl DummyWeights {
    /// For the model that `config` describes; another seed makes other numbers.
    pub fn new(config: ModelConfig, seed: u32) -> Self {
        Self { config, seed, like: None, valid_tp: OnceLock::new() }
    }

    /// In the formats that the tensors of `checkpoint` have.
    pub fn like(checkpoint: &Arc<Checkpoint>) -> Self {
        Self { like: Some(Arc::clone(checkpoint)), ..Self::new(checkpoint.config().clone(), 0) }
    }

    fn maker(&self, shard: Shard) -> Result<Maker<'_>, CheckpointError> {
        // Asked for every layer, and costly to answer for a model of many experts.
        let valid = self.valid_tp.get_or_init(|| self.config.valid_tp());
        if valid.contains(&shard.world_size) { shard.check_rank() } else { shard.check(&self.config) }?;
        Ok(Maker { config: &self.config, seed: self.seed, like: self.like.as_deref(), shard })
    }
}

impl std::fmt::Debug for DummyWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DummyWeights").field("seed", &self.seed).finish_non_exhaustive()
    }
}

/// One shard of them.
struct Maker<'a> {
    config: &'a ModelConfig,
    seed: u32,
    like: Option<&'a Checkpoint>,
    shard: Shard,
}

impl Maker<'_> {
    /// FNV-1a of the name, then the shard.
    fn seed(&self, name: &str, split: Split) -> u32 {
        let hash = name
            .bytes()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let Shard { rank, world_size } = self.shard;
        let part = if split == Split::Replicated { 0 } else { (world_size as u64) << 32 | rank as u64 };
        random::word(part, hash ^ random::word(0, self.seed))
    }

    fn linear(&self, spec: &LinearSpec, gain: f32) -> HostLinear {
        let (rows, columns) = spec.split.ranges(self.shard, spec.out_features, spec.in_features);
        let stored = self.like.and_then(|like| like.linear_format(&spec.module));
        let format = match stored.unwrap_or_else(|| described(self.config, spec)) {
            LinearFormat::Dense(dtype) => RandomFormat::Dense(dtype),
            LinearFormat::Int4(format) => RandomFormat::Int4 {
                // One group a row is one group of a shard's row.
                group_size: format.group_size.min(columns.len()),
                scales: format.scale,
                zero_points: !format.symmetric,
            },
        };
        HostLinear::Random(RandomLinear {
            out_features: rows.len(),
            in_features: columns.len(),
            format,
            // Of the whole row: the ranks' products are summed.
            deviation: gain / (spec.in_features as f32).sqrt(),
            seed: self.seed(&spec.module, spec.split),
        })
    }

    fn tensor(&self, spec: &TensorSpec, centre: f32, spread: f32) -> HostTensor {
        let mut shape = spec.shape.clone();
        shape[0] = spec.split.ranges(self.shard, shape[0], 1).0.len();
        let dtype = self.like.and_then(|like| like.tensor_dtype(&spec.name)).unwrap_or(DType::Bf16);
        RandomTensor::new(shape, dtype, centre, spread, self.seed(&spec.name, spec.split)).make()
    }

    fn norm(&self, spec: &TensorSpec) -> HostTensor {
        self.tensor(spec, 1.0, 0.3)
    }

    fn attention(&self, specs: &AttentionSpecs) -> HostAttention {
        let c = self.config;
        let kv_head = c.qk_nope_head_dim + c.v_head_dim;
        let mut kv_b_proj = self.linear(&specs.kv_b_proj, 1.0).dense();
        kv_b_proj.shape = vec![kv_b_proj.shape[0] / kv_head, kv_head, c.kv_lora_rank];
        HostAttention {
            q_a_proj: self.linear(&specs.q_a_proj, 1.0),
            q_a_layernorm: self.norm(&specs.q_a_layernorm),
            q_b_proj: self.linear(&specs.q_b_proj, 1.0),
            kv_a_proj_with_mqa: self.linear(&specs.kv_a_proj_with_mqa, 1.0),
            kv_a_layernorm: self.norm(&specs.kv_a_layernorm),
            kv_b_proj,
            o_proj: self.linear(&specs.o_proj, ADDED),
            indexer: specs.indexer.as_ref().map(|specs| self.indexer(specs)),
        }
    }

    fn draft(&self, specs: &DraftSpecs) -> HostDraft {
        let eh_proj = self.linear(&specs.eh_proj, 1.0).dense();
        HostDraft::new(self.norm(&specs.enorm), self.norm(&specs.hnorm), &eh_proj, self.norm(&specs.norm))
    }

    fn indexer(&self, specs: &IndexerSpecs) -> HostIndexer {
        HostIndexer {
            wq_b: self.linear(&specs.wq_b, 1.0),
            wk: self.linear(&specs.wk, 1.0),
            k_norm_weight: self.norm(&specs.k_norm_weight),
            k_norm_bias: self.tensor(&specs.k_norm_bias, 0.0, 0.3),
            weights_proj: self.linear(&specs.weights_proj, 1.0),
        }
    }

    fn swiglu(&self, specs: &SwiGluSpecs) -> HostSwiGlu {
        HostSwiGlu {
            gate_proj: self.linear(&specs.gate_proj, 1.0),
            up_proj: self.linear(&specs.up_proj, 1.0),
            down_proj: self.linear(&specs.down_proj, ADDED),
        }
    }

    fn moe(&self, specs: &MoeSpecs) -> HostMoe {
        let expert = |index| {
            let HostSwiGlu { gate_proj, up_proj, down_proj } = self.swiglu(&specs.expert(index));
            HostExpert { gate_proj, up_proj, down_proj }
        };
        HostMoe {
            gate: self.linear(&specs.gate, 1.0),
            // Small beside the scores, or a few experts would get most tokens: in a trained model it is what spreads them.
            e_score_correction_bias: self.tensor(&specs.e_score_correction_bias, 0.0, 0.02),
            experts: (0..specs.n_routed_experts).map(expert).collect(),
            shared_experts: specs.shared_experts.as_ref().map(|specs| self.swiglu(specs)),
        }
    }
}

impl WeightSource for DummyWeights {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load_layer(&self, layer: usize, shard: Shard) -> Result<HostLayer, CheckpointError> {
        let maker = self.maker(shard)?;
        let limit = self.config.num_hidden_layers;
        if layer >= limit {
            return Err(CheckpointError::OutOfRange { what: "layer", found: layer, limit });
        }
        let specs = layout::layer(&self.config, layer, shard.world_size);
        Ok(HostLayer {
            input_layernorm: maker.norm(&specs.input_layernorm),
            post_attention_layernorm: maker.norm(&specs.post_attention_layernorm),
            attention: maker.attention(&specs.attention),
            mlp: match &specs.mlp {
                MlpSpecs::Dense(swiglu) => HostMlp::Dense(maker.swiglu(swiglu)),
                MlpSpecs::Sparse(moe) => HostMlp::Sparse(maker.moe(moe)),
            },
            draft: specs.draft.as_ref().map(|draft| maker.draft(draft)),
        })
    }

    fn load_ends(&self, shard: Shard) -> Result<HostEnds, CheckpointError> {
        let maker = self.maker(shard)?;
        let specs = layout::ends(&self.config);
        let embed_tokens = maker.tensor(&specs.embed_tokens, 0.0, 1.0);
        Ok(HostEnds {
            vocab_start: shard.range(self.config.vocab_size).start,
            norm: maker.norm(&specs.norm),
            lm_head: match &specs.lm_head {
                Some(spec) => maker.linear(spec, 1.0).dense(),
                None => embed_tokens.clone(),
            },
            embed_tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;

    /// All formats: INT4 experts of symmetric groups, bf16 elsewhere.
    fn config() -> ModelConfig {
        let text = r#"{"model_type":"glm_moe_dsa","hidden_size":64,"num_hidden_layers":3,"vocab_size":96,
            "num_attention_heads":4,"q_lora_rank":32,"kv_lora_rank":32,"qk_nope_head_dim":16,
            "qk_rope_head_dim":8,"v_head_dim":16,"index_n_heads":4,"index_head_dim":16,"index_topk":8,
            "indexer_types":["full","shared","full"],"mlp_layer_types":["dense","sparse","sparse"],
            "rope_parameters":{"rope_theta":10000},"n_routed_experts":4,"num_experts_per_tok":2,
            "n_shared_experts":1,"moe_intermediate_size":128,"intermediate_size":128,
            "routed_scaling_factor":2.5,"rms_norm_eps":1e-5,"max_position_embeddings":128,"eos_token_id":1,
            "quantization_config":{"quant_method":"compressed-tensors","format":"pack-quantized",
            "ignore":["lm_head","re:.*self_attn.*","re:.*shared_experts.*","re:model[.]layers[.]0[.]mlp.*"],
            "config_groups":{"group_0":{"targets":["Linear"],
            "weights":{"num_bits":4,"type":"int","symmetric":true,"group_size":32,"strategy":"group"}}}}}"#;
        ModelConfig::from_json(text).unwrap()
    }

    fn bytes_of(weight: HostLinear) -> u64 {
        match weight.made() {
            HostLinear::Int4(packed) => {
                let words = packed.weight_packed.len() + packed.zero_points.map_or(0, |zeros| zeros.len());
                (4 * words + 2 * packed.scales.len()) as u64
            }
            other => 2 * other.dense().len() as u64,
        }
    }

    /// What a rank makes is what the plan says that it holds.
    #[test]
    fn a_rank_has_the_bytes_of_the_plan() {
        let weights = DummyWeights::new(config(), 1);
        for world_size in [1, 2, 4] {
            let plan = Plan::from_config(&config(), world_size).unwrap().weights;
            let shard = Shard { rank: world_size - 1, world_size };
            let (mut experts, mut attention) = (0, 0);
            for layer in 0..3 {
                let layer = weights.load_layer(layer, shard).unwrap();
                let HostAttention { q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj, .. } =
                    layer.attention;
                attention += 2 * kv_b_proj.len() as u64;
                attention +=
                    [q_a_proj, q_b_proj, kv_a_proj_with_mqa, o_proj].into_iter().map(bytes_of).sum::<u64>();
                if let HostMlp::Sparse(moe) = layer.mlp {
                    let projections =
                        moe.experts.into_iter().flat_map(|e| [e.gate_proj, e.up_proj, e.down_proj]);
                    experts += projections.map(bytes_of).sum::<u64>();
                }
            }
            assert_eq!((experts, attention), (plan.experts, plan.attention), "{world_size} ranks");
            let ends = weights.load_ends(shard).unwrap();
            assert_eq!(2 * (ends.embed_tokens.len() + ends.lm_head.len()) as u64, plan.embeddings);
            assert_eq!(ends.vocab_start, 96 / world_size * (world_size - 1));
        }
    }

    #[test]
    fn numbers_follow_seed_name_and_shard() {
        let layer = |seed, layer, rank| {
            DummyWeights::new(config(), seed).load_layer(layer, Shard { rank, world_size: 2 }).unwrap()
        };
        assert_eq!(layer(1, 1, 0), layer(1, 1, 0));
        assert_ne!(layer(1, 1, 0), layer(2, 1, 0));
        let (here, there, next) = (layer(1, 1, 0), layer(1, 1, 1), layer(1, 2, 0));
        assert_ne!(here.attention.q_a_proj, next.attention.q_a_proj);
        // Replicated and shared.
        assert_eq!(here.attention.indexer, there.attention.indexer);
        assert_eq!(here.attention.q_a_layernorm, there.attention.q_a_layernorm);
        assert_ne!(here.attention.q_a_proj, there.attention.q_a_proj);
        assert_ne!(here.attention.q_b_proj, there.attention.q_b_proj);
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        let weights = DummyWeights::new(config(), 1);
        let refused = |layer, rank, world_size| {
            weights.load_layer(layer, Shard { rank, world_size }).unwrap_err().to_string()
        };
        assert!(refused(3, 0, 1).contains("layer = 3; expected less than 3"));
        assert!(refused(0, 2, 2).contains("rank = 2; expected less than 2"));
        assert!(refused(0, 0, 3).contains("3 ranks"));
    }

    #[test]
    fn tokens_are_sent_to_almost_as_many_experts_as_by_chance() {
        use dsa80_reference::cpu::Cpu;
        use dsa80_reference::{Batch, LoneRank, SequenceSlice};

        use crate::engine::StepLimits;
        use crate::measure::Seen;
        use crate::runner::{INDEX_LOGITS, Rank};

        const EXPERTS: usize = 64;
        let config = ModelConfig { n_routed_experts: EXPERTS, num_experts_per_tok: 4, ..config() };
        let limits = StepLimits {
            page_size: 32,
            num_pages: 1,
            cache_dtype: DType::Act,
            max_batch_tokens: 32,
            max_batch_seqs: 1,
            max_model_len: 32,
            vocab_size: config.vocab_size,
            max_logprobs: 0,
        };
        let lone = Box::new(LoneRank::new(0, 1).unwrap());
        let weights = DummyWeights::new(config, 0);
        let mut rank = Rank::load(Cpu::<f32>::new(), lone, &weights, &limits, INDEX_LOGITS).unwrap();
        let tokens: Vec<u32> = (0..32).map(|i| 3 * i).collect();
        let slice = SequenceSlice { token_ids: &tokens, computed_len: 0, pages: &[0] };
        let batch = Batch::new(32, &[slice]).unwrap();
        let mut seen = Seen::of(&batch);
        rank.forward(&batch, Some(&mut seen)).unwrap();
        let chance = EXPERTS as f64 * (1.0 - (1.0 - 4.0 / EXPERTS as f64).powi(32));
        assert!(seen.experts.values().all(|&count| count as f64 > 0.8 * chance), "{seen:?} of {chance}");
    }
}
