//! A rank's weights on a backend.

use bytemuck::Pod;
use dsa80_reference::{
    HostArray, HostData, HostExpert, HostLinear, HostTensor, Kernels, RandomFormat, Result, buffers,
};

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
    /// `q_a_proj`, `kv_a_proj_with_mqa` and the indexer's `wk` and `weights_proj`, of the layer's input.
    pub(crate) a_proj: Projections<K>,
    pub(crate) q_a_layernorm: K::Tensor,
    /// `q_b_proj` and the indexer's `wq_b`, of the query's latent.
    pub(crate) q_b_proj: Projections<K>,
    pub(crate) kv_a_layernorm: K::Tensor,
    pub(crate) kv_b_proj: K::Tensor,
    pub(crate) o_proj: Linear<K>,
    pub(crate) indexer: Option<Indexer<K>>,
}

impl<K: Kernels> Attention<K> {
    fn upload(kernels: &K, attention: HostAttention) -> Result<Self> {
        let mut a_proj = vec![attention.q_a_proj, attention.kv_a_proj_with_mqa];
        let mut q_b_proj = vec![attention.q_b_proj];
        let indexer =
            attention.indexer.map(|HostIndexer { wq_b, wk, k_norm_weight, k_norm_bias, weights_proj }| {
                a_proj.extend([wk, weights_proj]);
                q_b_proj.push(wq_b);
                Indexer::upload(kernels, k_norm_weight, k_norm_bias)
            });
        Ok(Self {
            a_proj: Projections::upload(kernels, a_proj)?,
            q_a_layernorm: kernels.upload(attention.q_a_layernorm)?,
            q_b_proj: Projections::upload(kernels, q_b_proj)?,
            kv_a_layernorm: kernels.upload(attention.kv_a_layernorm)?,
            kv_b_proj: kernels.upload(attention.kv_b_proj)?,
            o_proj: Linear::upload(kernels, attention.o_proj)?,
            indexer: indexer.transpose()?,
        })
    }
}

/// Projections of one input, one after the other.
pub(crate) struct Projections<K: Kernels>(Vec<Run<K>>);

/// Neighbouring projections of one launch.
enum Run<K: Kernels> {
    /// So many, one below the other: all dense, and of one type.
    Joined(K::Tensor, usize),
    /// One of another format than its neighbours.
    Apart(Linear<K>),
}

impl<K: Kernels> Projections<K> {
    fn upload(kernels: &K, weights: Vec<HostLinear>) -> Result<Self> {
        let mut runs = Vec::new();
        let mut weights = weights.into_iter().peekable();
        while let Some(first) = weights.next() {
            let mut alike = vec![first];
            while alike.len() < MOST_JOINED
                && let Some(next) = weights.next_if(|next| joins(&alike[0], next))
            {
                alike.push(next);
            }
            runs.push(Run::upload(kernels, alike)?);
        }
        Ok(Self(runs))
    }

    /// `outs[i] = x weight_i^T`; of the last, as many as there is no output for are left out.
    pub(crate) fn apply(&self, kernels: &K, x: &K::Tensor, outs: &mut [&mut K::Tensor]) -> Result<()> {
        let mut outs = outs;
        for run in &self.0 {
            if outs.is_empty() {
                break;
            }
            let count = match run {
                Run::Joined(_, count) => (*count).min(outs.len()),
                Run::Apart(_) => 1,
            };
            let (own, others) = outs.split_at_mut(count);
            match run {
                Run::Joined(weight, _) => kernels.linear_split(x, weight, own)?,
                Run::Apart(weight) => weight.apply(kernels, x, own[0])?,
            }
            outs = others;
        }
        Ok(())
    }
}

/// Projections of a launch at most.
const MOST_JOINED: usize = 4;

impl<K: Kernels> Run<K> {
    /// Of weights that [join](joins).
    fn upload(kernels: &K, mut alike: Vec<HostLinear>) -> Result<Self> {
        if alike.len() == 1
            && let Some(weight) = alike.pop()
        {
            return Ok(Run::Apart(Linear::upload(kernels, weight)?));
        }
        let count = alike.len();
        let (mut dense, mut random) = (Vec::new(), Vec::new());
        for weight in alike {
            match weight {
                HostLinear::Dense(weight) => dense.push(weight),
                HostLinear::Random(weight) => match weight.format {
                    RandomFormat::Dense(dtype) => random.push(weight.tensor(dtype)),
                    RandomFormat::Int4 { .. } => {}
                },
                HostLinear::Int4(_) => {}
            }
        }
        let joined =
            if dense.is_empty() { kernels.random(&random)? } else { kernels.upload(stack(dense))? };
        Ok(Run::Joined(joined, count))
    }
}

