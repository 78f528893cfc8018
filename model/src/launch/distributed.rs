//! One rank in this process, the others in theirs.

use std::sync::Arc;
use std::time::Duration;

use dsa80_reference::Breaker;
use dsa80_reference::cpu::{Cpu, CpuCommunicator};
use sha2::{Digest, Sha256};

use super::options::{Device, LaunchOptions};
use super::{
    DEVICES, OPENING, WEIGHTS, cpu_limits, limits, no_device, say_what_is_loaded, start, start_engine,
};
use crate::checkpoint::Checkpoint;
use crate::distributed::{Creed, Leader, Member, Place};
use crate::engine::{EngineHandle, StepModel};
use crate::error::LaunchError;
use crate::headway::Headway;
use crate::runner::{INDEX_LOGITS, RankGroup, RankParts};

#[cfg(feature = "cuda")]
use super::cuda::RankOpened;

/// How long a rank waits for the last order of rank 0 when that has left, and then how long it may take to end.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);

/// What a rank runs on.
enum Opened {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(Box<RankOpened>),
}

impl Opened {
    /// As ranks tell each other.
    fn name(&self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => "cuda",
        }
    }
}

/// Launches rank 0, whose engine leads the ranks of the other processes ([`follow`]). `options.tp` is their number.
///
/// # Errors
/// As for [`launch`](super::launch); a rank that does not come, disagrees, fails or does not get on, by its number and with its reason.
pub fn launch_leader(
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    place: &Place,
) -> Result<EngineHandle, LaunchError> {
    limits::check(checkpoint.config(), options)?;
    let (creed, headway) = (creed(checkpoint, options)?, Headway::of(checkpoint));
    headway.enter("meeting of all ranks");
    let leader = Leader::gather(place.clone(), &creed, options.join_timeout, &headway)?;
    let fate = Arc::clone(leader.fate());
    headway.break_with(fate.breaker());
    let load = {
        let (checkpoint, options, headway) = (Arc::clone(checkpoint), options.clone(), Arc::clone(&headway));
        let place = place.clone();
        move || lead(leader, &checkpoint, &options, &place, &headway)
    };
    let model = start::watched(&headway, options.start_timeout, load);
    let model = model.inspect_err(|error| fate.fail(&format!("rank 0: {error}")))?;
    headway.started().say();
    Ok(start_engine(model, checkpoint, options))
}

fn lead(
    leader: Leader,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    place: &Place,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    headway.enter(DEVICES);
    headway.begin(0, OPENING);
    match open(options, place)? {
        opened @ Opened::Cpu => {
            leader.begin(opened.name(), &[])?;
            let limits = cpu_limits(checkpoint.config(), options)?;
            say_what_is_loaded(checkpoint.config(), options, &limits);
            headway.enter(WEIGHTS);
            let cpu = Cpu::<f32>::new();
            let communicator = Box::new(CpuCommunicator::new(cpu, leader.meeting()?));
            let parts = RankParts { kernels: cpu, communicator };
            let (others, weights) = (leader.followers(), start::told(checkpoint, headway));
            let mut group =
                RankGroup::lead(parts, others, &*weights, &limits, INDEX_LOGITS, move |_| Ok(limits))?;
            group.set_step_timeout(options.step_timeout);
            Ok(Box::new(group))
        }
        #[cfg(feature = "cuda")]
        Opened::Cuda(opened) => super::cuda::lead(*opened, leader, checkpoint, options, headway),
    }
}

/// Is another rank than 0: loads it and does what rank 0 says, until rank 0 leaves. Calls `lost` when the group fails, from another thread
/// than this, which may be stuck by then.
///
/// # Errors
/// As for [`launch_leader`]; this rank failed, or another: the reason is the first one's.
pub fn follow(
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    place: &Place,
    lost: Breaker,
) -> Result<(), LaunchError> {
    limits::check(checkpoint.config(), options)?;
    let (creed, headway) = (creed(checkpoint, options)?, Headway::of(checkpoint));
    let member = Member::join(place.clone(), &creed, options.join_timeout, &headway)?;
    member.fate().on_failure(Arc::clone(&lost));
    member.end_with_rank_0(LEAVE_PATIENCE, lost)?;
    let followed = follow_member(&member, checkpoint, options, place);
    followed.map_err(|error| {
        let fate = member.fate();
        fate.fail(&format!("rank {}: {error}", place.rank));
        // This rank's own words, if it was the first to fail.
        match fate.reason() {
            Some(reason) => LaunchError::Ranks(reason),
            None => error,
        }
    })
}

