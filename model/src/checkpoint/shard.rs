//! Which part of a tensor belongs to a rank.

use std::ops::Range;

use super::CheckpointError;
use crate::config::ModelConfig;

/// One rank of a tensor-parallel group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// `0..world_size`.
    pub rank: usize,
    /// Ranks that share the model.
    pub world_size: usize,
}

impl Shard {
    /// The only rank: everything.
    pub const WHOLE: Shard = Shard { rank: 0, world_size: 1 };

    /// Fails unless the rank exists and so many ranks can share the model.
    pub(crate) fn check(self, config: &ModelConfig) -> Result<(), CheckpointError> {
        config.check_tp(self.world_size).map_err(CheckpointError::TensorParallel)?;
        self.check_rank()
    }

    /// Fails unless the rank exists.
    pub(crate) fn check_rank(self) -> Result<(), CheckpointError> {
        let Self { rank, world_size } = self;
        if rank < world_size {
            Ok(())
        } else {
            Err(CheckpointError::OutOfRange { what: "rank", found: rank, limit: world_size })
        }
    }

    /// This rank's equal part of `len` things, of which `world_size` is a divisor.
    pub(crate) fn range(self, len: usize) -> Range<usize> {
        let share = len / self.world_size;
        self.rank * share..(self.rank + 1) * share
    }
}

/// How ranks share a weight `[out, in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Split {
    /// Every rank has all of it.
    Replicated,
    /// Every rank has some of the output features.
    Rows,
    /// Every rank has some of the input features.
    Columns,
}

impl Split {
    /// The rows and columns of a rank.
    pub(crate) fn ranges(self, shard: Shard, rows: usize, columns: usize) -> (Range<usize>, Range<usize>) {
        match self {
            Split::Replicated => (0..rows, 0..columns),
            Split::Rows => (shard.range(rows), 0..columns),
            Split::Columns => (0..rows, shard.range(columns)),
        }
    }
}
