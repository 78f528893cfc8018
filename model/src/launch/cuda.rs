//! The model on one GPU, or on one for every rank.

use std::sync::Arc;
use std::time::Instant;

use dsa80_cuda::expanded_mla::Expansion;
use dsa80_cuda::{
    Between, Cuda, Device as _, Gpu, GpuOfRank, Nccl, NcclCommunicator, NcclId, RankOnGpu, Tiles,
};
use dsa80_reference::Kernels;
use dsa80_reference::communicator::SingleRank;

use super::limits;
use super::memory::{self, GpuMemory, Settled};
use super::options::{Collectives, LaunchOptions};
use super::warm_up::{Turns, warm_up};
use super::{FIRST_STEPS, PLAN, WEIGHTS, reason, start};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::distributed::{Leader, Member, Place};
use crate::engine::{StepLimits, StepModel};
use crate::error::LaunchError;
use crate::headway::Headway;
use crate::runner::{RankGroup, RankParts};

/// Scores in the indexer's workspace, 256 MiB: 2048 tokens of a context of 32K at once.
pub(super) const INDEX_LOGITS: usize = 64 << 20;
/// What a rank of several processes does when it has its GPU.
const JOINING: &str = "joining the others' NCCL group";

/// What the model can run on.
pub(super) enum Opened {
    One(Box<Cuda>),
    Several(Vec<RankOnGpu>),
}

/// The GPUs that the model can run on, or why there are none and what to do about it.
pub(super) fn open(options: &LaunchOptions) -> Result<Opened, String> {
    let opened = if options.tp > 1 {
        let between = match options.collectives {
            Collectives::Auto => Between::Either,
            Collectives::Peer => Between::Peers,
            Collectives::Nccl => Between::Nccl,
        };
        RankOnGpu::open_group(options.tp, between, options.step_timeout).map(Opened::Several)
    } else {
        Cuda::open().map(|cuda| Opened::One(Box::new(cuda)))
    };
    opened.map_err(reason)
}

/// Loads the model, and makes a few steps so that the first request finds every kernel compiled.
pub(super) fn load(
    opened: Opened,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    let config = checkpoint.config();
    let widest = limits::widest(config, options);
    let weights = start::told(checkpoint, headway);
    headway.enter(PLAN);
    match opened {
        Opened::One(backend) => {
            let gpu = Arc::new(backend.into_device());
            say_what_is_used(&gpu, config, options);
            let settled = settle(&gpu, checkpoint, options)?;
            headway.enter(WEIGHTS);
            let kernels = Cuda::new(Arc::clone(&gpu), Tiles::for_gpu(&gpu.limits().name, None)?);
            let parts = RankParts { kernels, communicator: Box::new(SingleRank::default()) };
            let limits = settled.limits;
            let model = RankGroup::load_alone(parts, &*weights, &widest, INDEX_LOGITS, |_| Ok(limits))?;
            ready(model, config, options, headway, &[(gpu, settled)])
        }
        Opened::Several(ranks) => {
            for rank in &ranks {
                say_what_is_used(rank.backend.device(), config, options);
            }
            let mut limits = widest;
            let gpus: Vec<Arc<Gpu>> = ranks.iter().map(|rank| Arc::clone(rank.backend.device())).collect();
            let settled = settle_all(&gpus, checkpoint, options)?;
            for Settled { limits: own, .. } in &settled {
                limits.num_pages = limits.num_pages.min(own.num_pages);
                limits.max_model_len = limits.max_model_len.min(own.max_model_len);
            }
            let gpus: Vec<_> = gpus.into_iter().zip(settled).collect();
            headway.enter(WEIGHTS);
            if let Some(breaker) = ranks.first().and_then(|first| first.communicator.breaker()) {
                headway.break_with(breaker);
            }
            let parts = ranks
                .into_iter()
                .map(|RankOnGpu { backend, communicator }| RankParts { kernels: backend, communicator })
                .collect();
            let group =
                RankGroup::load_and_settle(parts, &weights, &widest, INDEX_LOGITS, move |_| Ok(limits))?;
            ready(group, config, options, headway, &gpus)
        }
    }
}

/// The GPU of one of several processes.
pub(super) struct RankOpened {
    place: Place,
    of_rank: GpuOfRank,
}

impl RankOpened {
    /// The process's GPU, or why there is none and what to do about it.
    pub(super) fn open(place: &Place) -> Result<Self, String> {
        let of_rank = GpuOfRank::open(place.local_rank).map_err(reason)?;
        Ok(Self { place: place.clone(), of_rank })
    }

    /// Joins the others' collectives, unless the group fails meanwhile.
    fn join(
        self,
        id: NcclId,
        options: &LaunchOptions,
        failed: &dyn Fn() -> Option<String>,
    ) -> Result<RankParts<Cuda<Arc<Gpu>>>, LaunchError> {
        let (Place { rank, world_size, .. }, GpuOfRank { backend, gpu }) = (self.place, self.of_rank);
        let patience = options.join_timeout;
        let communicator = NcclCommunicator::join(gpu, id, [rank, world_size], patience, failed)?;
        Ok(RankParts { kernels: backend, communicator: Box::new(communicator) })
    }
}

fn refuse_peers(options: &LaunchOptions) -> Result<(), LaunchError> {
    if options.collectives != Collectives::Peer {
        return Ok(());
    }
    Err(LaunchError::Options(
        "--collectives peer reaches into the memory of GPUs of the same process; between processes use nccl (or auto)".into(),
    ))
}

