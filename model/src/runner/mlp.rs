//! The second half of a layer: a dense SwiGLU, or routed experts beside a shared one.

use dsa80_reference::{DeviceTensor, Kernels, Result, RouterParams};

use super::forward::Forward;
use super::probe::Probe;
use super::weights::{Experts, Linear, Mlp, Moe, SwiGlu};
use super::workspace::Workspace;

/// Which workspace tensor a SwiGLU writes.
enum Target {
    Delta,
    Shared,
}

impl<K: Kernels> Forward<'_, K> {
    /// `delta = mlp(normed)`, this rank's part of the sum over ranks.
    pub(super) fn mlp(
        &mut self,
        layer: usize,
        weights: &Mlp<K>,
        probe: &mut Option<&mut dyn Probe>,
    ) -> Result<()> {
        match weights {
            Mlp::Dense(mlp) => self.swiglu(mlp, Target::Delta),
            Mlp::Sparse(moe) => self.moe(layer, moe, probe),
        }
    }

    fn swiglu(&mut self, mlp: &SwiGlu<K>, target: Target) -> Result<()> {
        let (kernels, tokens) = (self.kernels, self.tokens);
        let ws = &mut *self.workspace;
        ws.activated.set_shape(&[tokens, mlp.intermediate])?;
        kernels.swiglu(&ws.normed, &mlp.gate_up_proj, &mut ws.activated)?;
        let out = match target {
            Target::Delta => &mut ws.delta,
            Target::Shared => &mut ws.shared,
        };
        mlp.down_proj.apply(kernels, &ws.activated, out)
    }

    fn moe(&mut self, layer: usize, moe: &Moe<K>, probe: &mut Option<&mut dyn Probe>) -> Result<()> {
        let (kernels, config, tokens) = (self.kernels, self.config, self.tokens);
        let params = RouterParams {
            n_group: config.n_group,
            topk_group: config.topk_group,
            norm_topk_prob: config.norm_topk_prob,
            routed_scaling_factor: config.routed_scaling_factor,
        };
        let Workspace { normed, activated, shared, router_logits, expert_ids, expert_weights, .. } =
            &mut *self.workspace;
        let bias = &moe.e_score_correction_bias;
        // The shared expert and the router each have two steps, which go well together.
        if let Some(mlp) = &moe.shared_experts
            && let (Linear::Dense(gate), Linear::Dense(down)) = (&moe.gate, &mlp.down_proj)
        {
            activated.set_shape(&[tokens, mlp.intermediate])?;
            kernels.swiglu_and_linear(normed, &mlp.gate_up_proj, activated, gate, router_logits)?;
            kernels.linear_and_router(
                activated,
                down,
                shared,
                router_logits,
                bias,
                params,
                expert_ids,
                expert_weights,
            )?;
        } else {
            if let Some(mlp) = &moe.shared_experts {
                self.swiglu(mlp, Target::Shared)?;
            }
            let ws = &mut *self.workspace;
            moe.gate.apply(kernels, &ws.normed, &mut ws.router_logits)?;
            kernels.router(&ws.router_logits, bias, params, &mut ws.expert_ids, &mut ws.expert_weights)?;
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
