//! What the kernels that give a warp a row share (`kernels/rows.cuh`).

use dsa80_reference::{DType, DeviceTensor, Error, Result};

use crate::device::Device;
use crate::tensor::CudaTensor;

/// The types of dense weights.
pub(crate) const WEIGHTS: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

/// The number of a dense weight's type in `rows.cuh`.
pub(crate) fn weight_type(dtype: DType) -> String {
    WEIGHTS.iter().position(|&weight| weight == dtype).unwrap_or_default().to_string()
}

/// The rotary columns of a `[rows, dim / 2, 2]` table.
pub(crate) fn rotary_dim<D: Device>(
    kernel: &'static str,
    cos_sin: &CudaTensor<D>,
    rows: usize,
) -> Result<usize> {
    let [table_rows, pairs, two] = cos_sin.dims(kernel, "cos_sin")?;
    cos_sin.expect(kernel, "cos_sin", table_rows == rows && two == 2, || format!("[{rows}, dim / 2, 2]"))?;
    cos_sin.expect_dtype(kernel, "cos_sin", &[DType::Float], "floats")?;
    Ok(2 * pairs)
}

/// The slots of a cache whose rows have `act` columns, or `fp8` bytes.
pub(crate) fn slots<D: Device>(
    kernel: &'static str,
    cache: &CudaTensor<D>,
    page_size: usize,
    act: usize,
    fp8: usize,
) -> Result<i32> {
    cache.expect_dtype(kernel, "cache", &[DType::Act, DType::Fp8], "activations or 8-bit cache rows")?;
    let width = if cache.dtype() == DType::Fp8 { fp8 } else { act };
    let [pages, cache_page_size, columns] = cache.dims(kernel, "cache")?;
    cache.expect(
        kernel,
        "cache",
        cache_page_size == page_size && columns == width && page_size > 0,
        || format!("[pages, {page_size}, {width}]"),
    )?;
    i32::try_from(pages * page_size).map_err(|_| Error::Value {
        kernel,
        name: "cache",
        expected: "fewer than 2^31 slots".into(),
        found: (pages * page_size).to_string(),
    })
}