fn follow_member(
    member: &Member,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    place: &Place,
) -> Result<(), LaunchError> {
    let headway = member.headway();
    headway.begin(place.rank, OPENING);
    match open(options, place)? {
        opened @ Opened::Cpu => {
            member.begin(opened.name())?;
            let limits = cpu_limits(checkpoint.config(), options)?;
            let cpu = Cpu::<f32>::new();
            let communicator = Box::new(CpuCommunicator::new(cpu, member.meeting()?));
            let parts = RankParts { kernels: cpu, communicator };
            let weights = start::told(checkpoint, headway);
            member.follow(parts, &*weights, &limits, INDEX_LOGITS, move |_| Ok(limits))
        }
        #[cfg(feature = "cuda")]
        Opened::Cuda(opened) => super::cuda::follow(*opened, member, checkpoint, options),
    }
}

#[cfg(feature = "cuda")]
fn open(options: &LaunchOptions, place: &Place) -> Result<Opened, LaunchError> {
    match options.device {
        Device::Cpu => Ok(Opened::Cpu),
        Device::Wgpu => Err(no_processes_on_wgpu()),
        Device::Cuda => RankOpened::open(place)
            .map(|opened| Opened::Cuda(Box::new(opened)))
            .map_err(|reason| no_device(Device::Cuda, reason)),
        Device::Auto => Ok(match super::not_on_cuda(options).map_or_else(|| RankOpened::open(place), Err) {
            Ok(opened) => Opened::Cuda(Box::new(opened)),
            Err(reason) => {
                tracing::info!("device: cpu (auto: {reason})");
                Opened::Cpu
            }
        }),
    }
}

#[cfg(not(feature = "cuda"))]
fn open(options: &LaunchOptions, _place: &Place) -> Result<Opened, LaunchError> {
    match options.device {
        Device::Cpu | Device::Auto => Ok(Opened::Cpu),
        Device::Wgpu => Err(no_processes_on_wgpu()),
        Device::Cuda => Err(no_device(Device::Cuda, super::cuda::NOT_BUILT)),
    }
}

fn no_processes_on_wgpu() -> LaunchError {
    no_device(Device::Wgpu, "its ranks are threads of one process: leave the launcher out, and use --tp N")
}

/// What must be the same on all ranks. Taken apart whole, so that a new option is not forgotten.
fn creed(checkpoint: &Checkpoint, options: &LaunchOptions) -> Result<Creed, LaunchError> {
    let LaunchOptions {
        device,
        tp,
        dtype,
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        page_size,
        num_pages,
        kv_cache_bytes,
        kv_cache_dtype,
        gpu_memory_utilization,
        max_waiting: _,
        enable_prefix_caching: _,
        cuda_graphs,
        collectives,
        step_timeout: _,
        join_timeout: _,
        start_timeout: _,
    } = options;
    let config = format!("{:?}", checkpoint.config());
    let or_default = |value: &Option<usize>| value.map_or("not given".to_owned(), |value| value.to_string());
    let articles = [
        ("the version of dsa80", env!("CARGO_PKG_VERSION").to_owned()),
        ("WORLD_SIZE", tp.to_string()),
        ("the model's config.json (its hash)", hash(Sha256::new().chain_update(config))),
        ("--load-format", if checkpoint.is_dummy() { "dummy" } else { "safetensors" }.to_owned()),
        ("the hash of the checkpoint's tensors (names, types, shapes, samples)", hash(checkpoint.sample()?)),
        ("--device", device.to_string()),
        ("--dtype", dtype.to_string()),
        ("--max-model-len", or_default(max_model_len)),
        ("--max-num-seqs", max_num_seqs.to_string()),
        ("--max-num-batched-tokens", max_num_batched_tokens.to_string()),
        ("--page-size", page_size.to_string()),
        ("--num-pages", or_default(num_pages)),
        ("--kv-cache-memory", or_default(kv_cache_bytes)),
        ("--kv-cache-dtype", kv_cache_dtype.to_string()),
        ("--gpu-memory-utilization", gpu_memory_utilization.to_string()),
        ("--cuda-graphs", if *cuda_graphs { "on" } else { "off" }.to_owned()),
        ("--collectives", collectives.to_string()),
    ];
    Ok(Creed(articles.map(|(name, value)| (name.to_owned(), value)).into()))
}

/// As people can compare it.
fn hash(of: Sha256) -> String {
    of.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
