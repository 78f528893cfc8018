//! How long ranks take to sum or gather their parts, and whether they all have what comes of it.

use std::time::Instant;

use dsa80_reference::cpu::{Cpu, ThreadCommunicator};
use dsa80_reference::{Kernels, Result};

use super::gpu::GpuFacts;
use super::microseconds;
use super::sums::Check;
use super::work::{Gather, Sum, Work};
use crate::error::LaunchError;
use crate::launch::Device;
use crate::runner::RankParts;

/// Ranks that can be measured together: what sums their parts, and on what.
pub struct Group {
    /// `threads`, `peer` (our own kernels, as a model uses them), `peer_one_shot`, `peer_two_shots`, `nccl`: which implementation it is.
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

/// What follows a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Summed {
    /// Nothing: `all_reduce`.
    Alone,
    /// It is added to the residual stream and normed: `all_reduce_norm`, or `all_reduce` and `rms_norm` where there is no such launch.
    WithNorm,
}

/// Microseconds of a sum over ranks, or a gathering.
#[derive(Debug, Clone, PartialEq)]
pub struct CollectiveTimes {
    /// Rows of `hidden` elements.
    pub rows: usize,
    /// Of a call, one entry for every run: the slowest rank's.
    pub us: Vec<f64>,
    /// Whether the calls were replayed from a graph.
    pub in_a_graph: bool,
    /// Whether a sum and what follows it were one launch.
    pub fused: bool,
    /// What came of it.
    pub check: Check,
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
        Device::Wgpu => Err(LaunchError::Options(
            "--device wgpu: its ranks share an adapter and sum in host memory, as those of --device cpu do: measure that, or cuda".into(),
        )),
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

    use dsa80_cuda::all_reduce::AllReduceTiles;
    use dsa80_cuda::communicator::PATIENCE;
    use dsa80_cuda::crossover::Crossover;
    use dsa80_cuda::{
        Between, Cuda, Device as _, Gpu, NcclCommunicator, PeerCommunicator, Placement, RankOnGpu, Tiles,
    };
    use dsa80_reference::Communicator;

    use super::{GpuFacts, Group, RankParts, Ranks, Result};

    /// A GPU for every rank, or else all ranks on one.
    pub(super) fn groups(tp: usize) -> Result<Vec<Group>> {
        let peers = match RankOnGpu::open_group(tp, Between::Peers, PATIENCE) {
            Ok(ranks) => ranks,
            Err(peers) => {
                return match RankOnGpu::open_group(tp, Between::Nccl, PATIENCE) {
                    Ok(ranks) => {
                        tracing::warn!("our own kernels are left out: {peers}");
                        apart("nccl", parts_of(ranks)).map(|group| vec![group])
                    }
                    Err(_) => {
                        let group = together(tp)?;
                        tracing::warn!("{peers}: the ranks share one GPU instead");
                        Ok(vec![group])
                    }
                };
            }
        };
        let gpus: Vec<Arc<Gpu>> = peers.iter().map(|rank| Arc::clone(rank.backend.device())).collect();
        let mut groups = vec![apart("peer", parts_of(peers))?];
        // Whatever the size.
        for (name, bytes) in [("peer_one_shot", usize::MAX), ("peer_two_shots", 0)] {
            let crossover = Crossover { all_reduce_bytes: bytes, all_reduce_norm_bytes: bytes };
            let of_all = Tiles::for_gpu(&gpus[0].limits().name, None)?.all_reduce(gpus[0].limits());
            let tiles = AllReduceTiles { crossover: Some(crossover), ..of_all };
            let ranks = PeerCommunicator::group(gpus.clone(), tiles, Placement::Apart, PATIENCE)?;
            groups.push(apart(name, parts(&gpus, ranks)?)?);
        }
        match NcclCommunicator::group(&gpus, PATIENCE) {
            Ok(ranks) => groups.push(apart("nccl", parts(&gpus, ranks)?)?),
            Err(reason) => tracing::warn!("NCCL is left out: {reason}"),
        }
        Ok(groups)
    }

    type OnGpu = RankParts<Cuda<Arc<Gpu>>>;

