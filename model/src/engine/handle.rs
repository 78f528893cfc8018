//! The engine as its callers hold it: submit, watch, stop. Cheap to clone, usable from any thread or async
//! task.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use super::request::{Event, Request, SubmitError};
use super::stats::EngineStats;

/// What an engine thread offers to its handle. One implementation drives a model; tests may bring their own.
pub trait EngineBackend: Send + Sync {
    /// Queues `request`; its events go to the returned receiver. Setting `cancelled` (or dropping the
    /// receiver) frees everything it holds within one step.
    ///
    /// # Errors
    /// [`SubmitError`], without any side effect.
    fn submit(
        &self,
        request: Request,
        cancelled: Arc<AtomicBool>,
    ) -> Result<UnboundedReceiver<Event>, SubmitError>;

    /// A snapshot of the counters.
    fn stats(&self) -> EngineStats;

    /// The longest context (prompt and output) that is served.
    fn max_model_len(&self) -> usize;

    /// Takes no new requests from now on, lets the running ones finish for at most `grace`, fails the rest,
    /// and returns when the engine thread has ended. Calling it twice is harmless.
    fn shutdown(&self, grace: Duration);

    /// Whether the engine thread still runs; false after shutdown or after a failure that it could not
    /// survive.
    fn is_alive(&self) -> bool;

    /// Why the engine has stopped, if nobody asked it to.
    fn failure(&self) -> Option<String> {
        None
    }
}

/// A shared handle to a running engine.
#[derive(Clone)]
pub struct EngineHandle(Arc<dyn EngineBackend>);

impl EngineHandle {
    /// Wraps an engine.
    pub fn new(backend: Arc<dyn EngineBackend>) -> Self {
        Self(backend)
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`SubmitError`] says why it was not taken.
    pub fn submit(&self, request: Request) -> Result<EventStream, SubmitError> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let events = self.0.submit(request, Arc::clone(&cancelled))?;
        Ok(EventStream { events, cancelled })
    }

    /// A snapshot of the counters.
    pub fn stats(&self) -> EngineStats {
        self.0.stats()
    }

    /// The longest context (prompt and output) that is served.
    pub fn max_model_len(&self) -> usize {
        self.0.max_model_len()
    }

    /// Drains and stops the engine; see [`EngineBackend::shutdown`].
    pub fn shutdown(&self, grace: Duration) {
        self.0.shutdown(grace);
    }

    /// Whether the engine still runs.
    pub fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// Why the engine has stopped, if nobody asked it to.
    pub fn failure(&self) -> Option<String> {
        self.0.failure()
    }
}

/// The events of one request. Dropping it cancels the request.
#[derive(Debug)]
pub struct EventStream {
    events: UnboundedReceiver<Event>,
    cancelled: Arc<AtomicBool>,
}

impl EventStream {
    /// The next event; `None` after the last one (or if the engine died without a word).
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// [`next`](Self::next) for code outside an async runtime; it blocks.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Release);
    }
}
