//! From a checkpoint to a running engine.

mod alone;
#[cfg(feature = "cuda")]
mod cuda;
mod distributed;
#[cfg(not(all(feature = "cuda", feature = "wgpu")))]
mod left_out;
mod limits;
#[cfg(feature = "cuda")]
mod memory;
mod options;
mod start;
mod started;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod warm_up;
#[cfg(feature = "wgpu")]
mod wgpu;

#[cfg(not(feature = "cuda"))]
use self::left_out::cuda;
#[cfg(not(feature = "wgpu"))]
use self::left_out::wgpu;

use std::sync::Arc;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
use dsa80_reference::Error;
use dsa80_reference::cpu::{Cpu, ThreadCommunicator};

pub use self::alone::{Alone, Measurement, launch_alone};
pub use self::distributed::{follow, launch_leader};
pub use self::options::{Collectives, Device, Dtype, KvCacheDtype, LaunchOptions, LoadFormat};
pub use self::started::{Phase, RankMemory, Started};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::engine::{Engine, EngineHandle, EngineOptions, StepLimits, StepModel};
use crate::error::LaunchError;
use crate::headway::Headway;
use crate::runner::{RankGroup, RankParts};

/// Caches in host memory, where nothing else is said.
const CPU_CACHE_BYTES: usize = 256 << 20;
/// Phases of a start.
const DEVICES: &str = "devices";
#[cfg(feature = "cuda")]
const PLAN: &str = "memory plan";
const WEIGHTS: &str = "weights and caches";
#[cfg(any(feature = "cuda", feature = "wgpu"))]
const FIRST_STEPS: &str = "kernels and first steps";
/// What a rank does before all else.
const OPENING: &str = "opening its device";

/// Loads `checkpoint` on the chosen device and starts its engine.
///
/// # Errors
/// A device that this build or this machine does not have, options that do not fit the model (with the arithmetic and what
/// would fit), a damaged checkpoint, or a rank that does not get on for [`LaunchOptions::start_timeout`].
pub fn launch(checkpoint: &Arc<Checkpoint>, options: &LaunchOptions) -> Result<EngineHandle, LaunchError> {
    launch_and_tell(checkpoint, options).map(|(engine, _)| engine)
}

/// [`launch`], and what it took.
///
/// # Errors
/// As there.
pub fn launch_and_tell(
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
) -> Result<(EngineHandle, Started), LaunchError> {
    limits::check(checkpoint.config(), options)?;
    let headway = Headway::of(checkpoint);
    let load = {
        let (checkpoint, options, headway) = (Arc::clone(checkpoint), options.clone(), Arc::clone(&headway));
        move || load(&checkpoint, &options, &headway)
    };
    headway.enter(DEVICES);
    let model = start::watched(&headway, options.start_timeout, load)?;
    let started = headway.started();
    started.say();
    Ok((start_engine(model, checkpoint, options), started))
}

fn load(
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    match options.device {
        Device::Cpu => {
            tracing::info!("device: cpu, as asked for");
            on_cpu(checkpoint, options, headway)
        }
        Device::Wgpu => on_wgpu(checkpoint, options, headway),
        Device::Cuda => on_cuda(checkpoint, options, headway),
        Device::Auto => on_the_best(checkpoint, options, headway),
    }
}

fn start_engine(model: Box<dyn StepModel>, checkpoint: &Checkpoint, options: &LaunchOptions) -> EngineHandle {
    let options = EngineOptions {
        max_waiting: options.max_waiting,
        eos_token_ids: checkpoint.config().eos_token_ids.clone(),
        max_batch_tokens: options.max_num_batched_tokens,
        max_running: options.max_num_seqs,
        enable_prefix_caching: options.enable_prefix_caching,
        step_timeout: options.step_timeout,
    };
    Engine::start(model, options)
}

/// Why the CUDA kernels will not do, whatever GPU there is.
fn not_on_cuda(options: &LaunchOptions) -> Option<String> {
    (options.dtype == Dtype::F32).then(|| "its kernels compute in bf16, and --dtype is f32".to_owned())
}

