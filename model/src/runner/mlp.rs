//! The second half of a layer: a dense SwiGLU, or routed experts beside a shared one.

use dsa80_reference::{DeviceTensor, Kernels, Result, RouterParams};

use super::forward::Forward;
use super::probe::Probe;
use super::weights::{Experts, Mlp, Moe, SwiGlu};
use super::workspace::Workspace;

impl<K: Kernels> Forward<'_, K> {
    /// `delta = mlp(normed)`, this rank's part of the sum over ranks.
    pub(super) fn mlp(
        &mut self,
        layer: usize,
        weights: &Mlp<K>,
        probe: &mut Option<&mut dyn Probe>,
    ) -> Result<()> {
        match weights {
            Mlp::Dense(mlp) => {
                let Workspace { normed, activated, delta, .. } = &mut *self.workspace;
                mlp.apply(self.kernels, normed, activated, delta)
            }
            Mlp::Sparse(moe) => self.moe(layer, moe, probe),
        }
    }

    fn moe(&mut self, layer: usize, moe: &Moe<K>, probe: &mut Option<&mut dyn Probe>) -> Result<()> {
        let (kernels, config) = (self.kernels, self.config);
        let params = RouterParams {
            n_group: config.n_group,
            topk_group: config.topk_group,
            norm_topk_prob: config.norm_topk_prob,
            routed_scaling_factor: config.routed_scaling_factor,
        };
        let Workspace { normed, activated, shared, router_logits, expert_ids, expert_weights, .. } =
            &mut *self.workspace;
        let normed = &*normed;
        let mut route = || {
            moe.gate.apply(kernels, normed, router_logits)?;
            kernels.router(router_logits, &moe.e_score_correction_bias, params, expert_ids, expert_weights)
        };
        match &moe.shared_experts {
            Some(mlp) => {
                let run_shared = || mlp.apply(kernels, normed, activated, shared);
                kernels.side_by_side(self.tokens, run_shared, route)?;
            }
            None => route()?,
        }

        let ws = &mut *self.workspace;
        if let Some(probe) = probe {
            let mut ids = kernels.read_index(&ws.expert_ids)?;
            let mut weights = kernels.read(&ws.expert_weights)?;
            if probe.experts(layer, &mut ids, &mut weights) {
                kernels.write_index(&ids, &mut ws.expert_ids)?;
                kernels.write(&weights, &mut ws.expert_weights)?;
            }
        }
        let shared = moe.shared_experts.is_some().then_some(&ws.shared);
        match &moe.experts {
            Experts::Int4(experts) => kernels.moe_int4(
                &ws.normed,
                &ws.expert_ids,
                &ws.expert_weights,
                experts,
                shared,
                &mut ws.delta,
            ),
            Experts::Mixed(experts) => {
                kernels.moe(&ws.normed, &ws.expert_ids, &ws.expert_weights, experts, shared, &mut ws.delta)
            }
        }
    }
}

impl<K: Kernels> SwiGlu<K> {
    /// `out = down_proj(silu(gate_proj x) * up_proj x)`, by way of `activated`.
    fn apply(
        &self,
        kernels: &K,
        x: &K::Tensor,
        activated: &mut K::Tensor,
        out: &mut K::Tensor,
    ) -> Result<()> {
        activated.set_shape(&[x.shape()[0], self.intermediate])?;
        kernels.swiglu(x, &self.gate_up_proj, activated)?;
        self.down_proj.apply(kernels, activated, out)
    }
}