    fn parts_of(ranks: Vec<RankOnGpu>) -> Vec<OnGpu> {
        let part = |rank: RankOnGpu| RankParts { kernels: rank.backend, communicator: rank.communicator };
        ranks.into_iter().map(part).collect()
    }

    fn parts<C>(gpus: &[Arc<Gpu>], ranks: Vec<C>) -> Result<Vec<OnGpu>>
    where
        C: Communicator<dsa80_cuda::CudaTensor<Arc<Gpu>>> + 'static,
    {
        let part = |(gpu, rank): (&Arc<Gpu>, C)| {
            let kernels = Cuda::new(Arc::clone(gpu), Tiles::for_gpu(&gpu.limits().name, None)?);
            Ok(RankParts { kernels, communicator: Box::new(rank) as _ })
        };
        gpus.iter().zip(ranks).map(part).collect()
    }

    fn apart(name: &'static str, parts: Vec<OnGpu>) -> Result<Group> {
        let gpu = parts.first().map(|rank| GpuFacts::of(rank.kernels.device(), false)).transpose()?;
        let placement = format!("{} GPUs", parts.len());
        Ok(Group { name, placement, measures_a_link: true, gpu, ranks: Ranks::Gpus(parts) })
    }

    fn together(tp: usize) -> Result<Group> {
        let gpu = Arc::new(Cuda::open()?.into_device());
        let tiles = Tiles::for_gpu(&gpu.limits().name, None)?;
        let devices = vec![Arc::clone(&gpu); tp];
        let of_all = tiles.all_reduce(gpu.limits());
        let ranks = PeerCommunicator::group(devices.clone(), of_all, Placement::Together, PATIENCE)?;
        Ok(Group {
            name: "peer",
            placement: format!(
                "{tp} virtual ranks on one GPU, whose threads meet for every sum: no link is measured, and the threads' meeting is"
            ),
            measures_a_link: false,
            gpu: Some(GpuFacts::of(&gpu, false)?),
            ranks: Ranks::Gpus(parts(&devices, ranks)?),
        })
    }
}

impl Group {
    /// Sums `rows` of `hidden` elements over the ranks, `runs` times for every number of rows, and checks what comes of it.
    ///
    /// # Errors
    /// A rank failed.
    pub fn time(
        &mut self,
        summed: Summed,
        rows: &[usize],
        hidden: usize,
        runs: usize,
    ) -> Result<Vec<CollectiveTimes>, LaunchError> {
        let graphs = self.measures_a_link;
        match &mut self.ranks {
            Ranks::Cpu(ranks) => time_sums(ranks, summed, rows, hidden, runs, graphs),
            #[cfg(feature = "cuda")]
            Ranks::Gpus(ranks) => time_sums(ranks, summed, rows, hidden, runs, graphs),
        }
    }

    /// Gathers `rows` of tensors of so many `columns`, which the ranks divide, all at once; else as [`time`](Self::time).
    ///
    /// # Errors
    /// A rank failed.
    pub fn time_gather(
        &mut self,
        rows: &[usize],
        columns: &[usize],
        runs: usize,
    ) -> Result<Vec<CollectiveTimes>, LaunchError> {
        let graphs = self.measures_a_link;
        match &mut self.ranks {
            Ranks::Cpu(ranks) => time_gathers(ranks, rows, columns, runs, graphs),
            #[cfg(feature = "cuda")]
            Ranks::Gpus(ranks) => time_gathers(ranks, rows, columns, runs, graphs),
        }
    }
}

/// [`Group::time`] over any ranks; from graphs, if `graphs` and the backend has them.
///
/// # Errors
/// A rank failed.
pub fn time_sums<K: Kernels>(
    ranks: &mut [RankParts<K>],
    summed: Summed,
    rows: &[usize],
    hidden: usize,
    runs: usize,
    graphs: bool,
) -> Result<Vec<CollectiveTimes>, LaunchError> {
    let time = |&rows: &usize| {
        let body =
            |rank: &RankParts<K>| one_rank(rank, &mut Sum::new(rank, summed, rows, hidden)?, runs, graphs);
        time_size(ranks, rows, runs, body)
    };
    rows.iter().map(time).collect()
}

