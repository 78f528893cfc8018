//! The MTP layer: from what the model knows of a token, and the token after it, a guess at the one after that.

use dsa80_reference::{Batch, DeviceTensor, Kernels, Result};

use super::forward::Forward;
use super::weights::{Ends, Layer};
use crate::engine::Step;
use crate::weights::HostDraft;

/// Its weights.
pub(super) struct Drafter<K: Kernels> {
    layer: Layer<K>,
    enorm: K::Tensor,
    hnorm: K::Tensor,
    embedding_proj: K::Tensor,
    hidden_proj: K::Tensor,
    norm: K::Tensor,
}

impl<K: Kernels> Drafter<K> {
    pub(super) fn upload(kernels: &K, layer: Layer<K>, draft: HostDraft) -> Result<Self> {
        Ok(Self {
            layer,
            enorm: kernels.upload(draft.enorm)?,
            hnorm: kernels.upload(draft.hnorm)?,
            embedding_proj: kernels.upload(draft.embedding_proj)?,
            hidden_proj: kernels.upload(draft.hidden_proj)?,
            norm: kernels.upload(draft.norm)?,
        })
    }
}

impl<K: Kernels> Forward<'_, K> {
    /// From the hidden states that [`run`](Self::run) has left in `workspace.normed`, and the tokens of [`following`], to those whose logits
    /// are the guesses; they are left in the same place. Its caches are those of layer `index`.
    pub(super) fn draft(&mut self, ends: &Ends<K>, drafter: &Drafter<K>, index: usize) -> Result<()> {
        let (kernels, eps) = (self.kernels, self.config.rms_norm_eps);
        let ws = &mut *self.workspace;
        ws.shared.set_rows(self.tokens)?;
        kernels.rms_norm(&ws.normed, &drafter.hnorm, eps, &mut ws.shared)?;
        kernels.linear(&ws.shared, &drafter.hidden_proj, &mut ws.delta)?;
        kernels.embed(self.device_batch, &ends.embed_tokens, ends.vocab_start, &mut ws.residual)?;
        if self.communicator.world_size() > 1 {
            self.communicator.all_reduce(&mut ws.residual)?;
        }
        kernels.rms_norm(&ws.residual, &drafter.enorm, eps, &mut ws.normed)?;
        kernels.linear(&ws.normed, &drafter.embedding_proj, &mut ws.residual)?;
        // Every rank has the whole of both: there is nothing to sum.
        let layer = &drafter.layer;
        kernels.rms_norm_residual(
            &ws.delta,
            &mut ws.residual,
            &layer.input_layernorm,
            eps,
            &mut ws.normed,
        )?;
        self.attention(index, &layer.attention, &mut None)?;
        self.sum_and_norm(&layer.post_attention_layernorm, false)?;
        self.mlp(index, &layer.mlp, &mut None)?;
        self.sum_and_norm(&drafter.norm, false)
    }
}

/// `step`'s batch with the token after each instead of it, where it is known because it is scored; otherwise, behind a prompt, its own. The
/// embedding at position 0 is left out, as engines that draft leave it out: such a token stands outside every vocabulary.
pub(super) fn following(step: &Step) -> Batch {
    const NONE: i32 = -1;
    let mut batch = step.batch.clone();
    for target in &step.targets {
        if let Some(token) = target.forced {
            batch.token_ids[target.row] = token as i32;
        }
    }
    for (token, position) in batch.token_ids.iter_mut().zip(&batch.positions) {
        if *position == 0 {
            *token = NONE;
        }
    }
    batch
}
