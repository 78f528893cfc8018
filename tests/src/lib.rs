//! What the tests of dsa80 share: fixtures, random models, ways of running a prompt, distances.

pub mod distance;
pub mod engine;
pub mod fixture;
pub mod naive;
pub mod prompt;
pub mod random_model;
pub mod server;
