//! Memory arithmetic: what a rank holds, what a token costs, what context fits. For `dsa80 inspect`, before
//! any weight is loaded or even downloaded.

use dsa80_reference::DType;

use crate::checkpoint::format;
use crate::checkpoint::layout::{self, LinearSpec, Role, Spec, TensorSpec};
use crate::checkpoint::shard::Split;
use crate::checkpoint::slices::width;
use crate::checkpoint::{Checkpoint, CheckpointError, LinearFormat};
use crate::config::{ConfigError, ModelConfig};

/// Bytes of an element of the paged caches on the GPU backends: bf16.
const CACHE_ELEMENT: u64 = 2;

/// The memory of one rank of a tensor-parallel group. All ranks are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Ranks that share the model.
    pub world_size: usize,
    /// Weights that a rank holds.
    pub weights: WeightBytes,
    /// What a token adds to a rank's caches.
    pub kv: KvBytes,
    /// Parameters of the whole model.
    pub parameters: Parameters,
    /// The longest context the model was made for.
    pub max_position_embeddings: usize,
}

/// Bytes of weights, by what they belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightBytes {
    /// Attention projections without the indexer.
    pub attention: u64,
    /// Lightning indexers.
    pub indexer: u64,
    /// Routers, with their correction biases.
    pub router: u64,
    /// Routed experts.
    pub experts: u64,
    /// Shared experts.
    pub shared_experts: u64,
    /// Dense layers.
    pub dense_mlp: u64,
    /// All norms but the indexers'.
    pub norms: u64,
    /// Embedding and `lm_head`.
    pub embeddings: u64,
}

/// Bytes of paged cache a token, replicated on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvBytes {
    /// Latent rows, over all layers.
    pub mla: u64,
    /// Indexer keys, over the full layers.
    pub indexer: u64,
}

/// Numbers of parameters, however they are stored; MTP layers not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parameters {
    /// All of them.
    pub total: u64,
    /// Those that one token is multiplied with: all but the embedding and the experts that it is not sent to.
    pub active: u64,
}

impl WeightBytes {
    /// All of them.
    pub fn total(&self) -> u64 {
        let Self { attention, indexer, router, experts, shared_experts, dense_mlp, norms, embeddings } = self;
        let parts = [attention, indexer, router, experts, shared_experts, dense_mlp, norms, embeddings];
        parts.into_iter().fold(0, |sum, part| sum.saturating_add(*part))
    }

    fn of(&mut self, role: Role) -> &mut u64 {
        match role {
            Role::Attention => &mut self.attention,
            Role::Indexer => &mut self.indexer,
            Role::Router => &mut self.router,
            Role::Experts => &mut self.experts,
            Role::SharedExperts => &mut self.shared_experts,
            Role::DenseMlp => &mut self.dense_mlp,
            Role::Norms => &mut self.norms,
            Role::Embeddings => &mut self.embeddings,
        }
    }
}

impl KvBytes {
    /// Both caches.
    pub fn total(&self) -> u64 {
        self.mla + self.indexer
    }
}

impl Plan {
    /// The plan for a checkpoint, from the formats that its tensors have.
    ///
    /// # Errors
    /// A degree that does not divide the model.
    pub fn from_checkpoint(checkpoint: &Checkpoint, world_size: usize) -> Result<Self, CheckpointError> {
        let config = checkpoint.config();
        config.check_tp(world_size).map_err(CheckpointError::TensorParallel)?;
        let format = |spec: &LinearSpec| checkpoint.linear_format(&spec.module);
        let dtype = |spec: &TensorSpec| checkpoint.tensor_dtype(&spec.name);
        Ok(Self::new(config, world_size, format, dtype))
    }

    /// The plan for a checkpoint that follows its config: dense weights and scales in 16 bits, packed layers
    /// as `quantization_config` says.
    ///
    /// # Errors
    /// A degree that does not divide the model.
    pub fn from_config(config: &ModelConfig, world_size: usize) -> Result<Self, ConfigError> {
        config.check_tp(world_size)?;
        Ok(Self::new(config, world_size, |spec| Some(format::described(config, spec)), |_| None))
    }

