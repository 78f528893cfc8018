//! Which part of a tensor belongs to a rank.

use std::ops::Range;

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
