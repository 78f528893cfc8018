//! The caches that `latent_rope` and `layer_norm_rope` write.

use super::tensor::WgpuTensor;
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

/// Slots of a cache whose rows have `act` columns of activations, or `fp8` bytes.
pub(super) fn slots(
    kernel: &'static str,
    cache: &WgpuTensor,
    page_size: usize,
    act: usize,
    fp8: usize,
) -> Result<usize> {
    cache.expect_dtype(kernel, "cache", &[DType::Act, DType::Fp8], "activations or 8-bit cache rows")?;
    let width = if cache.dtype() == DType::Fp8 { fp8 } else { act };
    let [pages, cache_page_size, columns] = cache.dims(kernel, "cache")?;
    cache.expect(
        kernel,
        "cache",
        cache_page_size == page_size && columns == width && page_size > 0,
        || format!("[pages, {page_size}, {width}]"),
    )?;
    Ok(pages * page_size)
}
