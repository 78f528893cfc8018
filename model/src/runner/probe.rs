//! Looking into a step: what was selected, what came out of each layer, and replacing the discrete choices.

/// Sees what a step decides, layer by layer, and may decide otherwise.
///
/// One flipped selection or expert changes everything after it, so comparing two implementations layer by
/// layer needs the same choices in both: record them in one, force them in the other. Reading them waits for
/// the device, so a probe is for tests, never for serving.
pub trait Probe {
    /// After the selection of a full layer: `indices` `[T, k]`, -1 padded. Return true to have the changed
    /// values used.
    fn topk_indices(&mut self, layer: usize, indices: &mut [i32]) -> bool {
        let _ = (layer, indices);
        false
    }

    /// After the router of a sparse layer: `ids` and `weights` `[T, num_experts_per_tok]`. Return true to
    /// have the changed values used.
    fn experts(&mut self, layer: usize, ids: &mut [i32], weights: &mut [f64]) -> bool {
        let _ = (layer, ids, weights);
        false
    }

    /// Whether [`latents`](Self::latents) are of interest: the device is read for them.
    fn wants_latents(&self) -> bool {
        false
    }

    /// What `q_a_proj` `[T, q_lora_rank]` and `kv_a_proj_with_mqa` `[T, kv_lora_rank + rope]` give in `layer`, whole on every rank.
    fn latents(&mut self, layer: usize, q_a: &[f64], kv_a: &[f64]) {
        let _ = (layer, q_a, kv_a);
    }

    /// Whether [`hidden`](Self::hidden) is of interest: the device is read for it.
    fn wants_hidden(&self) -> bool {
        true
    }

    /// The residual stream `[T, hidden]` that enters `layer`; `layer == num_hidden_layers` is what enters the
    /// final norm.
    fn hidden(&mut self, layer: usize, hidden: &[f64]) {
        let _ = (layer, hidden);
    }
}
