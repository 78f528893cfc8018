//! The GPU that something was measured on.

use serde::{Deserialize, Serialize};

/// A GPU, its software, and what it reaches at best.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuFacts {
    /// Its name.
    pub name: String,
    /// `8.0` for an A100.
    pub compute_capability: String,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// The L2 cache.
    pub l2_bytes: usize,
    /// All of its memory.
    pub memory_bytes: usize,
    /// The newest CUDA version that the driver knows.
    pub cuda: String,
    /// The run-time compiler.
    pub nvrtc: String,
    /// The kernel module's own line about itself, where there is one.
    pub driver: Option<String>,
    /// Streaming reads of device memory, measured.
    pub read_gb_s: Option<f64>,
    /// `mma.sync` of bf16, measured.
    pub mma_tflop_s: Option<f64>,
}

impl GpuFacts {
    /// The facts of the GPU that a model is launched on where nothing else is said; `None` where there is none.
    pub fn found() -> Option<Self> {
        #[cfg(feature = "cuda")]
        return dsa80_cuda::Cuda::open().and_then(|cuda| Self::of(cuda.device(), false)).ok();
        #[cfg(not(feature = "cuda"))]
        None
    }
}

#[cfg(feature = "cuda")]
impl GpuFacts {
    /// The facts of a GPU, and its ceilings where they are asked for and 2 GiB of it are free.
    ///
    /// # Errors
    /// The GPU does not answer.
    pub(crate) fn of(gpu: &dsa80_cuda::Gpu, ceilings: bool) -> dsa80_reference::Result<Self> {
        use dsa80_cuda::Device as _;
        let limits = gpu.limits();
        let (major, minor) = limits.compute_capability;
        let measured = ceilings.then(|| dsa80_cuda::ceilings::Ceilings::measure(gpu).ok());
        let ceilings = measured.flatten();
        Ok(Self {
            name: limits.name.clone(),
            compute_capability: format!("{major}.{minor}"),
            multiprocessors: limits.multiprocessors,
            l2_bytes: gpu.l2_bytes(),
            memory_bytes: gpu.memory()?.1,
            cuda: gpu.driver_version().to_owned(),
            nvrtc: gpu.compiler().nvrtc_version().to_owned(),
            driver: driver(),
            read_gb_s: ceilings.as_ref().map(|ceilings| ceilings.read_gb_s),
            mma_tflop_s: ceilings.as_ref().map(|ceilings| ceilings.mma_tflop_s),
        })
    }
}

#[cfg(feature = "cuda")]
fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let line = text.lines().next()?;
    Some(line.split_whitespace().collect::<Vec<_>>().join(" "))
}
