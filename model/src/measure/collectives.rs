//! How long ranks take to sum their parts.

use std::time::Instant;

use dsa80_reference::cpu::{Cpu, ThreadCommunicator};
use dsa80_reference::{DType, Kernels, Result};

use super::gpu::GpuFacts;
use super::microseconds;
use crate::error::LaunchError;
use crate::launch::Device;
use crate::runner::RankParts;

/// Ranks that can be measured together: what sums their parts, and on what.
pub struct Group {
    /// `threads`, `peer`, `nccl`: which implementation it is.
    pub name: &'static str,
    /// Where the ranks are, and what the times say nothing about.
    pub placement: String,
    /// Whether the ranks are on GPUs that are connected, so that a link is measured.
    pub measures_a_link: bool,
    /// The first rank's GPU.
    pub gpu: Option<GpuFacts>,
    ranks: Ranks,
}

enum Ranks {
    Cpu(Vec<RankParts<Cpu<f32>>>),
    #[cfg(feature = "cuda")]
    Gpus(Vec<RankParts<dsa80_cuda::Cuda<std::sync::Arc<dsa80_cuda::Gpu>>>>),
}

/// Microseconds of a sum over ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct CollectiveTimes {
    /// Rows of `hidden` elements.
    pub rows: usize,
    /// Of a call, one entry for every run: the slowest rank's.
    pub us: Vec<f64>,
    /// Whether the calls were replayed from a graph.
    pub in_a_graph: bool,
}

/// Calls in a graph, and between two looks at the host's clock.
const CALLS: [usize; 2] = [20, 4];

/// Every implementation that `tp` ranks can be measured with here.
///
/// # Errors
/// Fewer than two ranks; a device that this machine does not have.
pub fn groups(device: Device, tp: usize) -> Result<Vec<Group>, LaunchError> {
    if tp < 2 {
        return Err(LaunchError::Options(format!(
            "--tp {tp}: one rank has nothing to sum; expected at least 2"
        )));
    }
    match device {
        Device::Cpu => Ok(vec![threads(tp)]),
        Device::Wgpu => {
            Err(LaunchError::Options("--device wgpu is not in this build; use cpu or cuda".into()))
        }
        Device::Cuda => gpus::groups(tp).map_err(LaunchError::from),
        Device::Auto => Ok(gpus::groups(tp).unwrap_or_else(|error| {
            tracing::info!("device: cpu (auto: {error})");
            vec![threads(tp)]
        })),
    }
}

fn threads(tp: usize) -> Group {
    let cpu = Cpu::<f32>::new();
    let parts = ThreadCommunicator::group(cpu, tp)
        .into_iter()
        .map(|rank| RankParts { kernels: cpu, communicator: Box::new(rank) as _ });
    Group {
        name: "threads",
        placement: format!("{tp} threads of the CPU, in memory: no link is measured"),
        measures_a_link: false,
        gpu: None,
        ranks: Ranks::Cpu(parts.collect()),
    }
}

#[cfg(not(feature = "cuda"))]
mod gpus {
    use super::{Group, Result};

    pub(super) fn groups(_tp: usize) -> Result<Vec<Group>> {
        Err(dsa80_reference::Error::Backend {
            backend: "cuda",
            message: "is not in this build (its feature `cuda` is off)".into(),
        })
    }
}

#[cfg(feature = "cuda")]
mod gpus {
    use std::sync::Arc;

    use dsa80_cuda::communicator::PATIENCE;
    use dsa80_cuda::{Between, Cuda, Device as _, PeerCommunicator, Placement, RankOnGpu, Tiles};

    use super::{GpuFacts, Group, RankParts, Ranks, Result};

    /// A GPU for every rank, or else all ranks on one.
    pub(super) fn groups(tp: usize) -> Result<Vec<Group>> {
        match RankOnGpu::open_group(tp, Between::Peers, PATIENCE) {
            Ok(ranks) => {
                let mut groups = vec![apart("peer", tp, ranks)?];
                match RankOnGpu::open_group(tp, Between::Nccl, PATIENCE) {
                    Ok(ranks) => groups.push(apart("nccl", tp, ranks)?),
                    Err(reason) => tracing::warn!("NCCL is left out: {reason}"),
                }
                Ok(groups)
            }
            Err(peers) => match RankOnGpu::open_group(tp, Between::Nccl, PATIENCE) {
                Ok(ranks) => {
                    tracing::warn!("our own kernels are left out: {peers}");
                    apart("nccl", tp, ranks).map(|group| vec![group])
                }
                Err(_) => {
                    let group = together(tp)?;
                    tracing::warn!("{peers}: the ranks share one GPU instead");
                    Ok(vec![group])
                }
            },
        }
    }

