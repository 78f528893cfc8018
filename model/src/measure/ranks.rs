//! Ranks that are measured, alone or together.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dsa80_reference::{Batch, Error, Kernels, RecordedKernel};

use super::{KernelTimes, MeasuredRanks, Seen, StepTimes, Waits, Watch, microseconds};
use crate::checkpoint::Shard;
use crate::engine::{Step, StepLimits};
use crate::error::LaunchError;
use crate::runner::{Rank, RecordedStep};

/// Ranks and what they were launched with: one alone, or some of which each steps on a thread of its own.
pub struct Measured<K: Kernels> {
    /// In rank order; several are [`SomeRanks`](dsa80_reference::SomeRanks) of a group.
    pub ranks: Vec<Rank<K>>,
    /// The first of them, and how many there would be.
    pub first: Shard,
    /// What their steps and caches hold.
    pub limits: StepLimits,
    /// Bytes of an element of an activation.
    pub act_bytes: usize,
    /// Leaves the collectives of all ranks out while it is set.
    pub silent: Arc<AtomicBool>,
    /// Whether collectives are kernels of ours, which can be recorded one by one.
    pub own_collectives: bool,
    /// What tells how long each of them is in its collectives; none where nothing does.
    pub watches: Vec<Arc<dyn Watch>>,
}

/// Kernels are shorter than steps, and there are many.
const RUNS_OF_A_KERNEL: usize = 5;

/// Runs in which the host waits until the device is done before it looks.
const RUNS_OF_THE_HOST: usize = 8;

impl<K: Kernels> MeasuredRanks for Measured<K> {
    fn limits(&self) -> StepLimits {
        self.limits
    }

    fn act_bytes(&self) -> usize {
        self.act_bytes
    }

    fn fill(&mut self, batch: &Batch) -> Result<(), LaunchError> {
        self.together(|_, rank| Ok(rank.forward(batch, None)?)).map(drop)
    }

    fn see(&mut self, batch: &Batch) -> Result<Seen, LaunchError> {
        let of_ranks = self.together(|_, rank| {
            let mut seen = Seen::of(batch);
            rank.forward(batch, Some(&mut seen))?;
            Ok(seen)
        })?;
        // There is at least one rank.
        Ok(of_ranks.into_iter().next().unwrap_or_default())
    }

    fn time(&mut self, step: &Step, runs: usize, kernels: bool) -> Result<StepTimes, LaunchError> {
        let limits = self.limits;
        let several = self.ranks.len() > 1;
        let kernels_live = kernels && (!several || self.own_collectives);
        let mut times = slowest(self.together(|_, rank| {
            let StepTimes { device_us, kernels, .. } = on_device(rank, step, runs, kernels_live)?;
            Ok(StepTimes { device_us, kernels, ..by_host(rank, &limits, step, runs)? })
        })?);
        if several {
            self.silent.store(true, Ordering::Relaxed);
            let first = self.first;
            let alone = self.together(|index, rank| {
                let vocab_size = limits.vocab_size;
                let own = of_own_vocabulary(step, vocab_size, Shard { rank: first.rank + index, ..first });
                let mut alone = on_device(rank, &own, runs, kernels && !kernels_live)?;
                if alone.device_us.is_empty() {
                    alone.step_us = steps_by_host(rank, &own, runs)?;
                }
                Ok(alone)
            });
            self.silent.store(false, Ordering::Relaxed);
            let alone = slowest(alone?);
            times.alone_us = if alone.device_us.is_empty() { alone.step_us } else { alone.device_us };
            if times.kernels.is_empty() {
                times.kernels = alone.kernels;
            }
            times.waits = self.waits(step, runs)?;
        }
        Ok(times)
    }
}

impl<K: Kernels> Measured<K> {
    /// What ranks wait for each other in a step.
    fn waits(&mut self, step: &Step, runs: usize) -> Result<Option<Waits>, LaunchError> {
        if self.watches.is_empty() {
            return Ok(None);
        }
        let watches = self.watches.clone();
        let of_ranks = self.together(|index, rank| {
            let watch = &*watches[index];
            watch.begin();
            let took = watched_runs(rank, watch, step, runs);
            watch.end();
            took
        })?;
        Ok(Waits::of(&of_ranks))
    }

