//! Ranks with a GPU each that sum through NCCL: threads of one process, or processes, on one machine or on several.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dsa80_reference::{Breaker, Communicator, DType, DeviceTensor, Error, Result};

use crate::device::Device;
use crate::gpu::nccl::{self, GatheredRun, Nccl, NcclId, NcclRank, NcclType, Unfinished, leaving};
use crate::gpu::{Gpu, GpuBuffer};
use crate::tensor::CudaTensor;
use crate::unstack::{MOST, unstack};

/// How often NCCL is asked for errors that come after a call, while a rank waits for its GPU.
const WATCH: Duration = Duration::from_millis(100);

/// Bytes that are gathered at a time where rows are put side by side afterwards.
const STACK_BYTES: usize = 8 << 20;

/// Bytes of a gathered row that is worth a part of a launch by itself, as a row of logits is.
const LONG_ROW: usize = 64 << 10;

/// One rank of an NCCL group. Its collectives are launches like any other: they do not wait, and can be captured in a graph.
///
/// The order of a sum is NCCL's: fixed for a group, a size and a version of NCCL, so that runs repeat; bf16 is rounded on the way.
#[derive(Debug)]
pub struct NcclCommunicator {
    gpu: Arc<Gpu>,
    shared: Arc<Shared>,
    /// For barriers.
    token: GpuBuffer,
    /// Where gathered shards lie one below the other.
    stack: GpuBuffer,
}

/// The ranks of a group that are in this process. A rank that fails or leaves breaks all of them: NCCL would let the others wait for it.
#[derive(Debug)]
struct Group {
    world_size: usize,
    broken: OnceLock<String>,
    /// How many threads watch its ranks.
    watched: Mutex<usize>,
    told: Condvar,
}

impl Group {
    fn new(world_size: usize) -> Arc<Self> {
        Arc::new(Self { world_size, broken: OnceLock::new(), watched: Mutex::new(0), told: Condvar::new() })
    }

    /// Gives up: the kernels that wait for other ranks end. The first reason is the cause. Does not wait.
    fn break_off(&self, reason: &str) {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if self.broken.set(reason.to_owned()).is_ok() {
            leaving::expect(*watched);
            self.told.notify_all();
        }
    }

    fn is_broken(&self) -> bool {
        self.broken.get().is_some()
    }

    /// Whether it breaks within `time`.
    fn breaks_within(&self, time: Duration) -> bool {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.told.wait_timeout_while(watched, time, |_| !self.is_broken()));
        self.is_broken()
    }
}

/// One that watches a rank of the group: once the group is broken, the end of the process waits for it.
struct Watching(Arc<Group>);

impl Watching {
    fn of(group: &Arc<Group>) -> Self {
        let mut watched = group.watched.lock().unwrap_or_else(PoisonError::into_inner);
        *watched += 1;
        if group.is_broken() {
            leaving::expect(1);
        }
        drop(watched);
        Self(Arc::clone(group))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut watched = self.0.watched.lock().unwrap_or_else(PoisonError::into_inner);
        *watched -= 1;
        if self.0.is_broken() {
            leaving::left();
        }
    }
}

/// What a rank's own thread and the one that watches it have in common.
#[derive(Debug)]
struct Shared {
    rank: usize,
    group: Arc<Group>,
    /// None once it was aborted.
    nccl: Mutex<Option<NcclRank>>,
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
        let deadline = Instant::now() + patience;
        let library = Nccl::load()?;
        gpu.bind()?;
        let nccl = NcclRank::begin(library, id, [rank, world_size])?;
        let communicator = Self::new(gpu, rank, Group::new(world_size), nccl)?;
        communicator.shared.joined(deadline, patience, given_up)?;
        Ok(communicator)
    }

    /// The ranks of a group with these GPUs, in rank order; each goes to its own thread. One that fails, or is dropped, breaks all.
    ///
    /// # Errors
    /// NCCL is not there or fails.
    pub fn group(gpus: &[Arc<Gpu>], patience: Duration) -> Result<Vec<Self>> {
        let (deadline, library) = (Instant::now() + patience, Nccl::load()?);
        let begun =
            nccl::begin_together(&library, library.unique_id()?, gpus.len(), |rank| gpus[rank].bind())?;
        let group = Group::new(gpus.len());
        let ranks = gpus.iter().zip(begun).enumerate();
        let ranks = ranks
            .map(|(rank, (gpu, nccl))| Self::new(Arc::clone(gpu), rank, Arc::clone(&group), nccl))
            .collect::<Result<Vec<_>>>()?;
        ranks.iter().try_for_each(|rank| rank.shared.joined(deadline, patience, &|| None))?;
        Ok(ranks)
    }

    /// A rank that may still be joining.
    fn new(gpu: Arc<Gpu>, rank: usize, group: Arc<Group>, nccl: NcclRank) -> Result<Self> {
        // The GPU's context outlives what NCCL does on it.
        let shared = Shared::watched(rank, group, nccl, Arc::clone(&gpu))?;
        let token = gpu.alloc("the token of barriers", 4).and_then(|token| {
            gpu.write(&token, 0, &[0; 4])?;
            Ok(token)
        });
        let token = token.inspect_err(|error| shared.break_off(&error.to_string()))?;
        let stack = gpu.alloc("what NCCL gathers", STACK_BYTES);
        let stack = stack.inspect_err(|error| shared.break_off(&error.to_string()))?;
        Ok(Self { gpu, shared, token, stack })
    }
}

