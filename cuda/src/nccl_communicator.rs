//! Ranks with a GPU each that sum through NCCL: threads of one process, or processes, on one machine or on several.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use dsa80_reference::{Breaker, Communicator, DType, DeviceTensor, Error, Result};

use crate::device::Device;
use crate::gpu::nccl::{self, Nccl, NcclId, NcclRank, NcclType, Unfinished};
use crate::gpu::{Gpu, GpuBuffer};
use crate::tensor::CudaTensor;

/// How often NCCL is asked for errors that come after a call, while a rank waits for its GPU.
const WATCH: Duration = Duration::from_millis(100);

/// One rank of an NCCL group. Its collectives are launches like any other: they do not wait, and can be captured in a graph.
///
/// The order of a sum is NCCL's: fixed for a group, a size and a version of NCCL, so that runs repeat; bf16 is rounded on the way.
#[derive(Debug)]
pub struct NcclCommunicator {
    gpu: Arc<Gpu>,
    shared: Arc<Shared>,
    /// For barriers.
    token: GpuBuffer,
}

/// What the rank's own thread, the one that watches and the one that breaks have in common.
#[derive(Debug)]
struct Shared {
    rank: usize,
    world_size: usize,
    /// None once it was aborted.
    nccl: Mutex<Option<NcclRank>>,
    broken: OnceLock<String>,
}

impl NcclCommunicator {
    /// Joins the group of `id` as `rank` of `world_size`, and waits no longer than `patience` for the others, nor when `given_up`.
    ///
    /// # Errors
    /// NCCL is not there or fails; the others do not come.
    pub fn join(
        gpu: Arc<Gpu>,
        id: NcclId,
        [rank, world_size]: [usize; 2],
        patience: Duration,
        given_up: &dyn Fn() -> Option<String>,
    ) -> Result<Self> {
        let nccl = NcclRank::begin(Nccl::load()?, &gpu, id, [rank, world_size])?;
        Self::new(gpu, nccl, [rank, world_size], patience, given_up)
    }

    /// The ranks of a group with these GPUs, in rank order; each goes to its own thread.
    ///
    /// # Errors
    /// NCCL is not there or fails.
    pub fn group(gpus: &[Arc<Gpu>], patience: Duration) -> Result<Vec<Self>> {
        let library = Nccl::load()?;
        let begun = nccl::begin_together(&library, gpus, library.unique_id()?)?;
        let ranks = gpus.iter().zip(begun).enumerate();
        ranks
            .map(|(rank, (gpu, nccl))| {
                Self::new(Arc::clone(gpu), nccl, [rank, gpus.len()], patience, &|| None)
            })
            .collect()
    }

    fn new(
        gpu: Arc<Gpu>,
        nccl: NcclRank,
        [rank, world_size]: [usize; 2],
        patience: Duration,
        given_up: &dyn Fn() -> Option<String>,
    ) -> Result<Self> {
        let token = gpu.alloc("the token of barriers", 4)?;
        gpu.write(&token, 0, &[0; 4])?;
        let deadline = Instant::now() + patience;
        let joined = nccl.settle(|| Instant::now() < deadline && given_up().is_none());
        let shared =
            Arc::new(Shared { rank, world_size, nccl: Mutex::new(Some(nccl)), broken: OnceLock::new() });
        let communicator = Self { gpu, shared, token };
        match joined {
            Ok(()) => {}
            Err(Unfinished::Failed(error)) => return Err(error),
            Err(Unfinished::GivenUp) => {
                let late = || format!("the other ranks have not joined NCCL's group within {patience:?}");
                return Err(communicator.shared.error(given_up().unwrap_or_else(late)));
            }
        }
        communicator.shared.watch()?;
        Ok(communicator)
    }

