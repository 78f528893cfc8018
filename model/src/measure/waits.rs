//! What ranks lose by waiting for each other: how long each was in every collective of a step. The one that came last waited for nobody.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use dsa80_reference::{Breaker, Communicator, DeviceTensor, Result};

use super::microseconds;

/// What ranks wait for each other in a step, in microseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Waits {
    /// Of every run: what a rank waited in all collectives together, the mean over ranks. A group of equals would be faster by that.
    pub lost_us: Vec<f64>,
    /// Of every run: its collectives, each as long as on the rank that came last.
    pub collectives_us: Vec<f64>,
    /// Of every rank: the median over runs of what it waited. The slowest waits least.
    pub of_ranks_us: Vec<f64>,
}

impl Waits {
    /// From how long every rank, in every run, was in every collective. `None` where those are not the same on all ranks, or none.
    pub(super) fn of(ranks: &[Vec<Vec<f64>>]) -> Option<Self> {
        let first = ranks.first()?;
        let alike = |rank: &Vec<Vec<f64>>| {
            rank.len() == first.len() && rank.iter().zip(first).all(|(a, b)| a.len() == b.len())
        };
        if first.first().is_none_or(Vec::is_empty) || !ranks.iter().all(alike) {
            return None;
        }
        let mut waits = Self::default();
        let mut of_ranks = vec![Vec::new(); ranks.len()];
        for run in 0..first.len() {
            let shortest: Vec<f64> = (0..first[run].len())
                .map(|at| ranks.iter().map(|rank| rank[run][at]).fold(f64::INFINITY, f64::min))
                .collect();
            let waited = |rank: &Vec<Vec<f64>>| {
                rank[run].iter().zip(&shortest).map(|(us, shortest)| us - shortest).sum::<f64>()
            };
            let waited: Vec<f64> = ranks.iter().map(waited).collect();
            waits.lost_us.push(waited.iter().sum::<f64>() / ranks.len() as f64);
            waits.collectives_us.push(shortest.iter().sum());
            of_ranks.iter_mut().zip(waited).for_each(|(all, us)| all.push(us));
        }
        waits.of_ranks_us = of_ranks.into_iter().map(median).collect();
        Some(waits)
    }
}

fn median(mut us: Vec<f64>) -> f64 {
    us.sort_by(f64::total_cmp);
    us[us.len() / 2]
}

/// What tells how long a rank's device takes from one moment of its work to another.
pub trait Clock: Send + Sync + 'static {
    /// A moment.
    type Moment: Send + Sync;

    /// This one.
    ///
    /// # Errors
    /// The device failed.
    fn now(&self) -> Result<Self::Moment>;

    /// Microseconds between two.
    ///
    /// # Errors
    /// The device failed.
    fn us(&self, from: &Self::Moment, to: &Self::Moment) -> Result<f64>;

    /// Whether a moment is one of a recorded step, that is to say, of every replay.
    fn is_recorded(&self, moment: &Self::Moment) -> bool;
}

/// The host's, for backends that wait in every collective.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostClock;

impl Clock for HostClock {
    type Moment = Instant;

    fn now(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn us(&self, from: &Instant, to: &Instant) -> Result<f64> {
        Ok(microseconds(to.duration_since(*from)))
    }

    fn is_recorded(&self, _: &Instant) -> bool {
        false
    }
}

#[cfg(feature = "cuda")]
impl Clock for Arc<dsa80_cuda::Gpu> {
    type Moment = dsa80_cuda::gpu::Moment;

    fn now(&self) -> Result<Self::Moment> {
        self.moment()
    }

    fn us(&self, from: &Self::Moment, to: &Self::Moment) -> Result<f64> {
        from.us_until(to)
    }

    fn is_recorded(&self, moment: &Self::Moment) -> bool {
        moment.is_recorded()
    }
}

/// A rank's collectives, as far as they are watched.
pub trait Watch: Send + Sync {
    /// Forgets what there was, and watches from now on.
    fn begin(&self);

    /// Watches no longer.
    fn end(&self);

