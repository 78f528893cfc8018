//! Every kernel as the contract's method, one body for every backend: CUDA in emulation and on a GPU, WGSL with subgroups and without.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in its helpers too, and shows what it measured"
)]

mod absorb;
mod communicator;
mod embed;
mod indexer_logits;
#[path = "../kernels/int4_weights.rs"]
mod int4_weights;
mod latent_rope;
mod layer_norm_rope;
mod linear;
mod linear_int4;
mod lm_head;
mod measure;
mod moe;
mod products;
mod qkv_norm_rope;
mod quantise_rows;
mod refusals;
mod rms_norm;
mod rope;
mod rope_table;
mod rotary;
mod router;
mod sample;
#[path = "../kernels/sample_rows.rs"]
mod sample_rows;
mod silu_mul;
mod sparse_mla;
mod swiglu;
mod top_k;
mod windows;
