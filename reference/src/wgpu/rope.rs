//! `rope`, and what the kernels with rotary columns share.

use super::Wgpu;
use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::{Error, Result};
use crate::kernels::RopeLayout;

static SHADER: Shader = shader!("rope");

const KERNEL: &str = "rope";

/// The rotary columns of a `[rows, dim / 2, 2]` table.
pub(super) fn rotary_dim(kernel: &'static str, cos_sin: &WgpuTensor, rows: usize) -> Result<usize> {
    let [table_rows, pairs, two] = cos_sin.dims(kernel, "cos_sin")?;
    cos_sin.expect(kernel, "cos_sin", table_rows == rows && two == 2, || format!("[{rows}, dim / 2, 2]"))?;
    cos_sin.expect_float(kernel, "cos_sin")?;
    Ok(2 * pairs)
}

pub(super) fn rope(
    wgpu: &Wgpu,
    x: &mut WgpuTensor,
    offset: usize,
    layout: RopeLayout,
    cos_sin: &WgpuTensor,
) -> Result<()> {
    let [tokens, heads, width] = x.dims(KERNEL, "x")?;
    x.expect_act(KERNEL, "x")?;
    x.expect_even(KERNEL, "x")?;
    let dim = rotary_dim(KERNEL, cos_sin, tokens)?;
    if dim > width || offset > width - dim {
        let expected = format!("room for {dim} columns in {width}");
        return Err(Error::Value { kernel: KERNEL, name: "offset", expected, found: offset.to_string() });
    }
    if tokens * heads * dim == 0 {
        return Ok(());
    }
    wgpu.launch(&Launch {
        kernel: KERNEL,
        shader: &SHADER,
        entry: "main",
        constants: &[
            ("WORKGROUP", wgpu.workgroup((dim / 2).min(64)).into()),
            ("DIM", dim as f64),
            ("HALF", (layout == RopeLayout::Half).into()),
        ],
        bindings: &[x.writes(), cos_sin.reads()],
        params: &[tokens * heads, heads, width, offset].map(|number| number as u32),
        groups: wgpu.fold(tokens * heads),
        shape: format!("{tokens} tokens, {heads} heads of {width}, {dim} rotary"),
    })
}
