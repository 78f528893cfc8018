//! Tensor parallelism on the CPU: between the threads of one process, or wherever else ranks meet.

use std::sync::Arc;

use super::{Cpu, CpuTensor, Real};
use crate::communicator::{Breaker, Communicator};
use crate::error::{Error, Result};
use crate::rendezvous::Rendezvous;
use crate::tensor::{DType, DeviceTensor};

/// Where the ranks of a group exchange what each of them has: in shared memory, or over a network.
pub trait Meeting<F>: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Gives `part` to the others and returns everybody's, in rank order. `what` is the collective, which must be the same on all ranks.
    ///
    /// # Errors
    /// [`Error::Communicator`] when the group is broken, or breaks meanwhile.
    fn meet(&self, what: &'static str, part: &[F]) -> Result<Vec<Arc<[F]>>>;

    /// Breaks the group with `reason`; the first one is the cause.
    fn break_group(&self, reason: &str);

    /// The same for any thread, which names the ranks that others wait for.
    fn breaker(&self) -> Breaker;
}

impl<F: Real> Meeting<F> for Rendezvous<Arc<[F]>> {
    fn rank(&self) -> usize {
        self.rank()
    }

    fn world_size(&self) -> usize {
        self.world_size()
    }

    fn meet(&self, _what: &'static str, part: &[F]) -> Result<Vec<Arc<[F]>>> {
        self.exchange(part.into())
    }

    fn break_group(&self, reason: &str) {
        self.break_group(|| reason.to_owned());
    }

    fn breaker(&self) -> Breaker {
        self.breaker()
    }
}

/// One rank of a group on the CPU. The sums are each rank's own, so they are the same wherever the ranks meet.
#[derive(Debug)]
pub struct CpuCommunicator<F, M> {
    cpu: Cpu<F>,
    meeting: M,
}

/// One rank of a group of threads that meet in shared memory.
///
/// A rank that is dropped before the others have finished (its thread failed or panicked) breaks the group:
/// every collective that waits, and every later one, fails with the reason.
pub type ThreadCommunicator<F> = CpuCommunicator<F, Rendezvous<Arc<[F]>>>;

impl<F: Real> ThreadCommunicator<F> {
    /// The ranks of a group of `world_size`, in order; each goes to its own thread. Sums of activations are
    /// rounded as `cpu` rounds.
    pub fn group(cpu: Cpu<F>, world_size: usize) -> Vec<Self> {
        Rendezvous::group(world_size).into_iter().map(|meeting| Self { cpu, meeting }).collect()
    }
}

impl<F: Real, M: Meeting<F>> CpuCommunicator<F, M> {
    /// The rank that meets the others at `meeting`. Sums of activations are rounded as `cpu` rounds.
    pub fn new(cpu: Cpu<F>, meeting: M) -> Self {
        Self { cpu, meeting }
    }

    /// Fails unless every part has as many elements as this rank's.
    fn same_length(&self, kernel: &'static str, parts: &[Arc<[F]>], len: usize) -> Result<()> {
        match parts.iter().position(|part| part.len() != len) {
            None => Ok(()),
            Some(rank) => Err(Error::Value {
                kernel,
                name: "tensor",
                expected: format!("{len} elements on every rank, as on rank {}", self.meeting.rank()),
                found: format!("{} on rank {rank}", parts[rank].len()),
            }),
        }
    }
}

impl<F: Real, M: Meeting<F>> Communicator<CpuTensor<F>> for CpuCommunicator<F, M> {
    fn rank(&self) -> usize {
        self.meeting.rank()
    }

    fn world_size(&self) -> usize {
        self.meeting.world_size()
    }

    fn all_reduce(&self, tensor: &mut CpuTensor<F>) -> Result<()> {
        let parts = self.meeting.meet("all_reduce", tensor.reals("all_reduce", "tensor")?)?;
        let is_act = tensor.dtype() == DType::Act;
        let out = tensor.reals_mut("all_reduce", "tensor")?;
        self.same_length("all_reduce", &parts, out.len())?;
        for (i, value) in out.iter_mut().enumerate() {
            let sum = parts.iter().map(|part| part[i]).sum();
            *value = if is_act { self.cpu.act(sum) } else { sum };
        }
        Ok(())
    }

    fn all_gather(&self, shard: &CpuTensor<F>, out: &mut CpuTensor<F>) -> Result<()> {
        let (Some((&columns, rows)), world_size) = (shard.shape().split_last(), self.meeting.world_size())
        else {
            return Err(Error::Shape {
                kernel: "all_gather",
                tensor: "shard",
                expected: "at least one dimension".into(),
                found: Vec::new(),
            });
        };
        out.expect_shape("all_gather", "out", &[rows, &[columns * world_size]].concat())?;
        let parts = self.meeting.meet("all_gather", shard.reals("all_gather", "shard")?)?;
        let out = out.reals_mut("all_gather", "out")?;
        self.same_length("all_gather", &parts, out.len() / world_size)?;
        if columns == 0 {
            return Ok(());
        }
        for (row, target) in out.chunks_exact_mut(columns * world_size).enumerate() {
            for (part, target) in parts.iter().zip(target.chunks_exact_mut(columns)) {
                target.copy_from_slice(&part[row * columns..(row + 1) * columns]);
            }
        }
        Ok(())
    }

