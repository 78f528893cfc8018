//! The error of every kernel and backend.

use crate::tensor::DType;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a kernel or a backend refused.
///
/// Every variant names the kernel or tensor, what was expected and what was found.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor's shape does not fit the kernel's contract.
    #[error("{kernel}: `{tensor}` has shape {found:?}, expected {expected}")]
    Shape {
        /// The kernel that refused.
        kernel: &'static str,
        /// The argument's name in the kernel's contract.
        tensor: &'static str,
        /// The expected shape, in words or numbers.
        expected: String,
        /// The shape that was given.
        found: Vec<usize>,
    },
    /// A tensor's element type does not fit the kernel's contract.
    #[error("{kernel}: `{tensor}` holds {found}, expected {expected}")]
    DType {
        /// The kernel that refused.
        kernel: &'static str,
        /// The argument's name in the kernel's contract.
        tensor: &'static str,
        /// The expected element type, in words.
        expected: &'static str,
        /// The element type that was given.
        found: DType,
    },
    /// A value that the kernel indexes with lies outside its range.
    #[error("{kernel}: `{name}` is {found}, expected {expected}")]
    Value {
        /// The kernel that refused.
        kernel: &'static str,
        /// The name of the value in the kernel's contract.
        name: &'static str,
        /// The accepted range, in words.
        expected: String,
        /// The value that was given.
        found: String,
    },
    /// A tensor or batch was asked to hold more than was allocated for it.
    #[error("a shape of {shape:?} was asked for, {elements} elements, but {capacity} were allocated")]
    Capacity {
        /// The shape that was asked for.
        shape: Vec<usize>,
        /// Its elements.
        elements: usize,
        /// Elements that were allocated.
        capacity: usize,
    },
    /// A collective cannot finish because another rank failed or left.
    #[error("rank {rank} of {world_size}: a collective was broken off: {reason}")]
    Communicator {
        /// The rank that reports.
        rank: usize,
        /// The number of ranks.
        world_size: usize,
        /// Why, as far as this rank knows.
        reason: String,
    },
    /// A kernel cannot run with the tile that was chosen for it.
    #[error("{kernel}: {tile} does not work: {reason}")]
    Tile {
        /// The kernel.
        kernel: &'static str,
        /// The tile.
        tile: String,
        /// What it needs and what there is.
        reason: String,
    },
    /// A kernel could not be compiled or launched, or failed while it ran.
    #[error("{kernel} ({shape}): {message}")]
    Launch {
        /// The kernel.
        kernel: &'static str,
        /// The shape of the launch, in words.
        shape: String,
        /// The message of the compiler or the driver.
        message: String,
    },
    /// The backend itself failed (device lost, out of memory, driver message).
    #[error("{backend}: {message}")]
    Backend {
        /// The backend's name.
        backend: &'static str,
        /// What happened, and what to do about it.
        message: String,
    },
}
