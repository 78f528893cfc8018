//! What a start took: seconds by phase, and the memory of every GPU beside what was planned.

use serde::{Deserialize, Serialize};

/// What became of a start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// In their order.
    pub phases: Vec<Phase>,
    /// Of ranks of this process that have a GPU.
    pub memory: Vec<RankMemory>,
}

/// A part of a start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// How long.
    pub seconds: f64,
}

/// The memory of a rank's GPU, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankMemory {
    /// The rank.
    pub rank: usize,
    /// Of it planned, before any was taken: weights.
    pub weights: u64,
    /// Tensors of a step, and what kernels keep between launches.
    pub workspace: u64,
    /// Recorded decode steps.
    pub graphs: u64,
    /// The caches.
    pub caches: u64,
    /// For what is not counted: compiled kernels, the driver's own.
    pub reserve: u64,
    /// What the start has really taken.
    pub taken: u64,
}

impl RankMemory {
    /// All that was planned.
    pub fn planned(&self) -> u64 {
        let Self { weights, workspace, graphs, caches, reserve, .. } = self;
        weights + workspace + graphs + caches + reserve
    }

    /// How much more was taken than planned, as a share of that; less where it is below 0.
    pub fn over(&self) -> f64 {
        self.taken as f64 / self.planned().max(1) as f64 - 1.0
    }
}

impl Started {
    /// Says it to whoever reads the log.
    pub(super) fn say(&self) {
        let phases = self.phases.iter().map(|phase| format!("{} {:.1} s", phase.name, phase.seconds));
        tracing::info!("started: {}", phases.collect::<Vec<_>>().join(", "));
        let gib = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
        for memory in &self.memory {
            tracing::info!(
                "memory of rank {}: {:.2} GiB taken, {:.2} planned ({:+.1} %)",
                memory.rank,
                gib(memory.taken),
                gib(memory.planned()),
                100.0 * memory.over()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_is_compared_with_all_that_was_planned() {
        let memory =
            RankMemory { rank: 3, weights: 50, workspace: 2, graphs: 1, caches: 46, reserve: 1, taken: 98 };
        assert_eq!(memory.planned(), 100);
        assert!((memory.over() + 0.02).abs() < 1e-12, "{}", memory.over());
    }
}