    /// Launches a collective.
    fn collective(&self, launch: impl FnOnce(&NcclRank) -> Result<()>) -> Result<()> {
        let shared = &self.shared;
        let guard = shared.lock();
        let Some(nccl) = &*guard else { return Err(shared.why()) };
        let settled = launch(nccl)
            .map_err(Unfinished::from)
            .and_then(|()| nccl.settle(|| shared.broken.get().is_none()));
        settled.map_err(|unfinished| match unfinished {
            Unfinished::Failed(error) => error,
            Unfinished::GivenUp => shared.why(),
        })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<NcclRank>> {
        // Whole between any two statements that hold the lock.
        self.nccl.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, reason: String) -> Error {
        Error::Communicator { rank: self.rank, world_size: self.world_size, reason }
    }

    fn why(&self) -> Error {
        self.error(self.broken.get().cloned().unwrap_or_else(|| "the group has ended".into()))
    }

    /// Gives up: the kernels that wait for other ranks end. The first reason is the cause.
    fn abort(&self, reason: &str) {
        // First, so that a thread that waits in a call lets go of the lock.
        let _ = self.broken.set(reason.to_owned());
        let taken = self.lock().take();
        if let Some(nccl) = taken {
            // Waits for graphs that refer to it, which may go with whoever calls this.
            std::thread::spawn(move || nccl.abort());
        }
    }

    fn check(&self) -> Result<()> {
        let checked = match &*self.lock() {
            Some(nccl) => nccl.check(),
            None => Err(self.why()),
        };
        checked.inspect_err(|error| self.abort(&error.to_string()))
    }

    /// Asks NCCL for errors as long as the rank is there.
    fn watch(self: &Arc<Self>) -> Result<()> {
        let watched: Weak<Self> = Arc::downgrade(self);
        let watch = move || {
            while let Some(shared) = watched.upgrade()
                && shared.check().is_ok()
            {
                drop(shared);
                std::thread::sleep(WATCH);
            }
        };
        let started = std::thread::Builder::new().name("dsa80-nccl-watch".into()).spawn(watch);
        started.map(drop).map_err(|error| self.error(format!("NCCL cannot be watched: {error}")))
    }
}

/// How NCCL calls a tensor's elements.
fn element<D: Device>(kernel: &'static str, tensor: &CudaTensor<D>) -> Result<NcclType> {
    match tensor.dtype() {
        DType::Act => Ok(NcclType::Bf16),
        DType::Float => Ok(NcclType::F32),
        found => Err(Error::DType { kernel, tensor: "tensor", expected: "activations or floats", found }),
    }
}

impl Communicator<CudaTensor<Arc<Gpu>>> for NcclCommunicator {
    fn rank(&self) -> usize {
        self.shared.rank
    }

    fn world_size(&self) -> usize {
        self.shared.world_size
    }

    /// In NCCL's order; bf16 is rounded on the way.
    fn all_reduce(&self, tensor: &mut CudaTensor<Arc<Gpu>>) -> Result<()> {
        let of = element("all_reduce", tensor)?;
        self.collective(|nccl| nccl.all_reduce(&self.gpu, tensor.buffer(), tensor.len(), of))
    }

    fn all_gather(&self, shard: &CudaTensor<Arc<Gpu>>, out: &mut CudaTensor<Arc<Gpu>>) -> Result<()> {
        let (of, world_size) = (element("all_gather", shard)?, self.shared.world_size);
        let Some((&columns, leading)) = shard.shape().split_last() else {
            let (expected, found) = ("at least one dimension".into(), Vec::new());
            return Err(Error::Shape { kernel: "all_gather", tensor: "shard", expected, found });
        };
        let whole = [leading, &[columns * world_size]].concat();
        out.expect("all_gather", "out", out.shape() == whole, || format!("{whole:?}"))?;
        if element("all_gather", out)? != of {
            let (expected, found) = ("the element type of the shards", out.dtype());
            return Err(Error::DType { kernel: "all_gather", tensor: "out", expected, found });
        }
        if shard.is_empty() {
            return Ok(());
        }
        let dims = [leading.iter().product(), columns, world_size];
        self.collective(|nccl| nccl.all_gather(&self.gpu, [shard.buffer(), out.buffer()], dims, of))
    }

    fn broadcast(&self, tensor: &mut CudaTensor<Arc<Gpu>>, root: usize) -> Result<()> {
        let of = element("broadcast", tensor)?;
        if root >= self.shared.world_size {
            let expected = format!("a rank below {}", self.shared.world_size);
            return Err(Error::Value {
                kernel: "broadcast",
                name: "root",
                expected,
                found: root.to_string(),
            });
        }
        self.collective(|nccl| nccl.broadcast(&self.gpu, tensor.buffer(), [tensor.len(), root], of))
    }

    fn barrier(&self) -> Result<()> {
        self.collective(|nccl| nccl.all_reduce(&self.gpu, &self.token, 1, NcclType::F32))?;
        self.gpu.synchronize()?;
        self.shared.check()
    }

    fn check(&self) -> Result<()> {
        self.shared.check()
    }

    fn abort(&self, reason: &str) {
        self.shared.abort(&format!("rank {}: {reason}", self.shared.rank));
    }

    fn breaker(&self) -> Option<Breaker> {
        let shared = Arc::clone(&self.shared);
        Some(Arc::new(move |reason| shared.abort(reason)))
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        self.shared.abort("the rank has ended");
    }
}
