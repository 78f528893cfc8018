//! Every kernel against the oracle: in emulation always, on a GPU where there is one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod attention;
mod cache_rows;
mod indexer_logits;
mod latent_rope;
mod layer_norm_rope;
mod sparse_mla;
mod sparse_mla_union;
mod sparse_mla_wide;
mod top_k;
