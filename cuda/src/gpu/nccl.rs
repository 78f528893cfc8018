//! NCCL, NVIDIA's library of collectives between GPUs and machines: found and loaded at run time, in whichever version the machine has.
//!
//! cudarc's own binding panics where the library is missing. What is called here has been there since NCCL 2.18 (2023); CUDA 12.8 came with
//! 2.25. Communicators are non-blocking: a call that needs other ranks returns at once, is asked for later, and can be given up.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUdeviceptr;
use dsa80_reference::{Error, Result};
use libloading::Library;

use super::{Gpu, GpuBuffer, refuse};

pub(crate) mod leaving;
#[cfg(test)]
pub(crate) mod mock;

/// What the environment says of it: the library's path.
const VARIABLE: &str = "DSA80_NCCL";

// nccl.h.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;
const SUM: c_int = 0;
const MAGIC: c_uint = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;
/// The version whose [`Config`] this is, and the oldest that is taken: 2.18.
const OLDEST: c_int = 21800;

/// Between two looks whether a call is through.
const POLL: Duration = Duration::from_micros(20);

type Handle = *mut c_void;

/// What ranks need to find each other, made by one of them and given to the others.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NcclId([u8; 128]);

impl NcclId {
    /// As it is sent to another rank.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// As it came from another rank.
    ///
    /// # Errors
    /// It is not as long as one.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let id = bytes.try_into().map(Self);
        id.map_err(|_| refuse(format!("an NCCL id of {} bytes; expected 128", bytes.len())))
    }
}

/// `ncclConfig_t` of NCCL 2.18; newer versions take its `size` and `version` for what it is.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        #[derive(Debug)]
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn bind(library: &Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: the types are those of nccl.h; the library is never unloaded.
                unsafe { Ok(Self { $($field: *library.get(concat!($name, "\0").as_bytes())?,)* }) }
            }
        }
    };
}

functions! {
    version = "ncclGetVersion": fn(*mut c_int) -> c_int;
    unique_id = "ncclGetUniqueId": fn(*mut NcclId) -> c_int;
    init_rank = "ncclCommInitRankConfig": fn(*mut Handle, c_int, NcclId, c_int, *mut Config) -> c_int;
    async_error = "ncclCommGetAsyncError": fn(Handle, *mut c_int) -> c_int;
    abort = "ncclCommAbort": fn(Handle) -> c_int;
    error_string = "ncclGetErrorString": fn(c_int) -> *const c_char;
    last_error = "ncclGetLastError": fn(Handle) -> *const c_char;
    group_start = "ncclGroupStart": fn() -> c_int;
    group_end = "ncclGroupEnd": fn() -> c_int;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> c_int;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
}

/// The library.
#[derive(Debug)]
pub struct Nccl {
    functions: Functions,
    version: c_int,
}

impl Nccl {
    /// The library, loaded once for the process.
    ///
    /// # Errors
    /// It is not there, does not load or is too old, with what to do about it.
    pub fn load() -> Result<Arc<Self>> {
        static LOADED: OnceLock<std::result::Result<Arc<Nccl>, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| Self::find(&candidates()).map(Arc::new));
        loaded.clone().map_err(refuse)
    }

    fn find(paths: &[PathBuf]) -> std::result::Result<Self, String> {
        for path in paths {
            // SAFETY: loading runs the library's initialisers; the names are those of NVIDIA's library alone.
            match unsafe { Library::new(path) } {
                Ok(library) => return Self::bind(library, path),
                Err(error) => tracing::debug!("{}: {error}", path.display()),
            }
        }
        let tried: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        Err(format!(
            "NCCL cannot be loaded ({} tried); install it (pip install nvidia-nccl-cu12), let {VARIABLE} name its libnccl.so.2, or run all \
             ranks in one process with --collectives peer",
            tried.join(", ")
        ))
    }

    fn bind(library: Library, path: &Path) -> std::result::Result<Self, String> {
        let functions = Functions::bind(&library).map_err(|error| {
            format!("{} lacks a function: {error}; it needs NCCL 2.18 or newer", path.display())
        })?;
        let mut version = 0;
        // SAFETY: fills one int.
        let status = unsafe { (functions.version)(&raw mut version) };
        if status != SUCCESS || version < OLDEST {
            return Err(format!("{} is NCCL {}; expected 2.18 or newer", path.display(), words(version)));
        }
        tracing::info!("NCCL {}", words(version));
        // Its threads run for as long as the process lives.
        std::mem::forget(library);
        Ok(Self { functions, version })
    }

    /// The version, `"2.25.1"`.
    pub fn version(&self) -> String {
        words(self.version)
    }

    /// A new id, of a group that does not exist yet.
    ///
    /// # Errors
    /// NCCL finds no network to listen on.
    pub fn unique_id(&self) -> Result<NcclId> {
        let mut id = NcclId([0; 128]);
        // SAFETY: fills the id.
        self.check("ncclGetUniqueId", unsafe { (self.functions.unique_id)(&raw mut id) })?;
        Ok(id)
    }

    fn check(&self, function: &str, status: c_int) -> Result<()> {
        if status == SUCCESS { Ok(()) } else { Err(refuse(self.failure(function, status))) }
    }

    fn failure(&self, function: &str, status: c_int) -> String {
        // SAFETY: the strings are static, or live until the next error; copied at once. They are for words in an error alone.
        let [what, detail] = unsafe {
            [(self.functions.error_string)(status), (self.functions.last_error)(std::ptr::null_mut())].map(
                |text| {
                    if text.is_null() {
                        String::new()
                    } else {
                        CStr::from_ptr(text).to_string_lossy().into_owned()
                    }
                },
            )
        };
        let detail = if detail.trim().is_empty() { String::new() } else { format!(" ({})", detail.trim()) };
        format!("{function}: {what}{detail}; NCCL_DEBUG=WARN says more")
    }
}