/// [`Group::time_gather`] over any ranks.
///
/// # Errors
/// A rank failed.
pub fn time_gathers<K: Kernels>(
    ranks: &mut [RankParts<K>],
    rows: &[usize],
    columns: &[usize],
    runs: usize,
    graphs: bool,
) -> Result<Vec<CollectiveTimes>, LaunchError> {
    let time = |&rows: &usize| {
        let body = |rank: &RankParts<K>| one_rank(rank, &mut Gather::new(rank, rows, columns)?, runs, graphs);
        time_size(ranks, rows, runs, body)
    };
    rows.iter().map(time).collect()
}

/// What a rank saw of a size.
struct OfRank {
    us: Vec<f64>,
    in_a_graph: bool,
    fused: bool,
    check: Check,
    digest: u64,
}

/// What all ranks saw, which each run `body` at the same time.
fn time_size<K: Kernels>(
    ranks: &mut [RankParts<K>],
    rows: usize,
    runs: usize,
    body: impl Fn(&RankParts<K>) -> Result<OfRank> + Sync,
) -> Result<CollectiveTimes, LaunchError> {
    let body = &body;
    let of_ranks: Vec<Result<OfRank>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter_mut()
            .map(|rank| {
                scope.spawn(move || {
                    let times = body(rank);
                    if let Err(error) = &times {
                        rank.communicator.abort(&error.to_string());
                    }
                    times
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(panicked()))).collect()
    });
    let of_ranks = of_ranks.into_iter().collect::<Result<Vec<OfRank>>>()?;
    let mut slowest = vec![0.0_f64; runs];
    for rank in &of_ranks {
        slowest.iter_mut().zip(&rank.us).for_each(|(slowest, us)| *slowest = slowest.max(*us));
    }
    let all = |holds: fn(&OfRank) -> bool| of_ranks.iter().all(holds);
    Ok(CollectiveTimes {
        rows,
        us: slowest,
        in_a_graph: all(|rank| rank.in_a_graph),
        fused: all(|rank| rank.fused),
        check: Check {
            identical: of_ranks.windows(2).all(|pair| pair[0].digest == pair[1].digest),
            repeats: all(|rank| rank.check.repeats),
            worst: of_ranks.iter().map(|rank| rank.check.worst).fold(0.0, f64::max),
        },
    })
}

fn panicked() -> dsa80_reference::Error {
    dsa80_reference::Error::Backend { backend: "thread", message: "a rank's thread panicked".into() }
}

fn one_rank<K: Kernels>(
    RankParts { kernels, communicator }: &RankParts<K>,
    work: &mut dyn Work,
    runs: usize,
    graphs: bool,
) -> Result<OfRank> {
    work.begin(false)?;
    // Runs it, and then records it.
    let once = if graphs { kernels.record(|| work.call())? } else { None };
    if once.is_none() {
        work.call()?;
    }
    let first = work.found()?;
    work.begin(false)?;
    match &once {
        Some(graph) => kernels.replay(graph)?,
        None => work.call()?,
    }
    let again = work.found()?;
    communicator.check()?;
    let check = Check {
        // For all ranks to say.
        identical: true,
        repeats: first.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()),
        worst: work.worst(&again),
    };

    work.begin(true)?;
    let count = CALLS[usize::from(!graphs)];
    let mut calls = || (0..count).try_for_each(|_| work.call());
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
    Ok(OfRank { us, in_a_graph: recorded.is_some(), fused: work.fused(), check, digest: digest(&again) })
}

/// FNV-1a of the values' bits.
fn digest(values: &[f64]) -> u64 {
    values
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, value| (hash ^ value.to_bits()).wrapping_mul(0x0100_0000_01b3))
}

/// Bytes of a rank up to which the first of two ways serves: from what both take with these numbers of rows of `row_bytes`, in ascending
/// order. None in a build that has no such ways.
#[cfg(feature = "cuda")]
pub fn serves_up_to(row_bytes: usize, sizes: &[(usize, [f64; 2])]) -> Option<usize> {
    let rows: Vec<usize> = sizes.iter().map(|(rows, _)| *rows).collect();
    let ratios: Vec<f64> = sizes.iter().map(|(_, [one, other])| one / other).collect();
    Some(dsa80_cuda::crossover::up_to_bytes(&rows, row_bytes, &ratios))
}

