//! Host memory that layers on their way to the devices may take together.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Counts bytes in use by all ranks of a process.
#[derive(Debug)]
pub(super) struct HostBudget {
    limit: u64,
    used: Mutex<u64>,
    freed: Condvar,
}

/// A part of the budget, given back when dropped.
#[derive(Debug, Default)]
pub struct Reservation(Option<(Arc<HostBudget>, u64)>);

impl HostBudget {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, used: Mutex::new(0), freed: Condvar::new() })
    }

    /// Waits until `bytes` fit. What is larger than the limit waits until it is alone.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Reservation {
        // What it guards is whole between any two statements: a panic elsewhere does not spoil it.
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |used: &mut u64| *used > 0 && used.saturating_add(bytes) > self.limit;
        let mut used = self.freed.wait_while(used, full).unwrap_or_else(PoisonError::into_inner);
        *used += bytes;
        Reservation(Some((Arc::clone(self), bytes)))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some((budget, bytes)) = self.0.take() {
            *budget.used.lock().unwrap_or_else(PoisonError::into_inner) -= bytes;
            budget.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn no_more_than_the_limit_is_in_use_unless_one_is_larger_by_itself() {
        let budget = HostBudget::new(10);
        let (now, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (budget, now, most) = (&budget, &now, &most);
                scope.spawn(move || {
                    for i in 0..50 {
                        let bytes = (thread * 7 + i) % 5 + 1;
                        let reserved = budget.reserve(bytes);
                        most.fetch_max(now.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                        std::thread::yield_now();
                        now.fetch_sub(bytes, Ordering::SeqCst);
                        drop(reserved);
                    }
                });
            }
        });
        assert!((2..=10).contains(&most.into_inner()));
        drop(budget.reserve(1000));
        assert_eq!(*budget.used.lock().unwrap(), 0);
    }
}
