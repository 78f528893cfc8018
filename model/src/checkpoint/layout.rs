//! The tensors that a config calls for: names, shapes and how ranks share them. Verifying, loading and
//! planning all read this one description.

use crate::config::{IndexerType, MlpLayerType, ModelConfig};

use super::shard::{Shard, Split};

/// What a weight belongs to, for the memory plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Attention,
    Indexer,
    Router,
    Experts,
    SharedExperts,
    DenseMlp,
    Norms,
    Embeddings,
}

/// A tensor that is never packed.
#[derive(Debug, Clone)]
pub(crate) struct TensorSpec {
    /// The full name.
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// `Replicated` or `Rows`.
    pub(crate) split: Split,
    pub(crate) role: Role,
}

/// The weight of a linear layer, packed or not.
#[derive(Debug, Clone)]
pub(crate) struct LinearSpec {
    /// The name without `.weight`.
    pub(crate) module: String,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) split: Split,
    pub(crate) role: Role,
    /// Loaded dense whatever the checkpoint holds.
    pub(crate) dense: bool,
}

impl LinearSpec {
    /// Whether transformers implements it as a `Linear`, which quantisers select by class.
    pub(crate) fn is_linear_class(&self) -> bool {
        self.role != Role::Router
    }
}

/// Either kind.
#[derive(Debug, Clone)]
pub(crate) enum Spec {
    Tensor(TensorSpec),
    Linear(LinearSpec),
}

pub(crate) struct LayerSpecs {
    pub(crate) input_layernorm: TensorSpec,
    pub(crate) post_attention_layernorm: TensorSpec,
    pub(crate) attention: AttentionSpecs,
    pub(crate) mlp: MlpSpecs,
    /// What an MTP layer has more.
    pub(crate) draft: Option<DraftSpecs>,
}

pub(crate) struct DraftSpecs {
    pub(crate) enorm: TensorSpec,
    pub(crate) hnorm: TensorSpec,
    pub(crate) eh_proj: LinearSpec,
    pub(crate) norm: TensorSpec,
}

pub(crate) struct AttentionSpecs {
    pub(crate) q_a_proj: LinearSpec,
    pub(crate) q_a_layernorm: TensorSpec,
    pub(crate) q_b_proj: LinearSpec,
    pub(crate) kv_a_proj_with_mqa: LinearSpec,
    pub(crate) kv_a_layernorm: TensorSpec,
    pub(crate) kv_b_proj: LinearSpec,
    pub(crate) o_proj: LinearSpec,
    pub(crate) indexer: Option<IndexerSpecs>,
}

pub(crate) struct IndexerSpecs {
    pub(crate) wq_b: LinearSpec,
    pub(crate) wk: LinearSpec,
    pub(crate) k_norm_weight: TensorSpec,
    pub(crate) k_norm_bias: TensorSpec,
    pub(crate) weights_proj: LinearSpec,
}

pub(crate) struct SwiGluSpecs {
    pub(crate) gate_proj: LinearSpec,
    pub(crate) up_proj: LinearSpec,
    pub(crate) down_proj: LinearSpec,
}

pub(crate) enum MlpSpecs {
    Dense(SwiGluSpecs),
    Sparse(MoeSpecs),
}

pub(crate) struct MoeSpecs {
    pub(crate) gate: LinearSpec,
    pub(crate) e_score_correction_bias: TensorSpec,
    pub(crate) shared_experts: Option<SwiGluSpecs>,
    pub(crate) n_routed_experts: usize,
    prefix: String,
    hidden: usize,
    intermediate: usize,
}

pub(crate) struct EndsSpecs {
    pub(crate) embed_tokens: TensorSpec,
    pub(crate) norm: TensorSpec,
    /// `None` when tied to the embedding.
    pub(crate) lm_head: Option<LinearSpec>,
}

fn tensor(name: String, shape: &[usize], split: Split, role: Role) -> TensorSpec {
    TensorSpec { name, shape: shape.to_vec(), split, role }
}

fn linear(module: String, [out_features, in_features]: [usize; 2], split: Split, role: Role) -> LinearSpec {
    LinearSpec { module, out_features, in_features, split, role, dense: false }
}

/// How `world_size` ranks have the `len` outputs of a projection that each of them needs whole: shared, and gathered after every product,
/// where they divide.
pub(crate) fn split_of_gathered(len: usize, world_size: usize) -> Split {
    if len.is_multiple_of(world_size) { Split::Rows } else { Split::Replicated }
}

/// How many of them one rank has.
pub(crate) fn share_of_gathered(len: usize, world_size: usize) -> usize {
    split_of_gathered(len, world_size).ranges(Shard { rank: 0, world_size }, len, 0).0.len()
}

