//! The end of a process waits for the ranks that are on their way out: NCCL is not to be called while the libraries under it are taken down.

use std::ffi::c_int;
use std::sync::{Condvar, Mutex, Once, PoisonError};
use std::time::Duration;

/// An abort takes milliseconds; one that hangs is not to keep a process that has to end.
const PATIENCE: Duration = Duration::from_secs(5);

static COUNT: Mutex<usize> = Mutex::new(0);
static CHANGED: Condvar = Condvar::new();

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> c_int;
}

/// From now on the process waits for `ranks` more before it ends.
pub(crate) fn expect(ranks: usize) {
    static REGISTERED: Once = Once::new();
    // After NCCL was loaded, so that this is called before what NCCL registered. Without it, the process ends as if nobody waited.
    REGISTERED.call_once(|| {
        // SAFETY: the function is there as long as the process, and does not unwind.
        let _ = unsafe { atexit(wait) };
    });
    *COUNT.lock().unwrap_or_else(PoisonError::into_inner) += ranks;
}

/// One of them has left.
pub(crate) fn left() {
    *COUNT.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
    CHANGED.notify_all();
}

extern "C" fn wait() {
    all_within(PATIENCE);
}

/// Whether all have left within `patience`.
pub(crate) fn all_within(patience: Duration) -> bool {
    let count = COUNT.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = CHANGED.wait_timeout_while(count, patience, |count| *count > 0);
    *waited.unwrap_or_else(PoisonError::into_inner).0 == 0
}
