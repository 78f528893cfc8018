//! The kernel contract of dsa80 and its portable implementations.
//!
//! [`Kernels`] is the contract: one method per kernel, as the model calls it. [`cpu::Cpu`] is the oracle that
//! judges every other implementation, generic over f32 and f64.

pub mod batch;
pub mod buffers;
pub mod communicator;
pub mod cpu;
mod error;
pub mod fp8;
mod host_array;
pub mod kernels;
mod lone_rank;
pub mod random;
mod rendezvous;
pub mod sampling;
pub mod slabs;
mod some_ranks;
pub mod tensor;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use batch::{Batch, SequenceSlice};
pub use communicator::{Breaker, Communicator};
pub use error::{Error, Result};
pub use host_array::HostArray;
pub use kernels::{IndexKeys, Kernels, RecordedKernel, RopeLayout, RouterParams, SampleOutput, host_times};
pub use lone_rank::LoneRank;
pub use random::{RandomFormat, RandomLinear, RandomTensor};
pub use rendezvous::{Rendezvous, ranks_have};
pub use sampling::{SampleRow, SamplingParams};
pub use some_ranks::SomeRanks;
pub use tensor::{DType, DeviceTensor, HostData, HostExpert, HostInt4, HostLinear, HostTensor};
