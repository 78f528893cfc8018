//! A step's deadline. What waits for another rank is broken off then; what does not end even so is given up.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dsa80_reference::Breaker;

/// From the deadline to giving up, as long as a step may take but within these: time for ranks to hear why, and to say so.
const GRACE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// When the step that is being made began.
#[derive(Debug)]
pub(super) struct StepClock {
    origin: Instant,
    /// Microseconds after the origin, plus one; 0 between steps.
    started: AtomicU64,
    ended: AtomicBool,
}

impl Default for StepClock {
    fn default() -> Self {
        Self { origin: Instant::now(), started: AtomicU64::new(0), ended: AtomicBool::new(false) }
    }
}

impl StepClock {
    /// A step begins.
    pub(super) fn start(&self) {
        self.started.store(self.now() + 1, Ordering::Relaxed);
    }

    /// It has ended.
    pub(super) fn stop(&self) {
        self.started.store(0, Ordering::Relaxed);
    }

    /// There will be no more steps.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX - 1)
    }

    /// Which step is being made, and for how long.
    fn step(&self) -> Option<(u64, Duration)> {
        let started = self.started.load(Ordering::Relaxed);
        let elapsed = (self.now() + 1).saturating_sub(started);
        (started > 0).then_some((started, Duration::from_micros(elapsed)))
    }
}

/// Starts the thread that watches the clock, until it ends: a step past `timeout` is broken by `breaker`, and one that goes on regardless
/// has `failed`.
pub(super) fn start(
    clock: Arc<StepClock>,
    timeout: Duration,
    breaker: Option<Breaker>,
    failed: impl FnOnce(String) + Send + 'static,
) -> io::Result<()> {
    let grace = timeout.clamp(GRACE[0], GRACE[1]);
    let tick = (timeout / 20).clamp(Duration::from_millis(5), Duration::from_millis(500));
    let watch = move || {
        let mut broken = None;
        while !clock.ended.load(Ordering::Relaxed) {
            thread::sleep(tick);
            let Some((step, elapsed)) = clock.step() else { continue };
            let reason = || format!("a step has not finished within {timeout:?} (--step-timeout)");
            if elapsed >= timeout && broken != Some(step) {
                broken = Some(step);
                if let Some(breaker) = &breaker {
                    breaker(&reason());
                }
            }
            if elapsed >= timeout.saturating_add(grace) {
                return failed(reason());
            }
        }
    };
    thread::Builder::new().name("dsa80-watchdog".into()).spawn(watch).map(drop)
}
