//! Why a model could not be launched.

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;

/// Why a model could not be launched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The configuration does not allow what was asked for.
    #[error(transparent)]
    Config(Box<ConfigError>),
    /// The checkpoint is damaged or incomplete.
    #[error(transparent)]
    Checkpoint(Box<CheckpointError>),
    /// A backend refused.
    #[error(transparent)]
    Kernel(#[from] dsa80_reference::Error),
    /// An option does not fit the model or the machine; the message gives the arithmetic and what would fit.
    #[error("{0}")]
    Options(String),
    /// The ranks of several processes did not find each other, or one of them failed; the message says which, and why.
    #[error("{0}")]
    Ranks(String),
    /// A rank's thread ended without an answer.
    #[error("rank {rank} of {world_size} ended while loading; its panic message is above")]
    RankLost {
        /// The rank.
        rank: usize,
        /// The number of ranks.
        world_size: usize,
    },
}

impl From<ConfigError> for LaunchError {
    fn from(error: ConfigError) -> Self {
        Self::Config(Box::new(error))
    }
}

impl From<CheckpointError> for LaunchError {
    fn from(error: CheckpointError) -> Self {
        Self::Checkpoint(Box::new(error))
    }
}
