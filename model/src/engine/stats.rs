//! Counters and gauges of a running engine, for `/metrics` and for tests that look for leaks.

/// A snapshot. Counters only grow; gauges (`running`, `waiting`, `pages_*`) go up and down.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EngineStats {
    /// Requests that hold pages and take part in steps.
    pub running: usize,
    /// Requests in the queue (preempted ones included).
    pub waiting: usize,
    /// Pages of the paged caches in all.
    pub pages_total: usize,
    /// Pages held by running requests.
    pub pages_used: usize,
    /// Pages that no request holds but whose contents the prefix cache could still serve.
    pub pages_cached: usize,
    /// Model steps made.
    pub steps: u64,
    /// Those of them that were described, but for their tokens, while the step before was being made.
    pub steps_ahead: u64,
    /// Prompt tokens computed (those found in the prefix cache not counted).
    pub prompt_tokens: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Requests put back into the queue because pages ran out.
    pub preemptions: u64,
    /// Requests that ended by themselves.
    pub finished: u64,
    /// Requests cancelled by their caller.
    pub cancelled: u64,
    /// Requests that ended with `Event::Failed`.
    pub failed: u64,
}