    /// What `body` gives on every rank, which all run it at the same time. The error is that of the rank that failed by itself.
    fn together<R: Send>(
        &mut self,
        body: impl Fn(usize, &mut Rank<K>) -> Result<R, LaunchError> + Sync,
    ) -> Result<Vec<R>, LaunchError> {
        let body = &body;
        let results: Vec<Result<R, LaunchError>> = std::thread::scope(|scope| {
            let run = |(index, rank): (usize, &mut Rank<K>)| {
                let result = body(index, rank);
                if let Err(error) = &result {
                    // The others may wait for this rank in a collective.
                    rank.abort(&error.to_string());
                }
                result
            };
            let threads: Vec<_> =
                self.ranks.iter_mut().enumerate().map(|rank| scope.spawn(move || run(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(panicked()))).collect()
        });
        let broken = |result: &Result<R, LaunchError>| {
            matches!(result, Err(LaunchError::Kernel(Error::Communicator { .. })))
        };
        match results.iter().position(|result| result.is_err() && !broken(result)) {
            Some(cause) => results.into_iter().nth(cause).into_iter().collect(),
            None => results.into_iter().collect(),
        }
    }
}

fn panicked() -> LaunchError {
    Error::Backend { backend: "thread", message: "a rank's thread panicked".into() }.into()
}

/// The device's part: replayed from a graph, where there are any.
fn on_device<K: Kernels>(
    rank: &mut Rank<K>,
    step: &Step,
    runs: usize,
    kernels: bool,
) -> Result<StepTimes, LaunchError> {
    let mut times = StepTimes::default();
    let Some(RecordedStep { whole, kernels: apart }) = rank.record_step(step, kernels)? else {
        return Ok(times);
    };
    let on_device = rank.kernels();
    // The first replays warm up clocks and caches.
    on_device.time_replays(&whole, 2)?;
    times.device_us = on_device.time_replays(&whole, runs)?;
    for RecordedKernel { name, shape, launches, graph } in apart {
        on_device.replay(&graph)?;
        let us = on_device.time_replays(&graph, RUNS_OF_A_KERNEL.min(runs))?;
        times.kernels.push(KernelTimes { name, shape, launches, us });
    }
    Ok(times)
}

/// How long a rank was in every collective of a step, run by run.
fn watched_runs<K: Kernels>(
    rank: &mut Rank<K>,
    watch: &dyn Watch,
    step: &Step,
    runs: usize,
) -> Result<Vec<Vec<f64>>, LaunchError> {
    let recorded = rank.record_step(step, false)?;
    let mut took = Vec::new();
    for _ in 0..runs {
        match &recorded {
            // The second begins when all ranks have ended the first: hosts, which begin when they like, are out of it.
            Some(RecordedStep { whole, .. }) => drop(rank.kernels().time_replays(whole, 2)?),
            None => {
                watch.begin();
                rank.step(step)?;
            }
        }
        took.push(watch.took()?);
    }
    Ok(took)
}

/// From the step to its tokens, as the engine makes it.
fn by_host<K: Kernels>(
    rank: &mut Rank<K>,
    limits: &StepLimits,
    step: &Step,
    runs: usize,
) -> Result<StepTimes, LaunchError> {
    let decode = step.batch.num_tokens() == step.batch.num_seqs();
    let limits = StepLimits {
        max_batch_seqs: step.batch.num_seqs(),
        max_model_len: step.batch.max_context_len,
        ..*limits
    };
    let graphs = if decode { rank.record_graphs(&limits)? } else { 0 };
    let step_us = steps_by_host(rank, step, runs)?;
    let host_us = if graphs > 0 { host_us(rank, step, &step_us)? } else { Vec::new() };
    Ok(StepTimes { step_us, host_us, ..StepTimes::default() })
}

fn steps_by_host<K: Kernels>(rank: &mut Rank<K>, step: &Step, runs: usize) -> Result<Vec<f64>, LaunchError> {
    rank.step(step)?;
    let timed = |_| {
        let started = Instant::now();
        rank.step(step)?;
        Ok(microseconds(started.elapsed()))
    };
    (0..runs).map(timed).collect()
}

/// The host's part of a replayed step: until it is on its way, and from the end of the device's work to the tokens.
fn host_us<K: Kernels>(rank: &mut Rank<K>, step: &Step, step_us: &[f64]) -> Result<Vec<f64>, LaunchError> {
    let longest = step_us.iter().copied().fold(0.0, f64::max);
    let device = Duration::from_secs_f64(1.5e-6 * longest);
    let mut host_us = Vec::new();
    for _ in 0..RUNS_OF_THE_HOST {
        let (started, mut before, mut ended) = (Instant::now(), Duration::ZERO, Instant::now());
        rank.step_while(step, &mut || {
            before = started.elapsed();
            std::thread::sleep(device);
            ended = Instant::now();
        })?;
        host_us.push(microseconds(before + ended.elapsed()));
    }
    Ok(host_us)
}

/// Of the runs of all ranks the slowest each, which is the whole group's; the first rank's kernels and host, which chooses the tokens.
fn slowest(of_ranks: Vec<StepTimes>) -> StepTimes {
    let mut of_ranks = of_ranks.into_iter();
    let mut all = of_ranks.next().unwrap_or_default();
    for other in of_ranks {
        for (all, other) in [(&mut all.step_us, other.step_us), (&mut all.device_us, other.device_us)] {
            all.iter_mut().zip(other).for_each(|(slowest, us)| *slowest = slowest.max(us));
        }
    }
    all
}

/// The same step with tokens whose embeddings `shard` has: alone it makes zeros of all others, which would be alike.
fn of_own_vocabulary(step: &Step, vocab_size: usize, shard: Shard) -> Step {
    let own = shard.range(vocab_size);
    let mut step = step.clone();
    for token in &mut step.batch.token_ids {
        *token = (own.start + *token as usize % own.len().max(1)) as i32;
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::greedy_step;
    use dsa80_reference::SequenceSlice;

    #[test]
    fn the_slowest_rank_counts_run_by_run() {
        let times = |step: [f64; 2], device: [f64; 2], host: f64| StepTimes {
            step_us: step.to_vec(),
            device_us: device.to_vec(),
            host_us: vec![host],
            ..StepTimes::default()
        };
        let all = slowest(vec![times([5.0, 1.0], [2.0, 2.0], 7.0), times([4.0, 3.0], [1.0, 6.0], 9.0)]);
        assert_eq!(all, times([5.0, 3.0], [2.0, 6.0], 7.0));
    }

    #[test]
    fn a_rank_alone_gets_tokens_of_its_own() {
        let slice = SequenceSlice { token_ids: &[3, 24, 38], computed_len: 0, pages: &[0] };
        let step = greedy_step(Batch::new(16, &[slice]).unwrap(), [2]);
        let own = of_own_vocabulary(&step, 80, Shard { rank: 3, world_size: 8 });
        assert_eq!(own.batch.token_ids, [33, 34, 38]);
        assert_eq!((own.batch.positions.len(), own.targets.len()), (3, 1));
    }
}
