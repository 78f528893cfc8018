//! Collectives between the ranks of a tensor-parallel group.

use crate::error::Result;

/// The collectives that the model needs, over tensors of one backend. Every rank calls the same ones in the
/// same order.
///
/// Sums are taken in rank order on every rank, so results are equal bit for bit on all ranks and from run to
/// run.
///
/// # Errors
/// Every method fails with [`Error::Communicator`](crate::Error::Communicator) when another rank has failed
/// or left: never a hang.
pub trait Communicator<T>: Send {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Replaces `tensor` by its sum over ranks, accumulated in `Float`, rounded to the tensor's type once.
    fn all_reduce(&self, tensor: &mut T) -> Result<()>;

    /// Concatenates the ranks' `shard`s along the last dimension into `out`, in rank order.
    fn all_gather(&self, shard: &T, out: &mut T) -> Result<()>;

    /// Replaces `tensor` by rank `root`'s.
    fn broadcast(&self, tensor: &mut T, root: usize) -> Result<()>;

    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<()>;

    /// Breaks the group: collectives that wait, and all later ones, fail on every rank with `reason`.
    /// Dropping a communicator does the same.
    fn abort(&self, reason: &str);
}
