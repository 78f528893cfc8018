//! The CUDA kernels of dsa80: hand-written for sm_80, compiled at run time.
//!
//! `kernels/NAME.cu` is a kernel, `src/NAME.rs` its launcher: its [`Tile`], the candidates of a sweep, what it costs, and how it is
//! launched on any [`Device`], with the arguments of the kernel contract. [`gpu`] is the device that a GPU is; the tests have another,
//! which runs the same sources on the CPU. [`Tiles`] are the tiles chosen for a GPU. [`Cuda`] is all of it as the contract's backend.

pub mod absorb;
mod absorb_merged;
pub mod all_gather;
pub mod all_reduce;
pub mod batch;
pub mod ceilings;
pub mod communicator;
pub mod counting;
mod cuda;
pub mod device;
pub mod embed;
pub mod exchange;
pub mod expanded_mla;
mod expanded_mla_rows;
pub mod gpu;
pub mod indexer_logits;
pub mod int4;
pub mod latent_rope;
pub mod layer_norm_rope;
pub mod linear;
pub mod linear_few;
pub mod linear_int4;
pub mod linear_int4_wide;
pub mod linear_many;
pub mod linear_split;
pub mod lm_head;
pub mod measure;
pub mod moe;
pub mod moe_int4;
mod moe_int4_experts;
mod moe_int4_grouped;
pub mod moe_int4_pairs;
mod moe_sort;
mod probe;
pub mod qkv_norm_rope;
pub mod random_fill;
pub mod registry;
pub mod repack_int4;
pub mod rms_norm;
pub mod rope;
pub mod rope_table;
pub mod router;
mod rows;
pub mod sample;
mod sample_plan;
pub mod silu_mul;
pub mod sources;
pub mod sparse_mla;
mod sparse_mla_dims;
pub mod sparse_mla_merge;
mod sparse_mla_narrow;
pub mod sparse_mla_union;
pub mod sparse_mla_wide;
pub mod swiglu;
pub mod tensor;
pub mod tile;
pub mod tiles;
pub mod top_k;

pub use batch::CudaBatch;
pub use communicator::{PeerCommunicator, Placement};
pub use counting::Counting;
pub use cuda::{Cuda, RankOnGpu};
pub use device::{Arg, Device, Gemm, Launch, Limits, Program, ProgramEntry};
pub use gpu::{Gpu, GpuBuffer};
pub use int4::{HostPackedInt4, Int4Rows, Int4Shape, PackedInt4};
pub use probe::{CudaDevice, ProbeError, devices};
pub use sample_plan::SamplePlan;
pub use sources::Sources;
pub use tensor::CudaTensor;
pub use tile::{Cost, Tile};
pub use tiles::Tiles;
