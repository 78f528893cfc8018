//! `embed`.

use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuBatch};
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("embed");

const KERNEL: &str = "embed";

pub(super) fn embed(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    table: &WgpuTensor,
    vocab_start: usize,
    out: &mut WgpuTensor,
) -> Result<()> {
    let [vocab, width] = table.dims(KERNEL, "table")?;
    table.expect_weight(KERNEL, "table")?;
    let tokens = batch.host().num_tokens();
    out.expect_shape(KERNEL, "out", &[tokens, width])?;
    out.expect_dtype(KERNEL, "out", &[DType::Act, DType::Float], "activations or floats")?;
    if out.dtype() == DType::Act {
        out.expect_even(KERNEL, "out")?;
    }
    if tokens == 0 || width == 0 {
        return Ok(());
    }
    let dtype = table.dtype();
    let windows = wgpu.windows(KERNEL, "table", vocab, width * table.width)?;
    for window in windows {
        let rows = [window.start, window.len()].map(|rows| rows as u32);
        wgpu.launch(&Launch {
            kernel: KERNEL,
            shader: &SHADER,
            entry: "main",
            constants: &[
                ("WORKGROUP", wgpu.workgroup(width.div_ceil(2).min(256)).into()),
                ("WEIGHT", table.weight_type()),
                ("FLOATS", out.is_floats().into()),
            ],
            bindings: &[
                batch.token_ids.reads(),
                table.reads_window(window.start * width..window.end * width),
                out.writes(),
            ],
            // Of a shard that starts beyond every token there is none: so it is with this start.
            params: &[
                tokens as u32,
                width as u32,
                u32::try_from(vocab_start).unwrap_or(u32::MAX),
                vocab as u32,
                rows[0],
                rows[1],
            ],
            groups: wgpu.fold(tokens),
            shape: format!("{tokens} tokens, {vocab} rows of {width}, {dtype}"),
        })?;
    }
    Ok(())
}
