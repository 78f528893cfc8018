//! Every kernel as the contract's method, one body for every backend: CUDA in emulation and on a GPU, WGSL with subgroups and without.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too, and shows what it measured")]

mod rms_norm;
