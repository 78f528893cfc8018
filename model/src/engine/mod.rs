//! The engine: continuous batching over a model.
//!
//! `engine` is the thread and the handle's side of it, `batching` what it does between two steps, `scheduler`
//! the decision who computes how much, `block_manager` the pages, `sequence` a request on its way, `stop`
//! when it ends, `validate` whether it may begin, `watchdog` a step's deadline. The model is seen through [`StepModel`] alone.

mod batching;
mod block_manager;
#[expect(clippy::module_inception, reason = "the engine's thread, among the engine's parts")]
mod engine;
mod handle;
mod request;
mod scheduler;
mod sequence;
mod stats;
mod step;
mod stop;
mod validate;
mod watchdog;

#[cfg(test)]
mod tests;

pub use engine::{Engine, EngineOptions};
pub use handle::{EngineBackend, EngineHandle, EventStream};
pub use request::{Event, FinishReason, Request, SubmitError, TokenLogprobs, Usage};
pub use stats::EngineStats;
pub use step::{SampleTarget, Sampled, Step, StepError, StepLimits, StepModel};