/// What a backend says, without its name.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn reason(error: Error) -> String {
    match error {
        Error::Backend { message, .. } => message,
        other => other.to_string(),
    }
}

/// Why there is no such device, and what there is.
fn no_device(device: Device, reason: impl std::fmt::Display) -> LaunchError {
    LaunchError::Options(format!("--device {device}: {reason}; or use --device cpu"))
}

fn on_cuda(
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    headway.begin(0, OPENING);
    let opened = cuda::open(options).map_err(|reason| no_device(Device::Cuda, reason))?;
    cuda::load(opened, checkpoint, options, headway)
}

fn on_wgpu(
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    headway.begin(0, OPENING);
    let opened = wgpu::open(Hardware::Any, options).map_err(|reason| no_device(Device::Wgpu, reason))?;
    tracing::info!("device: wgpu, as asked for");
    wgpu::load(opened, checkpoint, options, headway)
}

/// The CUDA kernels where they run, else those in WGSL where there is a GPU, else the CPU.
fn on_the_best(
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    headway.begin(0, OPENING);
    let opened = not_on_cuda(options).map_or_else(|| cuda::open(options), Err);
    let no_cuda = match opened {
        Ok(opened) => return cuda::load(opened, checkpoint, options, headway),
        Err(reason) => reason,
    };
    let no_wgpu = match wgpu::open(Hardware::Gpu, options) {
        Ok(opened) => {
            tracing::info!("device: wgpu (auto: no cuda: {no_cuda})");
            return wgpu::load(opened, checkpoint, options, headway);
        }
        Err(reason) => reason,
    };
    tracing::info!("device: cpu (auto: no cuda: {no_cuda}; no wgpu: {no_wgpu})");
    on_cpu(checkpoint, options, headway)
}

/// Which of wgpu's adapters will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hardware {
    /// A GPU, or else a CPU that stands in for one.
    Any,
    /// A GPU: the oracle is faster than a CPU that stands in for one.
    Gpu,
}

/// The oracle in f32, a thread for every rank.
fn on_cpu(
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    let limits = cpu_limits(checkpoint.config(), options)?;
    say_what_is_loaded(checkpoint.config(), options, &limits);
    headway.enter(WEIGHTS);
    let cpu = Cpu::<f32>::new();
    let ranks: Vec<_> = ThreadCommunicator::group(cpu, options.tp)
        .into_iter()
        .map(|rank| RankParts { kernels: cpu, communicator: Box::new(rank) })
        .collect();
    let mut group = RankGroup::load(ranks, &start::told(checkpoint, headway), limits)?;
    group.set_step_timeout(options.step_timeout);
    Ok(Box::new(group))
}

/// The limits with caches in host memory.
fn cpu_limits(config: &ModelConfig, options: &LaunchOptions) -> Result<StepLimits, LaunchError> {
    check_cpu(options)?;
    let memory = limits::CacheMemory {
        bytes: options.kv_cache_bytes.unwrap_or(CPU_CACHE_BYTES),
        act_bytes: size_of::<f32>(),
    };
    limits::within(config, options, memory)
}

fn check_cpu(options: &LaunchOptions) -> Result<(), LaunchError> {
    if options.dtype == Dtype::Bf16 {
        return Err(LaunchError::Options(
            "--dtype bf16 is for a GPU, and the device is the CPU, which computes in f32: use --dtype f32 or auto".into(),
        ));
    }
    if options.kv_cache_dtype == KvCacheDtype::Bf16 {
        return Err(LaunchError::Options(
            "--kv-cache-dtype bf16 is for a GPU; on the CPU use auto (f32) or fp8".into(),
        ));
    }
    Ok(())
}

fn say_what_is_loaded(config: &ModelConfig, options: &LaunchOptions, limits: &StepLimits) {
    tracing::info!(
        tp = options.tp,
        max_model_len = limits.max_model_len,
        num_pages = limits.num_pages,
        page_size = limits.page_size,
        "loading {} layers",
        config.num_hidden_layers,
    );
}