/// Layer `layer` of `world_size` ranks.
pub(crate) fn layer(config: &ModelConfig, layer: usize, world_size: usize) -> LayerSpecs {
    let prefix = format!("model.layers.{layer}");
    let norm = |name: &str| {
        tensor(format!("{prefix}.{name}.weight"), &[config.hidden_size], Split::Replicated, Role::Norms)
    };
    let mlp = format!("{prefix}.mlp");
    let hidden = config.hidden_size;
    LayerSpecs {
        input_layernorm: norm("input_layernorm"),
        post_attention_layernorm: norm("post_attention_layernorm"),
        attention: attention(config, &prefix, config.indexer_types[layer], world_size),
        mlp: match config.mlp_layer_types[layer] {
            MlpLayerType::Dense => {
                MlpSpecs::Dense(swiglu(&mlp, config.hidden_size, config.intermediate_size, Role::DenseMlp))
            }
            MlpLayerType::Sparse => MlpSpecs::Sparse(moe(config, mlp)),
        },
        draft: (config.index_of_draft_layer() == Some(layer)).then(|| DraftSpecs {
            enorm: norm("enorm"),
            hnorm: norm("hnorm"),
            eh_proj: LinearSpec {
                dense: true,
                ..linear(format!("{prefix}.eh_proj"), [hidden, 2 * hidden], Split::Replicated, Role::DenseMlp)
            },
            norm: norm("shared_head.norm"),
        }),
    }
}

/// What is not in a layer.
pub(crate) fn ends(config: &ModelConfig) -> EndsSpecs {
    let shape = [config.vocab_size, config.hidden_size];
    EndsSpecs {
        embed_tokens: tensor("model.embed_tokens.weight".to_owned(), &shape, Split::Rows, Role::Embeddings),
        norm: tensor("model.norm.weight".to_owned(), &[config.hidden_size], Split::Replicated, Role::Norms),
        lm_head: (!config.tie_word_embeddings).then(|| LinearSpec {
            dense: true,
            ..linear("lm_head".to_owned(), shape, Split::Rows, Role::Embeddings)
        }),
    }
}

fn attention(config: &ModelConfig, layer: &str, indexer: IndexerType, world_size: usize) -> AttentionSpecs {
    let heads = config.num_attention_heads;
    let hidden = config.hidden_size;
    let (q_rank, kv_rank) = (config.q_lora_rank, config.kv_lora_rank);
    let kv_head = config.qk_nope_head_dim + config.v_head_dim;
    let module =
        |name: &str, shape, split| linear(format!("{layer}.self_attn.{name}"), shape, split, Role::Attention);
    let norm = |name: &str, size| {
        tensor(format!("{layer}.self_attn.{name}.weight"), &[size], Split::Replicated, Role::Norms)
    };
    let gathered = |name: &str, out| module(name, [out, hidden], split_of_gathered(out, world_size));
    AttentionSpecs {
        q_a_proj: gathered("q_a_proj", q_rank),
        q_a_layernorm: norm("q_a_layernorm", q_rank),
        q_b_proj: module("q_b_proj", [heads * config.qk_head_dim(), q_rank], Split::Rows),
        kv_a_proj_with_mqa: gathered("kv_a_proj_with_mqa", config.latent_dim()),
        kv_a_layernorm: norm("kv_a_layernorm", kv_rank),
        kv_b_proj: LinearSpec { dense: true, ..module("kv_b_proj", [heads * kv_head, kv_rank], Split::Rows) },
        o_proj: module("o_proj", [hidden, heads * config.v_head_dim], Split::Columns),
        indexer: (indexer == IndexerType::Full).then(|| indexer_specs(config, layer)),
    }
}

fn indexer_specs(config: &ModelConfig, layer: &str) -> IndexerSpecs {
    let (heads, dim) = (config.index_n_heads, config.index_head_dim);
    let name = |name: &str| format!("{layer}.self_attn.indexer.{name}");
    let module = |module: &str, shape| linear(name(module), shape, Split::Replicated, Role::Indexer);
    let norm = |field: &str| tensor(name(field), &[dim], Split::Replicated, Role::Indexer);
    IndexerSpecs {
        wq_b: module("wq_b", [heads * dim, config.q_lora_rank]),
        wk: module("wk", [dim, config.hidden_size]),
        k_norm_weight: norm("k_norm.weight"),
        k_norm_bias: norm("k_norm.bias"),
        weights_proj: module("weights_proj", [heads, config.hidden_size]),
    }
}

