//! How far loading has come.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Told about every piece read. Shared by the ranks that load from one [`Checkpoint`](super::Checkpoint).
pub trait Progress: Send + Sync {
    /// `bytes` more have been read.
    fn advance(&self, bytes: u64);
}

/// Tells nobody.
impl Progress for () {
    fn advance(&self, _bytes: u64) {}
}

/// A bar on the terminal's standard error, removed when dropped; where there is no terminal, a line in the log every ten seconds.
#[derive(Debug)]
pub struct LoadingBar {
    bar: ProgressBar,
    total: u64,
    read: AtomicU64,
    started: Instant,
    /// Lines so far.
    lines: AtomicU64,
}

/// Between two lines.
const LINE: Duration = Duration::from_secs(10);

impl LoadingBar {
    /// A bar that is full after `total_bytes`.
    pub fn new(total_bytes: u64) -> Self {
        const TEMPLATE: &str = "loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
        let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self {
            bar: ProgressBar::new(total_bytes).with_style(style),
            total: total_bytes,
            read: AtomicU64::new(0),
            started: Instant::now(),
            lines: AtomicU64::new(0),
        }
    }
}

impl Progress for LoadingBar {
    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        let read = self.read.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if !self.bar.is_hidden() {
            return;
        }
        let elapsed = self.started.elapsed();
        let (due, lines) = (elapsed.as_secs() / LINE.as_secs(), self.lines.load(Ordering::Relaxed));
        let first = || self.lines.compare_exchange(lines, due, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if due > lines && first() {
            tracing::info!("loading: {}", line(read, self.total, elapsed));
        }
    }
}

/// How far it has come, how fast, and how long it will take.
fn line(read: u64, total: u64, elapsed: Duration) -> String {
    let gib = |bytes: f64| bytes / (1_u64 << 30) as f64;
    let rate = read as f64 / elapsed.as_secs_f64().max(1e-3);
    let left = total.saturating_sub(read) as f64 / rate.max(1.0);
    format!(
        "{:.1} of {:.1} GiB, {:.2} GiB/s, {left:.0} s left",
        gib(read as f64),
        gib(total as f64),
        gib(rate)
    )
}

impl Drop for LoadingBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        let line = line(10 << 30, 50 << 30, Duration::from_secs(5));
        assert_eq!(line, "10.0 of 50.0 GiB, 2.00 GiB/s, 20 s left");
    }
}