    /// Microseconds of every collective since the beginning, or of the last replay if they were recorded since then.
    ///
    /// # Errors
    /// The device failed.
    fn took(&self) -> Result<Vec<f64>>;
}

/// The collectives of `communicator`, and what watches them by `clock`.
pub fn watched<T: DeviceTensor + 'static, C: Clock>(
    communicator: Box<dyn Communicator<T>>,
    clock: C,
) -> (Box<dyn Communicator<T>>, Arc<dyn Watch>) {
    let log = Arc::new(Log { clock, seen: Mutex::new(None) });
    (Box::new(Watched { live: communicator, log: Arc::clone(&log) }), log)
}

/// From entering a collective to leaving it.
type Stay<C> = [<C as Clock>::Moment; 2];

struct Log<C: Clock> {
    clock: C,
    /// None while nobody watches.
    seen: Mutex<Option<Vec<Stay<C>>>>,
}

impl<C: Clock> Log<C> {
    fn seen(&self) -> MutexGuard<'_, Option<Vec<Stay<C>>>> {
        // Whole between any two statements that hold the lock.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: Clock> Watch for Log<C> {
    fn begin(&self) {
        *self.seen() = Some(Vec::new());
    }

    fn end(&self) {
        *self.seen() = None;
    }

    fn took(&self) -> Result<Vec<f64>> {
        let seen = self.seen();
        let seen = seen.as_deref().unwrap_or_default();
        let is_recorded = |stay: &&Stay<C>| self.clock.is_recorded(&stay[0]);
        let recorded: Vec<&Stay<C>> = seen.iter().filter(is_recorded).collect();
        let us = |[from, to]: &Stay<C>| self.clock.us(from, to);
        if recorded.is_empty() {
            return seen.iter().map(us).collect();
        }
        // A step runs once before it is recorded, and is recorded again where that was spoilt: the last time counts.
        let of_a_step = seen.len() - recorded.len();
        recorded[recorded.len().saturating_sub(of_a_step)..].iter().map(|&stay| us(stay)).collect()
    }
}

struct Watched<T, C: Clock> {
    live: Box<dyn Communicator<T>>,
    log: Arc<Log<C>>,
}

impl<T, C: Clock> Watched<T, C> {
    fn watch<R>(&self, collective: impl FnOnce() -> Result<R>) -> Result<R> {
        if self.log.seen().is_none() {
            return collective();
        }
        let from = self.log.clock.now()?;
        let result = collective()?;
        let stay = [from, self.log.clock.now()?];
        if let Some(seen) = &mut *self.log.seen() {
            seen.push(stay);
        }
        Ok(result)
    }
}

impl<T: DeviceTensor, C: Clock> Communicator<T> for Watched<T, C> {
    fn rank(&self) -> usize {
        self.live.rank()
    }

    fn world_size(&self) -> usize {
        self.live.world_size()
    }

    fn all_reduce(&self, tensor: &mut T) -> Result<()> {
        self.watch(|| self.live.all_reduce(tensor))
    }

    fn all_reduce_norm(
        &self,
        x: &mut T,
        residual: &mut T,
        weight: &T,
        eps: f64,
        out: &mut T,
    ) -> Result<bool> {
        self.watch(|| self.live.all_reduce_norm(x, residual, weight, eps, out))
    }

    fn all_gather(&self, shard: &T, out: &mut T) -> Result<()> {
        self.watch(|| self.live.all_gather(shard, out))
    }

    fn all_gather_each(&self, shards: &[&T], outs: &mut [&mut T]) -> Result<()> {
        self.watch(|| self.live.all_gather_each(shards, outs))
    }

