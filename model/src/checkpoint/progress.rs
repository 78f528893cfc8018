//! How far loading has come.

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

/// A bar on the terminal's standard error, removed when dropped; invisible where there is no terminal.
#[derive(Debug)]
pub struct LoadingBar(ProgressBar);

impl LoadingBar {
    /// A bar that is full after `total_bytes`.
    pub fn new(total_bytes: u64) -> Self {
        const TEMPLATE: &str = "loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
        let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self(ProgressBar::new(total_bytes).with_style(style))
    }
}

impl Progress for LoadingBar {
    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for LoadingBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
