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
    match options.device {
        Device::Cpu => on_cpu(checkpoint, weights, options, lone),
        Device::Wgpu => Err(super::no_wgpu()),
        Device::Cuda => on_cuda(checkpoint, weights, options, lone, ceilings),
        Device::Auto => on_the_best(checkpoint, weights, options, lone, ceilings),
    }
}

fn on_cpu(
    checkpoint: &Arc<Checkpoint>,
    weights: &dyn WeightSource,
    options: &LaunchOptions,
    lone: LoneRank,
) -> Result<Alone, LaunchError> {
    check_cpu_cache(options)?;
    let bytes = options.kv_cache_bytes.unwrap_or(CPU_CACHE_BYTES * options.tp);
    let memory = CacheMemory { bytes, act_bytes: size_of::<f32>() };
    let limits = limits::within(checkpoint.config(), options, memory)?;
    let (cpu, lone) = (Cpu::<f32>::new(), Box::new(lone));
    Ok(Alone { rank: measured(cpu, lone, weights, &limits, INDEX_LOGITS, size_of::<f32>())?, gpu: None })
}

fn measured<K: Kernels + 'static>(
    kernels: K,
    lone: Box<dyn Communicator<K::Tensor>>,
    weights: &dyn WeightSource,
    limits: &StepLimits,
    index_logits: usize,
    act_bytes: usize,
) -> Result<Box<dyn MeasuredRank>, LaunchError> {
    let rank = Rank::load(kernels, lone, weights, limits, index_logits)?;
    Ok(Box::new(Measured { rank, limits: *limits, act_bytes }))
}

#[cfg(feature = "cuda")]
fn on_cuda(
    checkpoint: &Arc<Checkpoint>,
    weights: &dyn WeightSource,
    options: &LaunchOptions,
    lone: LoneRank,
    ceilings: bool,
) -> Result<Alone, LaunchError> {
    load_on_gpu(dsa80_cuda::Cuda::open()?, checkpoint, weights, options, lone, ceilings)
}

#[cfg(feature = "cuda")]
fn on_the_best(
    checkpoint: &Arc<Checkpoint>,
    weights: &dyn WeightSource,
    options: &LaunchOptions,
    lone: LoneRank,
    ceilings: bool,
) -> Result<Alone, LaunchError> {
    match dsa80_cuda::Cuda::open() {
        Ok(cuda) => load_on_gpu(cuda, checkpoint, weights, options, lone, ceilings),
        Err(reason) => {
            tracing::warn!("device: cpu (auto: {reason})");
            on_cpu(checkpoint, weights, options, lone)
        }
    }
}

#[cfg(feature = "cuda")]
fn load_on_gpu(
    cuda: dsa80_cuda::Cuda,
    checkpoint: &Arc<Checkpoint>,
    weights: &dyn WeightSource,
    options: &LaunchOptions,
    lone: LoneRank,
    ceilings: bool,
) -> Result<Alone, LaunchError> {
    // Before the memory is full.
    let gpu = GpuFacts::of(cuda.device(), ceilings)?;
    let limits = super::cuda::settle(cuda.device(), checkpoint, options)?;
    let (lone, act_bytes) = (Box::new(lone), super::memory::ACT_BYTES);
    let rank = measured(cuda, lone, weights, &limits, super::cuda::INDEX_LOGITS, act_bytes)?;
    Ok(Alone { rank, gpu: Some(gpu) })
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(
    _checkpoint: &Arc<Checkpoint>,
    _weights: &dyn WeightSource,
    _options: &LaunchOptions,
    _lone: LoneRank,
    _ceilings: bool,
) -> Result<Alone, LaunchError> {
    Err(super::no_cuda())
}

#[cfg(not(feature = "cuda"))]
fn on_the_best(
    checkpoint: &Arc<Checkpoint>,
    weights: &dyn WeightSource,
    options: &LaunchOptions,
    lone: LoneRank,
    _ceilings: bool,
) -> Result<Alone, LaunchError> {
    on_cpu(checkpoint, weights, options, lone)
}
