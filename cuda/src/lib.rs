//! CUDA for dsa80.
//!
//! The hand-written kernels will live here. So far this crate answers one question: what would CUDA find on this machine?

mod probe;

pub use probe::{CudaDevice, ProbeError, devices};