/// As above.
#[cfg(not(feature = "cuda"))]
pub fn serves_up_to(_row_bytes: usize, _sizes: &[(usize, [f64; 2])]) -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use dsa80_reference::Communicator;
    use dsa80_reference::cpu::CpuTensor;

    use super::*;

    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        None,
        /// Rank 1 ends with its own part.
        OnOneRank,
        /// Every second sum is one too many.
        NowAndThen,
        /// All ranks are off alike.
        OnAll,
    }

    struct Faulty {
        live: ThreadCommunicator<f32>,
        fault: Fault,
        calls: AtomicUsize,
    }

    type Tensor = CpuTensor<f32>;

    impl Communicator<Tensor> for Faulty {
        fn rank(&self) -> usize {
            Communicator::rank(&self.live)
        }

        fn world_size(&self) -> usize {
            Communicator::world_size(&self.live)
        }

        fn all_reduce(&self, tensor: &mut Tensor) -> Result<()> {
            let own = tensor.clone();
            let odd = self.calls.fetch_add(1, Ordering::Relaxed) % 2 == 1;
            self.live.all_reduce(tensor)?;
            match self.fault {
                Fault::OnOneRank if self.rank() == 1 => *tensor = own,
                Fault::NowAndThen if odd => self.live.all_reduce(tensor)?,
                Fault::OnAll => self.live.all_reduce(tensor)?,
                _ => (),
            }
            Ok(())
        }

        fn all_gather(&self, shard: &Tensor, out: &mut Tensor) -> Result<()> {
            self.live.all_gather(shard, out)?;
            if self.fault == Fault::OnOneRank && self.rank() == 1 {
                let cpu = Cpu::<f32>::new();
                let swapped: Vec<f64> = cpu.read(out)?.into_iter().rev().collect();
                cpu.write(&swapped, out)?;
            }
            Ok(())
        }

        fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
            self.live.broadcast(tensor, root)
        }

        fn barrier(&self) -> Result<()> {
            self.live.barrier()
        }

        fn abort(&self, reason: &str) {
            self.live.abort(reason);
        }
    }

    fn ranks(fault: Fault) -> Vec<RankParts<Cpu<f32>>> {
        let cpu = Cpu::<f32>::new();
        let part = |live| {
            let communicator = Box::new(Faulty { live, fault, calls: AtomicUsize::new(0) }) as _;
            RankParts { kernels: cpu, communicator }
        };
        ThreadCommunicator::group(cpu, 2).into_iter().map(part).collect()
    }

    #[test]
    fn a_gathering_is_exact_or_wrong() {
        let check = |fault| time_gathers(&mut ranks(fault), &[3], &[8, 6], 2, false).unwrap()[0].check;
        let right = check(Fault::None);
        assert!(right.holds() && right.worst == 0.0, "{right:?}");
        let one = check(Fault::OnOneRank);
        assert!(!one.holds() && !one.identical && one.repeats, "{one:?}");
    }

    fn check(fault: Fault, summed: Summed) -> Check {
        let mut ranks = ranks(fault);
        let times = time_sums(&mut ranks, summed, &[3], 64, 2, true).unwrap();
        assert_eq!((times[0].us.len(), times[0].in_a_graph, times[0].fused), (2, false, false));
        times[0].check
    }

    #[test]
    fn what_a_rank_gets_wrong_is_seen_beside_its_time() {
        for summed in [Summed::Alone, Summed::WithNorm] {
            let right = check(Fault::None, summed);
            assert!(right.holds() && right.identical && right.repeats, "{right:?}");
            let one = check(Fault::OnOneRank, summed);
            assert!(!one.holds() && !one.identical && one.repeats && one.worst > 1.0, "{one:?}");
            let sometimes = check(Fault::NowAndThen, summed);
            assert!(!sometimes.holds() && sometimes.identical && !sometimes.repeats, "{sometimes:?}");
            let all = check(Fault::OnAll, summed);
            assert!(!all.holds() && all.identical && all.repeats && all.worst > 1.0, "{all:?}");
        }
    }
}