/// `2.25.1` of 22501.
fn words(version: c_int) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

/// What the environment names, or else the loader's search path and the toolkit's folder.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        return vec![path.into()];
    }
    ["libnccl.so.2", "libnccl.so", "/usr/local/cuda/lib64/libnccl.so.2"].map(PathBuf::from).into()
}

/// A rank of an NCCL group. Not thread-safe: its owner locks it.
///
/// Dropping it ends what it runs on the GPU, whether it has joined or not, and waits until no graph refers to it any more: not for a thread
/// that keeps such a graph, nor between the calls that begin a group and end it.
#[derive(Debug)]
pub(crate) struct NcclRank {
    nccl: Arc<Nccl>,
    // Where it is written: some versions write it once more when the rank has joined. An abort returns when nobody does any more.
    handle: Box<Handle>,
}

impl Drop for NcclRank {
    fn drop(&mut self) {
        // SAFETY: the communicator is alive, and nobody has it any more. A rank that is ended has nobody to tell.
        let _ = unsafe { (self.nccl.functions.abort)(*self.handle) };
    }
}

// SAFETY: NCCL lets any thread use a communicator, one at a time.
unsafe impl Send for NcclRank {}

/// The element types that are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NcclType {
    Bf16,
    F32,
}

impl NcclType {
    fn number(self) -> c_int {
        if self == Self::Bf16 { BFLOAT16 } else { FLOAT32 }
    }

    pub(crate) fn bytes(self) -> usize {
        if self == Self::Bf16 { 2 } else { 4 }
    }
}

/// Why a call was not finished.
#[derive(Debug)]
pub(crate) enum Unfinished {
    Failed(Error),
    /// The owner gave up.
    GivenUp,
}

impl From<Error> for Unfinished {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What lies together in a shard, and where the ranks' go, one after the other. In elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GatheredRun<'a> {
    pub(crate) shard: &'a GpuBuffer,
    pub(crate) shard_start: usize,
    pub(crate) out: &'a GpuBuffer,
    pub(crate) out_start: usize,
    pub(crate) elements: usize,
    pub(crate) world_size: usize,
}

impl NcclRank {
    /// Begins to join the group of `id` as `rank` of `world_size`, on the GPU that is bound; [`settle`](Self::settle) says when it has joined.
    pub(crate) fn begin(nccl: Arc<Nccl>, id: NcclId, [rank, world_size]: [usize; 2]) -> Result<Self> {
        let mut config = Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: OLDEST.unsigned_abs(),
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        };
        let mut handle: Box<Handle> = Box::new(std::ptr::null_mut());
        // SAFETY: fills the handle, which stays where it is; the configuration is copied.
        let status = unsafe {
            (nccl.functions.init_rank)(
                &raw mut *handle,
                c_int::try_from(world_size).unwrap_or(c_int::MAX),
                id,
                c_int::try_from(rank).unwrap_or(c_int::MAX),
                &raw mut config,
            )
        };
        if status != SUCCESS && status != IN_PROGRESS || (*handle).is_null() {
            return Err(refuse(nccl.failure("ncclCommInitRankConfig", status)));
        }
        Ok(Self { nccl, handle })
    }

    /// Waits until the calls so far are through on the host, as long as the owner `goes_on`.
    pub(crate) fn settle(&self, goes_on: impl Fn() -> bool) -> std::result::Result<(), Unfinished> {
        let started = Instant::now();
        loop {
            match self.state()? {
                IN_PROGRESS if !goes_on() => return Err(Unfinished::GivenUp),
                // At first without sleeping: most calls are through at once.
                IN_PROGRESS if started.elapsed() > POLL => std::thread::sleep(POLL),
                IN_PROGRESS => std::hint::spin_loop(),
                _ => return Ok(()),
            }
        }
    }

    /// Fails with what went wrong since, on this rank or on the way to another.
    pub(crate) fn check(&self) -> Result<()> {
        self.state().map(drop)
    }

