//! Ranks of a larger group, of which only some are there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::communicator::{Breaker, Communicator};
use crate::error::{Error, Result};
use crate::tensor::DeviceTensor;

/// One of a few ranks that stand for a group of more: to measure, on as many devices as there are, what ranks of a larger group do and what
/// their collectives take. What is summed and gathered is the live ranks' alone, in the shapes of the whole group, so what comes out of the
/// model means nothing, unless all are live.
pub struct SomeRanks<T> {
    live: Box<dyn Communicator<T>>,
    first: usize,
    world_size: usize,
    silent: Arc<AtomicBool>,
}

impl<T: DeviceTensor> SomeRanks<T> {
    /// Rank `first + live.rank()` of `world_size`. While `silent`, which all live ranks have to change together, nothing is summed or
    /// gathered at all, as by a [`LoneRank`](crate::LoneRank).
    ///
    /// # Errors
    /// The group has no such rank.
    pub fn new(
        live: Box<dyn Communicator<T>>,
        first: usize,
        world_size: usize,
        silent: Arc<AtomicBool>,
    ) -> Result<Self> {
        let end = first.saturating_add(live.world_size());
        if end <= world_size {
            return Ok(Self { live, first, world_size, silent });
        }
        let expected = format!("at most {world_size} ranks");
        let found = format!("{} from {first} on", live.world_size());
        Err(Error::Value { kernel: "communicator", name: "live ranks", expected, found })
    }

    /// Whether collectives are left out.
    fn silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }
}

impl<T: DeviceTensor> Communicator<T> for SomeRanks<T> {
    fn rank(&self) -> usize {
        self.first + self.live.rank()
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, tensor: &mut T) -> Result<()> {
        if self.silent() { Ok(()) } else { self.live.all_reduce(tensor) }
    }

    fn all_reduce_norm(
        &self,
        x: &mut T,
        residual: &mut T,
        weight: &T,
        eps: f64,
        out: &mut T,
    ) -> Result<bool> {
        if self.silent() { Ok(false) } else { self.live.all_reduce_norm(x, residual, weight, eps, out) }
    }

    fn all_gather(&self, shard: &T, out: &mut T) -> Result<()> {
        self.all_gather_each(&[shard], &mut [out])
    }

    /// Leaves the live ranks' shards at the beginning of each of `outs`, in rows as long as they make them; the rest as it is.
    fn all_gather_each(&self, shards: &[&T], outs: &mut [&mut T]) -> Result<()> {
        if self.silent() {
            return Ok(());
        }
        let wholes: Vec<Vec<usize>> = outs.iter().map(|out| out.shape().to_vec()).collect();
        for (out, whole) in outs.iter_mut().zip(&wholes) {
            let mut packed = whole.clone();
            if let Some(columns) = packed.last_mut() {
                *columns = *columns / self.world_size * self.live.world_size();
            }
            out.set_shape(&packed)?;
        }
        let gathered = self.live.all_gather_each(shards, outs);
        outs.iter_mut().zip(&wholes).try_for_each(|(out, whole)| out.set_shape(whole))?;
        gathered
    }

    fn broadcast(&self, tensor: &mut T, root: usize) -> Result<()> {
        match root.checked_sub(self.first).filter(|&live| live < self.live.world_size()) {
            Some(live) if !self.silent() => self.live.broadcast(tensor, live),
            _ => Ok(()),
        }
    }

    fn barrier(&self) -> Result<()> {
        self.live.barrier()
    }

    fn check(&self) -> Result<()> {
        self.live.check()
    }

    fn abort(&self, reason: &str) {
        self.live.abort(reason);
    }

    fn breaker(&self) -> Option<Breaker> {
        self.live.breaker()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, CpuTensor, ThreadCommunicator};
    use crate::kernels::Kernels;
    use crate::tensor::DType;

    fn tensor(shape: &[usize], values: &[f64]) -> CpuTensor<f32> {
        let cpu = Cpu::new();
        let mut tensor = cpu.alloc(DType::Float, shape).unwrap();
        cpu.write(values, &mut tensor).unwrap();
        tensor
    }

