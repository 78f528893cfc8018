//! What is worth a log line about a request.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Filled in while a request is served, and written as one line when it ends.
#[derive(Debug)]
pub struct RequestRecord {
    id: String,
    started: Instant,
    prompt_tokens: AtomicUsize,
    completion_tokens: AtomicUsize,
    /// Microseconds; `u64::MAX` before the first token.
    first_token: AtomicU64,
    /// What went wrong, if anything did.
    error: Mutex<Option<String>>,
}

impl RequestRecord {
    /// A record that starts now.
    pub fn new(id: String) -> Self {
        Self {
            id,
            started: Instant::now(),
            prompt_tokens: AtomicUsize::new(0),
            completion_tokens: AtomicUsize::new(0),
            first_token: AtomicU64::new(u64::MAX),
            error: Mutex::new(None),
        }
    }

    /// The request's id: `x-request-id`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// When it came.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Counts prompt tokens.
    pub fn add_prompt_tokens(&self, count: usize) {
        self.prompt_tokens.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts a generated token.
    pub fn add_completion_token(&self) {
        self.completion_tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes how long the first token of a choice took; the earliest counts.
    pub fn first_token(&self, after: Duration) {
        let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        self.first_token.fetch_min(micros, Ordering::Relaxed);
    }

    /// Notes what went wrong; the first note stays.
    pub fn fail(&self, error: &str) {
        let mut slot = self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        slot.get_or_insert_with(|| error.to_owned());
    }

    /// Prompt tokens, generated tokens, milliseconds to the first token, error.
    pub fn summary(&self) -> (usize, usize, Option<f64>, Option<String>) {
        let first = self.first_token.load(Ordering::Relaxed);
        (
            self.prompt_tokens.load(Ordering::Relaxed),
            self.completion_tokens.load(Ordering::Relaxed),
            (first != u64::MAX).then_some(first as f64 / 1e3),
            self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
        )
    }
}