/// Whether two projections of one input can be one weight.
fn joins(first: &HostLinear, second: &HostLinear) -> bool {
    match (first, second) {
        (HostLinear::Dense(first), HostLinear::Dense(second)) => {
            let two = first.shape.len() == 2 && second.shape.len() == 2;
            two && first.dtype() == second.dtype() && first.shape[1] == second.shape[1]
        }
        (HostLinear::Random(first), HostLinear::Random(second)) => {
            matches!(first.format, RandomFormat::Dense(_))
                && first.format == second.format
                && first.in_features == second.in_features
        }
        _ => false,
    }
}

/// Tensors of one type and as many columns, one below the other.
fn stack(tensors: Vec<HostTensor>) -> HostTensor {
    let rows = tensors.iter().map(|tensor| tensor.shape[0]).sum();
    let shape = vec![rows, tensors[0].shape[1]];
    let data = match &tensors[0].data {
        HostData::Bf16(_) => HostData::Bf16(joined(&tensors, |data| match data {
            HostData::Bf16(numbers) => numbers,
            _ => &[],
        })),
        HostData::F16(_) => HostData::F16(joined(&tensors, |data| match data {
            HostData::F16(numbers) => numbers,
            _ => &[],
        })),
        HostData::F32(_) => HostData::F32(joined(&tensors, |data| match data {
            HostData::F32(numbers) => numbers,
            _ => &[],
        })),
    };
    HostTensor { shape, data }
}

fn joined<T: Pod>(tensors: &[HostTensor], numbers: impl Fn(&HostData) -> &[T]) -> HostArray<T> {
    let mut all = buffers::take(tensors.iter().map(|tensor| numbers(&tensor.data).len()).sum());
    let mut rest = &mut all[..];
    for tensor in tensors {
        let own = numbers(&tensor.data);
        let (place, behind) = rest.split_at_mut(own.len());
        place.copy_from_slice(own);
        rest = behind;
    }
    all
}

/// The lightning indexer of a full layer, but for its projections; replicated on every rank.
pub(crate) struct Indexer<K: Kernels> {
    pub(crate) k_norm_weight: K::Tensor,
    pub(crate) k_norm_bias: K::Tensor,
}

impl<K: Kernels> Indexer<K> {
    fn upload(kernels: &K, k_norm_weight: HostTensor, k_norm_bias: HostTensor) -> Result<Self> {
        let k_norm_weight = kernels.upload(k_norm_weight)?;
        Ok(Self { k_norm_weight, k_norm_bias: kernels.upload(k_norm_bias)? })
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

#[cfg(test)]
mod tests {
    use dsa80_reference::cpu::{Cpu, CpuTensor};
    use dsa80_reference::{DType, DeviceTensor};
    use half::bf16;

    use super::*;

    const COLUMNS: usize = 3;

    fn weight(rows: usize, is_bf16: bool, first: f32) -> HostTensor {
        let numbers: Vec<f32> = (0..rows * COLUMNS).map(|i| first + i as f32).collect();
        let shape = [rows, COLUMNS];
        if is_bf16 {
            HostTensor::bf16(shape, numbers.into_iter().map(bf16::from_f32).collect())
        } else {
            HostTensor::f32(shape, numbers)
        }
    }

    #[test]
    fn neighbours_of_one_type_are_joined_and_all_are_what_each_would_be() {
        let kernels = Cpu::<f64>::new();
        let mut x: CpuTensor<f64> = kernels.alloc(DType::Act, &[2, COLUMNS]).unwrap();
        kernels.write(&[1.0, -2.0, 0.5, 3.0, 0.25, -1.0], &mut x).unwrap();
        for (types, runs) in [
            (&[true, true][..], &[2][..]),
            (&[true, true, true, true, true], &[4, 1]),
            (&[true, false, false, true], &[1, 2, 1]),
        ] {
            let weights: Vec<HostTensor> = types
                .iter()
                .enumerate()
                .map(|(i, &is_bf16)| weight(i + 1, is_bf16, 7.0 * i as f32))
                .collect();
            let hosts = weights.iter().cloned().map(HostLinear::Dense).collect();
            let all = Projections::upload(&kernels, hosts).unwrap();
            let counts: Vec<usize> =
                all.0.iter().map(|run| if let Run::Joined(_, count) = run { *count } else { 1 }).collect();
            assert_eq!(counts, runs);
            for count in 1..=types.len() {
                let mut outs: Vec<CpuTensor<f64>> =
                    (0..count).map(|i| kernels.alloc(DType::Float, &[2, i + 1]).unwrap()).collect();
                all.apply(&kernels, &x, &mut outs.iter_mut().collect::<Vec<_>>()).unwrap();
                for (out, weight) in outs.iter().zip(&weights) {
                    let mut expected = kernels.alloc(DType::Float, out.shape()).unwrap();
                    kernels.linear(&x, &kernels.upload(weight.clone()).unwrap(), &mut expected).unwrap();
                    assert_eq!(kernels.read(out).unwrap(), kernels.read(&expected).unwrap());
                }
            }
        }
    }
}
