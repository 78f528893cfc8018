//! What ranks take: their steps, what they read, their collectives, their loading. For `dsa80 bench`; nothing of it serves.

mod collectives;
mod gpu;
mod loading;
mod ranks;
mod seen;
mod sums;
mod traffic;
mod waits;
mod work;

use std::sync::Arc;
use std::time::Duration;

use dsa80_reference::{Batch, SamplingParams};

pub use self::collectives::{CollectiveTimes, Group, Summed, groups, serves_up_to, time_gathers, time_sums};
pub use self::gpu::GpuFacts;
pub use self::loading::{LoadPhases, TimedSource};
pub use self::ranks::Measured;
pub use self::seen::Seen;
pub use self::sums::Check;
pub use self::traffic::{ReadBytes, cache_bytes_per_token, flops, gathered};
pub use self::waits::{Clock, HostClock, Waits, Watch, watched};
use crate::engine::{SampleTarget, Step, StepLimits};
use crate::error::LaunchError;

/// One rank, or some that step together, whatever they run on.
pub trait MeasuredRanks {
    /// What its steps and caches hold.
    fn limits(&self) -> StepLimits;

    /// Bytes of an element of an activation, and of a cache that is not fp8.
    fn act_bytes(&self) -> usize;

    /// Computes a batch, and writes its rows of the caches.
    ///
    /// # Errors
    /// The device failed.
    fn fill(&mut self, batch: &Batch) -> Result<(), LaunchError>;

    /// What a batch selects and which experts it is sent to, on the first rank.
    ///
    /// # Errors
    /// The device failed.
    fn see(&mut self, batch: &Batch) -> Result<Seen, LaunchError>;

    /// Times a step, `runs` times each way that it can be made; `kernels` says whether one by one too. Of several ranks it is the slowest.
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
    /// Of several ranks: the same without their collectives, each alone with tokens of its own part of the vocabulary. By the device's clock
    /// where it has one, else by the host's.
    pub alone_us: Vec<f64>,
    /// Of several ranks whose collectives are watched: what they wait for each other.
    pub waits: Option<Waits>,
    /// The kernels of it, on the first rank; without collectives where those are a library's.
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