    fn broadcast(&self, tensor: &mut CpuTensor<F>, root: usize) -> Result<()> {
        let (rank, world_size) = (self.meeting.rank(), self.meeting.world_size());
        if root >= world_size {
            return Err(Error::Value {
                kernel: "broadcast",
                name: "root",
                expected: format!("a rank below {world_size}"),
                found: root.to_string(),
            });
        }
        let own: &[F] = if root == rank { tensor.reals("broadcast", "tensor")? } else { &[] };
        let parts = self.meeting.meet("broadcast", own)?;
        let out = tensor.reals_mut("broadcast", "tensor")?;
        self.same_length("broadcast", &parts[root..=root], out.len())?;
        out.copy_from_slice(&parts[root]);
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.meeting.meet("barrier", &[]).map(drop)
    }

    fn abort(&self, reason: &str) {
        self.meeting.break_group(&format!("rank {}: {reason}", self.meeting.rank()));
    }

    fn breaker(&self) -> Option<Breaker> {
        Some(self.meeting.breaker())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` on every rank of a group, each on its own thread.
    fn on_ranks<R: Send>(world_size: usize, body: impl Fn(ThreadCommunicator<f32>) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = ThreadCommunicator::group(Cpu::new(), world_size)
                .into_iter()
                .map(|communicator| scope.spawn(|| body(communicator)))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn tensor(shape: &[usize], values: &[f32]) -> CpuTensor<f32> {
        let mut tensor = CpuTensor::alloc(DType::Float, shape).unwrap();
        tensor.reals_mut("test", "tensor").unwrap().copy_from_slice(values);
        tensor
    }

    #[test]
    fn all_reduce_sums_in_rank_order_many_times() {
        let results = on_ranks(4, |communicator| {
            let mut sums = Vec::new();
            for round in 0..200 {
                let mut x = tensor(&[2], &[communicator.rank() as f32, round as f32]);
                communicator.all_reduce(&mut x).unwrap();
                sums.push(x.reals("test", "x").unwrap().to_vec());
            }
            sums
        });
        for sums in results {
            for (round, sum) in sums.iter().enumerate() {
                assert_eq!(sum, &[6.0, 4.0 * round as f32]);
            }
        }
    }

    #[test]
    fn all_gather_concatenates_the_last_dimension() {
        let results = on_ranks(2, |communicator| {
            let base = 10.0 * communicator.rank() as f32;
            let shard = tensor(&[2, 2], &[base, base + 1.0, base + 2.0, base + 3.0]);
            let mut out = CpuTensor::alloc(DType::Float, &[2, 4]).unwrap();
            communicator.all_gather(&shard, &mut out).unwrap();
            out.reals("test", "out").unwrap().to_vec()
        });
        for out in results {
            assert_eq!(out, [0.0, 1.0, 10.0, 11.0, 2.0, 3.0, 12.0, 13.0]);
        }
    }

    #[test]
    fn broadcast_takes_the_roots_tensor() {
        let results = on_ranks(3, |communicator| {
            let mut x = tensor(&[1], &[communicator.rank() as f32]);
            communicator.broadcast(&mut x, 2).unwrap();
            communicator.barrier().unwrap();
            x.reals("test", "x").unwrap()[0]
        });
        assert_eq!(results, [2.0, 2.0, 2.0]);
    }

    #[test]
    fn a_rank_that_leaves_ends_the_wait_of_the_others() {
        let results = on_ranks(3, |communicator| {
            if communicator.rank() == 1 {
                return None;
            }
            Some(communicator.barrier())
        });
        for result in results.into_iter().flatten() {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("rank 1 has left"), "{message}");
        }
    }

    #[test]
    fn abort_ends_the_wait_of_the_others_with_its_reason() {
        let results = on_ranks(2, |communicator| {
            if communicator.rank() == 0 {
                communicator.abort("out of pages");
            }
            communicator.barrier()
        });
        for result in results {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("rank 0: out of pages"), "{message}");
        }
    }

    #[test]
    fn ranks_that_disagree_on_the_shape_are_told() {
        let results = on_ranks(2, |communicator| {
            let len = 1 + communicator.rank();
            communicator.all_reduce(&mut tensor(&[len], &vec![0.0; len]))
        });
        for result in results {
            assert!(matches!(result, Err(Error::Value { kernel: "all_reduce", .. })), "{result:?}");
        }
    }
}
