//! A backend on every one of several GPUs.

use std::sync::Arc;

use dsa80_reference::Result;

use super::{Cuda, refuse, usable};
use crate::all_reduce::AllReduceTiles;
use crate::communicator::{PATIENCE, PeerCommunicator, Placement};
use crate::crossover;
use crate::device::Device as _;
use crate::gpu::Gpu;
use crate::sources::Sources;
use crate::tiles::Tiles;

/// A rank on a GPU of its own.
#[derive(Debug)]
pub struct RankOnGpu {
    /// Its backend.
    pub backend: Cuda<Arc<Gpu>>,
    /// Its place among the ranks.
    pub communicator: PeerCommunicator<Arc<Gpu>>,
}

impl RankOnGpu {
    /// The first `ranks` GPUs that the kernels run on, one for each rank, in rank order.
    ///
    /// # Errors
    /// There are fewer, or they cannot reach each other's memory; and as for [`Cuda::open`].
    pub fn open_group(ranks: usize) -> Result<Vec<Self>> {
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
        for gpu in &gpus {
            gpus.iter().try_for_each(|other| gpu.reach(other))?;
        }
        let tiles =
            gpus.iter().map(|gpu| Tiles::for_gpu(&gpu.limits().name, None)).collect::<Result<Vec<_>>>()?;
        // Those of the first: a launch has the same blocks on every rank.
        let of_all = tiles[0].all_reduce(gpus[0].limits());
        let pinned = tiles[0].crossover(ranks);
        let crossover = pinned.map_or_else(|| crossover::measure(&gpus, &of_all), Ok)?;
        tracing::info!(
            ranks,
            all_reduce_bytes = crossover.all_reduce_bytes,
            all_reduce_norm_bytes = crossover.all_reduce_norm_bytes,
            "ranks sum in one shot up to these sizes, {}",
            if pinned.is_some() { "as pinned for this GPU" } else { "measured now" },
        );
        let of_all = AllReduceTiles { crossover: Some(crossover), ..of_all };
        let communicators = PeerCommunicator::group(gpus.clone(), of_all, Placement::Apart, PATIENCE)?;
        let backends = gpus.into_iter().zip(tiles).map(|(gpu, tiles)| Cuda::new(gpu, tiles));
        let ranks = backends.zip(communicators);
        Ok(ranks.map(|(backend, communicator)| Self { backend, communicator }).collect())
    }
}
