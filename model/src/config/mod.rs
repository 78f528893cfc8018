//! `config.json` of `glm_moe_dsa`.

mod error;
mod fields;
mod index_share;
mod parse;
mod quantization;
mod tensor_parallel;
#[cfg(test)]
mod tests;

pub use error::ConfigError;
pub use quantization::{Expectation, Int4Scheme, QuantizationConfig, QuantizationMethod};

/// `eps` of the LayerNorm on the indexer's keys; a constant of the architecture, not a config field.
pub const INDEXER_NORM_EPS: f64 = 1e-6;

/// Whether a layer selects keys itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexerType {
    /// Runs the lightning indexer, owns its weights and its key cache.
    Full,
    /// Reuses the selection of the nearest full layer before it.
    Shared,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpLayerType {
    /// One SwiGLU.
    Dense,
    /// Routed experts.
    Sparse,
}

/// A validated configuration: every spelling is brought to one, and no two fields contradict each other.
///
/// Field names are those of `config.json`. Sizes are at least 1 and at most `i32::MAX` unless said otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers, at most 4096: without the MTP ones, but for one [that drafts](Self::draft_layer).
    pub num_hidden_layers: usize,
    /// Tokens in the embedding.
    pub vocab_size: usize,
    /// Attention heads; `num_key_value_heads`, where given, is the same.
    pub num_attention_heads: usize,
    /// Query latent.
    pub q_lora_rank: usize,
    /// Key-value latent.
    pub kv_lora_rank: usize,
    /// Unrotated part of a query/key head.
    pub qk_nope_head_dim: usize,
    /// Rotated part of a query/key head, and of an indexer head; even.
    pub qk_rope_head_dim: usize,
    /// Value head.
    pub v_head_dim: usize,
    /// Indexer heads.
    pub index_n_heads: usize,
    /// Indexer head dimension; at least `qk_rope_head_dim`.
    pub index_head_dim: usize,
    /// Keys selected per query.
    pub index_topk: usize,
    /// One entry a layer; the first is `Full`.
    pub indexer_types: Vec<IndexerType>,
    /// The MTP layer reuses the indices of its first draft step.
    pub index_share_for_mtp_iteration: bool,
    /// Rotary pairs of the attention are (x0, x1), (x2, x3), ...; always true, other checkpoints are refused.
    pub rope_interleave: bool,
    /// The same for the indexer; false means (x0, x_{d/2}), ....
    pub indexer_rope_interleave: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Routed experts of a sparse layer.
    pub n_routed_experts: usize,
    /// Experts a token goes to.
    pub num_experts_per_tok: usize,
    /// Shared experts of a sparse layer; may be 0.
    pub n_shared_experts: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Inner width of a dense layer.
    pub intermediate_size: usize,
    /// Expert groups; divides `n_routed_experts`.
    pub n_group: usize,
    /// Groups kept by the router.
    pub topk_group: usize,
    /// Divide the chosen experts' scores by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the routed experts' weights.
    pub routed_scaling_factor: f64,
    /// One entry a layer.
    pub mlp_layer_types: Vec<MlpLayerType>,
    /// `eps` of the layer norms and the final norm.
    pub rms_norm_eps: f64,
    /// `eps` of `q_a_layernorm` and `kv_a_layernorm`. `rms_norm_eps` unless the config has the field
    /// `latent_norm_eps`: serving engines use the former, transformers 1e-6 whatever the config says.
    pub latent_norm_eps: f64,
    /// The longest context the model was made for.
    pub max_position_embeddings: usize,
    /// Tokens that end a generation; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// MTP layers behind the last decoder layer; may be 0.
    pub num_nextn_predict_layers: usize,
    /// The last of the layers is the first MTP layer: it drafts tokens, and the layers before it are the model without it. Never so in a
    /// config as it is read.
    pub draft_layer: bool,
    /// `lm_head` is `embed_tokens`.
    pub tie_word_embeddings: bool,
    /// How linear layers are packed; `None` for an unquantised checkpoint.
    pub quantization: Option<QuantizationConfig>,
}

impl ModelConfig {
    /// Parses and validates the text of a `config.json`. Unknown fields are ignored.
    ///
    /// # Errors
    /// [`ConfigError`], naming the field, for anything missing, mistyped, contradictory or not supported.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        parse::model_config(text)
    }

    /// Query/key head dimension: `qk_nope_head_dim + qk_rope_head_dim`.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Elements in a row of the MLA cache: `kv_lora_rank + qk_rope_head_dim`.
    pub fn latent_dim(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Number of layers that own an indexer.
    pub fn num_full_layers(&self) -> usize {
        self.indexer_types.iter().filter(|t| **t == IndexerType::Full).count()
    }

    /// Number of layers with routed experts.
    pub fn num_sparse_layers(&self) -> usize {
        self.mlp_layer_types.iter().filter(|t| **t == MlpLayerType::Sparse).count()
    }

    /// With the first MTP layer as one layer more: a full layer with routed experts, as it is published. The same again where there is none.
    #[must_use]
    pub fn with_draft_layer(&self) -> Self {
        let mut config = self.clone();
        if !self.draft_layer && self.num_nextn_predict_layers > 0 {
            config.draft_layer = true;
            config.num_hidden_layers += 1;
            config.indexer_types.push(IndexerType::Full);
            config.mlp_layer_types.push(MlpLayerType::Sparse);
        }
        config
    }

    /// The layer that drafts.
    pub fn index_of_draft_layer(&self) -> Option<usize> {
        self.draft_layer.then(|| self.num_hidden_layers - 1)
    }

    /// Inner width of the shared experts taken together; 0 when there are none.
    pub fn shared_intermediate_size(&self) -> usize {
        self.moe_intermediate_size * self.n_shared_experts
    }
}
