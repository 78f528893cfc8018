//! What the tests of dsa80 share: fixtures, random models, ways of running a prompt, distances.

pub mod bodies;
pub mod distance;
pub mod emulator;
pub mod engine;
pub mod fixture;
pub mod glm;
pub mod judge;
pub mod layers;
pub mod naive;
pub mod parity;
pub mod plain_read;
pub mod pool;
pub mod prompt;
pub mod random_model;
pub mod server;
pub mod skeleton;
