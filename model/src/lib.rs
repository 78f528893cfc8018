//! GLM-5.2 (`glm_moe_dsa`): configuration, checkpoints, the forward pass and the engine.

pub mod checkpoint;
pub mod config;
pub mod engine;
pub mod plan;
pub mod weights;
