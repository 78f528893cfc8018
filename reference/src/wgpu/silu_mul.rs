//! `silu_mul`.

use super::Wgpu;
use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("silu_mul");

pub(super) fn silu_mul(wgpu: &Wgpu, gate: &WgpuTensor, up: &WgpuTensor, out: &mut WgpuTensor) -> Result<()> {
    let kernel = "silu_mul";
    gate.expect_act(kernel, "gate")?;
    launch(wgpu, kernel, gate, up, out)
}

/// Of activations or, between the kernels of a `swiglu`, of floats.
pub(super) fn launch(
    wgpu: &Wgpu,
    kernel: &'static str,
    gate: &WgpuTensor,
    up: &WgpuTensor,
    out: &mut WgpuTensor,
) -> Result<()> {
    let shape: [usize; 2] = gate.dims(kernel, "gate")?;
    up.expect_shape(kernel, "up", &shape)?;
    up.expect_dtype(
        kernel,
        "up",
        &[gate.dtype()],
        if gate.dtype() == DType::Act { "activations" } else { "floats" },
    )?;
    out.expect_shape(kernel, "out", &shape)?;
    out.expect_act(kernel, "out")?;
    // The last word's second half may be nobody's: then there is room for it.
    let words = out.len().div_ceil(2);
    if words == 0 {
        return Ok(());
    }
    let lanes = wgpu.workgroup(256);
    wgpu.launch(&Launch {
        kernel,
        shader: &SHADER,
        entry: "main",
        constants: &[("WORKGROUP", lanes.into()), ("FLOATS", gate.is_floats().into())],
        bindings: &[gate.reads(), up.reads(), out.writes()],
        params: &[words as u32],
        groups: wgpu.fold(words.div_ceil(lanes as usize)),
        shape: format!("{} rows of {}", shape[0], shape[1]),
    })
}
