//! GLM-5.2 (`glm_moe_dsa`): configuration, checkpoints, the forward pass and the engine.

pub mod checkpoint;
pub mod config;
pub mod distributed;
pub mod dummy;
pub mod engine;
mod error;
mod headway;
pub mod launch;
pub mod measure;
pub mod plan;
pub mod runner;
pub mod weights;

pub use error::LaunchError;