    fn new(
        config: &ModelConfig,
        world_size: usize,
        format: impl Fn(&LinearSpec) -> Option<LinearFormat>,
        dtype: impl Fn(&TensorSpec) -> Option<DType>,
    ) -> Self {
        let mut weights = WeightBytes::default();
        let mut routed = 0_u64;
        let mut total = 0_u64;
        for spec in layout::all(config, world_size) {
            let (role, elements, bytes) = match spec {
                Spec::Tensor(spec) => {
                    let elements = product(&spec.shape);
                    let share =
                        if spec.split == Split::Replicated { elements } else { elements / world_size as u64 };
                    (
                        spec.role,
                        elements,
                        share.saturating_mul(width(dtype(&spec).unwrap_or(DType::Bf16)) as u64),
                    )
                }
                Spec::Linear(spec) => {
                    let elements = product(&[spec.out_features, spec.in_features]);
                    let format = format(&spec).unwrap_or(LinearFormat::Dense(DType::Bf16));
                    (spec.role, elements, resident_bytes(&spec, format, world_size))
                }
            };
            let weights = weights.of(role);
            *weights = weights.saturating_add(bytes);
            total = total.saturating_add(elements);
            if role == Role::Experts {
                routed = routed.saturating_add(elements);
            }
        }
        let embedding = product(&[config.vocab_size, config.hidden_size]);
        if config.tie_word_embeddings {
            // A tied `lm_head` is a second copy on the device, not a second set of parameters.
            weights.embeddings = weights.embeddings.saturating_mul(2);
        }
        let looked_up = if config.tie_word_embeddings { 0 } else { embedding };
        let unrouted = total.saturating_sub(routed).saturating_sub(looked_up);
        let active = unrouted
            .saturating_add(routed / config.n_routed_experts as u64 * config.num_experts_per_tok as u64);
        let cached = |elements: usize, layers: usize| (elements * layers) as u64 * CACHE_ELEMENT;
        Self {
            world_size,
            weights,
            kv: KvBytes {
                mla: cached(config.latent_dim(), config.num_hidden_layers),
                indexer: cached(config.index_head_dim, config.num_full_layers()),
            },
            parameters: Parameters { total, active },
            max_position_embeddings: config.max_position_embeddings,
        }
    }

    /// Tokens whose cache rows fit beside the weights in `memory` bytes of one rank; shared by all sequences.
    pub fn cache_tokens(&self, memory: u64) -> u64 {
        memory.saturating_sub(self.weights.total()) / self.kv.total()
    }

    /// The longest single context that fits in `memory` bytes of one rank:
    /// [`cache_tokens`](Self::cache_tokens), but no more than the model was made for.
    pub fn longest_context(&self, memory: u64) -> usize {
        usize::try_from(self.cache_tokens(memory))
            .map_or(self.max_position_embeddings, |tokens| tokens.min(self.max_position_embeddings))
    }
}

/// Bytes of a rank's part of a linear layer once loaded.
fn resident_bytes(spec: &LinearSpec, format: LinearFormat, world_size: usize) -> u64 {
    let (mut rows, mut columns) = (spec.out_features, spec.in_features);
    match spec.split {
        Split::Replicated => {}
        Split::Rows => rows /= world_size,
        Split::Columns => columns /= world_size,
    }
    match format {
        LinearFormat::Dense(dtype) => product(&[rows, columns, width(dtype)]),
        LinearFormat::Int4(_) if spec.dense => product(&[rows, columns, width(DType::F32)]),
        LinearFormat::Int4(format) => {
            let groups = columns.div_ceil(format.group_size);
            let words = product(&[rows, columns.div_ceil(8), size_of::<u32>()]);
            let scales = product(&[rows, groups, width(format.scale)]);
            let zero_points =
                if format.symmetric { 0 } else { product(&[rows.div_ceil(8), groups, size_of::<u32>()]) };
            words.saturating_add(scales).saturating_add(zero_points)
        }
    }
}

