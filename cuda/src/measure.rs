//! How long a call takes: captured in one graph, replayed.

use dsa80_reference::Result;
use serde::{Deserialize, Serialize};

use crate::gpu::Gpu;

/// Microseconds of a call over the replays of one graph.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The median.
    pub median_us: f64,
    /// One in ten is shorter.
    pub p10_us: f64,
    /// One in ten is longer.
    pub p90_us: f64,
    /// Calls in the graph.
    pub calls: usize,
    /// Replays of the graph.
    pub replays: usize,
}

/// A graph is at least this long, so that what lies between two replays does not count.
const GRAPH_US: f64 = 1000.0;

impl Timing {
    /// From the times of a graph's replays.
    pub fn of(mut times: Vec<f64>, calls: usize) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = (share * (times.len().saturating_sub(1)) as f64).round() as usize;
            times.get(place).copied().unwrap_or(f64::NAN) / calls as f64
        };
        Self { median_us: at(0.5), p10_us: at(0.1), p90_us: at(0.9), calls, replays: times.len() }
    }
}

/// Times `launch(copy)` over all `copies`, in turn.
///
/// # Errors
/// `launch` failed, or did what cannot be captured.
pub fn time_calls(
    gpu: &Gpu,
    copies: usize,
    replays: usize,
    mut launch: impl FnMut(usize) -> Result<()>,
) -> Result<Timing> {
    let mut passes =
        |count: usize| gpu.capture(|| (0..count).flat_map(|_| 0..copies).try_for_each(&mut launch));
    let once = passes(1)?;
    // The first replays warm up clocks and caches.
    let pass_us = gpu.time(3, || once.launch())?.into_iter().fold(f64::INFINITY, f64::min);
    let count = (GRAPH_US / pass_us).ceil().clamp(1.0, 200.0) as usize;
    let graph = if count == 1 { once } else { passes(count)? };
    graph.launch()?;
    let times = gpu.time(replays, || graph.launch())?;
    Ok(Timing::of(times, count * copies))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_a_call() {
        let times = (0..=100).rev().map(f64::from).collect();
        let timing = Timing::of(times, 10);
        assert_eq!((timing.p10_us, timing.median_us, timing.p90_us), (1.0, 5.0, 9.0));
        assert_eq!((timing.calls, timing.replays), (10, 101));
    }
}
