//! The attention block: MLA over the rows that the lightning indexer selects, absorbed, or expanded where the backend says so.

use dsa80_reference::{DeviceTensor, IndexKeys, Kernels, Result, RopeLayout};

use super::forward::Forward;
use super::gathered::gather;
use super::probe::Probe;
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
        let outs = &mut [q_a.own(), kv_a.own(), index_k, index_weights];
        let count = match indexer {
            None => 2,
            Some(_) if scores => 4,
            Some(_) => 3,
        };
        weights.a_proj.apply(kernels, normed, &mut outs[..count])?;
        gather(self.communicator, [&mut ws.q_a, &mut ws.kv_a])?;
        if let Some(probe) = probe.as_deref_mut().filter(|probe| probe.wants_latents()) {
            probe.latents(layer, &kernels.read(&ws.q_a.whole)?, &kernels.read(&ws.kv_a.whole)?);
        }

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
            &ws.q_a.whole,
            &weights.q_a_layernorm,
            &mut ws.q_latent,
            &ws.kv_a.whole,
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

        if weights.indexer.is_some() {
            self.select(layer, layout, scores)?;
            self.probe_selection(layer, probe)?;
        }

        let ws = &mut *self.workspace;
        let (batch, kv_b, cache) = (self.device_batch, &weights.kv_b_proj, &self.caches.mla[layer]);
        let scale = (qk_head_dim as f64).powf(-0.5);
        ws.o.set_shape(&[tokens, shape.heads, shape.v_head_dim])?;
        if kernels.expands(batch, &ws.q, kv_b, cache, &ws.topk_indices) {
            let Workspace { q, cos_sin, topk_indices, o, .. } = ws;
            kernels.expanded_mla(batch, q, kv_b, cos_sin, cache, topk_indices, scale, o)?;
        } else {
            let Workspace { q, cos_sin, q_absorbed, topk_indices, o_latent, o, .. } = ws;
            kernels.absorb_query(q, kv_b, cos_sin, q_absorbed)?;
            kernels.sparse_mla_output(batch, q_absorbed, cache, topk_indices, scale, kv_b, o_latent, o)?;
        }
        ws.o.set_shape(&[tokens, shape.heads * shape.v_head_dim])?;
        weights.o_proj.apply(kernels, &ws.o, &mut ws.delta)
    }

    /// The indexer of a full layer: leaves the selection in `topk_indices`, where the shared layers that follow find it. With `scores`,
    /// its query and weights are there.
    fn select(&mut self, layer: usize, layout: RopeLayout, scores: bool) -> Result<()> {
        let (kernels, shape, tokens) = (self.kernels, self.shape, self.tokens);
        let ws = &mut *self.workspace;
        let (longest, Some(cache)) = (self.batch.max_context_len, &self.caches.indexer[layer]) else {
            return Ok(());
        };
        if !scores {
            ws.index_logits.set_shape(&[tokens, 0])?;
            return kernels.top_k(self.device_batch, 0..tokens, &ws.index_logits, &mut ws.topk_indices);
        }

        ws.index_q.set_shape(&[tokens, shape.index_n_heads, shape.index_head_dim])?;
        kernels.rope(&mut ws.index_q, 0, layout, &ws.cos_sin)?;

        let scale = ((shape.index_n_heads * shape.index_head_dim) as f64).powf(-0.5);
        let chunk = (ws.index_logits.capacity() / longest).clamp(1, tokens.max(1));
        for start in (0..tokens).step_by(chunk) {
            let rows = start..(start + chunk).min(tokens);
            ws.index_logits.set_shape(&[rows.len(), longest])?;
            kernels.indexer_logits(
                self.device_batch,
                rows.clone(),
                &ws.index_q,
                &ws.index_weights,
                cache,
                scale,
                &mut ws.index_logits,
            )?;
            kernels.top_k(self.device_batch, rows, &ws.index_logits, &mut ws.topk_indices)?;
        }
        Ok(())
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
