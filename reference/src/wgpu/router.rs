//! `router`.

use super::Wgpu;
use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::{Error, Result};
use crate::kernels::RouterParams;

static SHADER: Shader = shader!("router");

const KERNEL: &str = "router";

pub(super) fn router(
    wgpu: &Wgpu,
    logits: &WgpuTensor,
    bias: &WgpuTensor,
    params: RouterParams,
    topk_ids: &mut WgpuTensor,
    topk_weights: &mut WgpuTensor,
) -> Result<()> {
    let RouterParams { n_group, topk_group, norm_topk_prob, routed_scaling_factor } = params;
    let [tokens, experts] = logits.dims(KERNEL, "logits")?;
    logits.expect_float(KERNEL, "logits")?;
    bias.expect_shape(KERNEL, "bias", &[experts])?;
    bias.expect_weight(KERNEL, "bias")?;
    let [_, top_k] = topk_ids.dims(KERNEL, "topk_ids")?;
    topk_ids.expect_shape(KERNEL, "topk_ids", &[tokens, top_k])?;
    topk_ids.expect_index(KERNEL, "topk_ids")?;
    topk_weights.expect_shape(KERNEL, "topk_weights", &[tokens, top_k])?;
    topk_weights.expect_float(KERNEL, "topk_weights")?;
    let expect = |name, ok: bool, expected: String, found: usize| {
        let found = found.to_string();
        if ok { Ok(()) } else { Err(Error::Value { kernel: KERNEL, name, expected, found }) }
    };
    let divides = n_group > 0 && experts > 0 && experts.is_multiple_of(n_group);
    expect("n_group", divides, format!("a divisor of {experts} experts"), n_group)?;
    expect("topk_group", (1..=n_group).contains(&topk_group), format!("1 to {n_group} groups"), topk_group)?;
    let kept = topk_group * (experts / n_group);
    topk_ids
        .expect(KERNEL, "topk_ids", top_k <= kept, || format!("at most {kept} experts of the kept groups"))?;
    if tokens * top_k == 0 {
        return Ok(());
    }
    wgpu.launch(&Launch {
        kernel: KERNEL,
        shader: &SHADER,
        entry: "main",
        constants: &[
            ("WORKGROUP", wgpu.workgroup(experts.min(256)).into()),
            ("WEIGHT", bias.weight_type()),
            ("EXPERTS", experts as f64),
            ("GROUPS", n_group as f64),
            ("NORMALISE", norm_topk_prob.into()),
        ],
        bindings: &[logits.reads(), bias.reads(), topk_ids.writes(), topk_weights.writes()],
        params: &[tokens as u32, top_k as u32, topk_group as u32, (routed_scaling_factor as f32).to_bits()],
        groups: wgpu.fold(tokens),
        shape: format!("{tokens} tokens, {experts} experts in {n_group} groups, {top_k} of them"),
    })
}
