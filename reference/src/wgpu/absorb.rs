//! `absorb_query` and `absorb_output`.

use super::Wgpu;
use super::launch::Launch;
use super::product::{Product, Weight};
use super::rope::rotary_dim;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::Result;
use crate::tensor::DeviceTensor;

static SHADER: Shader = shader!("absorb_query");

/// Tokens of a workgroup, as the shader has them.
const TOKENS: usize = 8;

pub(super) fn absorb_query(
    wgpu: &Wgpu,
    q: &WgpuTensor,
    kv_b: &WgpuTensor,
    cos_sin: &WgpuTensor,
    out: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "absorb_query";
    let [tokens, heads, q_width] = q.dims(kernel, "q")?;
    q.expect_act(kernel, "q")?;
    let [kv_heads, rows, rank] = kv_b.dims(kernel, "kv_b")?;
    kv_b.expect(kernel, "kv_b", kv_heads == heads, || format!("[{heads}, nope + v, kv_lora_rank]"))?;
    kv_b.expect_weight(kernel, "kv_b")?;
    kv_b.expect_even(kernel, "kv_b")?;
    let rope = rotary_dim(kernel, cos_sin, tokens)?;
    out.expect(kernel, "out", out.shape() == [tokens, heads, rank + rope], || {
        format!("[{tokens}, {heads}, {rank} + {rope}]")
    })?;
    out.expect_act(kernel, "out")?;
    q.expect(kernel, "q", rope < q_width && q_width - rope <= rows, || {
        format!("[T, H, nope + {rope}] with nope at least 1 and at most the {rows} rows of a head of `kv_b`")
    })?;
    if tokens * heads == 0 {
        return Ok(());
    }
    let nope = q_width - rope;
    let lanes = wgpu.workgroup(64);
    let columns = (rank + rope) / 2;
    wgpu.launch(&Launch {
        kernel,
        shader: &SHADER,
        entry: "main",
        constants: &[
            ("WORKGROUP", lanes.into()),
            ("WEIGHT", kv_b.weight_type()),
            ("NOPE", nope as f64),
            ("QUERIES", (TOKENS * nope) as f64),
        ],
        bindings: &[q.reads(), kv_b.reads(), cos_sin.reads(), out.writes()],
        params: &[tokens, heads, rows, rank, rope].map(|number| number as u32),
        groups: [columns.div_ceil(lanes as usize), tokens.div_ceil(TOKENS), heads]
            .map(|groups| groups as u32),
        shape: format!("{tokens} tokens, {heads} heads of {nope} + {rope}, rank {rank}, {}", kv_b.dtype()),
    })
}

pub(super) fn absorb_output(
    wgpu: &Wgpu,
    o: &WgpuTensor,
    kv_b: &WgpuTensor,
    out: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "absorb_output";
    let [tokens, heads, rank] = o.dims(kernel, "o")?;
    o.expect_act(kernel, "o")?;
    let [kv_heads, rows, kv_rank] = kv_b.dims(kernel, "kv_b")?;
    kv_b.expect(kernel, "kv_b", (kv_heads, kv_rank) == (heads, rank) && rank > 0, || {
        format!("[{heads}, nope + v, {rank}]")
    })?;
    kv_b.expect_weight(kernel, "kv_b")?;
    let [out_tokens, out_heads, v] = out.dims(kernel, "out")?;
    out.expect(kernel, "out", (out_tokens, out_heads) == (tokens, heads) && v <= rows, || {
        format!("[{tokens}, {heads}, v] with v at most the {rows} rows of a head of `kv_b`")
    })?;
    out.expect_act(kernel, "out")?;
    let (weight, features) = (Weight::Dense(kv_b), rows - v..rows);
    Product { kernel, x: o, rows: None, weight, features, rows_of_head: rows, tokens, heads, columns: rank }
        .launch(wgpu, "out", out)
}
