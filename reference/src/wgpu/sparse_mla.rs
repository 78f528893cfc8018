//! `sparse_mla`.

use super::Wgpu;
use super::batch::WgpuBatch;
use super::launch::{Binding, Launch};
use super::paged::PagedCache;
use super::shader::{MATRICES, Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::Result;
use crate::fp8::MlaRow;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("sparse_mla", after "fp8", "paged");
pub(super) static BY_MATRICES: Shader =
    shader!("sparse_mla_matrix", enabling MATRICES, after "paged", "halves");
static MERGE: Shader = shader!("sparse_mla_merge");

/// Of a workgroup: lanes, heads, rows of bf16 or f32 at once.
const LANES: u32 = 128;
const HEADS: usize = 8;
const KEYS: usize = 16;
const KEYS_OF_FLOATS: usize = 8;

/// Columns of a latent at most: two words of a lane.
const COLUMNS: usize = 4 * LANES as usize;

/// Columns of a latent that matrices take, and of a row at most.
const LATENT: usize = 512;
const WIDTH: usize = 576;

/// Workgroups that fill a large GPU: with fewer the selection is split.
const ENOUGH: usize = 1024;
const ENOUGH_OF_MATRICES: usize = 256;

/// A split has at least so many rows, or what it leaves to merge is as much as it reads.
const SPLIT: usize = 64;

/// Lanes that merge a row.
const MERGE_LANES: usize = 256;

pub(super) fn sparse_mla(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    q: &WgpuTensor,
    cache: &WgpuTensor,
    topk_indices: &WgpuTensor,
    scale: f64,
    out: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "sparse_mla";
    let host = batch.host();
    let tokens = host.num_tokens();
    q.expect_act(kernel, "q")?;
    let [q_tokens, heads, width] = q.dims(kernel, "q")?;
    q.expect(kernel, "q", q_tokens == tokens, || format!("[{tokens}, H, kv_lora_rank + rope]"))?;
    out.expect_act(kernel, "out")?;
    let [out_tokens, out_heads, rank] = out.dims(kernel, "out")?;
    out.expect(kernel, "out", (out_tokens, out_heads) == (tokens, heads) && rank <= width, || {
        format!("[{tokens}, {heads}, kv_lora_rank] with kv_lora_rank at most {width}")
    })?;
    let fp8 = cache.dtype() == DType::Fp8;
    let layout = MlaRow { kv_lora_rank: rank, rope: width - rank };
    let cache = PagedCache::new(wgpu, kernel, batch, cache, (width, layout.row_bytes()))?;
    let whole = width.is_multiple_of(8) && rank.is_multiple_of(8) && rank > 0;
    out.expect(kernel, "out", whole && rank <= COLUMNS, || {
        format!("rows of a multiple of 8 columns, at most {COLUMNS}, and the rotary ones too")
    })?;
    topk_indices.expect_index(kernel, "topk_indices")?;
    let [index_tokens, k] = topk_indices.dims(kernel, "topk_indices")?;
    topk_indices.expect(kernel, "topk_indices", index_tokens == tokens, || format!("[{tokens}, k]"))?;
    let (vectors, scales) = (width / 8, if fp8 { layout.groups() } else { 1 });
    wgpu.expect_lanes(kernel, LANES)?;
    // Of floats there is no room for the queries as well.
    let (keys, staged) = if q.is_floats() { (KEYS_OF_FLOATS, 0) } else { (KEYS, HEADS) };
    let shared = 8 * q.width * (keys + staged) * vectors + 4 * keys * scales + 4 * (1032 + 128 + HEADS + 32);
    wgpu.expect_shared(kernel, "q", shared, width)?;
    if tokens * heads == 0 {
        return Ok(());
    }

    let by_matrices =
        wgpu.context.has_matrices() && rank == LATENT && width.is_multiple_of(64) && width <= WIDTH;
    let groups = tokens * heads.div_ceil(HEADS);
    let enough = if by_matrices { ENOUGH_OF_MATRICES } else { ENOUGH };
    let splits = enough.div_ceil(groups).min(k / SPLIT).max(1);
    let split = k.div_ceil(splits).max(1).next_multiple_of(KEYS);
    // Rounding up may leave none for the last.
    let splits = k.div_ceil(split).max(1);
    let shape =
        format!("{tokens} rows of {heads} x ({rank} + {}), {k} selected, {splits} splits", width - rank);
    let mut parts = match splits {
        1 => wgpu.nothing()?,
        _ => wgpu.tensor(DType::Float, &[tokens * heads, splits, rank + 2])?,
    };
    let (mut reads, windows) = cache.reads()?;
    let mut constants = vec![("FP8", f64::from(fp8)), ("ROW_VECTORS", vectors as f64), ("WINDOWS", windows)];
    let row_quads = if fp8 { layout.row_bytes() } else { width * q.width } / 16;
    let mut params = vec![tokens as u32, heads as u32, k as u32, splits as u32, split as u32];
    params.push((scale as f32).to_bits());
    let shader = if by_matrices {
        constants.push(("PAGE_SIZE", host.page_size as f64));
        reads = reads.map(Binding::in_order);
        &BY_MATRICES
    } else {
        params.push(host.page_size as u32);
        constants.extend([
            ("LATENT_VECTORS", (rank / 8) as f64),
            ("SCALES", scales as f64),
            ("KEYS", keys as f64),
            ("STAGED", f64::from(staged > 0)),
            ("QUERY_VECTORS", (staged * vectors).max(1) as f64),
        ]);
        &SHADER
    };
    params.extend([cache.window_pages() as u32, host.max_blocks as u32, row_quads as u32]);
    let [a, b, c, d] = reads;
    wgpu.launch(&Launch {
        kernel,
        shader,
        entry: "main",
        constants: &constants,
        bindings: &[
            batch.seq_ids.reads(),
            batch.block_table.reads(),
            topk_indices.reads(),
            q.reads(),
            a,
            b,
            c,
            d,
            if splits == 1 { out.writes() } else { parts.writes() },
        ],
        params: &params,
        groups: wgpu.fold(groups * splits),
        shape: shape.clone(),
    })?;
    if splits == 1 {
        return Ok(());
    }
    wgpu.launch(&Launch {
        kernel,
        shader: &MERGE,
        entry: "main",
        constants: &[("WORKGROUP", wgpu.workgroup(MERGE_LANES.min(rank / 2)).into())],
        bindings: &[parts.reads(), out.writes()],
        params: &[(tokens * heads) as u32, splits as u32, rank as u32],
        groups: wgpu.fold(tokens * heads),
        shape,
    })
}
