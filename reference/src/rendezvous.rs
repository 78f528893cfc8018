//! Where the threads of a group meet to exchange what each of them has.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::communicator::Breaker;
use crate::error::{Error, Result};

/// One rank's end of a group of threads.
///
/// A rank that is dropped before the others have finished (its thread failed or panicked) breaks the group: every exchange that waits, and
/// every later one, fails with the reason.
#[derive(Debug)]
pub struct Rendezvous<P> {
    rank: usize,
    group: Arc<Group<P>>,
}

#[derive(Debug)]
struct Group<P> {
    world_size: usize,
    state: Mutex<State<P>>,
    changed: Condvar,
}

/// An exchange has two halves: every rank puts its part, then every rank takes all parts.
#[derive(Debug)]
struct State<P> {
    parts: Vec<Option<P>>,
    put: usize,
    taken: usize,
    broken: Option<String>,
}

impl<P> State<P> {
    /// The ranks that others wait for.
    fn missing(&self) -> Vec<usize> {
        let waiting = self.put > 0 && self.put < self.parts.len();
        let absent = |rank: &usize| waiting && self.parts[*rank].is_none();
        (0..self.parts.len()).filter(absent).collect()
    }
}

/// `rank 1 has`, `ranks 1, 2 have`.
pub fn ranks_have(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match ranks {
        [rank] => format!("rank {rank} has"),
        _ => format!("ranks {} have", list.join(", ")),
    }
}

impl<P: Clone> Rendezvous<P> {
    /// The ends of a group of `world_size`, in rank order; each goes to its own thread.
    pub fn group(world_size: usize) -> Vec<Self> {
        let parts = vec![None; world_size];
        let group = Arc::new(Group {
            world_size,
            state: Mutex::new(State { parts, put: 0, taken: 0, broken: None }),
            changed: Condvar::new(),
        });
        (0..world_size).map(|rank| Self { rank, group: Arc::clone(&group) }).collect()
    }

    /// Gives `part` to the others and returns everybody's, in rank order.
    ///
    /// # Errors
    /// [`Error::Communicator`] when the group is broken, or breaks meanwhile.
    pub fn exchange(&self, part: P) -> Result<Vec<P>> {
        let mut state = self.lock();
        // The exchange before this one may still be read by slower ranks.
        while state.broken.is_none() && state.parts[self.rank].is_some() {
            state = self.wait(state);
        }
        self.check_state(&state)?;
        state.parts[self.rank] = Some(part);
        state.put += 1;
        self.group.changed.notify_all();
        while state.broken.is_none() && state.put < self.group.world_size {
            state = self.wait(state);
        }
        // A rank that leaves after it has put its part has not broken this exchange.
        if state.put < self.group.world_size {
            self.check_state(&state)?;
        }
        let parts = state.parts.iter().flatten().cloned().collect();
        state.taken += 1;
        if state.taken == self.group.world_size {
            state.parts.fill(None);
            (state.put, state.taken) = (0, 0);
            self.group.changed.notify_all();
        }
        Ok(parts)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<P>>) -> MutexGuard<'a, State<P>> {
        self.group.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

impl<P> Rendezvous<P> {
    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.group.world_size
    }

    /// Fails once the group is broken.
    ///
    /// # Errors
    /// [`Error::Communicator`] with the first reason.
    pub fn check(&self) -> Result<()> {
        self.check_state(&self.lock())
    }

    /// Breaks the group from any thread, and names the ranks that the others wait for.
    pub fn breaker(&self) -> Breaker
    where
        P: Send + 'static,
    {
        let group = Arc::clone(&self.group);
        Arc::new(move |reason| {
            let mut state = group.state.lock().unwrap_or_else(PoisonError::into_inner);
            let missing = state.missing();
            state.broken.get_or_insert_with(|| match missing.is_empty() {
                true => reason.to_owned(),
                false => format!("{reason}; {} not come to a collective", ranks_have(&missing)),
            });
            group.changed.notify_all();
        })
    }

    /// Breaks the group. The first reason is the cause; later ones are its consequences.
    pub fn break_group(&self, reason: impl FnOnce() -> String) {
        self.lock().broken.get_or_insert_with(reason);
        self.group.changed.notify_all();
    }

    fn check_state(&self, state: &State<P>) -> Result<()> {
        match &state.broken {
            None => Ok(()),
            Some(reason) => Err(Error::Communicator {
                rank: self.rank,
                world_size: self.group.world_size,
                reason: reason.clone(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<P>> {
        // The state is consistent between any two statements that hold the lock, so a poisoned lock is still
        // good.
        self.group.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<P> Drop for Rendezvous<P> {
    fn drop(&mut self) {
        self.break_group(|| format!("rank {} has left", self.rank));
    }
}
