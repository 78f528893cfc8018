//! A backend on every one of several GPUs.

use std::sync::Arc;
use std::time::Duration;

use dsa80_reference::{Communicator, Result};

use super::{Cuda, refuse, usable};
use crate::all_reduce::AllReduceTiles;
use crate::communicator::{PATIENCE, PeerCommunicator, Placement, alike};
use crate::crossover::{self, Crossover};
use crate::device::Device as _;
use crate::gpu::Gpu;
use crate::nccl_communicator::NcclCommunicator;
use crate::sources::Sources;
use crate::tensor::CudaTensor;
use crate::tiles::Tiles;

/// A rank on a GPU of its own, in a process with all others.
pub struct RankOnGpu {
    /// Its backend.
    pub backend: Cuda<Arc<Gpu>>,
    /// Its place among the ranks.
    pub communicator: Box<dyn Communicator<CudaTensor<Arc<Gpu>>>>,
}

/// What goes between the GPUs of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// Our own kernels, which reach into each other's memory.
    Peers,
    /// NVIDIA's library.
    Nccl,
    /// Our own kernels where the GPUs are connected so, or else NVIDIA's library.
    Either,
}

impl RankOnGpu {
    /// The first `ranks` GPUs that the kernels run on, one for each rank, in rank order. A rank that waits for another in a collective of
    /// our own gives up after `patience`, and not before [`PATIENCE`].
    ///
    /// # Errors
    /// There are fewer, or, with [`Between::Peers`], they differ or cannot reach each other's memory; and as for [`Cuda::open`].
    pub fn open_group(ranks: usize, between: Between, patience: Duration) -> Result<Vec<Self>> {
        let usable = usable()?;
        if usable.len() < ranks {
            return Err(refuse(format!(
                "{ranks} ranks need a GPU each, and there are {} that the kernels run on; use --tp {0} at most",
                usable.len()
            )));
        }
        let gpus = usable[..ranks]
            .iter()
            .map(|device| Gpu::open(device.ordinal, Sources::Embedded).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let tiles =
            gpus.iter().map(|gpu| Tiles::for_gpu(&gpu.limits().name, None)).collect::<Result<Vec<_>>>()?;
        let patience = patience.max(PATIENCE);
        let connected = || {
            alike(&gpus)?;
            gpus.iter().try_for_each(|gpu| gpus.iter().try_for_each(|other| gpu.reach(other)))
        };
        let with_nccl = match between {
            Between::Nccl => true,
            Between::Peers => connected().map(|()| false)?,
            Between::Either => {
                connected().inspect_err(|error| tracing::info!("collectives: NCCL ({error})")).is_err()
            }
        };
        let communicators: Vec<Box<dyn Communicator<_>>> = if with_nccl {
            boxed(NcclCommunicator::group(&gpus, patience)?)
        } else {
            // Those of the first: a launch has the same blocks on every rank.
            let of_all = tiles[0].all_reduce(gpus[0].limits());
            let crossover = crossover_of(&gpus, &tiles[0], &of_all)?;
            let of_all = AllReduceTiles { crossover: Some(crossover), ..of_all };
            boxed(PeerCommunicator::group(gpus.clone(), of_all, Placement::Apart, patience)?)
        };
        let backends = gpus.into_iter().zip(tiles).map(|(gpu, tiles)| Cuda::new(gpu, tiles));
        let ranks = backends.zip(communicators);
        Ok(ranks.map(|(backend, communicator)| Self { backend, communicator }).collect())
    }
}

fn boxed<C: Communicator<CudaTensor<Arc<Gpu>>> + 'static>(
    communicators: Vec<C>,
) -> Vec<Box<dyn Communicator<CudaTensor<Arc<Gpu>>>>> {
    communicators.into_iter().map(|communicator| Box::new(communicator) as _).collect()
}

/// The GPU of a rank whose others are in other processes.
#[derive(Debug)]
pub struct GpuOfRank {
    /// Its backend.
    pub backend: Cuda<Arc<Gpu>>,
    /// The GPU, to join the others' collectives with.
    pub gpu: Arc<Gpu>,
}

impl GpuOfRank {
    /// The `local_rank`-th GPU that the kernels run on; the only one where a launcher shows each process its own.
    ///
    /// # Errors
    /// There are too few; and as for [`Cuda::open`].
    pub fn open(local_rank: usize) -> Result<Self> {
        let usable = usable()?;
        let device = match usable.as_slice() {
            [only] => only,
            all => all.get(local_rank).ok_or_else(|| {
                refuse(format!(
                    "LOCAL_RANK is {local_rank}, and there are {} GPUs that the kernels run on: start as many ranks on a machine as it has \
                     GPUs, and number them from 0",
                    all.len()
                ))
            })?,
        };
        let gpu = Arc::new(Gpu::open(device.ordinal, Sources::Embedded)?);
        let tiles = Tiles::for_gpu(&gpu.limits().name, None)?;
        Ok(Self { backend: Cuda::new(Arc::clone(&gpu), tiles), gpu })
    }
}

/// Up to which sizes these GPUs sum in one shot: as pinned for them, or as measured now.
fn crossover_of(gpus: &[Arc<Gpu>], tiles: &Tiles, of_all: &AllReduceTiles) -> Result<Crossover> {
    let pinned = tiles.crossover(gpus.len());
    let crossover = pinned.map_or_else(|| crossover::measure(gpus, of_all), Ok)?;
    tracing::info!(
        ranks = gpus.len(),
        all_reduce_bytes = crossover.all_reduce_bytes,
        all_reduce_norm_bytes = crossover.all_reduce_norm_bytes,
        "ranks sum in one shot up to these sizes, {}",
        if pinned.is_some() { "as pinned for this GPU" } else { "measured now" },
    );
    Ok(crossover)
}
