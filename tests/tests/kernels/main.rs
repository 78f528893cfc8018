//! Every kernel against the oracle: in emulation always, on a GPU where there is one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod cache_rows;
mod latent_rope;
mod layer_norm_rope;
