//! Tiles: the constants of a kernel that may change without changing its result.

use dsa80_reference::{Error, Result};
use serde::{Serialize, de::DeserializeOwned};

use crate::device::Limits;

/// The compile-time constants of one kernel, small enough to sweep. Every tile that [`validate`](Self::validate) accepts is right.
pub trait Tile:
    Copy + std::fmt::Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// The kernel's name: its file in `kernels/`, its key in `tiles/*.toml`.
    const KERNEL: &'static str;
    /// What the model fixes and the tile must divide (head dims, k).
    type Dims: Copy + std::fmt::Debug + PartialEq + Send + Sync;

    /// The tile that fits any device, the fallback for an unknown one.
    fn safe(dims: Self::Dims) -> Self;

    /// The tiles that a sweep tries, every one of them valid for `dims` on `limits`.
    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self>;

    /// Says why the kernel cannot run with this tile, if it cannot.
    ///
    /// # Errors
    /// [`Error::Tile`]: shared memory, registers or divisibility, with the arithmetic.
    fn validate(&self, dims: Self::Dims, limits: &Limits) -> Result<()>;
}

/// The error of a tile.
pub(crate) fn refuse<T: Tile>(tile: &T, reason: String) -> Error {
    Error::Tile { kernel: T::KERNEL, tile: format!("{tile:?}"), reason }
}

/// Fails with `reason` unless `ok`.
pub(crate) fn require<T: Tile>(tile: &T, ok: bool, reason: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(refuse(tile, reason())) }
}

/// Fails unless a block of `bytes` shared memory fits `limits`.
pub(crate) fn require_shared<T: Tile>(tile: &T, bytes: usize, limits: &Limits) -> Result<()> {
    require(tile, bytes <= limits.shared_per_block, || {
        format!(
            "a block needs {bytes} bytes of shared memory, {} has {}",
            limits.name, limits.shared_per_block
        )
    })
}

/// What a launch reads, writes and computes at least: each input byte once, each output byte once. The roofline is drawn from it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// Bytes of device memory.
    pub bytes: f64,
    /// Floating-point operations of the tensor cores (a multiply-add is two).
    pub flops: f64,
}
