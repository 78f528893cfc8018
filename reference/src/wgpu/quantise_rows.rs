//! What `latent_rope` and `layer_norm_rope` do with a cache of 8 bits: the rows of a step become codes and scales.

use super::launch::Launch;
use super::paged::cut;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuBatch};
use crate::error::{Error, Result};
use crate::fp8::{IndexerPage, MlaRow};

static SHADER: Shader = shader!("quantise_rows", after "fp8");

/// Lanes of a row: each has a word of codes of a row of a model.
const LANES: usize = 128;

/// How the rows lie in the cache.
#[derive(Debug, Clone, Copy)]
pub(super) enum Layout {
    Mla(MlaRow),
    Indexer(IndexerPage),
}

/// Fails unless a cache of 8 bits may have such rows.
pub(super) fn check(kernel: &'static str, layout: Layout) -> Result<()> {
    let refuse = |name, expected: &str, found: usize| {
        Err(Error::Value { kernel, name, expected: expected.into(), found: found.to_string() })
    };
    match layout {
        Layout::Mla(row) if row.kv_lora_rank % 4 != 0 => {
            refuse("kv_lora_rank", "a multiple of 4 for an 8-bit cache", row.kv_lora_rank)
        }
        Layout::Indexer(page) if page.width % 4 != 0 => {
            refuse("width", "a multiple of 4 for an 8-bit cache", page.width)
        }
        Layout::Indexer(page) if page.page_size % 4 != 0 => {
            refuse("page_size", "a multiple of 4 for an 8-bit indexer cache", page.page_size)
        }
        _ => Ok(()),
    }
}

/// Writes `rows`, `[T, columns]` `Act`, into the slots of the batch's tokens.
pub(super) fn quantise_rows(
    wgpu: &Wgpu,
    kernel: &'static str,
    batch: &WgpuBatch,
    rows: &WgpuTensor,
    layout: Layout,
    cache: &mut WgpuTensor,
) -> Result<()> {
    let (tokens, page_size) = (batch.host().num_tokens(), batch.host().page_size);
    let (is_mla, columns, rope, row_bytes) = match layout {
        Layout::Mla(row) => (true, row.kv_lora_rank, row.rope, row.row_bytes()),
        Layout::Indexer(page) => (false, page.width, 0, page.row_bytes()),
    };
    let (windows, page) = cut(wgpu, kernel, page_size, cache, (columns + rope, row_bytes))?;
    for pages in windows {
        wgpu.launch(&Launch {
            kernel,
            shader: &SHADER,
            entry: "main",
            constants: &[("WORKGROUP", wgpu.workgroup(LANES).into()), ("MLA", is_mla.into())],
            bindings: &[
                batch.slot_mapping.reads(),
                rows.reads(),
                cache.writes_window(pages.start * page..pages.end * page),
            ],
            params: &[
                tokens as u32,
                columns as u32,
                rope as u32,
                (pages.start * page_size) as u32,
                (pages.len() * page_size) as u32,
                (row_bytes / 4) as u32,
                page_size as u32,
            ],
            groups: wgpu.fold(tokens),
            shape: format!("{tokens} rows of {columns} + {rope}, in 8 bits"),
        })?;
    }
    Ok(())
}
