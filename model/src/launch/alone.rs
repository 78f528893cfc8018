//! Ranks of a group whose others are not there: for measurements of what they do.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use dsa80_reference::cpu::{Cpu, ThreadCommunicator};
use dsa80_reference::{Communicator, Kernels, LoneRank, SomeRanks};

#[cfg(feature = "wgpu")]
use super::Hardware;
use super::limits::{self, CacheMemory};
use super::options::{Device, LaunchOptions};
#[cfg(feature = "cuda")]
use super::reason;
use super::{CPU_CACHE_BYTES, check_cpu, no_device, wgpu};
use crate::checkpoint::{Checkpoint, Shard};
use crate::engine::StepLimits;
use crate::error::LaunchError;
use crate::measure::{Clock, GpuFacts, HostClock, Measured, MeasuredRanks, Watch, watched};
use crate::runner::{INDEX_LOGITS, Rank, RankParts, WeightSource};

/// Ranks that are measured, and the GPU that the first is on.
pub struct Alone {
    /// The ranks.
    pub ranks: Box<dyn MeasuredRanks>,
    /// What sums over them: `none` where there is one, `threads` on the CPU, `peer` or `nccl`.
    pub between: &'static str,
    /// The first rank's GPU, if it has one.
    pub gpu: Option<GpuFacts>,
}

/// Which ranks of a group are there, and what is asked of them.
#[derive(Debug, Clone, Copy)]
pub struct Measurement {
    /// The first.
    pub rank: usize,
    /// How many: one by itself, or some that step together, each on a GPU of its own or a thread of the CPU.
    pub live: usize,
    /// Whether to measure what the GPU reaches before.
    pub ceilings: bool,
    /// From how many new tokens on a prefill's attention is expanded, instead of what the backend takes.
    pub expand_from: Option<usize>,
}

impl Measurement {
    /// Rank `rank` by itself, and nothing else.
    pub fn of(rank: usize) -> Self {
        Self { rank, live: 1, ceilings: false, expand_from: None }
    }
}

/// Loads ranks of `options.tp` with `weights`, which are those of `checkpoint` or in its formats. What ranks that are not there would add is
/// left out.
///
/// # Errors
/// As for [`launch`](super::launch); ranks that the group has not, or that there are no devices for.
pub fn launch_alone(
    checkpoint: &Arc<Checkpoint>,
    weights: &dyn WeightSource,
    options: &LaunchOptions,
    measurement: &Measurement,
) -> Result<Alone, LaunchError> {
    limits::check(checkpoint.config(), options)?;
    let (&Measurement { rank, live, .. }, tp) = (measurement, options.tp);
    if rank >= tp {
        return Err(LaunchError::Options(format!("--rank {rank}: there are {tp} ranks, counted from 0")));
    }
    if live == 0 || live > tp - rank {
        return Err(LaunchError::Options(format!(
            "--live {live}: expected 1 to {} ranks, from rank {rank} of {tp} on",
            tp - rank
        )));
    }
    let request = Request { checkpoint, weights, options, measurement };
    match options.device {
        Device::Cpu => request.on_cpu(),
        Device::Wgpu => request.on_wgpu(),
        Device::Cuda => request.on_cuda(),
        Device::Auto => request.on_the_best(),
    }
}

/// What is launched.
#[derive(Clone, Copy)]
struct Request<'a> {
    checkpoint: &'a Arc<Checkpoint>,
    weights: &'a dyn WeightSource,
    options: &'a LaunchOptions,
    measurement: &'a Measurement,
}

impl<'a> Request<'a> {
    fn on_cpu(self) -> Result<Alone, LaunchError> {
        self.refuse_expansion()?;
        check_cpu(self.options)?;
        let bytes = self.options.kv_cache_bytes.unwrap_or(CPU_CACHE_BYTES * self.options.tp);
        let memory = CacheMemory { bytes, act_bytes: size_of::<f32>() };
        let limits = limits::within(self.checkpoint.config(), self.options, memory)?;
        let cpu = Cpu::<f32>::new();
        let parts = ThreadCommunicator::group(cpu, self.measurement.live)
            .into_iter()
            .map(|live| RankParts { kernels: cpu, communicator: Box::new(live) })
            .collect();
        let group = self.group(parts, true).watched(|_| HostClock);
        let ranks = group.load(self.weights, &limits, INDEX_LOGITS, size_of::<f32>())?;
        Ok(Alone { ranks, between: self.between("threads"), gpu: None })
    }

