//! GLM-5.2 (`glm_moe_dsa`): configuration, checkpoints, the forward pass and the engine.

pub mod engine;