    fn broadcast(&self, tensor: &mut T, root: usize) -> Result<()> {
        self.watch(|| self.live.broadcast(tensor, root))
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
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use dsa80_reference::cpu::{Cpu, CpuTensor, ThreadCommunicator};
    use dsa80_reference::{DType, Kernels};

    use super::*;

    #[test]
    fn whoever_comes_last_waits_for_nobody_and_the_others_for_it() {
        // Two collectives, 2 and 5 us long by themselves: rank 2 is 3 us late for the first, rank 0 4 us for the second.
        let run = |late: f64| [vec![2.0 + late, 5.0], vec![2.0 + late, 9.0], vec![2.0, 9.0]];
        let [a, b, c] = run(3.0);
        let [d, e, f] = run(6.0);
        let waits = Waits::of(&[vec![a, d], vec![b, e], vec![c, f]]).unwrap();
        assert_eq!(waits.collectives_us, [7.0, 7.0]);
        assert_eq!(waits.lost_us, [(3.0 + 7.0 + 4.0) / 3.0, (6.0 + 10.0 + 4.0) / 3.0]);
        assert_eq!(waits.of_ranks_us, [6.0, 10.0, 4.0]);
    }

    #[test]
    fn ranks_that_did_not_do_the_same_are_not_compared() {
        assert_eq!(Waits::of(&[]), None);
        assert_eq!(Waits::of(&[vec![], vec![]]), None);
        assert_eq!(Waits::of(&[vec![vec![]], vec![vec![]]]), None);
        assert_eq!(Waits::of(&[vec![vec![1.0]], vec![vec![1.0, 2.0]]]), None);
        assert_eq!(Waits::of(&[vec![vec![1.0]; 2], vec![vec![1.0]]]), None);
    }

    #[test]
    fn a_rank_that_comes_late_is_waited_for() {
        const LATE: Duration = Duration::from_millis(30);
        let cpu = Cpu::<f32>::new();
        let took: Vec<Vec<Vec<f64>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = ThreadCommunicator::group(cpu, 3)
                .into_iter()
                .map(|rank| {
                    let (communicator, watch) = watched(Box::new(rank) as _, HostClock);
                    scope.spawn(move || {
                        let mut x: CpuTensor<f32> = cpu.alloc(DType::Float, &[4]).unwrap();
                        communicator.all_reduce(&mut x).unwrap();
                        watch.begin();
                        if communicator.rank() == 1 {
                            std::thread::sleep(LATE);
                        }
                        communicator.all_reduce(&mut x).unwrap();
                        let took = watch.took().unwrap();
                        watch.end();
                        communicator.all_reduce(&mut x).unwrap();
                        assert!(watch.took().unwrap().is_empty(), "watched after the end");
                        vec![took]
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let Waits { lost_us, of_ranks_us, .. } = Waits::of(&took).unwrap();
        let late = microseconds(LATE);
        assert!(lost_us.len() == 1 && lost_us[0] > late / 3.0, "{took:?}");
        assert!(of_ranks_us[1] < late / 3.0 && of_ranks_us[0] > late / 2.0, "{of_ranks_us:?}");
    }

    /// Moments count up; those from a number on are recorded.
    struct Counter {
        moments: AtomicU32,
        recorded_from: u32,
    }

    impl Clock for Counter {
        type Moment = u32;

        fn now(&self) -> Result<u32> {
            Ok(self.moments.fetch_add(1, Ordering::Relaxed))
        }

        fn us(&self, from: &u32, to: &u32) -> Result<f64> {
            Ok(f64::from(from * 1000 + to))
        }

        fn is_recorded(&self, moment: &u32) -> bool {
            *moment >= self.recorded_from
        }
    }

    #[test]
    fn of_a_recorded_step_the_last_recording_counts() {
        let cpu = Cpu::<f32>::new();
        let mut x: CpuTensor<f32> = cpu.alloc(DType::Float, &[4]).unwrap();
        let rank = ThreadCommunicator::group(cpu, 1).remove(0);
        let clock = Counter { moments: AtomicU32::new(0), recorded_from: 4 };
        let (communicator, watch) = watched(Box::new(rank) as _, clock);
        watch.begin();
        // Run, recorded, and recorded again, since that was spoilt.
        for _ in 0..3 {
            communicator.all_reduce(&mut x).unwrap();
            communicator.broadcast(&mut x, 0).unwrap();
        }
        assert_eq!(watch.took().unwrap(), [8009.0, 10011.0]);
    }
}