    fn state(&self) -> Result<c_int> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive; fills one int.
        let status = unsafe { (self.nccl.functions.async_error)(*self.handle, &raw mut state) };
        self.nccl.check("ncclCommGetAsyncError", status)?;
        match state {
            SUCCESS | IN_PROGRESS => Ok(state),
            error => Err(refuse(self.nccl.failure("NCCL", error))),
        }
    }

    /// A call that may go on after it has returned.
    fn called(&self, function: &str, status: c_int) -> Result<()> {
        if status == IN_PROGRESS { Ok(()) } else { self.nccl.check(function, status) }
    }

    /// Sums `count` elements over the ranks, in place.
    pub(crate) fn all_reduce(&self, gpu: &Gpu, data: &GpuBuffer, count: usize, of: NcclType) -> Result<()> {
        gpu.bind()?;
        let data = pointer(data.range(0, count * of.bytes())?);
        // SAFETY: the range was compared with the buffer, which outlives the stream's work; the communicator is alive.
        let status = unsafe {
            let (number, stream) = (of.number(), gpu.stream.cu_stream().cast());
            (self.nccl.functions.all_reduce)(data, data, count, number, SUM, *self.handle, stream)
        };
        self.called("ncclAllReduce", status)
    }

    /// Gathers every run over the ranks, all in one launch.
    pub(crate) fn all_gather(&self, gpu: &Gpu, runs: &[GatheredRun<'_>], of: NcclType) -> Result<()> {
        gpu.bind()?;
        // Together they are one launch. SAFETY: no arguments.
        self.nccl.check("ncclGroupStart", unsafe { (self.nccl.functions.group_start)() })?;
        let gathered = runs.iter().try_for_each(|run| {
            let bytes = |elements: usize| elements * of.bytes();
            let shard = run.shard.range(bytes(run.shard_start), bytes(run.elements))?;
            let out = run.out.range(bytes(run.out_start), bytes(run.elements * run.world_size))?;
            // SAFETY: as for `all_reduce`.
            let status = unsafe {
                let (number, stream) = (of.number(), gpu.stream.cu_stream().cast());
                (self.nccl.functions.all_gather)(
                    pointer(shard),
                    pointer(out),
                    run.elements,
                    number,
                    *self.handle,
                    stream,
                )
            };
            self.called("ncclAllGather", status)
        });
        // SAFETY: no arguments; the group must end even when it failed.
        let ended = unsafe { (self.nccl.functions.group_end)() };
        gathered.and_then(|()| self.called("ncclGroupEnd", ended))
    }

    /// Replaces `count` elements by those of rank `root`.
    pub(crate) fn broadcast(
        &self,
        gpu: &Gpu,
        data: &GpuBuffer,
        [count, root]: [usize; 2],
        of: NcclType,
    ) -> Result<()> {
        gpu.bind()?;
        let data = pointer(data.range(0, count * of.bytes())?);
        let root = c_int::try_from(root).unwrap_or(c_int::MAX);
        // SAFETY: as for `all_reduce`.
        let status = unsafe {
            let (number, stream) = (of.number(), gpu.stream.cu_stream().cast());
            (self.nccl.functions.broadcast)(data, data, count, number, root, *self.handle, stream)
        };
        self.called("ncclBroadcast", status)
    }
}

fn pointer(address: CUdeviceptr) -> *mut c_void {
    address as *mut c_void
}

/// Begins to join several ranks of one process, which would wait for each other if they joined in turn. `bind` binds a rank's GPU.
pub(crate) fn begin_together(
    library: &Arc<Nccl>,
    id: NcclId,
    world_size: usize,
    bind: impl Fn(usize) -> Result<()>,
) -> Result<Vec<NcclRank>> {
    // SAFETY: no arguments.
    library.check("ncclGroupStart", unsafe { (library.functions.group_start)() })?;
    let mut begun = Vec::with_capacity(world_size);
    let all = (0..world_size).try_for_each(|rank| {
        bind(rank)?;
        begun.push(NcclRank::begin(Arc::clone(library), id, [rank, world_size])?);
        Ok(())
    });
    // SAFETY: no arguments; the group must end even when it failed, and before the ranks that have begun are dropped.
    let ended = unsafe { (library.functions.group_end)() };
    all?;
    if ended == IN_PROGRESS { Ok(begun) } else { library.check("ncclGroupEnd", ended).map(|()| begun) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_or_another_is_refused_with_what_to_do() {
        let missing = Nccl::find(&["/nowhere/libnccl.so.2".into()]).unwrap_err();
        for words in ["/nowhere/libnccl.so.2 tried", "DSA80_NCCL", "--collectives peer"] {
            assert!(missing.contains(words), "{missing}");
        }
        if cfg!(target_os = "linux") {
            let other = Nccl::find(&["libc.so.6".into()]).unwrap_err();
            assert!(other.contains("libc.so.6 lacks a function"), "{other}");
        }
        assert_eq!(words(22501), "2.25.1");
        assert!(NcclId::from_bytes(&[0; 127]).is_err() && NcclId::from_bytes(&[0; 128]).is_ok());
    }

    #[test]
    fn where_there_is_nccl_it_is_bound() {
        match Nccl::load() {
            Ok(library) => assert!(library.version().starts_with("2.")),
            Err(error) => assert!(error.to_string().contains("NCCL"), "{error}"),
        }
    }
}