    /// Only the CUDA kernels expand.
    fn refuse_expansion(self) -> Result<(), LaunchError> {
        match self.measurement.expand_from {
            Some(tokens) => Err(LaunchError::Options(format!(
                "--expand-from {tokens}: only the CUDA kernels expand attention, and the device is not cuda; leave it out"
            ))),
            None => Ok(()),
        }
    }

    fn group<K: Kernels>(self, parts: Vec<RankParts<K>>, own_collectives: bool) -> Group<'a, K> {
        let Self { options, measurement, .. } = self;
        Group { parts, own_collectives, options, measurement, watches: Vec::new() }
    }

    fn between(self, several: &'static str) -> &'static str {
        if self.measurement.live > 1 { several } else { "none" }
    }
}

/// Ranks before they have weights.
struct Group<'a, K: Kernels> {
    /// Of one that is by itself the communicator is not used.
    parts: Vec<RankParts<K>>,
    own_collectives: bool,
    options: &'a LaunchOptions,
    measurement: &'a Measurement,
    /// Of several, where a clock says how long they are in their collectives.
    watches: Vec<Arc<dyn Watch>>,
}

impl<K: Kernels + 'static> Group<'_, K> {
    /// The same, with collectives that are watched by a clock of each rank.
    fn watched<C: Clock>(mut self, clock: impl Fn(&K) -> C) -> Self {
        if self.parts.len() > 1 {
            let of_rank = |RankParts { kernels, communicator }| {
                let (communicator, watch) = watched(communicator, clock(&kernels));
                (RankParts { kernels, communicator }, watch)
            };
            (self.parts, self.watches) = self.parts.into_iter().map(of_rank).unzip();
        }
        self
    }

    /// Loads all at once.
    fn load(
        self,
        weights: &dyn WeightSource,
        limits: &StepLimits,
        index_logits: usize,
        act_bytes: usize,
    ) -> Result<Box<dyn MeasuredRanks>, LaunchError> {
        let silent = Arc::<AtomicBool>::default();
        let (&Measurement { rank: first, live, .. }, world_size) = (self.measurement, self.options.tp);
        let place = |communicator| -> Result<Box<dyn Communicator<K::Tensor>>, LaunchError> {
            Ok(if live > 1 {
                Box::new(SomeRanks::new(communicator, first, world_size, Arc::clone(&silent))?)
            } else {
                Box::new(LoneRank::new(first, world_size)?)
            })
        };
        let parts = self.parts.into_iter().map(|part| Ok((part.kernels, place(part.communicator)?)));
        let parts = parts.collect::<Result<Vec<_>, LaunchError>>()?;
        let load = |(kernels, communicator)| -> Result<Rank<K>, LaunchError> {
            let mut rank = Rank::load(kernels, communicator, weights, limits, index_logits)?;
            rank.stand_in_for_others()?;
            Ok(rank)
        };
        let ranks: Vec<Result<Rank<K>, LaunchError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || load(part))).collect();
            let ended = || LaunchError::RankLost { rank: first, world_size };
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(ended()))).collect()
        });
        Ok(Box::new(Measured {
            ranks: ranks.into_iter().collect::<Result<_, _>>()?,
            first: Shard { rank: first, world_size },
            limits: *limits,
            act_bytes,
            silent,
            own_collectives: self.own_collectives,
            watches: self.watches,
        }))
    }
}

#[cfg(feature = "wgpu")]
impl Request<'_> {
    fn on_wgpu(self) -> Result<Alone, LaunchError> {
        let context =
            wgpu::open(Hardware::Any, self.options).map_err(|reason| no_device(Device::Wgpu, reason))?;
        self.on_adapter(&context)
    }

    fn on_adapter(self, context: &wgpu::Opened) -> Result<Alone, LaunchError> {
        self.refuse_expansion()?;
        tracing::info!("device: wgpu, {}", context.name());
        let limits = wgpu::settle(context, self.checkpoint.config(), self.options)?;
        let group = self.group(wgpu::parts(context, self.measurement.live), true);
        let ranks = group.load(self.weights, &limits, INDEX_LOGITS, context.act().bytes())?;
        Ok(Alone { ranks, between: self.between("threads"), gpu: None })
    }

    /// Where there is no GPU with CUDA, for this reason.
    fn without_cuda(self, no_cuda: &str) -> Result<Alone, LaunchError> {
        match wgpu::open(Hardware::Gpu, self.options) {
            Ok(context) => {
                tracing::warn!("device: wgpu (auto: no cuda: {no_cuda})");
                self.on_adapter(&context)
            }
            Err(no_wgpu) => {
                tracing::warn!("device: cpu (auto: no cuda: {no_cuda}; no wgpu: {no_wgpu})");
                self.on_cpu()
            }
        }
    }
}