/// A config alone may claim any sizes: too large is as good as infinite.
fn product(factors: &[usize]) -> u64 {
    factors.iter().fold(1_u64, |product, factor| product.saturating_mul(*factor as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = (1_u64 << 30) as f64;

    /// GLM-5.2's dimensions with a `quantization_config`.
    fn glm_5_2(quantization: &str) -> ModelConfig {
        let text = r#"{"model_type":"glm_moe_dsa","hidden_size":6144,"num_hidden_layers":78,"vocab_size":154880,
            "num_attention_heads":64,"q_lora_rank":2048,"kv_lora_rank":512,"qk_nope_head_dim":192,
            "qk_rope_head_dim":64,"v_head_dim":256,"index_n_heads":32,"index_head_dim":128,
            "index_topk":2048,"index_topk_freq":4,"index_skip_topk_offset":3,
            "rope_parameters":{"rope_theta":8000000},"n_routed_experts":256,"num_experts_per_tok":8,
            "n_shared_experts":1,"moe_intermediate_size":2048,"intermediate_size":12288,
            "routed_scaling_factor":2.5,"first_k_dense_replace":3,"rms_norm_eps":1e-5,
            "max_position_embeddings":1048576,
            "quantization_config":QUANTIZATION}"#;
        ModelConfig::from_json(&text.replace("QUANTIZATION", quantization)).unwrap()
    }

    /// As cyankiwi/GLM-5.2-AWQ-INT4: only the routed experts packed, group size 32, asymmetric.
    const EXPERTS_ONLY: &str = r#"{"quant_method":"compressed-tensors","format":"pack-quantized",
        "ignore":["lm_head","re:.*self_attn.*","re:.*shared_experts.*","re:model[.]layers[.][0-2][.]mlp.*"],
        "config_groups":{"group_0":{"targets":["Linear"],
        "weights":{"num_bits":4,"type":"int","symmetric":false,"group_size":32,"strategy":"group"}}}}"#;

    /// The published size is 744 billion parameters, 40 of them active.
    #[test]
    fn parameters_of_glm_5_2() {
        let Parameters { total, active } = Plan::from_config(&glm_5_2("null"), 1).unwrap().parameters;
        assert_eq!(total / 1_000_000_000, 743);
        assert_eq!(active / 1_000_000_000, 40);
        // By hand, in parts.
        let attention = 2048 * 6144 + 2048 * 16384 + 576 * 6144 + 512 * 28672 + 6144 * 16384;
        let indexer = 2048 * 4096 + 6144 * 128 + 6144 * 32 + 2 * 128;
        let expert = 3 * 2048 * 6144;
        let sparse = 256 * 6144 + 256 + 257 * expert;
        let norms = 2 * 6144 + 2048 + 512;
        let layers = 78 * (attention + norms) + 21 * indexer + 3 * (3 * 12288 * 6144) + 75 * sparse;
        assert_eq!(total, layers + 2 * 154880 * 6144 + 6144);
        assert_eq!(total - active, 154880 * 6144 + 75 * 248 * expert);
    }

    /// The published INT4 checkpoint has 474 GB, of which the MTP layer, which is not loaded, takes 20.
    #[test]
    fn memory_of_glm_5_2_in_int4() {
        let config = glm_5_2(EXPERTS_ONLY);
        let whole = Plan::from_config(&config, 1).unwrap();
        let gigabytes = whole.weights.total() as f64 / 1e9;
        assert!((gigabytes / 454.0 - 1.0).abs() < 0.01, "{gigabytes}");
        // 4 bits, and 16 + 4 bits for every 32 of them.
        let expert_weights = 75 * 256 * 3 * 2048 * 6144_u64;
        assert_eq!(whole.weights.experts, expert_weights / 2 + expert_weights / 32 * 20 / 8);

        let rank = Plan::from_config(&config, 8).unwrap();
        assert_eq!(rank.weights.experts * 8, whole.weights.experts);
        assert_eq!(rank.weights.embeddings * 8, whole.weights.embeddings);
        assert_eq!(rank.weights.indexer, whole.weights.indexer);
        assert_eq!(rank.weights.attention * 8, whole.weights.attention);
        assert_eq!(rank.weights.norms, whole.weights.norms);
        assert_eq!(rank.parameters, whole.parameters);
    }

    /// Of 574 rows of `kv_a_proj_with_mqa` eight ranks cannot have as many each.
    #[test]
    fn what_ranks_gather_is_whole_on_each_where_they_do_not_divide_it() {
        let config = ModelConfig { qk_rope_head_dim: 62, ..glm_5_2("null") };
        let [one, eight] = [1, 8].map(|ranks| Plan::from_config(&config, ranks).unwrap().weights.attention);
        let kv_a = 78 * 2 * (512 + 62) * 6144;
        assert_eq!(8 * (eight - kv_a), one - kv_a);
    }

    #[test]
    fn caches_of_glm_5_2() {
        let plan = Plan::from_config(&glm_5_2(EXPERTS_ONLY), 8).unwrap();
        assert_eq!(plan.kv, KvBytes { mla: 78 * 1152, indexer: 21 * 256 });
        let weights = plan.weights.total();
        assert_eq!(plan.cache_tokens(weights), 0);
        assert_eq!(plan.longest_context(weights / 2), 0);
        assert_eq!(plan.longest_context(weights + 1000 * plan.kv.total() + 1), 1000);
        assert_eq!(plan.longest_context(u64::MAX), 1_048_576);
        // An A100 of 80 GB used to 90 %.
        let context = plan.longest_context((0.9 * 80.0 * GIB) as u64);
        assert!((150_000..250_000).contains(&context), "{context}");
    }

    #[test]
    fn a_degree_that_does_not_divide() {
        let message = Plan::from_config(&glm_5_2(EXPERTS_ONLY), 3).unwrap_err().to_string();
        assert!(message.contains("3 ranks"), "{message}");
    }
}
