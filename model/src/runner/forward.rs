//! The forward pass, written once for every backend.

use dsa80_reference::{Batch, Communicator, Kernels, Result};

use super::cache::Caches;
use super::probe::Probe;
use super::shape::RankShape;
use super::weights::{Ends, Layer};
use super::workspace::Workspace;
use crate::config::ModelConfig;

/// One step in flight: the batch on its way through the layers.
pub(super) struct Forward<'a, K: Kernels> {
    pub(super) kernels: &'a K,
    pub(super) communicator: &'a dyn Communicator<K::Tensor>,
    pub(super) config: &'a ModelConfig,
    pub(super) shape: &'a RankShape,
    pub(super) caches: &'a mut Caches<K>,
    pub(super) workspace: &'a mut Workspace<K>,
    pub(super) batch: &'a Batch,
    pub(super) device_batch: &'a K::Batch,
    pub(super) tokens: usize,
}

impl<K: Kernels> Forward<'_, K> {
    /// From token ids to the final norm; the normalised hidden states are left in `workspace.normed`.
    pub(super) fn run(
        &mut self,
        ends: &Ends<K>,
        layers: &[Layer<K>],
        mut probe: Option<&mut dyn Probe>,
    ) -> Result<()> {
        let (kernels, config) = (self.kernels, self.config);
        let probed = probe.as_ref().is_some_and(|probe| probe.wants_hidden());
        self.workspace.set_tokens(self.shape, self.tokens)?;
        let ws = &mut *self.workspace;
        kernels.rope_table(self.device_batch, config.rope_theta, &mut ws.cos_sin)?;
        kernels.embed(self.device_batch, &ends.embed_tokens, ends.vocab_start, &mut ws.residual)?;
        if self.communicator.world_size() > 1 {
            self.communicator.all_reduce(&mut self.workspace.residual)?;
        }

        for (index, layer) in layers.iter().enumerate() {
            // The first layer has nothing to add to the residual stream yet.
            if index == 0 {
                let ws = &mut *self.workspace;
                kernels.rms_norm(
                    &ws.residual,
                    &layer.input_layernorm,
                    config.rms_norm_eps,
                    &mut ws.normed,
                )?;
            } else {
                self.sum_and_norm(&layer.input_layernorm, probed)?;
            }
            self.probe_hidden(index, &mut probe)?;
            self.attention(index, &layer.attention, &mut probe)?;
            self.sum_and_norm(&layer.post_attention_layernorm, probed)?;
            self.mlp(index, &layer.mlp, &mut probe)?;
        }
        self.sum_and_norm(&ends.norm, probed)?;
        self.probe_hidden(layers.len(), &mut probe)
    }

    /// What the ranks' parts of a block add to the residual stream, and its norm. A probe sees the whole stream, of which a rank would
    /// otherwise have the rows that it keeps.
    pub(super) fn sum_and_norm(&mut self, weight: &K::Tensor, probed: bool) -> Result<()> {
        let eps = self.config.rms_norm_eps;
        let Workspace { delta, residual, normed, .. } = &mut *self.workspace;
        let several = self.communicator.world_size() > 1;
        if several && !probed && self.communicator.all_reduce_norm(delta, residual, weight, eps, normed)? {
            return Ok(());
        }
        if several {
            self.communicator.all_reduce(delta)?;
        }
        self.kernels.rms_norm_residual(delta, residual, weight, eps, normed)
    }

    fn probe_hidden(&mut self, layer: usize, probe: &mut Option<&mut dyn Probe>) -> Result<()> {
        if let Some(probe) = probe.as_deref_mut().filter(|probe| probe.wants_hidden()) {
            probe.hidden(layer, &self.kernels.read(&self.workspace.residual)?);
        }
        Ok(())
    }
}

/// Which token rows are projected to logits.
pub(super) enum LogitRows {
    /// Those in `workspace.logit_rows`.
    Listed,
    /// All of a step that is recorded.
    Every,
}

/// Leaves the logits of normalised rows in `workspace.logits`, which has as many rows.
pub(super) fn lm_head<K: Kernels>(
    kernels: &K,
    communicator: &dyn Communicator<K::Tensor>,
    ends: &Ends<K>,
    workspace: &mut Workspace<K>,
    rows: LogitRows,
) -> Result<()> {
    let Workspace { normed, logit_rows, every_row, logits_shard, logits, .. } = workspace;
    let rows = match rows {
        LogitRows::Listed => &*logit_rows,
        LogitRows::Every => &*every_row,
    };
    if communicator.world_size() == 1 {
        return kernels.lm_head(normed, rows, &ends.lm_head, logits);
    }
    kernels.lm_head(normed, rows, &ends.lm_head, logits_shard)?;
    communicator.all_gather(logits_shard, logits)
}