impl Shared {
    /// A rank with a thread of its own, which asks NCCL for errors, and aborts the rank when the group is broken: on no other thread, because
    /// that waits for graphs which may go with whoever breaks the group. `kept` stays until then.
    fn watched(
        rank: usize,
        group: Arc<Group>,
        nccl: NcclRank,
        kept: impl Send + 'static,
    ) -> Result<Arc<Self>> {
        let shared = Arc::new(Self { rank, group, nccl: Mutex::new(Some(nccl)) });
        let watched = Arc::clone(&shared);
        let watching = Watching::of(&shared.group);
        let watch = move || {
            while !watched.group.breaks_within(WATCH) {
                // What it finds breaks the group.
                let _ = watched.check();
            }
            let aborted = watched.lock().take();
            drop((aborted, kept, watching));
        };
        let started = std::thread::Builder::new().name(format!("dsa80-nccl-{rank}")).spawn(watch);
        started.map_err(|error| shared.error(format!("NCCL cannot be watched: {error}")))?;
        Ok(shared)
    }

    /// Waits until the rank has joined.
    fn joined(
        &self,
        deadline: Instant,
        patience: Duration,
        given_up: &dyn Fn() -> Option<String>,
    ) -> Result<()> {
        let goes_on = || Instant::now() < deadline && given_up().is_none();
        self.settle(
            |_| Ok(()),
            goes_on,
            || {
                let late = || format!("the other ranks have not joined NCCL's group within {patience:?}");
                given_up().unwrap_or_else(late)
            },
        )
        .inspect_err(|error| self.fails_with(error))
    }

    /// Launches a collective.
    fn collective(&self, launch: impl FnOnce(&NcclRank) -> Result<()>) -> Result<()> {
        self.settle(launch, || true, String::new)
    }

