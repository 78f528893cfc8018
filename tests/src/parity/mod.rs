//! What the parity tests of the kernels share: devices, random batches and values, tensors on both sides, comparisons.
//!
//! A test is a strategy of cases and a body that runs one case on one device and compares it with the oracle, [`Cpu`] in f64 with the
//! contract's rounding points. [`check`] runs it on every device there is: in emulation always, on a GPU where there is one.

pub mod batches;
pub mod compare;
pub mod contract;
pub mod devices;
mod interval;
mod runner;
pub mod tensors;
pub mod values;

use dsa80_reference::cpu::Cpu;

pub use batches::{BatchCase, Batches};
pub use compare::{Measured, assert_close, assert_same, half_ulp_bf16};
pub use devices::{TestDevice, twice};
pub use interval::Interval;
pub use runner::{catches, check, check_on_gpu, large_cases, small_cases};
pub use tensors::{Pair, batch, integers, numbers, poisoned, read, read_bytes, read_index, weight_bytes};
pub use values::Values;

/// Half the spacing of f32 at 1: the relative error of one rounding.
pub const F32_UNIT: f64 = 1.0 / (1 << 24) as f64;

/// The judge: f64, rounding to bf16 where the contract says so.
pub fn oracle() -> Cpu<f64> {
    Cpu::rounding_to_bf16()
}
