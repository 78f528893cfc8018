//! A rank's weights on a backend.

use dsa80_reference::buffers::{self, Element};
use dsa80_reference::{HostData, HostExpert, HostLinear, HostTensor, Kernels, RandomFormat, Result};

use crate::weights::{HostAttention, HostEnds, HostIndexer, HostLayer, HostMlp, HostMoe, HostSwiGlu};

/// A linear layer in the format its checkpoint module has.
pub(crate) enum Linear<K: Kernels> {
    Dense(K::Tensor),
    Int4(K::Int4),
}

impl<K: Kernels> Linear<K> {
    fn upload(kernels: &K, weight: HostLinear) -> Result<Self> {
        Ok(match weight {
            HostLinear::Dense(weight) => Linear::Dense(kernels.upload(weight)?),
            HostLinear::Int4(weight) => Linear::Int4(kernels.upload_int4(weight)?),
            HostLinear::Random(weight) => match weight.format {
                RandomFormat::Dense(dtype) => Linear::Dense(kernels.random(&[weight.tensor(dtype)])?),
                RandomFormat::Int4 { .. } => Linear::Int4(kernels.random_int4(&weight)?),
            },
        })
    }

    /// `out = x weight^T`, by the kernel of the format.
    pub(crate) fn apply(&self, kernels: &K, x: &K::Tensor, out: &mut K::Tensor) -> Result<()> {
        match self {
            Linear::Dense(weight) => kernels.linear(x, weight, out),
            Linear::Int4(weight) => kernels.linear_int4(x, weight, out),
        }
    }
}

/// Token embedding, final norm and output projection; embedding and projection are vocabulary shards.
pub(crate) struct Ends<K: Kernels> {
    pub(crate) embed_tokens: K::Tensor,
    pub(crate) vocab_start: usize,
    pub(crate) norm: K::Tensor,
    pub(crate) lm_head: K::Tensor,
}

impl<K: Kernels> Ends<K> {
    pub(crate) fn upload(kernels: &K, ends: HostEnds) -> Result<Self> {
        Ok(Self {
            embed_tokens: kernels.upload(ends.embed_tokens)?,
            vocab_start: ends.vocab_start,
            norm: kernels.upload(ends.norm)?,
            lm_head: kernels.upload(ends.lm_head)?,
        })
    }
}

/// One decoder layer.
pub(crate) struct Layer<K: Kernels> {
    pub(crate) input_layernorm: K::Tensor,
    pub(crate) post_attention_layernorm: K::Tensor,
    pub(crate) attention: Attention<K>,
    pub(crate) mlp: Mlp<K>,
}

impl<K: Kernels> Layer<K> {
    pub(crate) fn upload(kernels: &K, layer: HostLayer) -> Result<Self> {
        Ok(Self {
            input_layernorm: kernels.upload(layer.input_layernorm)?,
            post_attention_layernorm: kernels.upload(layer.post_attention_layernorm)?,
            attention: Attention::upload(kernels, layer.attention)?,
            mlp: match layer.mlp {
                HostMlp::Dense(mlp) => Mlp::Dense(SwiGlu::upload(kernels, mlp)?),
                HostMlp::Sparse(moe) => Mlp::Sparse(Moe::upload(kernels, moe)?),
            },
        })
    }
}

/// Multi-head latent attention, with an indexer where the layer is a full one.
pub(crate) struct Attention<K: Kernels> {
    pub(crate) qkv_a_proj: QkvA<K>,
    pub(crate) q_a_layernorm: K::Tensor,
    pub(crate) q_b_proj: Linear<K>,
    pub(crate) kv_a_layernorm: K::Tensor,
    pub(crate) kv_b_proj: K::Tensor,
    pub(crate) o_proj: Linear<K>,
    pub(crate) indexer: Option<Indexer<K>>,
}

impl<K: Kernels> Attention<K> {
    fn upload(kernels: &K, attention: HostAttention) -> Result<Self> {
        Ok(Self {
            qkv_a_proj: QkvA::upload(kernels, attention.q_a_proj, attention.kv_a_proj_with_mqa)?,
            q_a_layernorm: kernels.upload(attention.q_a_layernorm)?,
            q_b_proj: Linear::upload(kernels, attention.q_b_proj)?,
            kv_a_layernorm: kernels.upload(attention.kv_a_layernorm)?,
            kv_b_proj: kernels.upload(attention.kv_b_proj)?,
            o_proj: Linear::upload(kernels, attention.o_proj)?,
            indexer: attention.indexer.map(|indexer| Indexer::upload(kernels, indexer)).transpose()?,
        })
    }
}

/// The projections of a layer's input to the query's latent and to the cache row.
pub(crate) enum QkvA<K: Kernels> {
    /// One below the other, for one launch: both are dense and of one type.
    Joined(K::Tensor),
    /// Of different formats.
    Apart { q_a_proj: Linear<K>, kv_a_proj_with_mqa: Linear<K> },
}

