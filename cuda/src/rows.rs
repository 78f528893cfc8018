//! What the kernels that give a warp a row share (`kernels/rows.cuh`).

use dsa80_reference::{DType, DeviceTensor, Error, Result};

use crate::device::{Device, Limits};
use crate::tensor::CudaTensor;
use crate::tile::{Tile, require};

/// The tiles of a sweep: blocks of `warps` rows, lanes that hold `vector` neighbouring columns.
pub(crate) fn candidates<T: Tile>(
    dims: T::Dims,
    limits: &Limits,
    tile: impl Fn(usize, usize) -> T,
) -> Vec<T> {
    let tiles = [1, 2, 4, 8].into_iter().flat_map(|warps| [4, 8].map(|vector| tile(warps, vector)));
    tiles.filter(|tile| tile.validate(dims, limits).is_ok()).collect()
}

/// Fails unless `rows.cuh` has vectors of `vector` columns and a block of `warps` warps may have 255 registers a thread.
pub(crate) fn require_rows<T: Tile>(tile: &T, warps: usize, vector: usize) -> Result<()> {
    require(tile, matches!(vector, 4 | 8), || "a vector has 4 or 8 columns".into())?;
    require(tile, (1..=8).contains(&warps), || "a block has 1 to 8 warps".into())
}

/// Neighbouring columns that are loaded at once where every row has `width` of them: 16 bytes of bf16, or what divides the row.
pub(crate) fn vector(width: usize) -> usize {
    [8, 4, 2].into_iter().find(|vector| width.is_multiple_of(*vector)).unwrap_or(1)
}

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

#[cfg(test)]
pub(crate) mod tests {
    use crate::device::{Limits, ProgramEntry};
    use crate::tile::Tile;

    /// An A100 takes every tile of the sweep, the safe one among them; what is refused says why.
    pub(crate) fn assert_candidates_and_refusals<T: Tile>(dims: T::Dims, refusals: &[(T, T::Dims, &str)]) {
        let limits = Limits::a100();
        let candidates = T::candidates(dims, &limits);
        assert!(candidates.contains(&T::safe(dims)) && candidates.len() == 8, "{candidates:?}");
        for (tile, dims, reason) in refusals {
            let error = tile.validate(*dims, &limits).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}: ", T::KERNEL)) && error.contains(reason), "{error}");
        }
    }

    pub(crate) fn assert_distinct(programs: &[ProgramEntry]) {
        for (i, entry) in programs.iter().enumerate() {
            assert!(programs[..i].iter().all(|other| other.program != entry.program), "{}", entry.variant);
        }
    }
}
