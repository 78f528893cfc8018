//! One rank's weights in host memory, as the checkpoint stores them and as the backend takes them.
//!
//! Dimensions are those of the *shard*: `H_local` is `num_attention_heads / world_size`, and so on. What is
//! not said to be sharded is whole on every rank.

use std::ops::Range;

use bytemuck::Pod;
use dsa80_reference::{HostArray, HostData, HostExpert, HostLinear, HostTensor};

/// The weights of one decoder layer.
#[derive(Debug, Clone, PartialEq)]
pub struct HostLayer {
    /// `[hidden]`.
    pub input_layernorm: HostTensor,
    /// `[hidden]`.
    pub post_attention_layernorm: HostTensor,
    /// Multi-head latent attention, with the lightning indexer on full layers.
    pub attention: HostAttention,
    /// The feed-forward part.
    pub mlp: HostMlp,
    /// Present on an MTP layer.
    pub draft: Option<HostDraft>,
}

/// What an MTP layer has beside a decoder layer's weights. Its input is `embedding_proj enorm(e) + hidden_proj hnorm(h)`: of the embedding
/// of the next token, and of what the final norm gives for this one.
#[derive(Debug, Clone, PartialEq)]
pub struct HostDraft {
    /// `[hidden]`.
    pub enorm: HostTensor,
    /// `[hidden]`.
    pub hnorm: HostTensor,
    /// `[hidden, hidden]`: the first columns of `eh_proj`.
    pub embedding_proj: HostTensor,
    /// `[hidden, hidden]`: the other columns.
    pub hidden_proj: HostTensor,
    /// `[hidden]`: `shared_head.norm`, before `lm_head`.
    pub norm: HostTensor,
}

impl HostDraft {
    /// From whole tensors.
    pub fn new(enorm: HostTensor, hnorm: HostTensor, eh_proj: &HostTensor, norm: HostTensor) -> Self {
        let [embedding_proj, hidden_proj] = halves(eh_proj);
        Self { enorm, hnorm, embedding_proj, hidden_proj, norm }
    }
}

/// The left and the right half of a matrix.
fn halves(matrix: &HostTensor) -> [HostTensor; 2] {
    let [rows, columns] = [matrix.shape[0], matrix.shape[1..].iter().product()];
    let width = columns / 2;
    [0, width].map(|start| {
        let data = match &matrix.data {
            HostData::Bf16(data) => HostData::Bf16(columns_of(data, columns, start..start + width)),
            HostData::F16(data) => HostData::F16(columns_of(data, columns, start..start + width)),
            HostData::F32(data) => HostData::F32(columns_of(data, columns, start..start + width)),
        };
        HostTensor { shape: vec![rows, width], data }
    })
}

fn columns_of<T: Pod>(data: &[T], columns: usize, wanted: Range<usize>) -> HostArray<T> {
    data.chunks_exact(columns).flat_map(|row| row[wanted.clone()].iter().copied()).collect()
}

/// Multi-head latent attention.
#[derive(Debug, Clone, PartialEq)]
pub struct HostAttention {
    /// `[q_local, hidden]`: this rank's part of `q_lora_rank` rows, or all of them where ranks do not divide them.
    pub q_a_proj: HostLinear,
    /// `[q_lora_rank]`.
    pub q_a_layernorm: HostTensor,
    /// `[H_local * (qk_nope_head_dim + qk_rope_head_dim), q_lora_rank]`: this rank's heads.
    pub q_b_proj: HostLinear,
    /// `[kv_local, hidden]`: as much of `kv_lora_rank + qk_rope_head_dim` rows.
    pub kv_a_proj_with_mqa: HostLinear,
    /// `[kv_lora_rank]`.
    pub kv_a_layernorm: HostTensor,
    /// `[H_local, qk_nope_head_dim + v_head_dim, kv_lora_rank]`, per head K then V, always dense: what the
    /// checkpoint holds in INT4 is dequantised to f32, exactly, because `absorb` works on single heads.
    pub kv_b_proj: HostTensor,
    /// `[hidden, H_local * v_head_dim]`: the columns of this rank's heads.
    pub o_proj: HostLinear,
    /// Present on full layers; shared layers reuse the selection of the nearest full layer before them.
    pub indexer: Option<HostIndexer>,
}

/// The lightning indexer of a full layer, whole on every rank.
#[derive(Debug, Clone, PartialEq)]
pub struct HostIndexer {
    /// `[index_n_heads * index_head_dim, q_lora_rank]`.
    pub wq_b: HostLinear,
    /// `[index_head_dim, hidden]`.
    pub wk: HostLinear,
    /// `[index_head_dim]`: the LayerNorm's scale.
    pub k_norm_weight: HostTensor,
    /// `[index_head_dim]`: the LayerNorm's shift.
    pub k_norm_bias: HostTensor,
    /// `[index_n_heads, hidden]`.
    pub weights_proj: HostLinear,
}

/// A SwiGLU block: `down(silu(gate x) * up x)`.
#[derive(Debug, Clone, PartialEq)]
pub struct HostSwiGlu {
    /// `[intermediate_local, hidden]`.
    pub gate_proj: HostLinear,
    /// `[intermediate_local, hidden]`.
    pub up_proj: HostLinear,
    /// `[hidden, intermediate_local]`.
    pub down_proj: HostLinear,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "one a layer, taken apart at once")]
pub enum HostMlp {
    /// One SwiGLU for every token.
    Dense(HostSwiGlu),
    /// Routed experts.
    Sparse(HostMoe),
}

/// Router, routed experts and shared experts.
#[derive(Debug, Clone, PartialEq)]
pub struct HostMoe {
    /// `[n_routed_experts, hidden]`, whole on every rank.
    pub gate: HostLinear,
    /// `[n_routed_experts]`, whole on every rank; used for the choice only.
    pub e_score_correction_bias: HostTensor,
    /// `n_routed_experts` of them, each with `moe_intermediate_size / world_size` inner features.
    pub experts: Vec<HostExpert>,
    /// The shared experts, which the checkpoint stores as one SwiGLU of `moe_intermediate_size *
    /// n_shared_experts` inner features; `None` when the model has none.
    pub shared_experts: Option<HostSwiGlu>,
}

/// What stands before the first layer and after the last.
#[derive(Debug, Clone, PartialEq)]
pub struct HostEnds {
    /// `[vocab_local, hidden]`: rows `vocab_start..`.
    pub embed_tokens: HostTensor,
    /// The first token id of this rank's vocabulary shard, in both `embed_tokens` and `lm_head`.
    pub vocab_start: usize,
    /// `[hidden]`: the final norm.
    pub norm: HostTensor,
    /// `[vocab_local, hidden]`, always dense (INT4 is dequantised to f32, exactly); `embed_tokens` again when
    /// the checkpoint ties them.
    pub lm_head: HostTensor,
}