    fn apart(name: &'static str, tp: usize, ranks: Vec<RankOnGpu>) -> Result<Group> {
        let gpu = ranks.first().map(|rank| GpuFacts::of(rank.backend.device(), false)).transpose()?;
        let parts = ranks
            .into_iter()
            .map(|RankOnGpu { backend, communicator }| RankParts { kernels: backend, communicator });
        Ok(Group {
            name,
            placement: format!("{tp} GPUs"),
            measures_a_link: true,
            gpu,
            ranks: Ranks::Gpus(parts.collect()),
        })
    }

    fn together(tp: usize) -> Result<Group> {
        let gpu = Arc::new(Cuda::open()?.into_device());
        let tiles = Tiles::for_gpu(&gpu.limits().name, None)?;
        let devices = vec![Arc::clone(&gpu); tp];
        let of_all = tiles.all_reduce(gpu.limits());
        let communicators = PeerCommunicator::group(devices, of_all, Placement::Together, PATIENCE)?;
        let parts = communicators.into_iter().map(|communicator| {
            let tiles = Tiles::for_gpu(&gpu.limits().name, None)?;
            let kernels = Cuda::new(Arc::clone(&gpu), tiles);
            Ok(RankParts { kernels, communicator: Box::new(communicator) as _ })
        });
        Ok(Group {
            name: "peer",
            placement: format!(
                "{tp} virtual ranks on one GPU, whose threads meet for every sum: no link is measured, and the threads' meeting is"
            ),
            measures_a_link: false,
            gpu: Some(GpuFacts::of(&gpu, false)?),
            ranks: Ranks::Gpus(parts.collect::<Result<_>>()?),
        })
    }
}

/// Sums `rows` of `hidden` elements over the ranks of `group`, `runs` times for every number of rows.
///
/// # Errors
/// A rank failed.
pub fn time_all_reduce(
    group: Group,
    rows: &[usize],
    hidden: usize,
    runs: usize,
) -> Result<Vec<CollectiveTimes>, LaunchError> {
    let graphs = group.measures_a_link;
    match group.ranks {
        Ranks::Cpu(ranks) => all_ranks(ranks, rows, hidden, runs, graphs),
        #[cfg(feature = "cuda")]
        Ranks::Gpus(ranks) => all_ranks(ranks, rows, hidden, runs, graphs),
    }
}

fn all_ranks<K: Kernels>(
    ranks: Vec<RankParts<K>>,
    rows: &[usize],
    hidden: usize,
    runs: usize,
    graphs: bool,
) -> Result<Vec<CollectiveTimes>, LaunchError> {
    // A rank that leaves breaks the group: each comes back, to stay until all have ended.
    let of_ranks: Vec<Result<(RankParts<K>, Vec<CollectiveTimes>)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                scope.spawn(move || {
                    let times: Result<_> =
                        rows.iter().map(|&rows| one_rank(&rank, rows, hidden, runs, graphs)).collect();
                    match times {
                        Ok(times) => Ok((rank, times)),
                        Err(error) => {
                            rank.communicator.abort(&error.to_string());
                            Err(error)
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(panicked()))).collect()
    });
    let mut slowest: Vec<CollectiveTimes> = Vec::new();
    for of_rank in of_ranks.into_iter().collect::<Result<Vec<_>>>()? {
        let (_rank, times) = of_rank;
        if slowest.is_empty() {
            slowest = times;
            continue;
        }
        for (slowest, times) in slowest.iter_mut().zip(times) {
            for (slowest, us) in slowest.us.iter_mut().zip(times.us) {
                *slowest = slowest.max(us);
            }
        }
    }
    Ok(slowest)
}

fn panicked() -> dsa80_reference::Error {
    dsa80_reference::Error::Backend { backend: "thread", message: "a rank's thread panicked".into() }
}

fn one_rank<K: Kernels>(
    RankParts { kernels, communicator }: &RankParts<K>,
    rows: usize,
    hidden: usize,
    runs: usize,
    graphs: bool,
) -> Result<CollectiveTimes> {
    let mut tensor = kernels.alloc(DType::Act, &[rows, hidden])?;
    // Zeros stay zeros, however often they are summed.
    kernels.write(&vec![0.0; rows * hidden], &mut tensor)?;
    let count = CALLS[usize::from(!graphs)];
    let mut calls = || (0..count).try_for_each(|_| communicator.all_reduce(&mut tensor));
    let recorded = if graphs { kernels.record(&mut calls)? } else { None };
    let mut us = Vec::with_capacity(runs);
    if let Some(graph) = &recorded {
        communicator.barrier()?;
        kernels.time_replays(graph, 2)?;
        communicator.barrier()?;
        us = kernels.time_replays(graph, runs)?;
    } else {
        calls()?;
        for _ in 0..runs {
            communicator.barrier()?;
            let started = Instant::now();
            calls()?;
            us.push(microseconds(started.elapsed()));
        }
    }
    communicator.check()?;
    us.iter_mut().for_each(|us| *us /= count as f64);
    Ok(CollectiveTimes { rows, us, in_a_graph: recorded.is_some() })
}
