//! A library of this process, of which a test says what becomes of its ranks.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::*;

const SYSTEM_ERROR: c_int = 2;

/// Groups by the number in front of their id. Never freed: a rank may be asked for at any time.
static GROUPS: Mutex<Vec<&'static Ranks>> = Mutex::new(Vec::new());

thread_local! {
    static IN_A_GROUP: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

#[derive(Default)]
struct Ranks {
    joined: AtomicBool,
    aborts: AtomicUsize,
    /// What NCCL says of each that has joined.
    states: [AtomicI32; 8],
}

/// What a handle points to.
struct Rank {
    rank: usize,
    group: &'static Ranks,
    aborted: AtomicBool,
}

pub(crate) struct Mock {
    number: usize,
    group: &'static Ranks,
}

impl Default for Mock {
    fn default() -> Self {
        let group: &'static Ranks = Box::leak(Box::default());
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        groups.push(group);
        Self { number: groups.len() - 1, group }
    }
}

impl Mock {
    pub(crate) fn nccl(&self) -> Arc<Nccl> {
        let functions = Functions {
            version,
            unique_id,
            init_rank,
            async_error,
            abort,
            error_string,
            last_error,
            group_start,
            group_end,
            all_reduce,
            all_gather,
            broadcast,
        };
        Arc::new(Nccl { functions, version: OLDEST })
    }

    pub(crate) fn id(&self) -> NcclId {
        let mut id = [0; 128];
        id[0] = u8::try_from(self.number).unwrap();
        NcclId(id)
    }

    /// Rank 0 of two.
    pub(crate) fn begin(&self) -> NcclRank {
        NcclRank::begin(self.nccl(), self.id(), [0, 2]).unwrap()
    }

    pub(crate) fn join_at_once(&self) {
        self.group.joined.store(true, Ordering::Relaxed);
    }

    /// What `rank` has called is not through.
    pub(crate) fn stall(&self, rank: usize) {
        self.group.states[rank].store(IN_PROGRESS, Ordering::Relaxed);
    }

    pub(crate) fn fail(&self, rank: usize) {
        self.group.states[rank].store(SYSTEM_ERROR, Ordering::Relaxed);
    }

    pub(crate) fn aborts(&self) -> usize {
        self.group.aborts.load(Ordering::Relaxed)
    }

    pub(crate) fn wait_for_aborts(&self, count: usize) {
        let started = Instant::now();
        while self.aborts() < count {
            assert!(started.elapsed() < Duration::from_secs(20), "{} of {count} are aborted", self.aborts());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// # Safety
/// `handle` is one of [`init_rank`].
unsafe fn rank_of(handle: Handle) -> &'static Rank {
    // SAFETY: those are never freed.
    unsafe { &*handle.cast::<Rank>() }
}

unsafe extern "C" fn version(out: *mut c_int) -> c_int {
    // SAFETY: as NCCL is called.
    unsafe { *out = OLDEST };
    SUCCESS
}

unsafe extern "C" fn unique_id(_id: *mut NcclId) -> c_int {
    SYSTEM_ERROR
}

unsafe extern "C" fn init_rank(
    out: *mut Handle,
    _world_size: c_int,
    id: NcclId,
    rank: c_int,
    _config: *mut Config,
) -> c_int {
    let group = GROUPS.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(id.0[0])];
    let rank = usize::try_from(rank).unwrap();
    let made: *mut Rank = Box::into_raw(Box::new(Rank { rank, group, aborted: AtomicBool::new(false) }));
    // SAFETY: as NCCL is called.
    unsafe { *out = made.cast() };
    IN_PROGRESS
}

unsafe extern "C" fn async_error(handle: Handle, out: *mut c_int) -> c_int {
    // SAFETY: as NCCL is called.
    let rank = unsafe { rank_of(handle) };
    assert!(!rank.aborted.load(Ordering::Relaxed), "rank {} is asked after its abort", rank.rank);
    let joined = rank.group.joined.load(Ordering::Relaxed);
    let state = if joined { rank.group.states[rank.rank].load(Ordering::Relaxed) } else { IN_PROGRESS };
    // SAFETY: as NCCL is called.
    unsafe { *out = state };
    SUCCESS
}

unsafe extern "C" fn abort(handle: Handle) -> c_int {
    // SAFETY: as NCCL is called.
    let rank = unsafe { rank_of(handle) };
    assert!(!rank.aborted.swap(true, Ordering::Relaxed), "rank {} is aborted twice", rank.rank);
    assert!(!IN_A_GROUP.get(), "rank {} is aborted before the group's calls have ended", rank.rank);
    rank.group.aborts.fetch_add(1, Ordering::Relaxed);
    SUCCESS
}

unsafe extern "C" fn error_string(status: c_int) -> *const c_char {
    if status == SYSTEM_ERROR { c"unhandled system error".as_ptr() } else { c"no error".as_ptr() }
}

unsafe extern "C" fn last_error(_handle: Handle) -> *const c_char {
    std::ptr::null()
}

unsafe extern "C" fn group_start() -> c_int {
    IN_A_GROUP.set(true);
    SUCCESS
}

unsafe extern "C" fn group_end() -> c_int {
    IN_A_GROUP.set(false);
    IN_PROGRESS
}

unsafe extern "C" fn all_reduce(
    _send: *const c_void,
    _receive: *mut c_void,
    _count: usize,
    _of: c_int,
    _operation: c_int,
    _handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    SUCCESS
}

unsafe extern "C" fn all_gather(
    _send: *const c_void,
    _receive: *mut c_void,
    _count: usize,
    _of: c_int,
    _handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    SUCCESS
}

unsafe extern "C" fn broadcast(
    _send: *const c_void,
    _receive: *mut c_void,
    _count: usize,
    _of: c_int,
    _root: c_int,
    _handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    SUCCESS
}
