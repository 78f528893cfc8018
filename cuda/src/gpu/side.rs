//! The second stream of a GPU: what is launched aside, between a fork and a join.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};
use dsa80_reference::{Error, Result};

use super::{driver_message, refuse};

/// A stream that forks from another and joins it by events, so that a capture of the other takes both in, as branches of the graph.
#[derive(Debug)]
pub(super) struct Side {
    stream: Arc<CudaStream>,
    forked: CudaEvent,
    joined: CudaEvent,
    /// Launches go here.
    current: AtomicBool,
    /// There is something that the other stream has not waited for.
    apart: AtomicBool,
}

impl Side {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        Ok(Self {
            stream: context.new_stream()?,
            forked: context.new_event(None)?,
            joined: context.new_event(None)?,
            current: AtomicBool::new(false),
            apart: AtomicBool::new(false),
        })
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn is_current(&self) -> bool {
        self.current.load(Ordering::Relaxed)
    }

    /// Runs `launches` with this stream as the current one, after all that is in `main` by now.
    ///
    /// # Errors
    /// `launches` failed; the driver refuses.
    pub(super) fn run(&self, main: &CudaStream, launches: impl FnOnce() -> Result<()>) -> Result<()> {
        // Aside of what is aside already: in its order.
        if self.is_current() {
            return launches();
        }
        self.forked.record(main).map_err(failed)?;
        self.stream.wait(&self.forked).map_err(failed)?;
        self.apart.store(true, Ordering::Relaxed);
        self.current.store(true, Ordering::Relaxed);
        let launched = launches();
        self.current.store(false, Ordering::Relaxed);
        launched
    }

    /// `main` waits for all that is in this stream by now; nothing inside of [`run`](Self::run).
    ///
    /// # Errors
    /// The driver refuses.
    pub(super) fn join(&self, main: &CudaStream) -> Result<()> {
        if self.is_current() || !self.apart.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        self.joined.record(&self.stream).map_err(failed)?;
        main.wait(&self.joined).map_err(failed)
    }
}

fn failed(error: DriverError) -> Error {
    refuse(driver_message(error))
}
