//! What a rank takes: its steps, what they read, its collectives, its loading. For `dsa80 bench`; nothing of it serves.

mod collectives;
mod gpu;
mod loading;
mod seen;
mod traffic;

use std::sync::Arc;
use std::time::{Duration, Instant};

use dsa80_reference::{Batch, Kernels, RecordedKernel, SamplingParams};

pub use self::collectives::{CollectiveTimes, Group, groups, time_all_reduce};
pub use self::gpu::GpuFacts;
pub use self::loading::{LoadPhases, TimedSource};
pub use self::seen::Seen;
pub use self::traffic::{ReadBytes, cache_bytes_per_token, flops};
use crate::engine::{SampleTarget, Step, StepLimits};
use crate::error::LaunchError;
use crate::runner::{Rank, RecordedStep};

/// One rank, alone, whatever it runs on.
pub trait MeasuredRank {
    /// What its steps and caches hold.
    fn limits(&self) -> StepLimits;

    /// Bytes of an element of an activation, and of a cache that is not fp8.
    fn act_bytes(&self) -> usize;

    /// Computes a batch, and writes its rows of the caches.
    ///
    /// # Errors
    /// The device failed.
    fn fill(&mut self, batch: &Batch) -> Result<(), LaunchError>;

    /// What a batch selects and which experts it is sent to.
    ///
    /// # Errors
    /// The device failed.
    fn see(&mut self, batch: &Batch) -> Result<Seen, LaunchError>;

    /// Times a step, `runs` times each way that it can be made; `kernels` says whether one by one too.
    ///
    /// # Errors
    /// The device failed, or the step cannot be recorded.
    fn time(&mut self, step: &Step, runs: usize, kernels: bool) -> Result<StepTimes, LaunchError>;
}

/// Microseconds of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepTimes {
    /// From the step to its tokens, as the engine makes it: the host's part included.
    pub step_us: Vec<f64>,
    /// Of those, until all is on its way to the device; only of a step that the engine replays from a graph.
    pub host_us: Vec<f64>,
    /// Of the device alone, replayed from a graph; nothing on a backend that has none.
    pub device_us: Vec<f64>,
    /// The kernels of it.
    pub kernels: Vec<KernelTimes>,
}

/// One kernel's launches in a step, by themselves.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTimes {
    /// The kernel.
    pub name: String,
    /// The shape, in words.
    pub shape: String,
    /// Its launches.
    pub launches: usize,
    /// Microseconds of all of them.
    pub us: Vec<f64>,
}

/// A rank and what it was launched with.
pub(crate) struct Measured<K: Kernels> {
    pub(crate) rank: Rank<K>,
    pub(crate) limits: StepLimits,
    pub(crate) act_bytes: usize,
}

/// Kernels are shorter than steps, and there are many.
const RUNS_OF_A_KERNEL: usize = 5;

/// Runs in which the host waits until the device is done before it looks.
const RUNS_OF_THE_HOST: usize = 8;

impl<K: Kernels> MeasuredRank for Measured<K> {
    fn limits(&self) -> StepLimits {
        self.limits
    }

    fn act_bytes(&self) -> usize {
        self.act_bytes
    }

    fn fill(&mut self, batch: &Batch) -> Result<(), LaunchError> {
        Ok(self.rank.forward(batch, None)?)
    }

    fn see(&mut self, batch: &Batch) -> Result<Seen, LaunchError> {
        let mut seen = Seen::of(batch);
        self.rank.forward(batch, Some(&mut seen))?;
        Ok(seen)
    }

    fn time(&mut self, step: &Step, runs: usize, kernels: bool) -> Result<StepTimes, LaunchError> {
        let mut times = StepTimes::default();
        let recorded = self.rank.record_step(step)?;
        if let Some(RecordedStep { whole, kernels: apart }) = &recorded {
            let on_device = self.rank.kernels();
            // The first replays warm up clocks and caches.
            on_device.time_replays(whole, 2)?;
            times.device_us = on_device.time_replays(whole, runs)?;
            for RecordedKernel { name, shape, launches, graph } in apart.iter().filter(|_| kernels) {
                on_device.replay(graph)?;
                let us = on_device.time_replays(graph, RUNS_OF_A_KERNEL.min(runs))?;
                let (name, shape) = (name.clone(), shape.clone());
                times.kernels.push(KernelTimes { name, shape, launches: *launches, us });
            }
        }
        drop(recorded);
        let decode = step.batch.num_tokens() == step.batch.num_seqs();
        let limits = StepLimits {
            max_batch_seqs: step.batch.num_seqs(),
            max_model_len: step.batch.max_context_len,
            ..self.limits
        };
        let graphs = if decode { self.rank.record_graphs(&limits)? } else { 0 };
        self.rank.step(step)?;
        for _ in 0..runs {
            let started = Instant::now();
            self.rank.step(step)?;
            times.step_us.push(microseconds(started.elapsed()));
        }
        if graphs > 0 {
            times.host_us = self.host_us(step, &times.step_us)?;
        }
        Ok(times)
    }
}

impl<K: Kernels> Measured<K> {
    /// The host's part of a replayed step: until it is on its way, and from the end of the device's work to the tokens.
    fn host_us(&mut self, step: &Step, step_us: &[f64]) -> Result<Vec<f64>, LaunchError> {
        let longest = step_us.iter().copied().fold(0.0, f64::max);
        let device = Duration::from_secs_f64(1.5e-6 * longest);
        let mut host_us = Vec::new();
        for _ in 0..RUNS_OF_THE_HOST {
            let (started, mut before, mut ended) = (Instant::now(), Duration::ZERO, Instant::now());
            self.rank.step_while(step, &mut || {
                before = started.elapsed();
                std::thread::sleep(device);
                ended = Instant::now();
            })?;
            host_us.push(microseconds(before + ended.elapsed()));
        }
        Ok(host_us)
    }
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// A step that takes the best token of each of these rows of a batch: with one rank's logits a draw would say nothing.
pub fn greedy_step(batch: Batch, rows: impl IntoIterator<Item = usize>) -> Step {
    let params = Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
    let target = |row: usize| SampleTarget {
        row,
        params: Arc::clone(&params),
        prompt: Arc::default(),
        output: Vec::new(),
        banned: Arc::default(),
        position: batch.visible(row) as u32,
        forced: None,
        logprobs: None,
    };
    let targets = rows.into_iter().map(target).collect();
    Step { batch, targets }
}
