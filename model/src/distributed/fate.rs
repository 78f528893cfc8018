//! Whether a group of ranks still works, or why it does not: known once, to everybody who asks.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dsa80_reference::Breaker;

/// What has become of a group, as this process knows it.
#[derive(Default)]
pub(crate) struct Fate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    end: Option<End>,
    hooks: Vec<Breaker>,
}

#[derive(Clone)]
enum End {
    /// All is done; that connections close means nothing any more.
    Done,
    Failed(String),
}

impl Fate {
    /// The group has failed. The first reason is the cause; later ones are its consequences. Whoever asked is told.
    pub(crate) fn fail(&self, reason: &str) {
        let hooks = {
            let mut state = self.lock();
            if state.end.is_some() {
                return;
            }
            state.end = Some(End::Failed(reason.to_owned()));
            self.changed.notify_all();
            std::mem::take(&mut state.hooks)
        };
        hooks.iter().for_each(|hook| hook(reason));
    }

    /// The group has done what there was to do.
    pub(crate) fn finish(&self) {
        let mut state = self.lock();
        state.end.get_or_insert(End::Done);
        state.hooks.clear();
        self.changed.notify_all();
    }

    /// Calls `hook` when the group fails; at once if it has.
    pub(crate) fn on_failure(&self, hook: Breaker) {
        let mut state = self.lock();
        match state.end.clone() {
            None => state.hooks.push(hook),
            Some(End::Done) => {}
            Some(End::Failed(reason)) => {
                drop(state);
                hook(&reason);
            }
        }
    }

    /// Whether there is no more to come: done, or failed.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Waits for the end, or for so long.
    pub(crate) fn wait(&self, patience: Duration) {
        let waiting = |state: &mut State| state.end.is_none();
        let _ = self.changed.wait_timeout_while(self.lock(), patience, waiting);
    }

    /// Why the group has failed, if it has.
    pub(crate) fn reason(&self) -> Option<String> {
        match &self.lock().end {
            Some(End::Failed(reason)) => Some(reason.clone()),
            _ => None,
        }
    }

    /// Why a connection has closed: what the watch hears of it in a moment, or else `own` words. The group has failed then.
    pub(crate) fn reason_or(&self, own: impl FnOnce() -> String) -> String {
        const MOMENT: Duration = Duration::from_secs(1);
        self.wait(MOMENT);
        self.fail(&own());
        self.reason().unwrap_or_else(|| "the group has ended".into())
    }

    /// [`fail`](Self::fail), for other threads.
    pub(crate) fn breaker(self: &Arc<Self>) -> Breaker {
        let fate = Arc::clone(self);
        Arc::new(move |reason| fate.fail(reason))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between any two statements that hold the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn the_first_reason_is_told_once_to_all_who_ask() {
        let (fate, told) = (Arc::new(Fate::default()), Arc::new(AtomicUsize::new(0)));
        let hook = || {
            let told = Arc::clone(&told);
            let hook: Breaker = Arc::new(move |reason: &str| {
                assert_eq!(reason, "out of pages");
                told.fetch_add(1, Ordering::Relaxed);
            });
            hook
        };
        fate.on_failure(hook());
        assert!(!fate.is_over());
        fate.fail("out of pages");
        (fate.breaker())("a consequence");
        fate.finish();
        fate.on_failure(hook());
        assert_eq!(told.load(Ordering::Relaxed), 2);
        assert_eq!(fate.reason_or(|| "closed".into()), "out of pages");
    }

    #[test]
    fn what_closes_after_the_end_is_no_failure() {
        let fate = Fate::default();
        fate.finish();
        fate.fail("closed");
        fate.on_failure(Arc::new(|_| panic!("nothing has failed")));
        assert!(fate.is_over() && fate.reason().is_none());
    }
}
