//! Ranks that are threads of one process and reach into each other's device memory: on a GPU each, or all on one.

use std::sync::Arc;
use std::time::Duration;

use dsa80_reference::{Communicator, DeviceTensor, Error, Rendezvous, Result};

use crate::all_gather::{Gathered, MOST, all_gather, broadcast};
use crate::all_reduce::{AllReduceTiles, all_reduce};
use crate::all_reduce_norm::{AllReduceNormDims, NormParts, all_reduce_norm, fits};
use crate::device::Device;
use crate::exchange::{self, Exchange, ExchangeDims};
use crate::tensor::{CudaTensor, element_bytes};

/// How long a rank waits for another before the group is broken: longer than any step, and than what a first launch compiles.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Where the ranks of a group are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// On a device each. A collective is a launch like any other: it does not wait, and can be captured in a graph.
    Apart,
    /// On one device, as many as the model is cut into: a collective is one launch for all of them, for which the ranks' threads meet. For
    /// tests of what several GPUs compute.
    Together,
}

/// Whether a launch has as many blocks on every one of `devices`, which deal their work by their multiprocessors.
///
/// # Errors
/// The first that has another number of them.
pub(crate) fn alike<D: Device>(devices: &[D]) -> Result<()> {
    let of = |device: &D| device.limits().multiprocessors;
    let expected = devices.first().map_or(0, of);
    match devices.iter().map(of).enumerate().find(|&(_, found)| found != expected) {
        None => Ok(()),
        Some((rank, found)) => Err(Error::Value {
            kernel: "collectives",
            name: "multiprocessors",
            expected: format!(
                "{expected}, as rank 0's GPU has, on every GPU of a group; use NCCL between GPUs that differ"
            ),
            found: format!("{found} on rank {rank}'s"),
        }),
    }
}

/// One rank of a group. Its tensors belong to the device that it was made with, which its backend shares (an [`Arc`]).
#[derive(Debug)]
pub struct PeerCommunicator<D: Device> {
    device: D,
    placement: Placement,
    tiles: AllReduceTiles,
    exchange: Exchange<D::Buffer>,
    rendezvous: Rendezvous<Parts<D>>,
}

/// What a rank brings to a collective that is one launch for all.
type Parts<D> = Arc<[CudaTensor<D>]>;

impl<D: Device> PeerCommunicator<D> {
    /// The ranks of a group with these devices, in rank order; each goes to its own thread. Devices that are
    /// [apart](Placement::Apart) must reach each other's memory.
    ///
    /// # Errors
    /// More ranks, or fewer, than the kernels are written for; devices that have another number of multiprocessors; memory.
    pub fn group(
        devices: Vec<D>,
        tiles: AllReduceTiles,
        placement: Placement,
        patience: Duration,
    ) -> Result<Vec<Self>> {
        let dims = ExchangeDims::new(devices.len())?;
        alike(&devices)?;
        let workspaces = devices
            .iter()
            .map(|device| exchange::alloc_workspace(device, dims))
            .collect::<Result<Vec<_>>>()?;
        let ranks = devices.into_iter().zip(Rendezvous::group(dims.ranks));
        Ok(ranks
            .map(|(device, rendezvous)| Self {
                device,
                placement,
                tiles,
                exchange: Exchange {
                    dims,
                    workspaces: workspaces.clone(),
                    first_rank: if placement == Placement::Apart { rendezvous.rank() } else { 0 },
                    patience,
                },
                rendezvous,
            })
            .collect())
    }

    /// Launches a collective over `tensors`, the same of every rank: `launch` gets the first of each rank of the launch, the second, and
    /// so on.
    fn collective(
        &self,
        tensors: &[&CudaTensor<D>],
        launch: impl FnOnce(&[Vec<CudaTensor<D>>]) -> Result<()>,
    ) -> Result<()> {
        self.rendezvous.check()?;
        let own: Parts<D> = tensors.iter().map(|tensor| tensor.alias()).collect();
        if self.placement == Placement::Apart {
            return launch(&by_tensor(&[own]));
        }
        // What the others wrote on their streams must be there, and what is written here before they go on.
        self.wait()?;
        let parts = self.rendezvous.exchange(own)?;
        if self.rank_of_group() == 0
            && let Err(error) = launch(&by_tensor(&parts)).and_then(|()| self.check_device())
        {
            self.rendezvous.break_group(|| format!("rank 0: {error}"));
            return Err(error);
        }
        self.rendezvous.exchange(Arc::new([])).map(drop)
    }