/// Loads rank 0 of several processes.
pub(super) fn lead(
    opened: RankOpened,
    leader: Leader,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    refuse_peers(options)?;
    let config = checkpoint.config();
    say_what_is_used(opened.of_rank.backend.device(), config, options);
    let id = Nccl::load()?.unique_id()?;
    leader.begin("cuda", id.bytes())?;
    let fate = Arc::clone(leader.fate());
    headway.begin(0, JOINING);
    let parts = opened.join(id, options, &|| fate.reason())?;
    if let Some(breaker) = parts.communicator.breaker() {
        fate.on_failure(breaker);
    }
    let widest = limits::widest(config, options);
    headway.enter(PLAN);
    // By now NCCL has what it takes of the memory.
    let gpu = Arc::clone(parts.kernels.device());
    let settled = settle(&gpu, checkpoint, options)?;
    let limits = settled.limits;
    headway.enter(WEIGHTS);
    let (others, weights) = (leader.followers(), start::told(checkpoint, headway));
    let group = RankGroup::lead(parts, others, &*weights, &widest, INDEX_LOGITS, move |_| Ok(limits))?;
    ready(group, config, options, headway, &[(gpu, settled)])
}

/// Loads another rank of several processes, which then does what rank 0 says.
pub(super) fn follow(
    opened: RankOpened,
    member: &Member,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
) -> Result<(), LaunchError> {
    refuse_peers(options)?;
    let config = checkpoint.config();
    say_what_is_used(opened.of_rank.backend.device(), config, options);
    let id = NcclId::from_bytes(&member.begin("cuda")?)?;
    let (fate, headway) = (member.fate(), member.headway());
    headway.begin(opened.place.rank, JOINING);
    let parts = opened.join(id, options, &|| fate.reason())?;
    if let Some(breaker) = parts.communicator.breaker() {
        fate.on_failure(breaker);
    }
    let widest = limits::widest(config, options);
    let limits = settle(parts.kernels.device(), checkpoint, options)?.limits;
    member.follow(parts, &*start::told(checkpoint, headway), &widest, INDEX_LOGITS, move |_| Ok(limits))
}

/// Warms the model up, and records its decode steps: by then what the kernels keep between launches is as large as it gets.
fn ready<K: Kernels + 'static>(
    mut model: RankGroup<K>,
    config: &ModelConfig,
    options: &LaunchOptions,
    headway: &Headway,
    gpus: &[(Arc<Gpu>, Settled)],
) -> Result<Box<dyn StepModel>, LaunchError> {
    let made_ready = make_ready(&mut model, config, options, headway);
    // The others hear why before rank 0 leaves them.
    made_ready.inspect_err(|error| model.give_up(&error.to_string()))?;
    let num_pages = model.limits().num_pages;
    for (rank, (gpu, settled)) in gpus.iter().enumerate() {
        headway.holds(settled.memory(rank, num_pages, memory_of(gpu)?));
    }
    Ok(Box::new(model))
}

fn make_ready<K: Kernels + 'static>(
    model: &mut RankGroup<K>,
    config: &ModelConfig,
    options: &LaunchOptions,
    headway: &Headway,
) -> Result<(), LaunchError> {
    tracing::info!(
        "the weights are on the GPU; compiling the kernels: a minute the first time, then they are found on disk"
    );
    headway.enter(FIRST_STEPS);
    let started = Instant::now();
    let turns = turns(&model.limits(), config);
    warm_up(model, config, turns, &mut || headway.begin_together("a first step"))?;
    tracing::info!(elapsed_ms = started.elapsed().as_millis() as u64, "the kernels are compiled");
    if options.cuda_graphs {
        let started = Instant::now();
        headway.enter("decode graphs");
        headway.begin_together("recording decode steps");
        let graphs = model.record_graphs()?;
        tracing::info!(
            graphs,
            elapsed_ms = started.elapsed().as_millis() as u64,
            "decode steps are recorded"
        );
    }
    model.set_step_timeout(options.step_timeout);
    Ok(())
}

fn say_what_is_used(gpu: &Gpu, config: &ModelConfig, options: &LaunchOptions) {
    let (major, minor) = gpu.limits().compute_capability;
    tracing::info!(
        nvrtc = gpu.compiler().nvrtc_version(),
        tp = options.tp,
        "device: cuda, {} (sm_{major}{minor}); loading {} layers",
        gpu.limits().name,
        config.num_hidden_layers,
    );
}

/// The limits, from what a GPU's memory holds before anything is on it.
pub(super) fn settle(
    gpu: &Gpu,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
) -> Result<Settled, LaunchError> {
    memory::settle(memory_of(gpu)?, gpu.limits().clone(), checkpoint, options)
}

/// [`settle`] of every GPU.
pub(super) fn settle_all(
    gpus: &[Arc<Gpu>],
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
) -> Result<Vec<Settled>, LaunchError> {
    let gpus = gpus.iter().map(|gpu| Ok((memory_of(gpu)?, gpu.limits().clone())));
    memory::settle_all(&gpus.collect::<Result<Vec<_>, LaunchError>>()?, checkpoint, options)
}

fn memory_of(gpu: &Gpu) -> Result<GpuMemory, LaunchError> {
    let (free, total) = gpu.memory()?;
    Ok(GpuMemory { total: total as u64, free: free as u64 })
}

/// The attention of chunks is expanded up to some length of what is before them.
pub(super) fn turns(limits: &StepLimits, config: &ModelConfig) -> Turns {
    let (k, tokens, expansion) = (config.index_topk, limits.max_batch_tokens, Expansion::default());
    let context = if tokens < expansion.tokens { 0 } else { expansion.longest(tokens, k) + 1 };
    Turns { context, chunk: Some(expansion.most_tokens(k)) }
}