    /// Calls NCCL, and waits until that is through on the host, as long as it `goes_on` and the group is whole.
    fn settle(
        &self,
        call: impl FnOnce(&NcclRank) -> Result<()>,
        goes_on: impl Fn() -> bool,
        why_not: impl FnOnce() -> String,
    ) -> Result<()> {
        let guard = self.lock();
        let Some(nccl) = guard.as_ref().filter(|_| !self.group.is_broken()) else { return Err(self.why()) };
        let settled = call(nccl)
            .map_err(Unfinished::from)
            .and_then(|()| nccl.settle(|| !self.group.is_broken() && goes_on()));
        settled.map_err(|unfinished| match unfinished {
            Unfinished::Failed(error) => error,
            Unfinished::GivenUp if self.group.is_broken() => self.why(),
            Unfinished::GivenUp => self.error(why_not()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<NcclRank>> {
        // Whole between any two statements that hold the lock.
        self.nccl.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, reason: String) -> Error {
        Error::Communicator { rank: self.rank, world_size: self.group.world_size, reason }
    }

    fn why(&self) -> Error {
        self.error(self.group.broken.get().cloned().unwrap_or_else(|| "the group has ended".into()))
    }

    /// Breaks the group because of this rank.
    fn break_off(&self, reason: &str) {
        self.group.break_off(&format!("rank {}: {reason}", self.rank));
    }

    fn check(&self) -> Result<()> {
        let checked = match &*self.lock() {
            Some(nccl) if !self.group.is_broken() => nccl.check(),
            _ => return Err(self.why()),
        };
        checked.inspect_err(|error| self.fails_with(error))
    }

    fn fails_with(&self, error: &Error) {
        match error {
            Error::Communicator { reason, .. } => self.break_off(reason),
            other => self.break_off(&other.to_string()),
        }
    }
}

/// A tensor that is gathered.
struct Gathered<'a> {
    shard: &'a CudaTensor<Arc<Gpu>>,
    out: &'a CudaTensor<Arc<Gpu>>,
    of: NcclType,
    rows: usize,
    /// Of a shard.
    columns: usize,
    world_size: usize,
}

impl<'a> Gathered<'a> {
    fn new(
        shard: &'a CudaTensor<Arc<Gpu>>,
        out: &'a CudaTensor<Arc<Gpu>>,
        world_size: usize,
    ) -> Result<Self> {
        let of = element("all_gather", shard)?;
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
        Ok(Self { shard, out, of, rows: leading.iter().product(), columns, world_size })
    }

    /// Bytes of a row of the whole.
    fn row_bytes(&self) -> usize {
        self.columns * self.world_size * self.of.bytes()
    }

    /// Whether its rows are gathered one by one to where they belong: a single one, or such as are worth it.
    fn in_place(&self) -> bool {
        self.rows <= 1 || self.row_bytes() >= LONG_ROW
    }
}

impl NcclCommunicator {
    fn gather_rows(
        &self,
        Gathered { shard, out, of, rows, columns, world_size }: &Gathered<'_>,
    ) -> Result<()> {
        if shard.is_empty() {
            return Ok(());
        }
        let run = |row: usize| GatheredRun {
            shard: shard.buffer(),
            shard_start: row * columns,
            out: out.buffer(),
            out_start: row * columns * world_size,
            elements: *columns,
            world_size: *world_size,
        };
        let runs: Vec<_> = (0..*rows).map(run).collect();
        self.shared.collective(|nccl| nccl.all_gather(&self.gpu, &runs, *of))
    }

    /// Tensors of as many rows and of one type: shards one below the other, which a kernel then puts side by side.
    fn gather_stacked(&self, all: &[&Gathered<'_>]) -> Result<()> {
        let Some(&&Gathered { of, rows, world_size, .. }) = all.first() else { return Ok(()) };
        let row_bytes: usize = all.iter().map(|one| one.row_bytes()).sum();
        let outs: Vec<_> = all.iter().map(|one| one.out).collect();
        // A row of each is shorter than the stack.
        let at_once = (STACK_BYTES / row_bytes.max(1)).max(1);
        for first in (0..rows).step_by(at_once) {
            let rows = at_once.min(rows - first);
            let mut out_start = 0;
            let mut runs = Vec::with_capacity(all.len());
            for Gathered { shard, columns, .. } in all {
                let (shard_start, elements) = (first * columns, rows * columns);
                let (shard, out) = (shard.buffer(), &self.stack);
                runs.push(GatheredRun { shard, shard_start, out, out_start, elements, world_size });
                out_start += elements * world_size;
            }
            self.shared.collective(|nccl| nccl.all_gather(&self.gpu, &runs, of))?;
            unstack(&self.gpu, &self.stack, &outs, world_size, [first, rows])?;
        }
        Ok(())
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
        self.shared.group.world_size
    }

    /// In NCCL's order; bf16 is rounded on the way.
    fn all_reduce(&self, tensor: &mut CudaTensor<Arc<Gpu>>) -> Result<()> {
        let of = element("all_reduce", tensor)?;
        self.shared.collective(|nccl| nccl.all_reduce(&self.gpu, tensor.buffer(), tensor.len(), of))
    }

    fn all_gather(&self, shard: &CudaTensor<Arc<Gpu>>, out: &mut CudaTensor<Arc<Gpu>>) -> Result<()> {
        self.all_gather_each(&[shard], &mut [out])
    }

    fn all_gather_each(
        &self,
        shards: &[&CudaTensor<Arc<Gpu>>],
        outs: &mut [&mut CudaTensor<Arc<Gpu>>],
    ) -> Result<()> {
        let world_size = self.world_size();
        let gathered = shards.iter().zip(outs.iter());
        let gathered: Vec<_> =
            gathered.map(|(shard, out)| Gathered::new(shard, out, world_size)).collect::<Result<_>>()?;
        gathered.iter().filter(|one| one.in_place()).try_for_each(|one| self.gather_rows(one))?;
        let stacked: Vec<_> = gathered.iter().filter(|one| !one.in_place()).collect();
        let alike = |a: &&Gathered<'_>, b: &&Gathered<'_>| (a.rows, a.of) == (b.rows, b.of);
        let alike = stacked.chunk_by(alike).flat_map(|alike| alike.chunks(MOST));
        alike.into_iter().try_for_each(|alike| self.gather_stacked(alike))
    }

    fn broadcast(&self, tensor: &mut CudaTensor<Arc<Gpu>>, root: usize) -> Result<()> {
        let of = element("broadcast", tensor)?;
        if root >= self.shared.group.world_size {
            let expected = format!("a rank below {}", self.shared.group.world_size);
            return Err(Error::Value {
                kernel: "broadcast",
                name: "root",
                expected,
                found: root.to_string(),
            });
        }
        self.shared.collective(|nccl| nccl.broadcast(&self.gpu, tensor.buffer(), [tensor.len(), root], of))
    }

    fn barrier(&self) -> Result<()> {
        self.shared.collective(|nccl| nccl.all_reduce(&self.gpu, &self.token, 1, NcclType::F32))?;
        self.gpu.synchronize()?;
        self.shared.check()
    }

    fn check(&self) -> Result<()> {
        self.shared.check()
    }

    fn abort(&self, reason: &str) {
        self.shared.break_off(reason);
    }

    fn breaker(&self) -> Option<Breaker> {
        let group = Arc::clone(&self.shared.group);
        Some(Arc::new(move |reason| group.break_off(reason)))
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        self.shared.group.break_off(&format!("rank {} has left", self.shared.rank));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::nccl::mock::Mock;

    /// Far less than any deadline, and far more than it takes.
    const SOON: Duration = Duration::from_secs(20);

    fn ranks(mock: &Mock, world_size: usize) -> Vec<Arc<Shared>> {
        let group = Group::new(world_size);
        let begun = nccl::begin_together(&mock.nccl(), mock.id(), world_size, |_| Ok(())).unwrap();
        let ranks = begun.into_iter().enumerate();
        ranks.map(|(rank, nccl)| Shared::watched(rank, Arc::clone(&group), nccl, ()).unwrap()).collect()
    }

    fn join(rank: &Shared, patience: Duration) -> Result<()> {
        rank.joined(Instant::now() + patience, patience, &|| None)
    }

    /// Rank 1 waits in a collective that rank 0 does not come to; how that ends when `instead` happens to rank 0.
    fn end(instead: impl FnOnce(&Mock, &Shared)) -> String {
        let mock = Mock::default();
        mock.join_at_once();
        let ranks = ranks(&mock, 2);
        ranks.iter().for_each(|rank| join(rank, SOON).unwrap());
        let started = Instant::now();
        let (waiting, waits) = std::sync::mpsc::channel();
        let error = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                ranks[1].collective(|_| {
                    mock.stall(1);
                    waiting.send(()).unwrap();
                    Ok(())
                })
            });
            waits.recv().unwrap();
            instead(&mock, &ranks[0]);
            waiter.join().unwrap().unwrap_err().to_string()
        });
        assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
        // Each on its own thread, and once.
        mock.wait_for_aborts(2);
        assert!(leaving::all_within(SOON));
        for rank in &ranks {
            let later = [rank.check(), rank.collective(|_| panic!("nothing is called once it is broken"))];
            assert!(later.into_iter().all(|later| later.is_err()));
        }
        assert_eq!(mock.aborts(), 2);
        error
    }

    #[test]
    fn a_rank_that_fails_in_any_way_ends_what_the_others_of_its_process_wait_for() {
        let aborted = end(|_, rank| rank.break_off("rms_norm: `x` has shape [3]"));
        assert!(
            aborted.contains("rank 1 of 2: a collective was broken off: rank 0: rms_norm: `x` has shape [3]"),
            "{aborted}"
        );
        let broken = end(|_, rank| rank.group.break_off("a step has not finished within 120s"));
        assert!(broken.contains("a step has not finished within 120s"), "{broken}");
        // Nobody asks: the thread that watches finds out.
        let failed = end(|mock, _| mock.fail(0));
        assert!(failed.contains("rank 0: ") && failed.contains("unhandled system error"), "{failed}");
    }

    #[test]
    fn a_rank_that_still_joins_is_aborted_before_it_is_freed() {
        let mock = Mock::default();
        drop(NcclRank::begin(mock.nccl(), mock.id(), [0, 2]).unwrap());
        assert_eq!(mock.aborts(), 1);
        // Also where another one could not begin, but not before the group's calls have ended.
        let mock = Mock::default();
        let missing = || Err(Error::Backend { backend: "cuda", message: "no context".into() });
        let bind = |rank| if rank == 1 { missing() } else { Ok(()) };
        let error = nccl::begin_together(&mock.nccl(), mock.id(), 2, bind).unwrap_err();
        assert!(error.to_string().contains("no context"), "{error}");
        assert_eq!(mock.aborts(), 1);
    }

    #[test]
    fn ranks_that_do_not_join_are_not_waited_for() {
        let mock = Mock::default();
        let ranks = ranks(&mock, 2);
        let late = join(&ranks[0], Duration::from_millis(30)).unwrap_err().to_string();
        assert!(late.contains("have not joined NCCL's group within 30ms"), "{late}");
        // The other is told at once.
        assert!(join(&ranks[1], 10 * SOON).unwrap_err().to_string().contains("within 30ms"));
        mock.wait_for_aborts(2);
        let lost = || Some("rank 1 has closed its connection".to_owned());
        let rank = Shared::watched(0, Group::new(2), mock.begin(), ()).unwrap();
        let error = rank.joined(Instant::now() + 10 * SOON, 10 * SOON, &lost).unwrap_err();
        assert!(error.to_string().contains("rank 1 has closed its connection"), "{error}");
        mock.wait_for_aborts(3);
    }
}
