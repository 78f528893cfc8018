//! Every kernel against the oracle: in emulation always, on a GPU where there is one.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in its helpers too, and shows what it measured"
)]

mod absorb;
mod all_reduce;
mod all_reduce_norm;
mod all_reduce_times;
mod attention;
mod cache_rows;
mod embed;
mod expanded_mla;
mod experts;
mod indexer_logits;
mod int4_weights;
mod latent_rope;
mod layer_norm_rope;
mod linear;
mod linear_and_router;
mod linear_int4;
mod linear_split;
mod lm_head;
mod moe;
mod moe_int4;
mod qkv_norm_rope;
mod random_fill;
mod repack_int4;
mod rms_norm;
mod rope;
mod rope_table;
mod router;
mod sample;
mod sample_rows;
mod silu_mul;
mod sparse_mla;
mod sparse_mla_union;
mod sparse_mla_wide;
mod swiglu;
mod top_k;
mod unstack;
