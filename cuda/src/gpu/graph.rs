//! Launches captured once and replayed, and how long they take.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaGraph};
use dsa80_reference::Result;

use super::cublaslt::CublasLt;
use super::{Gpu, Modules, driver_message, refuse};

/// How often a capture is begun before it is given up.
const ATTEMPTS: usize = 16;

/// Captured launches. They read and write the buffers that they were captured with, which must outlive the graph.
pub struct Graph {
    graph: CudaGraph,
    // What it launches stays loaded.
    _modules: Arc<Modules>,
    _cublaslt: Option<Arc<CublasLt>>,
}

// SAFETY: a graph has one owner, and the driver asks no more than that two threads do not use it at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Launches all of it; does not wait.
    ///
    /// # Errors
    /// The driver refuses, or a launch before failed.
    pub fn launch(&self) -> Result<()> {
        self.graph.launch().map_err(|error| refuse(driver_message(error)))
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Gpu {
    /// Captures what `launches` launches, without running it. The programs must have been launched (or [prepared](Gpu::prepare))
    /// before: loading a module cannot be captured. What another thread does on the same GPU (another engine that starts, say) may
    /// spoil a capture, which is then repeated.
    ///
    /// # Errors
    /// `launches` failed, allocated or waited; it launched nothing.
    pub fn capture(&self, mut launches: impl FnMut() -> Result<()>) -> Result<Graph> {
        for _ in 1..ATTEMPTS {
            if let Some(graph) = self.capture_once(&mut launches)? {
                return Ok(graph);
            }
        }
        self.capture_once(&mut launches)?.ok_or_else(|| {
            refuse(format!("{ATTEMPTS} captures in a row were spoilt by what else the GPU does"))
        })
    }

    /// None if the capture was spoilt.
    fn capture_once(&self, launches: &mut impl FnMut() -> Result<()>) -> Result<Option<Graph>> {
        let failed = |error| refuse(driver_message(error));
        self.stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(failed)?;
        self.capturing.store(true, Ordering::Relaxed);
        let launched = launches();
        self.capturing.store(false, Ordering::Relaxed);
        // The capture must end even when it failed, or the stream stays unusable.
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        if graph.as_ref().is_err_and(|error| error.0 == CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED) {
            return Ok(None);
        }
        launched?;
        let graph =
            graph.map_err(failed)?.ok_or_else(|| refuse("nothing was launched to be captured".into()))?;
        graph.upload().map_err(failed)?;
        let cublaslt = self.cublaslt.get().cloned().flatten();
        Ok(Some(Graph { graph, _modules: self.modules.clone(), _cublaslt: cublaslt }))
    }

    /// Microseconds of each of `times` runs of `work`, queued one after the other so that the GPU never waits for the host. Waits.
    ///
    /// # Errors
    /// `work` failed.
    pub fn time(&self, times: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let mut marks = vec![self.mark()?];
        for _ in 0..times {
            work()?;
            marks.push(self.mark()?);
        }
        self.synchronize()?;
        let elapsed = |pair: &[CudaEvent]| pair[0].elapsed_ms(&pair[1]).map(|ms| f64::from(ms) * 1e3);
        let times: std::result::Result<Vec<f64>, _> = marks.windows(2).map(elapsed).collect();
        times.map_err(|error| refuse(driver_message(error)))
    }

    fn mark(&self) -> Result<CudaEvent> {
        self.stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .map_err(|error| refuse(driver_message(error)))
    }
}
