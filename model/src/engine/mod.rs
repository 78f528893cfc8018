//! The engine: continuous batching over a model.

mod handle;
mod request;
mod stats;

pub use handle::{EngineBackend, EngineHandle, EventStream};
pub use request::{Event, FinishReason, Request, SubmitError, TokenLogprobs, Usage};
pub use stats::EngineStats;
