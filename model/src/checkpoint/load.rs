//! One rank's weights, read piece by piece.

use std::sync::atomic::Ordering;

use bytemuck::Pod;
use dsa80_reference::{DType, HostArray, HostData, HostExpert, HostInt4, HostLinear, HostTensor};

use super::format::{Int4Format, LinearFormat};
use super::layout::{
    self, AttentionSpecs, DraftSpecs, IndexerSpecs, LinearSpec, MlpSpecs, MoeSpecs, SwiGluSpecs, TensorSpec,
};
use super::shard::{Shard, Split};
use super::slices::{self, Slice};
use super::tensors::TensorView;
use super::{Checkpoint, CheckpointError, int4, parallel};
use crate::config::{ModelConfig, QuantizationMethod};
use crate::weights::{
    HostAttention, HostDraft, HostEnds, HostIndexer, HostLayer, HostMlp, HostMoe, HostSwiGlu,
};

/// Reads for one rank. The checkpoint has been verified and the degree checked, so what can fail here is only
/// a lookup.
pub(super) struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    shard: Shard,
    readers: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, shard: Shard) -> Self {
        Self { checkpoint, shard, readers: checkpoint.readers }
    }

    pub(super) fn layer(&self, config: &ModelConfig, index: usize) -> Result<HostLayer, CheckpointError> {
        let specs = layout::layer(config, index, self.shard.world_size);
        Ok(HostLayer {
            input_layernorm: self.tensor(&specs.input_layernorm)?,
            post_attention_layernorm: self.tensor(&specs.post_attention_layernorm)?,
            attention: self.attention(config, &specs.attention)?,
            mlp: match &specs.mlp {
                MlpSpecs::Dense(swiglu) => HostMlp::Dense(self.swiglu(swiglu)?),
                MlpSpecs::Sparse(moe) => HostMlp::Sparse(self.moe(moe)?),
            },
            draft: specs.draft.as_ref().map(|draft| self.draft(draft)).transpose()?,
        })
    }

    pub(super) fn ends(&self, config: &ModelConfig) -> Result<HostEnds, CheckpointError> {
        let specs = layout::ends(config);
        let embed_tokens = self.tensor(&specs.embed_tokens)?;
        Ok(HostEnds {
            vocab_start: self.shard.range(config.vocab_size).start,
            norm: self.tensor(&specs.norm)?,
            lm_head: match &specs.lm_head {
                Some(spec) => self.dense(spec)?,
                None => embed_tokens.clone(),
            },
            embed_tokens,
        })
    }

    fn attention(
        &self,
        config: &ModelConfig,
        specs: &AttentionSpecs,
    ) -> Result<HostAttention, CheckpointError> {
        let mut kv_b_proj = self.dense(&specs.kv_b_proj)?;
        let kv_head = config.qk_nope_head_dim + config.v_head_dim;
        kv_b_proj.shape = vec![kv_b_proj.shape[0] / kv_head, kv_head, config.kv_lora_rank];
        Ok(HostAttention {
            q_a_proj: self.linear(&specs.q_a_proj)?,
            q_a_layernorm: self.tensor(&specs.q_a_layernorm)?,
            q_b_proj: self.linear(&specs.q_b_proj)?,
            kv_a_proj_with_mqa: self.linear(&specs.kv_a_proj_with_mqa)?,
            kv_a_layernorm: self.tensor(&specs.kv_a_layernorm)?,
            kv_b_proj,
            o_proj: self.linear(&specs.o_proj)?,
            indexer: specs.indexer.as_ref().map(|indexer| self.indexer(indexer)).transpose()?,
        })
    }

    fn draft(&self, specs: &DraftSpecs) -> Result<HostDraft, CheckpointError> {
        let (enorm, hnorm) = (self.tensor(&specs.enorm)?, self.tensor(&specs.hnorm)?);
        Ok(HostDraft::new(enorm, hnorm, &self.dense(&specs.eh_proj)?, self.tensor(&specs.norm)?))
    }

    fn indexer(&self, specs: &IndexerSpecs) -> Result<HostIndexer, CheckpointError> {
        Ok(HostIndexer {
            wq_b: self.linear(&specs.wq_b)?,
            wk: self.linear(&specs.wk)?,
            k_norm_weight: self.tensor(&specs.k_norm_weight)?,
            k_norm_bias: self.tensor(&specs.k_norm_bias)?,
            weights_proj: self.linear(&specs.weights_proj)?,
        })
    }

    fn swiglu(&self, specs: &SwiGluSpecs) -> Result<HostSwiGlu, CheckpointError> {
        Ok(HostSwiGlu {
            gate_proj: self.linear(&specs.gate_proj)?,
            up_proj: self.linear(&specs.up_proj)?,
            down_proj: self.linear(&specs.down_proj)?,
        })
    }

    fn moe(&self, specs: &MoeSpecs) -> Result<HostMoe, CheckpointError> {
        // A projection is a part: the fewer bytes a part has, the sooner all readers are done.
        let mut projections: Vec<[Option<HostLinear>; 3]> = Vec::new();
        projections.resize_with(specs.n_routed_experts, || [None, None, None]);
        let specs_of = |expert: usize| {
            let SwiGluSpecs { gate_proj, up_proj, down_proj } = specs.expert(expert);
            [gate_proj, up_proj, down_proj]
        };
        let parts = projections
            .iter_mut()
            .enumerate()
            .flat_map(|(expert, slots)| slots.iter_mut().zip(specs_of(expert)))
            .collect();
        parallel::for_each(self.checkpoint.readers, parts, |(slot, spec): (&mut Option<_>, LinearSpec)| {
            // The threads are busy with projections already.
            let alone = Self { readers: 1, ..*self };
            *slot = Some(alone.linear(&spec)?);
            Ok(())
        })?;
        let expert = |[gate_proj, up_proj, down_proj]: [Option<HostLinear>; 3]| {
            Some(HostExpert { gate_proj: gate_proj?, up_proj: up_proj?, down_proj: down_proj? })
        };
        Ok(HostMoe {
            gate: self.linear(&specs.gate)?,
            e_score_correction_bias: self.tensor(&specs.e_score_correction_bias)?,
            // Without an error, all are there.
            experts: projections.into_iter().filter_map(expert).collect(),
            shared_experts: specs.shared_experts.as_ref().map(|shared| self.swiglu(shared)).transpose()?,
        })
    }

    fn tensor(&self, spec: &TensorSpec) -> Result<HostTensor, CheckpointError> {
        let view = self.view(&spec.name)?;
        let (rows, columns) = (spec.shape[0], spec.shape[1..].iter().product());
        let (rows, columns) = spec.split.ranges(self.shard, rows, columns);
        let mut tensor = self.floats(view, &Slice { rows, columns }, spec.split)?;
        tensor.shape.truncate(spec.shape.len());
        Ok(tensor)
    }

    fn linear(&self, spec: &LinearSpec) -> Result<HostLinear, CheckpointError> {
        let missing = || CheckpointError::Missing {
            file: self.checkpoint.name().to_owned(),
            tensor: format!("{}.weight", spec.module),
            expected: "it, as verified when the checkpoint was opened".to_owned(),
        };
        match *self.checkpoint.formats.get(&spec.module).ok_or_else(missing)? {
            LinearFormat::Dense(_) => {
                let view = self.view(&format!("{}.weight", spec.module))?;
                self.floats(view, &slices::dense(spec, self.shard), spec.split).map(HostLinear::Dense)
            }
            LinearFormat::Int4(format) => self.int4(spec, format).map(HostLinear::Int4),
        }
    }

    /// A linear layer that is wanted dense.
    fn dense(&self, spec: &LinearSpec) -> Result<HostTensor, CheckpointError> {
        self.linear(spec).map(HostLinear::dense)
    }

    fn int4(&self, spec: &LinearSpec, format: Int4Format) -> Result<HostInt4, CheckpointError> {
        let part = |suffix: &str| self.view(&format!("{}.{suffix}", spec.module));
        let slices = slices::int4(spec, format, self.shard);
        let words = |suffix: &str, slice: &Slice| self.copy::<u32>(part(suffix)?, slice, spec.split);
        let zero_points =
            |suffix: &str| slices.zero_points.as_ref().map(|slice| words(suffix, slice)).transpose();
        Ok(match format.method {
            QuantizationMethod::CompressedTensors => int4::from_compressed_tensors(
                &slices,
                words("weight_packed", &slices.words)?,
                self.floats(part("weight_scale")?, &slices.scales, spec.split)?,
                zero_points("weight_zero_point")?,
            ),
            QuantizationMethod::AutoAwq => int4::from_auto_awq(
                &slices,
                &words("qweight", &slices.words)?,
                self.floats(part("scales")?, &slices.scales, spec.split)?,
                zero_points("qzeros")?,
            ),
        })
    }

    fn view(&self, name: &str) -> Result<TensorView<'a>, CheckpointError> {
        self.checkpoint.tensors.require(name, || "it, as verified when the checkpoint was opened".to_owned())
    }

    /// `slice` of a float tensor, as a matrix.
    fn floats(
        &self,
        view: TensorView<'_>,
        slice: &Slice,
        split: Split,
    ) -> Result<HostTensor, CheckpointError> {
        let data = match view.float()? {
            DType::Bf16 => HostData::Bf16(self.copy(view, slice, split)?),
            DType::F16 => HostData::F16(self.copy(view, slice, split)?),
            _ => HostData::F32(self.copy(view, slice, split)?),
        };
        Ok(HostTensor { shape: vec![slice.rows.len(), slice.columns.len()], data })
    }

    /// Reads `slice` and counts its bytes.
    fn copy<T: Pod>(
        &self,
        view: TensorView<'_>,
        slice: &Slice,
        split: Split,
    ) -> Result<HostArray<T>, CheckpointError> {
        let elements = slice.read(view, view.shape[1..].iter().product(), self.readers)?;
        let bytes = size_of_val(&*elements) as u64;
        let counter = match split {
            Split::Replicated => &self.checkpoint.replicated_bytes,
            Split::Rows | Split::Columns => &self.checkpoint.sharded_bytes,
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
        self.checkpoint.progress.advance(bytes);
        Ok(elements)
    }
}
