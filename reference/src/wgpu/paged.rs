//! What launchers ask of a batch and of the paged caches that it names.

use std::ops::Range;

use super::Wgpu;
use super::batch::WgpuBatch;
use super::context::WgpuContext;
use super::launch::{Binding, step_of_windows};
use super::tensor::WgpuTensor;
use crate::error::{Error, Result};
use crate::tensor::{DType, DeviceTensor};

/// Windows of a cache that `paged.wgsl` tells apart.
const WINDOWS: usize = 4;

/// Slots of a window that it numbers: one less than 30 bits have, for the last number of the last window is a hole.
const WINDOW_SLOTS: usize = (1 << 30) - 1;

/// A cache `[pages, page_size, row]`, cut into windows of whole pages that bindings take.
pub(super) struct PagedCache<'a> {
    kernel: &'static str,
    cache: &'a WgpuTensor,
    pub(super) page_size: usize,
    /// Elements of a page.
    page: usize,
    windows: Vec<Range<usize>>,
}

impl<'a> PagedCache<'a> {
    /// Fails unless `cache` has rows of `act` numbers or `fp8` bytes, in pages as the batch has them.
    pub(super) fn new(
        wgpu: &Wgpu,
        kernel: &'static str,
        batch: &WgpuBatch,
        cache: &'a WgpuTensor,
        (act, fp8): (usize, usize),
    ) -> Result<Self> {
        let page_size = batch.host().page_size;
        let (windows, page) = cut(wgpu, kernel, page_size, cache, (act, fp8))?;
        Ok(Self { kernel, cache, page_size, page, windows })
    }

    /// The windows as bindings, the first in place of those that are not there, and how many there are.
    pub(super) fn reads(&self) -> Result<([Binding<'a>; WINDOWS], f64)> {
        let count = self.windows.len();
        let slots = self.windows.first().map_or(0, ExactSizeIterator::len) * self.page_size;
        if count > WINDOWS || (count > 1 && slots > WINDOW_SLOTS) {
            return Err(Error::Shape {
                kernel: self.kernel,
                tensor: "cache",
                expected: format!(
                    "at most {} pages, which are {WINDOWS} of the adapter's bindings; lower the cache size or use more ranks",
                    WINDOWS * self.windows[0].len()
                ),
                found: self.cache.shape().to_vec(),
            });
        }
        let window = |i: usize| {
            let pages = self.windows.get(i).or(self.windows.first()).cloned().unwrap_or(0..0);
            self.cache.reads_window(pages.start * self.page..pages.end * self.page)
        };
        Ok(([window(0), window(1), window(2), window(3)], count.max(1) as f64))
    }

    /// Pages of a window.
    pub(super) fn window_pages(&self) -> usize {
        self.windows.first().map_or(0, ExactSizeIterator::len).max(1)
    }
}

impl WgpuContext {
    /// Pages of `page_bytes` that a cache can have on this adapter at most.
    pub fn most_pages(&self, page_bytes: usize) -> usize {
        let bytes = |limit: u64| usize::try_from(limit).unwrap_or(usize::MAX);
        let whole = bytes(self.limits.max_storage_buffer_binding_size) / page_bytes.max(1);
        let step = step_of_windows(&self.limits, page_bytes);
        let buffer = bytes(self.limits.max_buffer_size) / page_bytes.max(1);
        whole.max(WINDOWS * (whole / step * step)).min(buffer)
    }
}

/// The windows of a cache, in pages, and the elements of a page.
pub(super) fn cut(
    wgpu: &Wgpu,
    kernel: &'static str,
    page_size: usize,
    cache: &WgpuTensor,
    (act, fp8): (usize, usize),
) -> Result<(Vec<Range<usize>>, usize)> {
    cache.expect_dtype(kernel, "cache", &[DType::Act, DType::Fp8], "activations or 8-bit cache rows")?;
    let (row, bytes) = if cache.dtype() == DType::Act { (act, cache.width) } else { (fp8, 1) };
    let [pages, found_page_size, columns] = cache.dims(kernel, "cache")?;
    cache.expect(kernel, "cache", found_page_size == page_size && columns == row, || {
        format!("[pages, {page_size}, {row}]")
    })?;
    let page = page_size * row;
    Ok((wgpu.windows(kernel, "cache", pages, page * bytes)?, page))
}

/// Fails unless `rows` lie inside the step.
pub(super) fn expect_rows(kernel: &'static str, rows: &Range<usize>, tokens: usize) -> Result<()> {
    if rows.start <= rows.end && rows.end <= tokens {
        return Ok(());
    }
    Err(Error::Value {
        kernel,
        name: "rows",
        expected: format!("a range inside 0..{tokens}"),
        found: format!("{rows:?}"),
    })
}
