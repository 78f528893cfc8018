//! One rank of a group whose others are not there.

use std::sync::OnceLock;

use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::tensor::DeviceTensor;

/// Rank `rank` of `world_size` by itself: to measure what one rank of many does, and what memory it takes, on one device. Nothing is
/// summed or gathered: what comes out of the model means nothing.
#[derive(Debug)]
pub struct LoneRank {
    rank: usize,
    world_size: usize,
    broken: OnceLock<String>,
}

impl LoneRank {
    /// Rank `rank` of `world_size`.
    ///
    /// # Errors
    /// There is no such rank.
    pub fn new(rank: usize, world_size: usize) -> Result<Self> {
        if rank < world_size {
            return Ok(Self { rank, world_size, broken: OnceLock::new() });
        }
        let expected = format!("a rank below {world_size}");
        Err(Error::Value { kernel: "communicator", name: "rank", expected, found: rank.to_string() })
    }

    fn check(&self) -> Result<()> {
        let Self { rank, world_size, .. } = *self;
        match self.broken.get() {
            None => Ok(()),
            Some(reason) => Err(Error::Communicator { rank, world_size, reason: reason.clone() }),
        }
    }
}

impl<T: DeviceTensor> Communicator<T> for LoneRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    /// Leaves this rank's own part.
    fn all_reduce(&self, _tensor: &mut T) -> Result<()> {
        self.check()
    }

    /// Leaves `out` as it is.
    fn all_gather(&self, _shard: &T, _out: &mut T) -> Result<()> {
        self.check()
    }

    fn broadcast(&self, _tensor: &mut T, _root: usize) -> Result<()> {
        self.check()
    }

    fn barrier(&self) -> Result<()> {
        self.check()
    }

    fn abort(&self, reason: &str) {
        // The first reason is the cause.
        let _ = self.broken.set(format!("rank {}: {reason}", self.rank));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, CpuTensor};
    use crate::kernels::Kernels;
    use crate::tensor::DType;

    #[test]
    fn a_lone_rank_leaves_tensors_alone_until_it_is_aborted() {
        let cpu = Cpu::<f32>::new();
        let rank: &dyn Communicator<CpuTensor<f32>> = &LoneRank::new(3, 8).unwrap();
        assert_eq!((rank.rank(), rank.world_size()), (3, 8));
        let mut tensor = cpu.alloc(DType::Float, &[2]).unwrap();
        cpu.write(&[1.0, 2.0], &mut tensor).unwrap();
        rank.all_reduce(&mut tensor).unwrap();
        rank.all_gather(&tensor.clone(), &mut tensor).unwrap();
        rank.broadcast(&mut tensor, 5).unwrap();
        assert_eq!(cpu.read(&tensor).unwrap(), [1.0, 2.0]);
        rank.abort("enough");
        let error = rank.barrier().unwrap_err().to_string();
        assert!(error.contains("rank 3 of 8") && error.contains("enough"), "{error}");
        assert!(LoneRank::new(8, 8).unwrap_err().to_string().contains("below 8"));
    }
}
