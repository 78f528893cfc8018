//! Collectives between the ranks of a tensor-parallel group.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
use crate::tensor::DeviceTensor;

/// Breaks a group with a reason, from any thread: also while its ranks wait.
pub type Breaker = Arc<dyn Fn(&str) + Send + Sync>;

/// The collectives that the model needs, over tensors of one backend. Every rank calls the same ones in the
/// same order.
///
/// Sums are taken in the same order on every rank, so results are equal bit for bit on all ranks and from run to run: in rank order, but
/// where a library sums (NCCL), whose order is fixed for a group and a size and is not ours to choose.
///
/// # Errors
/// Every method fails with [`Error::Communicator`] when another rank has failed
/// or left: never a hang.
pub trait Communicator<T>: Send {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Replaces `tensor` by its sum over ranks, accumulated in `Float`, rounded to the tensor's type once.
    fn all_reduce(&self, tensor: &mut T) -> Result<()>;

    /// [`all_reduce`](Self::all_reduce) of `x`, then [`rms_norm_residual`](crate::Kernels::rms_norm_residual) of it, with the roundings of both,
    /// in one launch. False, on every rank, where there is no such launch, or none for this shape: then nothing was done.
    ///
    /// `x` is unspecified afterwards. So are rows of `residual` that another rank keeps up to date: which one does is the same in every call
    /// of the same shape, so that a step, which makes no others, may go on with them. `out` is whole on every rank.
    fn all_reduce_norm(
        &self,
        _x: &mut T,
        _residual: &mut T,
        _weight: &T,
        _eps: f64,
        _out: &mut T,
    ) -> Result<bool> {
        Ok(false)
    }

    /// Concatenates the ranks' `shard`s along the last dimension into `out`, in rank order.
    fn all_gather(&self, shard: &T, out: &mut T) -> Result<()>;

    /// [`all_gather`](Self::all_gather) of several shards, each into an `out` of its own: in one launch where there is one.
    fn all_gather_each(&self, shards: &[&T], outs: &mut [&mut T]) -> Result<()> {
        shards.iter().zip(outs).try_for_each(|(shard, out)| self.all_gather(shard, out))
    }

    /// Replaces `tensor` by rank `root`'s.
    fn broadcast(&self, tensor: &mut T, root: usize) -> Result<()>;

    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<()>;

    /// Fails when a collective failed that an earlier call had merely launched. Waits for the device.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Breaks the group: collectives that wait, and all later ones, fail on every rank with `reason`.
    /// Dropping a communicator does the same.
    fn abort(&self, reason: &str);

    /// [`abort`](Self::abort) for another thread than this rank's, which may be waiting for its device. None where nothing waits for
    /// another rank.
    fn breaker(&self) -> Option<Breaker> {
        None
    }
}

/// The group of one rank, on any backend: its tensors are the whole already.
#[derive(Debug, Default)]
pub struct SingleRank {
    broken: OnceLock<String>,
}

impl SingleRank {
    fn check(&self) -> Result<()> {
        match self.broken.get() {
            None => Ok(()),
            Some(reason) => Err(Error::Communicator { rank: 0, world_size: 1, reason: reason.clone() }),
        }
    }
}

impl<T: DeviceTensor> Communicator<T> for SingleRank {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce(&self, _tensor: &mut T) -> Result<()> {
        self.check()
    }

    /// Refuses: what a backend's memory holds only its own kernels can copy, and one rank has nothing to put together.
    fn all_gather(&self, _shard: &T, _out: &mut T) -> Result<()> {
        self.check()?;
        let reason = "one rank gathers nothing: its shard is the whole".into();
        Err(Error::Communicator { rank: 0, world_size: 1, reason })
    }

    fn broadcast(&self, _tensor: &mut T, root: usize) -> Result<()> {
        self.check()?;
        if root == 0 {
            return Ok(());
        }
        let expected = "a rank below 1".into();
        Err(Error::Value { kernel: "broadcast", name: "root", expected, found: root.to_string() })
    }

    fn barrier(&self) -> Result<()> {
        self.check()
    }

    fn abort(&self, reason: &str) {
        // The first reason is the cause.
        let _ = self.broken.set(format!("rank 0: {reason}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, CpuTensor};
    use crate::kernels::Kernels;
    use crate::tensor::DType;

    #[test]
    fn a_single_rank_leaves_tensors_alone_until_it_is_aborted() {
        let cpu = Cpu::<f32>::new();
        let rank: &dyn Communicator<CpuTensor<f32>> = &SingleRank::default();
        let mut tensor = cpu.alloc(DType::Float, &[2]).unwrap();
        cpu.write(&[1.0, 2.0], &mut tensor).unwrap();
        rank.all_reduce(&mut tensor).unwrap();
        rank.broadcast(&mut tensor, 0).unwrap();
        rank.barrier().unwrap();
        assert_eq!((rank.rank(), rank.world_size()), (0, 1));
        assert_eq!(cpu.read(&tensor).unwrap(), [1.0, 2.0]);
        let shard = tensor.clone();
        assert!(matches!(rank.all_gather(&shard, &mut tensor), Err(Error::Communicator { .. })));
        assert!(matches!(rank.broadcast(&mut tensor, 1), Err(Error::Value { .. })));
        rank.abort("out of pages");
        rank.abort("again");
        for failed in [rank.barrier(), rank.all_reduce(&mut tensor), rank.broadcast(&mut tensor, 0)] {
            assert!(failed.unwrap_err().to_string().contains("rank 0: out of pages"));
        }
    }
}
