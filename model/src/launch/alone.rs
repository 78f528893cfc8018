//! One rank of several, alone: for measurements of what it does by itself.

use std::sync::Arc;

use dsa80_reference::cpu::Cpu;
use dsa80_reference::{Communicator, Kernels, LoneRank};

use super::limits::{self, CacheMemory};
use super::options::{Device, LaunchOptions};
use super::{CPU_CACHE_BYTES, check_cpu_cache};
use crate::checkpoint::Checkpoint;
use crate::engine::StepLimits;
use crate::error::LaunchError;
use crate::measure::{GpuFacts, Measured, MeasuredRank};
use crate::runner::{INDEX_LOGITS, Rank, WeightSource};

/// A rank that is measured, and the GPU that it is on.
pub struct Alone {
    /// The rank.
    pub rank: Box<dyn MeasuredRank>,
    /// Its GPU, if it has one.
    pub gpu: Option<GpuFacts>,
}

/// What is launched.
struct Request<'a> {
    checkpoint: &'a Arc<Checkpoint>,
    weights: &'a dyn WeightSource,
    options: &'a LaunchOptions,
    lone: LoneRank,
    /// Whether to measure those of the GPU before; without the feature `cuda` there is none.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    ceilings: bool,
}

/// Loads rank `rank` of `options.tp` with `weights`, which are those of `checkpoint` or in its formats. What other ranks would add is left
/// out. `ceilings` says whether to measure those of the GPU before.
///
/// # Errors
/// As for [`launch`](super::launch); a rank that is not there.
pub fn launch_alone(
    checkpoint: &Arc<Checkpoint>,
    weights: &dyn WeightSource,
    options: &LaunchOptions,
    rank: usize,
    ceilings: bool,
) -> Result<Alone, LaunchError> {
    limits::check(checkpoint.config(), options)?;
    let lone = LoneRank::new(rank, options.tp).map_err(|_| {
        LaunchError::Options(format!("--rank {rank}: there are {} ranks, counted from 0", options.tp))
    })?;
    let request = Request { checkpoint, weights, options, lone, ceilings };
    match options.device {
        Device::Cpu => request.on_cpu(),
        Device::Wgpu => Err(super::no_wgpu()),
        Device::Cuda => request.on_cuda(),
        Device::Auto => request.on_the_best(),
    }
}

impl Request<'_> {
    fn on_cpu(self) -> Result<Alone, LaunchError> {
        let options = self.options;
        check_cpu_cache(options)?;
        let bytes = options.kv_cache_bytes.unwrap_or(CPU_CACHE_BYTES * options.tp);
        let memory = CacheMemory { bytes, act_bytes: size_of::<f32>() };
        let limits = limits::within(self.checkpoint.config(), options, memory)?;
        let rank = self.measured(Cpu::<f32>::new(), &limits, INDEX_LOGITS, size_of::<f32>())?;
        Ok(Alone { rank, gpu: None })
    }

    fn measured<K>(
        self,
        kernels: K,
        limits: &StepLimits,
        index_logits: usize,
        act_bytes: usize,
    ) -> Result<Box<dyn MeasuredRank>, LaunchError>
    where
        K: Kernels + 'static,
        LoneRank: Communicator<K::Tensor>,
    {
        let mut rank = Rank::load(kernels, Box::new(self.lone), self.weights, limits, index_logits)?;
        rank.stand_in_for_others()?;
        Ok(Box::new(Measured { rank, limits: *limits, act_bytes }))
    }
}

#[cfg(feature = "cuda")]
impl Request<'_> {
    fn on_cuda(self) -> Result<Alone, LaunchError> {
        self.on_gpu(dsa80_cuda::Cuda::open()?)
    }

    fn on_the_best(self) -> Result<Alone, LaunchError> {
        match dsa80_cuda::Cuda::open() {
            Ok(cuda) => self.on_gpu(cuda),
            Err(reason) => {
                tracing::warn!("device: cpu (auto: {reason})");
                self.on_cpu()
            }
        }
    }

    fn on_gpu(self, cuda: dsa80_cuda::Cuda) -> Result<Alone, LaunchError> {
        // Before the memory is full.
        let gpu = GpuFacts::of(cuda.device(), self.ceilings)?;
        let limits = super::cuda::settle(cuda.device(), self.checkpoint, self.options)?;
        let rank = self.measured(cuda, &limits, super::cuda::INDEX_LOGITS, super::memory::ACT_BYTES)?;
        Ok(Alone { rank, gpu: Some(gpu) })
    }
}

#[cfg(not(feature = "cuda"))]
impl Request<'_> {
    fn on_cuda(self) -> Result<Alone, LaunchError> {
        Err(super::no_cuda())
    }

    fn on_the_best(self) -> Result<Alone, LaunchError> {
        self.on_cpu()
    }
}
