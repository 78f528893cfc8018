//! The engine: continuous batching over a model.

mod handle;
mod request;
mod stats;
mod step;

pub use handle::{EngineBackend, EngineHandle, EventStream};
pub use request::{Event, FinishReason, Request, SubmitError, TokenLogprobs, Usage};
pub use stats::EngineStats;
pub use step::{SampleTarget, Sampled, Step, StepError, StepLimits, StepModel};
