//! How far the ranks have come with a start: what tells one that does not get on any more from one that takes its time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use dsa80_reference::Breaker;

use crate::checkpoint::Checkpoint;
use crate::launch::{Phase, RankMemory, Started};

/// What the ranks of this process, and those that it hears of, have done of a start.
#[derive(Default)]
pub(crate) struct Headway {
    state: Mutex<State>,
    /// Whose bytes are read.
    checkpoint: Option<Arc<Checkpoint>>,
}

#[derive(Default)]
struct State {
    /// Pieces of work that were begun, and signs that another process has come further.
    count: u64,
    /// What every rank was last known to do.
    doing: BTreeMap<usize, String>,
    /// How far ranks of other processes say that they are.
    heard: BTreeMap<usize, u64>,
    breakers: Vec<Breaker>,
    /// Phases of this process's start, and when each began.
    phases: Vec<(&'static str, Instant)>,
    memory: Vec<RankMemory>,
}

impl Headway {
    /// Of ranks that read `checkpoint`.
    pub(crate) fn of(checkpoint: &Arc<Checkpoint>) -> Arc<Self> {
        Arc::new(Self { checkpoint: Some(Arc::clone(checkpoint)), ..Self::default() })
    }

    /// `rank` has done what it did, and begins `what`.
    pub(crate) fn begin(&self, rank: usize, what: impl Into<String>) {
        let mut state = self.lock();
        state.count += 1;
        state.doing.insert(rank, what.into());
    }

    /// All ranks begin `what` together.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub(crate) fn begin_together(&self, what: &str) {
        let mut state = self.lock();
        state.count += 1;
        state.doing.entry(0).or_default();
        state.doing.values_mut().for_each(|doing| what.clone_into(doing));
    }

    /// This process begins a phase of its start.
    pub(crate) fn enter(&self, phase: &'static str) {
        let mut state = self.lock();
        state.count += 1;
        state.phases.push((phase, Instant::now()));
    }

    /// What the GPU of a rank of this process holds now.
    #[cfg(feature = "cuda")]
    pub(crate) fn holds(&self, memory: RankMemory) {
        self.lock().memory.push(memory);
    }

    /// What all phases took, of which the last ends now.
    pub(crate) fn started(&self) -> Started {
        let (now, state) = (Instant::now(), self.lock());
        let ends = state.phases.iter().skip(1).map(|(_, began)| *began).chain([now]);
        let phase = |((name, began), end): (&(&'static str, Instant), Instant)| Phase {
            name: (*name).to_owned(),
            seconds: end.duration_since(*began).as_secs_f64(),
        };
        Started { phases: state.phases.iter().zip(ends).map(phase).collect(), memory: state.memory.clone() }
    }

    /// Another process says how far its `rank` is.
    pub(crate) fn hear(&self, rank: usize, count: u64, doing: String) {
        let mut state = self.lock();
        if state.heard.insert(rank, count) != Some(count) {
            state.count += 1;
            state.doing.insert(rank, doing);
        }
    }

    /// How far this process is, and what its `rank` does: what others [hear](Self::hear).
    pub(crate) fn sign(&self, rank: usize) -> (u64, String) {
        let doing = self.lock().doing.get(&rank).cloned().unwrap_or_default();
        (self.total(), doing)
    }

    /// Changes whenever a rank has got on.
    pub(crate) fn total(&self) -> u64 {
        let read = self.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.bytes_read().total());
        self.lock().count.wrapping_add(read)
    }

    /// What every rank was last known to do, in words.
    pub(crate) fn last_known(&self) -> String {
        let state = self.lock();
        let ranks = state.doing.iter().map(|(rank, doing)| format!("rank {rank}: {doing}"));
        ranks.collect::<Vec<_>>().join("; ")
    }

    /// What ends the waits of ranks for each other, should none get on any more.
    pub(crate) fn break_with(&self, breaker: Breaker) {
        self.lock().breakers.push(breaker);
    }

    /// Ends those waits.
    pub(crate) fn break_off(&self, reason: &str) {
        let breakers = std::mem::take(&mut self.lock().breakers);
        breakers.iter().for_each(|breaker| breaker(reason));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between any two statements that hold the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_lasts_until_the_next_begins() {
        const WHILE: std::time::Duration = std::time::Duration::from_millis(40);
        let headway = Headway::default();
        assert_eq!(headway.started(), Started::default());
        headway.enter("weights");
        std::thread::sleep(WHILE);
        headway.enter("kernels");
        let Started { phases, .. } = headway.started();
        assert_eq!(phases.iter().map(|phase| &*phase.name).collect::<Vec<_>>(), ["weights", "kernels"]);
        assert!(
            phases[0].seconds >= WHILE.as_secs_f64() && phases[1].seconds < phases[0].seconds,
            "{phases:?}"
        );
    }

    #[test]
    fn what_is_begun_and_what_is_heard_anew_is_headway() {
        let headway = Headway::default();
        let mut before = headway.total();
        let mut got_on = || {
            let total = headway.total();
            total != std::mem::replace(&mut before, total)
        };
        headway.begin(0, "opening its GPU");
        assert!(got_on());
        headway.hear(1, 7, "loading layer 1 of 4".into());
        assert!(got_on());
        headway.hear(1, 7, "loading layer 1 of 4".into());
        assert!(!got_on(), "a rank that says the same again has not got on");
        headway.hear(1, 8, "loading layer 2 of 4".into());
        assert!(got_on());
        assert_eq!(headway.last_known(), "rank 0: opening its GPU; rank 1: loading layer 2 of 4");
        headway.begin_together("a first step");
        assert!(got_on());
        assert_eq!(headway.last_known(), "rank 0: a first step; rank 1: a first step");
        assert_eq!(headway.sign(1).1, "a first step");
    }
}