#[cfg(not(feature = "wgpu"))]
impl Request<'_> {
    fn on_wgpu(self) -> Result<Alone, LaunchError> {
        Err(no_device(Device::Wgpu, wgpu::NOT_BUILT))
    }

    fn without_cuda(self, no_cuda: &str) -> Result<Alone, LaunchError> {
        tracing::warn!("device: cpu (auto: no cuda: {no_cuda}; no wgpu: {})", wgpu::NOT_BUILT);
        self.on_cpu()
    }
}

#[cfg(feature = "cuda")]
impl Request<'_> {
    fn on_cuda(self) -> Result<Alone, LaunchError> {
        self.on_gpus(self.open_gpus()?)
    }

    fn on_the_best(self) -> Result<Alone, LaunchError> {
        if let Some(reason) = super::not_on_cuda(self.options) {
            return self.without_cuda(&reason);
        }
        match self.open_gpus() {
            Ok(opened) => self.on_gpus(opened),
            Err(error) => self.without_cuda(&reason(error)),
        }
    }
}

#[cfg(feature = "cuda")]
mod gpus {
    use dsa80_cuda::expanded_mla::Expansion;
    use dsa80_cuda::{Between, Cuda, Gpu, GpuOfRank, RankOnGpu};
    use dsa80_reference::communicator::SingleRank;

    use super::*;
    use crate::launch::options::Collectives;

    type OnGpu = RankParts<Cuda<Arc<Gpu>>>;

    impl Request<'_> {
        /// A GPU for every rank, and what is between them.
        pub(super) fn open_gpus(self) -> dsa80_reference::Result<(Vec<OnGpu>, &'static str)> {
            let Request { options, measurement, .. } = self;
            if measurement.live == 1 {
                let kernels = GpuOfRank::open(0)?.backend;
                return Ok((
                    vec![RankParts { kernels, communicator: Box::new(SingleRank::default()) }],
                    "none",
                ));
            }
            let open = |between, name| {
                let ranks = RankOnGpu::open_group(measurement.live, between, options.step_timeout)?;
                let parts = ranks
                    .into_iter()
                    .map(|rank| RankParts { kernels: rank.backend, communicator: rank.communicator });
                Ok((parts.collect(), name))
            };
            match options.collectives {
                Collectives::Peer => open(Between::Peers, "peer"),
                Collectives::Nccl => open(Between::Nccl, "nccl"),
                Collectives::Auto => open(Between::Peers, "peer").or_else(|_| open(Between::Nccl, "nccl")),
            }
        }

        pub(super) fn on_gpus(
            self,
            (parts, between): (Vec<OnGpu>, &'static str),
        ) -> Result<Alone, LaunchError> {
            let Request { checkpoint, weights, options, measurement } = self;
            let (mut gpu, mut limits) = (None, limits::widest(checkpoint.config(), options));
            let gpus: Vec<Arc<Gpu>> = parts.iter().map(|part| Arc::clone(part.kernels.device())).collect();
            if let Some(first) = gpus.first() {
                // Before the memory is full.
                gpu = Some(GpuFacts::of(first, measurement.ceilings)?);
            }
            for settled in crate::launch::cuda::settle_all(&gpus, checkpoint, options)? {
                let own = settled.limits;
                limits.num_pages = limits.num_pages.min(own.num_pages);
                limits.max_model_len = limits.max_model_len.min(own.max_model_len);
            }
            let expanding = |RankParts { kernels, communicator }: OnGpu| {
                let kernels = match measurement.expand_from {
                    Some(tokens) => kernels.with_expansion(Expansion::starting_at(tokens)),
                    None => kernels,
                };
                RankParts { kernels, communicator }
            };
            let parts = parts.into_iter().map(expanding).collect();
            let group = self.group(parts, between == "peer");
            let group = group.watched(|kernels| Arc::clone(kernels.device()));
            let (index_logits, act_bytes) =
                (crate::launch::cuda::INDEX_LOGITS, crate::launch::memory::ACT_BYTES);
            Ok(Alone { ranks: group.load(weights, &limits, index_logits, act_bytes)?, between, gpu })
        }
    }
}

#[cfg(not(feature = "cuda"))]
impl Request<'_> {
    fn on_cuda(self) -> Result<Alone, LaunchError> {
        Err(no_device(Device::Cuda, super::cuda::NOT_BUILT))
    }

    fn on_the_best(self) -> Result<Alone, LaunchError> {
        self.without_cuda(super::cuda::NOT_BUILT)
    }
}
