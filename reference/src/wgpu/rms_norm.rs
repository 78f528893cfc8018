//! `rms_norm` and `rms_norm_residual`.

use super::Wgpu;
use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("rms_norm");

/// Lanes of a row.
const LANES: usize = 256;
/// Vectors of eight columns that a lane keeps.
const KEPT: usize = 4;

pub(super) fn rms_norm(
    wgpu: &Wgpu,
    x: &WgpuTensor,
    weight: &WgpuTensor,
    eps: f64,
    out: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "rms_norm";
    x.expect_dtype(kernel, "x", &[DType::Act, DType::Float], "activations or floats")?;
    launch(wgpu, kernel, x, None, weight, eps, out)
}

pub(super) fn rms_norm_residual(
    wgpu: &Wgpu,
    x: &WgpuTensor,
    residual: &mut WgpuTensor,
    weight: &WgpuTensor,
    eps: f64,
    out: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "rms_norm_residual";
    x.expect_act(kernel, "x")?;
    residual.expect_float(kernel, "residual")?;
    launch(wgpu, kernel, x, Some(residual), weight, eps, out)
}

fn launch(
    wgpu: &Wgpu,
    kernel: &'static str,
    x: &WgpuTensor,
    residual: Option<&mut WgpuTensor>,
    weight: &WgpuTensor,
    eps: f64,
    out: &mut WgpuTensor,
) -> Result<()> {
    let [rows, width] = x.dims(kernel, "x")?;
    x.expect(kernel, "x", width > 0, || "at least one column".into())?;
    x.expect_even(kernel, "x")?;
    weight.expect_shape(kernel, "weight", &[width])?;
    weight.expect_weight(kernel, "weight")?;
    out.expect_shape(kernel, "out", &[rows, width])?;
    out.expect_act(kernel, "out")?;
    if let Some(residual) = &residual {
        residual.expect_shape(kernel, "residual", &[rows, width])?;
    }
    if rows == 0 {
        return Ok(());
    }
    let nothing = wgpu.nothing()?;
    let (adds, residual) = match residual {
        Some(residual) => (true, residual.writes()),
        None => (false, nothing.unused()),
    };
    let lanes = wgpu.workgroup(LANES.min(width / 2));
    let wide = width.is_multiple_of(8) && width <= 8 * KEPT * lanes as usize;
    wgpu.launch(&Launch {
        kernel,
        shader: &SHADER,
        entry: "main",
        constants: &[
            ("WORKGROUP", lanes.into()),
            ("WIDE", wide.into()),
            ("WEIGHT", weight.weight_type()),
            ("FLOATS", x.is_floats().into()),
            ("RESIDUAL", f64::from(adds)),
        ],
        bindings: &[x.reads(), residual, weight.reads(), out.writes()],
        params: &[rows as u32, width as u32, (eps as f32).to_bits()],
        groups: wgpu.fold(rows),
        shape: format!("{rows} rows of {width}, {}", weight.dtype()),
    })
}