    fn rank_of_group(&self) -> usize {
        self.rendezvous.rank()
    }

    fn own_workspace(&self) -> &D::Buffer {
        &self.exchange.workspaces[self.rank_of_group()]
    }

    /// Waits for everything that this rank has launched.
    fn wait(&self) -> Result<()> {
        self.device.read(self.own_workspace(), 0, &mut [])
    }

    fn check_device(&self) -> Result<()> {
        match exchange::failure(&self.device, self.own_workspace(), self.exchange.patience)? {
            None => Ok(()),
            Some(reason) => {
                // A rank that gave up has said why.
                self.rendezvous.check()?;
                let (rank, world_size) = (self.rank_of_group(), self.rendezvous.world_size());
                Err(Error::Communicator { rank, world_size, reason })
            }
        }
    }
}

/// The tensors of ranks, transposed.
fn by_tensor<D: Device>(parts: &[Parts<D>]) -> Vec<Vec<CudaTensor<D>>> {
    let tensors = parts.iter().map(|part| part.len()).min().unwrap_or(0);
    (0..tensors).map(|i| parts.iter().map(|part| part[i].alias()).collect()).collect()
}

impl<D: Device> Communicator<CudaTensor<D>> for PeerCommunicator<D> {
    fn rank(&self) -> usize {
        self.rank_of_group()
    }

    fn world_size(&self) -> usize {
        self.rendezvous.world_size()
    }

    fn all_reduce(&self, tensor: &mut CudaTensor<D>) -> Result<()> {
        self.collective(&[tensor], |of| all_reduce(&self.device, &self.tiles, &self.exchange, &of[0]))
    }

    fn all_reduce_norm(
        &self,
        x: &mut CudaTensor<D>,
        residual: &mut CudaTensor<D>,
        weight: &CudaTensor<D>,
        eps: f64,
        out: &mut CudaTensor<D>,
    ) -> Result<bool> {
        let exchange = self.exchange.dims;
        let shots = self.tiles.shots_of_norm(x.len() * element_bytes(x.dtype()), exchange.ranks);
        let tile = self.tiles.norm.of(shots);
        let dims = AllReduceNormDims { width: x.shape().last().copied().unwrap_or(0), shots };
        if !fits(&tile, exchange, dims, self.device.limits()) {
            return Ok(false);
        }
        self.collective(&[x, residual, weight, out], |of| {
            let parts = NormParts { x: &of[0], residual: &of[1], weight: &of[2], out: &of[3] };
            all_reduce_norm(shots, &self.device, &tile, &self.exchange, &parts, eps)
        })?;
        Ok(true)
    }

    fn all_gather(&self, shard: &CudaTensor<D>, out: &mut CudaTensor<D>) -> Result<()> {
        self.all_gather_each(&[shard], &mut [out])
    }

    fn all_gather_each(&self, shards: &[&CudaTensor<D>], outs: &mut [&mut CudaTensor<D>]) -> Result<()> {
        for (shards, outs) in shards.chunks(MOST).zip(outs.chunks(MOST)) {
            let both = shards.iter().zip(outs);
            let tensors: Vec<&CudaTensor<D>> = both.flat_map(|(shard, out)| [*shard, &**out]).collect();
            self.collective(&tensors, |of| {
                let gathered: Vec<_> =
                    of.chunks_exact(2).map(|of| Gathered { shards: &of[0], outs: &of[1] }).collect();
                all_gather(&self.device, &self.exchange, &gathered)
            })?;
        }
        Ok(())
    }

    fn broadcast(&self, tensor: &mut CudaTensor<D>, root: usize) -> Result<()> {
        self.collective(&[tensor], |of| broadcast(&self.device, &self.exchange, &of[0], root))
    }

    fn barrier(&self) -> Result<()> {
        self.wait()?;
        self.rendezvous.exchange(Arc::new([])).map(drop)
    }

    fn check(&self) -> Result<()> {
        self.check_device()
    }

    fn abort(&self, reason: &str) {
        let rank = self.rank_of_group();
        self.rendezvous.break_group(|| format!("rank {rank}: {reason}"));
        if self.placement == Placement::Apart {
            for workspace in &self.exchange.workspaces {
                // Who cannot be told waits no longer than its patience.
                let _ = exchange::abort(&self.device, workspace);
            }
        }
    }
}
