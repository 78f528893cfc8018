//! The attention block: MLA over the rows that the lightning indexer selects, absorbed, or expanded where the backend says so.

use dsa80_reference::{Batch, DeviceTensor, IndexKeys, Kernels, Result, RopeLayout};

use super::forward::Forward;
use super::probe::Probe;
use super::shape::RankShape;
use super::weights::Attention;
use super::workspace::Workspace;
use crate::config::INDEXER_NORM_EPS;

impl<K: Kernels> Forward<'_, K> {
    /// `delta = o_proj(attention(normed))`, this rank's part of the sum over ranks.
    pub(super) fn attention(
        &mut self,
        layer: usize,
        weights: &Attention<K>,
        probe: &mut Option<&mut dyn Probe>,
    ) -> Result<()> {
        let (kernels, config, shape, tokens) = (self.kernels, self.config, self.shape, self.tokens);
        let ws = &mut *self.workspace;
        let layout = if config.indexer_rope_interleave { RopeLayout::Interleaved } else { RopeLayout::Half };
        // A full layer has an indexer and a cache for it: the config's check has made sure.
        let indexer = weights.indexer.as_ref().zip(self.caches.indexer[layer].as_mut());
        // Where every row sees no more than `index_topk` keys all are selected, and nothing needs a score.
        let scores = self.batch.max_context_len > shape.index_topk;
        let Workspace { normed, q_a, kv_a, index_k, index_weights, .. } = ws;
        let outs = &mut [q_a, kv_a, index_k, index_weights];
        let count = match indexer {
            None => 2,
            Some(_) if scores => 4,
            Some(_) => 3,
        };
        weights.a_proj.apply(kernels, normed, &mut outs[..count])?;

        let keys = indexer.map(|(indexer, cache)| IndexKeys {
            x: &ws.index_k,
            weight: &indexer.k_norm_weight,
            bias: &indexer.k_norm_bias,
            eps: INDEXER_NORM_EPS,
            layout,
            cache,
        });
        kernels.qkv_norm_rope(
            self.device_batch,
            &ws.q_a,
            &weights.q_a_layernorm,
            &mut ws.q_latent,
            &ws.kv_a,
            &weights.kv_a_layernorm,
            &mut self.caches.mla[layer],
            config.latent_norm_eps,
            &ws.cos_sin,
            keys,
        )?;

        let qk_head_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim;
        ws.q.set_shape(&[tokens, shape.heads * qk_head_dim])?;
        ws.index_q.set_shape(&[tokens, shape.index_n_heads * shape.index_head_dim])?;
        let outs = &mut [&mut ws.q, &mut ws.index_q];
        let count = if weights.indexer.is_some() && scores { 2 } else { 1 };
        weights.q_b_proj.apply(kernels, &ws.q_latent, &mut outs[..count])?;
        ws.q.set_shape(&[tokens, shape.heads, qk_head_dim])?;

        let Workspace { cos_sin, q, q_absorbed, index_q, index_weights, index_logits, topk_indices, .. } =
            &mut *ws;
        let kv_b = &weights.kv_b_proj;
        let expands = kernels.expands(self.device_batch, q, kv_b, &self.caches.mla[layer], topk_indices);
        let mut absorb = || if expands { Ok(()) } else { kernels.absorb_query(q, kv_b, cos_sin, q_absorbed) };
        if let Some(cache) = &self.caches.indexer[layer] {
            let selection = Selection {
                kernels,
                shape,
                batch: self.batch,
                device_batch: self.device_batch,
                layout,
                cos_sin,
                index_q,
                index_weights,
                cache,
                index_logits,
                topk_indices,
            };
            kernels.side_by_side(tokens, || selection.run(scores), absorb)?;
            self.probe_selection(layer, probe)?;
        } else {
            absorb()?;
        }

        let ws = &mut *self.workspace;
        let (batch, kv_b, cache) = (self.device_batch, &weights.kv_b_proj, &self.caches.mla[layer]);
        let scale = (qk_head_dim as f64).powf(-0.5);
        ws.o.set_shape(&[tokens, shape.heads, shape.v_head_dim])?;
        if expands {
            let Workspace { q, cos_sin, topk_indices, o, .. } = ws;
            kernels.expanded_mla(batch, q, kv_b, cos_sin, cache, topk_indices, scale, o)?;
        } else {
            let Workspace { q_absorbed, topk_indices, o_latent, o, .. } = ws;
            kernels.sparse_mla_output(batch, q_absorbed, cache, topk_indices, scale, kv_b, o_latent, o)?;
        }
        ws.o.set_shape(&[tokens, shape.heads * shape.v_head_dim])?;
        weights.o_proj.apply(kernels, &ws.o, &mut ws.delta)
    }

    fn probe_selection(&mut self, layer: usize, probe: &mut Option<&mut dyn Probe>) -> Result<()> {
        let Some(probe) = probe else { return Ok(()) };
        let topk_indices = &mut self.workspace.topk_indices;
        let mut indices = self.kernels.read_index(topk_indices)?;
        if probe.topk_indices(layer, &mut indices) {
            self.kernels.write_index(&indices, topk_indices)?;
        }
        Ok(())
    }
}

/// The indexer of a full layer: leaves the selection in `topk_indices`, where the shared layers that follow find it.
struct Selection<'a, K: Kernels> {
    kernels: &'a K,
    shape: &'a RankShape,
    batch: &'a Batch,
    device_batch: &'a K::Batch,
    layout: RopeLayout,
    cos_sin: &'a K::Tensor,
    index_q: &'a mut K::Tensor,
    index_weights: &'a K::Tensor,
    cache: &'a K::Tensor,
    index_logits: &'a mut K::Tensor,
    topk_indices: &'a mut K::Tensor,
}

impl<K: Kernels> Selection<'_, K> {
    /// With `scores`, the indexer's query and weights are there.
    fn run(self, scores: bool) -> Result<()> {
        let Self { kernels, shape, batch, index_q, index_logits, topk_indices, .. } = self;
        let (tokens, longest) = (batch.num_tokens(), batch.max_context_len);
        if !scores {
            index_logits.set_shape(&[tokens, 0])?;
            return kernels.top_k(self.device_batch, 0..tokens, index_logits, topk_indices);
        }

        index_q.set_shape(&[tokens, shape.index_n_heads, shape.index_head_dim])?;
        kernels.rope(index_q, 0, self.layout, self.cos_sin)?;

        let scale = ((shape.index_n_heads * shape.index_head_dim) as f64).powf(-0.5);
        let chunk = (index_logits.capacity() / longest).clamp(1, tokens.max(1));
        for start in (0..tokens).step_by(chunk) {
            let rows = start..(start + chunk).min(tokens);
            index_logits.set_shape(&[rows.len(), longest])?;
            kernels.indexer_logits(
                self.device_batch,
                rows.clone(),
                index_q,
                self.index_weights,
                self.cache,
                scale,
                index_logits,
            )?;
            kernels.top_k(self.device_batch, rows, index_logits, topk_indices)?;
        }
        Ok(())
    }
}