fn swiglu(prefix: &str, hidden: usize, intermediate: usize, role: Role) -> SwiGluSpecs {
    let module = |name: &str, shape, split| linear(format!("{prefix}.{name}"), shape, split, role);
    SwiGluSpecs {
        gate_proj: module("gate_proj", [intermediate, hidden], Split::Rows),
        up_proj: module("up_proj", [intermediate, hidden], Split::Rows),
        down_proj: module("down_proj", [hidden, intermediate], Split::Columns),
    }
}

fn moe(config: &ModelConfig, prefix: String) -> MoeSpecs {
    let (hidden, experts) = (config.hidden_size, config.n_routed_experts);
    let shared = config.shared_intermediate_size();
    let bias = format!("{prefix}.gate.e_score_correction_bias");
    MoeSpecs {
        gate: linear(format!("{prefix}.gate"), [experts, hidden], Split::Replicated, Role::Router),
        e_score_correction_bias: tensor(bias, &[experts], Split::Replicated, Role::Router),
        shared_experts: (shared > 0)
            .then(|| swiglu(&format!("{prefix}.shared_experts"), hidden, shared, Role::SharedExperts)),
        n_routed_experts: experts,
        prefix,
        hidden,
        intermediate: config.moe_intermediate_size,
    }
}

impl MoeSpecs {
    /// Routed expert `expert`.
    pub(crate) fn expert(&self, expert: usize) -> SwiGluSpecs {
        swiglu(&format!("{}.experts.{expert}", self.prefix), self.hidden, self.intermediate, Role::Experts)
    }
}

impl SwiGluSpecs {
    fn into_specs(self) -> [Spec; 3] {
        [self.gate_proj, self.up_proj, self.down_proj].map(Spec::Linear)
    }
}

impl EndsSpecs {
    /// All of them.
    pub(crate) fn into_specs(self) -> impl Iterator<Item = Spec> {
        let tensors = [self.embed_tokens, self.norm].map(Spec::Tensor);
        tensors.into_iter().chain(self.lm_head.map(Spec::Linear))
    }
}

impl LayerSpecs {
    /// Every tensor of the layer. Lazy, because a layer has hundreds of experts.
    pub(crate) fn into_specs(self) -> impl Iterator<Item = Spec> {
        let attention = self.attention;
        let mut specs = vec![
            Spec::Tensor(self.input_layernorm),
            Spec::Tensor(self.post_attention_layernorm),
            Spec::Linear(attention.q_a_proj),
            Spec::Tensor(attention.q_a_layernorm),
            Spec::Linear(attention.q_b_proj),
            Spec::Linear(attention.kv_a_proj_with_mqa),
            Spec::Tensor(attention.kv_a_layernorm),
            Spec::Linear(attention.kv_b_proj),
            Spec::Linear(attention.o_proj),
        ];
        if let Some(indexer) = attention.indexer {
            specs.extend([
                Spec::Linear(indexer.wq_b),
                Spec::Linear(indexer.wk),
                Spec::Tensor(indexer.k_norm_weight),
                Spec::Tensor(indexer.k_norm_bias),
                Spec::Linear(indexer.weights_proj),
            ]);
        }
        if let Some(DraftSpecs { enorm, hnorm, eh_proj, norm }) = self.draft {
            specs.extend([enorm, hnorm, norm].map(Spec::Tensor));
            specs.push(Spec::Linear(eh_proj));
        }
        let mut routed = None;
        match self.mlp {
            MlpSpecs::Dense(swiglu) => specs.extend(swiglu.into_specs()),
            MlpSpecs::Sparse(mut moe) => {
                specs.push(Spec::Linear(moe.gate.clone()));
                specs.push(Spec::Tensor(moe.e_score_correction_bias.clone()));
                specs.extend(moe.shared_experts.take().into_iter().flat_map(SwiGluSpecs::into_specs));
                routed = Some(moe);
            }
        }
        let experts = routed
            .into_iter()
            .flat_map(|moe| (0..moe.n_routed_experts).flat_map(move |e| moe.expert(e).into_specs()));
        specs.into_iter().chain(experts)
    }
}

/// Every tensor of the model as `world_size` ranks have it: what is not in a layer, then the layers in order.
pub(crate) fn all(config: &ModelConfig, world_size: usize) -> impl Iterator<Item = Spec> {
    let ends = ends(config);
    let outside = [Spec::Tensor(ends.embed_tokens), Spec::Tensor(ends.norm)];
    let outside = outside.into_iter().chain(ends.lm_head.map(Spec::Linear));
    outside.chain(
        (0..config.num_hidden_layers).flat_map(move |index| layer(config, index, world_size).into_specs()),
    )
}
