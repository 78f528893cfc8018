//! Launches captured once and replayed, and how long they take.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use cudarc::driver::sys::{
    self, CUevent_flags, CUevent_record_flags, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode,
};
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
    // Moments that it marks stay, too.
    _moments: Vec<Arc<CudaEvent>>,
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

/// A moment of a GPU's work.
#[derive(Debug)]
pub struct Moment {
    event: Arc<CudaEvent>,
    recorded: bool,
}

impl Moment {
    /// Whether it is part of what was captured: then it is the last replay's.
    pub fn is_recorded(&self) -> bool {
        self.recorded
    }

    /// Microseconds from here to `later`, both of which must have been. Waits for that one.
    ///
    /// # Errors
    /// The driver refuses: nothing was replayed, or a launch failed.
    pub fn us_until(&self, later: &Self) -> Result<f64> {
        let ms = self.event.elapsed_ms(&later.event).map_err(|error| refuse(driver_message(error)))?;
        Ok(f64::from(ms) * 1e3)
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
        let moments = std::mem::take(&mut *self.moments());
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
        Ok(Some(Graph { graph, _modules: self.modules.clone(), _cublaslt: cublaslt, _moments: moments }))
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

    /// Marks a moment of what is launched: while launches are captured, of every replay.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn moment(&self) -> Result<Moment> {
        let failed = |error| refuse(driver_message(error));
        let recorded = self.capturing.load(Ordering::Relaxed);
        if !recorded {
            return Ok(Moment { event: Arc::new(self.mark()?), recorded });
        }
        let event = Arc::new(self.context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed)?);
        let external = CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
        // SAFETY: the event and the stream are of this context and alive, and the graph keeps the event.
        unsafe { sys::cuEventRecordWithFlags(event.cu_event(), self.stream.cu_stream(), external) }
            .result()
            .map_err(failed)?;
        self.moments().push(Arc::clone(&event));
        Ok(Moment { event, recorded })
    }

    /// Of the capture under way.
    fn moments(&self) -> MutexGuard<'_, Vec<Arc<CudaEvent>>> {
        // Whole between any two statements that hold the lock.
        self.moments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self) -> Result<CudaEvent> {
        self.stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .map_err(|error| refuse(driver_message(error)))
    }
}