    /// What `body` gives on two live ranks of eight, which are its ranks 4 and 5.
    fn two_of_eight<R: Send>(
        silent: bool,
        body: impl Fn(&dyn Communicator<CpuTensor<f32>>) -> R + Sync,
    ) -> Vec<R> {
        let silent = Arc::new(AtomicBool::new(silent));
        std::thread::scope(|scope| {
            let ranks = ThreadCommunicator::group(Cpu::<f32>::new(), 2).into_iter().map(|live| {
                let (body, silent) = (&body, Arc::clone(&silent));
                scope.spawn(move || body(&SomeRanks::new(Box::new(live), 4, 8, silent).unwrap()))
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn live_ranks_sum_and_gather_what_is_theirs_in_the_shapes_of_all() {
        let seen = two_of_eight(false, |rank| {
            let own = rank.rank() as f64;
            let mut x = tensor(&[2], &[own, 1.0]);
            rank.all_reduce(&mut x).unwrap();
            let shard = tensor(&[2, 1], &[own, 10.0 * own]);
            let mut out = tensor(&[2, 8], &[7.0; 16]);
            rank.all_gather(&shard, &mut out).unwrap();
            let mut both = [tensor(&[1, 8], &[7.0; 8]), tensor(&[1, 16], &[7.0; 16])];
            let [a, b] = &mut both;
            let shards = [tensor(&[1, 1], &[own]), tensor(&[1, 2], &[own, -own])];
            rank.all_gather_each(&[&shards[0], &shards[1]], &mut [a, b]).unwrap();
            let mut sent = tensor(&[1], &[own]);
            rank.broadcast(&mut sent, 5).unwrap();
            // From a rank that is not there.
            rank.broadcast(&mut sent, 0).unwrap();
            rank.barrier().unwrap();
            rank.check().unwrap();
            let cpu = Cpu::<f32>::new();
            let read = |tensor: &CpuTensor<f32>| cpu.read(tensor).unwrap();
            assert_eq!((rank.world_size(), out.shape()), (8, &[2, 8][..]));
            assert_eq!((both[0].shape(), both[1].shape()), (&[1, 8][..], &[1, 16][..]));
            (rank.rank(), read(&x), read(&out), read(&sent), both.map(|tensor| read(&tensor)))
        });
        for (index, (rank, x, out, sent, [a, b])) in seen.into_iter().enumerate() {
            assert_eq!((&a[..3], &b[..5]), (&[4.0, 5.0, 7.0][..], &[4.0, -4.0, 5.0, -5.0, 7.0][..]));
            assert_eq!((rank, x, sent), (4 + index, vec![9.0, 2.0], vec![5.0]));
            assert_eq!((&out[..4], &out[4..]), (&[4.0, 5.0, 40.0, 50.0][..], &[7.0; 12][..]));
        }
    }

    #[test]
    fn silent_ranks_leave_tensors_alone_and_still_hear_of_a_failure() {
        let errors = two_of_eight(true, |rank| {
            let mut x = tensor(&[1], &[rank.rank() as f64]);
            rank.all_reduce(&mut x).unwrap();
            rank.broadcast(&mut x, 4).unwrap();
            let whole = tensor(&[8], &[3.0; 8]);
            let mut out = tensor(&[8], &[3.0; 8]);
            rank.all_gather(&x, &mut out).unwrap();
            let cpu = Cpu::<f32>::new();
            assert_eq!(cpu.read(&x).unwrap(), [rank.rank() as f64]);
            assert_eq!(cpu.read(&out).unwrap(), cpu.read(&whole).unwrap());
            if rank.rank() == 5 {
                rank.abort("enough");
            }
            rank.barrier().unwrap_err().to_string()
        });
        assert!(errors.iter().all(|error| error.contains("enough")), "{errors:?}");
    }

    #[test]
    fn more_live_ranks_than_the_group_has_are_refused() {
        let live = ThreadCommunicator::group(Cpu::<f32>::new(), 2).remove(0);
        let refused = SomeRanks::new(Box::new(live), 7, 8, Arc::default()).err().unwrap().to_string();
        assert!(refused.contains("at most 8 ranks") && refused.contains("2 from 7 on"), "{refused}");
    }
}
