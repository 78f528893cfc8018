//! The server against the mock engine: wire formats, refusals, life and death. No model, no GPU.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod chat;
mod client;
mod completions;
mod errors;
mod lifecycle;
mod routes;
