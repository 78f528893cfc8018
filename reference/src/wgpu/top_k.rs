//! `top_k`.

use std::ops::Range;

use super::Wgpu;
use super::batch::WgpuBatch;
use super::launch::Launch;
use super::paged::expect_rows;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::Result;

static SHADER: Shader = shader!("top_k");

/// Lanes of a row; at most the digits that they count.
const LANES: usize = 256;

pub(super) fn top_k(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    rows: Range<usize>,
    logits: &WgpuTensor,
    topk_indices: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "top_k";
    let host = batch.host();
    let tokens = host.num_tokens();
    expect_rows(kernel, &rows, tokens)?;
    let [index_tokens, k] = topk_indices.dims(kernel, "topk_indices")?;
    topk_indices.expect(kernel, "topk_indices", index_tokens == tokens, || format!("[{tokens}, k]"))?;
    topk_indices.expect_index(kernel, "topk_indices")?;
    logits.expect_float(kernel, "logits")?;
    let [logits_rows, columns] = logits.dims(kernel, "logits")?;
    // Rows that select everything do not read their logits.
    let read = rows.clone().map(|t| host.visible(t)).filter(|&visible| visible > k).max().unwrap_or(0);
    logits.expect(kernel, "logits", read == 0 || (logits_rows == rows.len() && columns >= read), || {
        format!("[{}, at least {read}]", rows.len())
    })?;
    if rows.is_empty() || k == 0 {
        return Ok(());
    }
    let windows = match read {
        0 => std::iter::once(0..rows.len()).collect(),
        _ => wgpu.windows(kernel, "logits", rows.len(), columns * 4)?,
    };
    for window in windows {
        let elements = if read == 0 { 0..0 } else { window.start * columns..window.end * columns };
        wgpu.launch(&Launch {
            kernel,
            shader: &SHADER,
            entry: "main",
            constants: &[("WORKGROUP", wgpu.workgroup(LANES).into())],
            bindings: &[batch.positions.reads(), logits.reads_window(elements), topk_indices.writes()],
            params: &[(rows.start + window.start) as u32, window.len() as u32, columns as u32, k as u32],
            groups: wgpu.fold(window.len()),
            shape: format!("{} rows of {columns}, the best {k}", rows.len()),
        })?;
    }
    Ok(())
}
