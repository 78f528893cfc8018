//! `indexer_logits`.

use std::ops::Range;

use super::Wgpu;
use super::batch::WgpuBatch;
use super::launch::Launch;
use super::paged::{PagedCache, expect_rows};
use super::shader::{MATRICES, Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::{Error, Result};
use crate::fp8::IndexerPage;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("indexer_logits", after "fp8", "paged");
pub(super) static BY_MATRICES: Shader =
    shader!("indexer_logits_matrix", enabling MATRICES, after "paged", "halves");

/// Of a workgroup: lanes, keys of bf16 or f32, heads at once, rows where sequences have several.
const LANES: u32 = 128;
const KEYS: usize = 64;
const KEYS_OF_FLOATS: usize = 16;
const HEADS: usize = 32;
const ROWS: usize = 16;
const ROWS_OF_MATRICES: usize = 64;
/// Workgroups that fill a large GPU, and blocks of keys of one at most.
const ENOUGH: usize = 1024;
const MOST_BLOCKS: usize = 8;
/// Columns of a key that matrices take.
const WIDTH: usize = 128;

pub(super) fn indexer_logits(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    rows: Range<usize>,
    q: &WgpuTensor,
    weights: &WgpuTensor,
    cache: &WgpuTensor,
    scale: f64,
    logits: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "indexer_logits";
    let host = batch.host();
    let tokens = host.num_tokens();
    q.expect_act(kernel, "q")?;
    let [q_tokens, heads, width] = q.dims(kernel, "q")?;
    q.expect(kernel, "q", q_tokens == tokens && heads > 0 && width > 0, || format!("[{tokens}, HI, D]"))?;
    weights.expect_float(kernel, "weights")?;
    weights.expect_shape(kernel, "weights", &[tokens, heads])?;
    let fp8 = cache.dtype() == DType::Fp8;
    let row_bytes = IndexerPage { page_size: host.page_size, width }.row_bytes();
    let cache = PagedCache::new(wgpu, kernel, batch, cache, (width, row_bytes))?;
    let multiple = if fp8 { 4 } else { 2 };
    q.expect(kernel, "q", width.is_multiple_of(multiple), || {
        format!("rows of a multiple of {multiple} columns, which are whole words")
    })?;
    if fp8 && !host.page_size.is_multiple_of(4) {
        return Err(Error::Value {
            kernel,
            name: "page_size",
            expected: "a multiple of 4 for an 8-bit indexer cache".into(),
            found: host.page_size.to_string(),
        });
    }
    expect_rows(kernel, &rows, tokens)?;
    if !(scale.is_finite() && scale > 0.0) {
        return Err(Error::Value {
            kernel,
            name: "scale",
            expected: "a positive number".into(),
            found: scale.to_string(),
        });
    }
    let longest = rows.clone().map(|t| host.visible(t)).max().unwrap_or(0);
    logits.expect_float(kernel, "logits")?;
    let [logits_rows, columns] = logits.dims(kernel, "logits")?;
    logits.expect(kernel, "logits", logits_rows == rows.len() && columns >= longest, || {
        format!("[{}, at least {longest}]", rows.len())
    })?;
    let vectors = width.div_ceil(8);
    let stride = vectors + 1 - vectors % 2;
    wgpu.expect_lanes(kernel, LANES)?;
    let keys = if q.is_floats() { KEYS_OF_FLOATS } else { KEYS };
    wgpu.expect_shared(kernel, "q", (keys + HEADS) * stride * 8 * q.width + 4096 + 8 * keys, width)?;
    if rows.is_empty() {
        return Ok(());
    }
    let by_matrices = wgpu.context.has_matrices() && width == WIDTH;
    let group_rows = match tokens > host.num_seqs() {
        true if by_matrices => ROWS_OF_MATRICES,
        true => ROWS,
        false => 1,
    };
    let ([a, b, c, d], windows) = cache.reads()?;
    let mut constants = vec![("FP8", f64::from(fp8)), ("WINDOWS", windows)];
    let shader = if by_matrices {
        &BY_MATRICES
    } else {
        constants.extend([("ROW_VECTORS", vectors as f64), ("KEYS", keys as f64)]);
        &SHADER
    };
    for window in wgpu.windows(kernel, "logits", rows.len(), columns * 4)? {
        let (first, count) = (rows.start + window.start, window.len());
        let longest = (first..first + count).map(|t| host.visible(t)).max().unwrap_or(0);
        let (groups, all_blocks) = (count.div_ceil(group_rows), longest.div_ceil(keys));
        // A row's queries are put in their place once for several blocks, where there are enough of them.
        let group_blocks = match by_matrices && group_rows == 1 {
            true => (groups * all_blocks / ENOUGH).clamp(1, MOST_BLOCKS),
            false => 1,
        };
        let blocks = all_blocks.div_ceil(group_blocks);
        let mut params = vec![
            first as u32,
            count as u32,
            columns as u32,
            heads as u32,
            (width / 2) as u32,
            (if fp8 { width / 4 } else { width * q.width / 4 }) as u32,
            (scale as f32).to_bits(),
            host.page_size as u32,
            cache.window_pages() as u32,
            host.max_blocks as u32,
            group_rows as u32,
            blocks as u32,
        ];
        if by_matrices {
            params.push(group_blocks as u32);
        }
        wgpu.launch(&Launch {
            kernel,
            shader,
            entry: "main",
            constants: &constants,
            bindings: &[
                batch.positions.reads(),
                batch.seq_ids.reads(),
                batch.block_table.reads(),
                q.reads(),
                weights.reads(),
                a,
                b,
                c,
                d,
                logits.writes_window(window.start * columns..window.end * columns),
            ],
            params: &params,
            groups: wgpu.fold(groups * blocks),
            shape: format!("{count} rows of {heads} x {width}, {longest} keys"),
        })?;
    }
    Ok(())
}