impl<K: Kernels> QkvA<K> {
    fn upload(kernels: &K, q_a_proj: HostLinear, kv_a_proj_with_mqa: HostLinear) -> Result<Self> {
        if let (HostLinear::Dense(q_a), HostLinear::Dense(kv_a)) = (&q_a_proj, &kv_a_proj_with_mqa)
            && let Some(both) = stack(q_a, kv_a)
        {
            [q_a_proj, kv_a_proj_with_mqa].into_iter().for_each(HostLinear::give_back);
            return Ok(Self::Joined(kernels.upload(both)?));
        }
        if let (HostLinear::Random(q_a), HostLinear::Random(kv_a)) = (&q_a_proj, &kv_a_proj_with_mqa)
            && let (RandomFormat::Dense(dtype), true) = (q_a.format, q_a.format == kv_a.format)
        {
            return Ok(Self::Joined(kernels.random(&[q_a.tensor(dtype), kv_a.tensor(dtype)])?));
        }
        Ok(Self::Apart {
            q_a_proj: Linear::upload(kernels, q_a_proj)?,
            kv_a_proj_with_mqa: Linear::upload(kernels, kv_a_proj_with_mqa)?,
        })
    }

    /// `q_a = x q_a_proj^T`, `kv_a = x kv_a_proj_with_mqa^T`.
    pub(crate) fn apply(
        &self,
        kernels: &K,
        x: &K::Tensor,
        q_a: &mut K::Tensor,
        kv_a: &mut K::Tensor,
    ) -> Result<()> {
        match self {
            QkvA::Joined(weight) => kernels.linear_split(x, weight, q_a, kv_a),
            QkvA::Apart { q_a_proj, kv_a_proj_with_mqa } => {
                q_a_proj.apply(kernels, x, q_a)?;
                kv_a_proj_with_mqa.apply(kernels, x, kv_a)
            }
        }
    }
}

/// `second` below `first`, if they have one type and as many columns.
fn stack(first: &HostTensor, second: &HostTensor) -> Option<HostTensor> {
    let (&[a, columns], &[b, second_columns]) = (&first.shape[..], &second.shape[..]) else { return None };
    if columns != second_columns {
        return None;
    }
    let data = match (&first.data, &second.data) {
        (HostData::Bf16(first), HostData::Bf16(second)) => HostData::Bf16(joined(first, second)),
        (HostData::F16(first), HostData::F16(second)) => HostData::F16(joined(first, second)),
        (HostData::F32(first), HostData::F32(second)) => HostData::F32(joined(first, second)),
        _ => return None,
    };
    Some(HostTensor { shape: vec![a + b, columns], data })
}

fn joined<T: Element + Copy>(first: &[T], second: &[T]) -> Vec<T> {
    let mut both = buffers::take(first.len() + second.len());
    both[..first.len()].copy_from_slice(first);
    both[first.len()..].copy_from_slice(second);
    both
}

/// The lightning indexer of a full layer; replicated on every rank.
pub(crate) struct Indexer<K: Kernels> {
    pub(crate) wq_b: Linear<K>,
    pub(crate) wk: Linear<K>,
    pub(crate) k_norm_weight: K::Tensor,
    pub(crate) k_norm_bias: K::Tensor,
    pub(crate) weights_proj: Linear<K>,
}

impl<K: Kernels> Indexer<K> {
    fn upload(kernels: &K, indexer: HostIndexer) -> Result<Self> {
        Ok(Self {
            wq_b: Linear::upload(kernels, indexer.wq_b)?,
            wk: Linear::upload(kernels, indexer.wk)?,
            k_norm_weight: kernels.upload(indexer.k_norm_weight)?,
            k_norm_bias: kernels.upload(indexer.k_norm_bias)?,
            weights_proj: Linear::upload(kernels, indexer.weights_proj)?,
        })
    }
}

/// The second half of a layer.
pub(crate) enum Mlp<K: Kernels> {
    Dense(SwiGlu<K>),
    Sparse(Moe<K>),
}

/// A gated MLP: a dense layer's, or the shared expert of a sparse one.
pub(crate) struct SwiGlu<K: Kernels> {
    /// `gate_proj` and `up_proj`.
    pub(crate) gate_up_proj: K::SwiGlu,
    pub(crate) down_proj: Linear<K>,
    /// Rows of `gate_proj` on this rank.
    pub(crate) intermediate: usize,
}

impl<K: Kernels> SwiGlu<K> {
    fn upload(kernels: &K, mlp: HostSwiGlu) -> Result<Self> {
        let (intermediate, _) = mlp.gate_proj.dims();
        Ok(Self {
            gate_up_proj: kernels.upload_swiglu(mlp.gate_proj, mlp.up_proj)?,
            down_proj: Linear::upload(kernels, mlp.down_proj)?,
            intermediate,
        })
    }
}

/// Router, routed experts and the shared expert.
pub(crate) struct Moe<K: Kernels> {
    pub(crate) gate: Linear<K>,
    pub(crate) e_score_correction_bias: K::Tensor,
    pub(crate) experts: Experts<K>,
    pub(crate) shared_experts: Option<SwiGlu<K>>,
}

/// The routed experts, for the kernel that their formats allow.
pub(crate) enum Experts<K: Kernels> {
    Int4(K::ExpertsInt4),
    Mixed(K::Experts),
}

impl<K: Kernels> Moe<K> {
    fn upload(kernels: &K, moe: HostMoe) -> Result<Self> {
        Ok(Self {
            gate: Linear::upload(kernels, moe.gate)?,
            e_score_correction_bias: kernels.upload(moe.e_score_correction_bias)?,
            experts: if HostExpert::fit_moe_int4(&moe.experts) {
                Experts::Int4(kernels.upload_experts_int4(moe.experts)?)
            } else {
                Experts::Mixed(kernels.upload_experts(moe.experts)?)
            },
            shared_experts: moe.shared_experts.map(|mlp| SwiGlu::upload(kernels, mlp)).transpose()?,
        })
    }
}
