//! The C++ side: its library, memory that it may touch, kernels that it runs.
#![expect(unsafe_code, reason = "kernels are C++, and what they touch is raw memory")]

use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

use super::compile::{Unit, with_lines};

/// Address space on either side of an allocation, so that what runs over one reaches no other.
const SPACE: usize = 1 << 20;
/// Bytes next to an allocation that are compared after every launch.
const GUARD: usize = 256;
/// What memory holds before it is written: not a number as f32, bf16 and f16, -1 as an integer.
const POISON: u8 = 0xff;
const GUARD_BYTE: u8 = 0xa5;
/// Threads that work on a launch at most: launches are small, and tests run side by side.
const MAX_WORKERS: u64 = 16;

type Entry = unsafe extern "C" fn(*mut *mut c_void);
type MapFn = unsafe extern "C" fn(usize) -> *mut u8;
type UnmapFn = unsafe extern "C" fn(*mut u8, usize);
type LaunchFn = unsafe extern "C" fn(
    Entry,
    *mut *mut c_void,
    *const Allocation,
    u32,
    *const u32,
    u32,
    u32,
    u64,
    u64,
) -> *mut c_void;
type RunFn = unsafe extern "C" fn(*mut c_void);
type MessageFn = unsafe extern "C" fn(*const c_void) -> *const c_char;

#[repr(C)]
struct Allocation {
    name: *const c_char,
    base: *const u8,
    bytes: u64,
}

/// The functions of `runtime.cpp`.
pub(super) struct Runtime {
    map: MapFn,
    unmap: UnmapFn,
    launch: LaunchFn,
    run: RunFn,
    join: RunFn,
    message: MessageFn,
    free_launch: RunFn,
    /// Kernels are linked against it.
    _library: Library,
}

/// The runtime, compiled and loaded by whoever asks first.
pub(super) fn loaded() -> Result<&'static Runtime, &'static String> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    RUNTIME
        .get_or_init(|| Runtime::load(&Unit::runtime().compiled()?).map_err(|error| error.to_string()))
        .as_ref()
}

impl Runtime {
    fn load(path: &Path) -> Result<Self, libloading::Error> {
        // SAFETY: the library is ours; loading it runs no code but that of the C++ runtime library. The types are those of its sources.
        unsafe {
            let library = Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL)?;
            Ok(Self {
                map: *library.get(b"emulation_map\0")?,
                unmap: *library.get(b"emulation_unmap\0")?,
                launch: *library.get(b"emulation_launch\0")?,
                run: *library.get(b"emulation_run\0")?,
                join: *library.get(b"emulation_join\0")?,
                message: *library.get(b"emulation_message\0")?,
                free_launch: *library.get(b"emulation_free_launch\0")?,
                _library: library,
            })
        }
    }
}

/// Device memory of the emulator.
#[derive(Debug, Clone)]
pub struct EmulatedBuffer(Arc<Memory>);

impl EmulatedBuffer {
    pub(super) fn new(memory: Memory) -> Self {
        Self(Arc::new(memory))
    }

    /// Where kernels see it.
    pub fn address(&self) -> usize {
        self.0.base().addr()
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.0
    }
}

/// An allocation with space around it.
#[derive(Debug)]
pub(super) struct Memory {
    name: CString,
    mapping: *mut u8,
    bytes: usize,
}

// SAFETY: it is memory that the struct owns, reached through copies in and out and by kernels, as a GPU's is.
unsafe impl Send for Memory {}
// SAFETY: as above; what two threads do to one buffer at a time is as undefined as on two streams, but for bytes.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn alloc(name: &str, bytes: usize) -> Option<Self> {
        let name = CString::new(name).ok()?;
        let runtime = loaded().ok()?;
        let size = bytes.checked_add(2 * SPACE)?;
        // SAFETY: no precondition.
        let mapping = unsafe { (runtime.map)(size) };
        if mapping.is_null() {
            return None;
        }
        // SAFETY: the mapping has GUARD bytes before and after the allocation.
        unsafe {
            mapping.add(SPACE - GUARD).write_bytes(GUARD_BYTE, GUARD);
            mapping.add(SPACE).write_bytes(POISON, bytes);
            mapping.add(SPACE + bytes).write_bytes(GUARD_BYTE, GUARD);
        }
        Some(Self { name, mapping, bytes })
    }

    fn base(&self) -> *mut u8 {
        self.mapping.wrapping_add(SPACE)
    }

    pub(super) fn name(&self) -> Cow<'_, str> {
        self.name.to_string_lossy()
    }

    fn range(&self, offset: usize, length: usize) -> Result<*mut u8, String> {
        if offset.checked_add(length).is_none_or(|end| end > self.bytes) {
            let name = self.name.to_string_lossy();
            return Err(format!("{length} bytes at {offset} of `{name}`, which has {}", self.bytes));
        }
        Ok(self.base().wrapping_add(offset))
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), String> {
        let at = self.range(offset, bytes.len())?;
        // SAFETY: the range was checked, and `bytes` is memory of Rust, which is never inside an allocation.
        unsafe { at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), String> {
        let at = self.range(offset, bytes.len())?;
        // SAFETY: as in `write`; all of the allocation was written when it was made.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(at, bytes.len()) };
        Ok(())
    }

    fn guards_hold(&self) -> bool {
        // SAFETY: both guards lie in the mapping and were written when it was made.
        let guards = unsafe {
            [
                std::slice::from_raw_parts(self.mapping.add(SPACE - GUARD), GUARD),
                std::slice::from_raw_parts(self.mapping.add(SPACE + self.bytes), GUARD),
            ]
        };
        guards.iter().all(|guard| guard.iter().all(|&byte| byte == GUARD_BYTE))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Ok(runtime) = loaded() {
            // SAFETY: the mapping is from `map` with this size, and nobody has a pointer into it any more.
            unsafe { (runtime.unmap)(self.mapping, self.bytes + 2 * SPACE) };
        }
    }
}

/// An argument of a kernel.
pub(super) enum Argument<'a> {
    Pointer(Option<&'a Memory>),
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
}

impl Argument<'_> {
    /// As `emulation_signature` spells the type of its parameter.
    fn letter(&self) -> char {
        match self {
            Argument::Pointer(_) => 'p',
            Argument::I32(_) => 'i',
            Argument::I64(_) => 'l',
            Argument::F32(_) => 'f',
            Argument::F64(_) => 'd',
        }
    }

    /// Its bytes, in the first ones of a word.
    fn word(&self) -> u64 {
        let mut word = [0; 8];
        match *self {
            Argument::Pointer(memory) => {
                word = (memory.map_or(0, |memory| memory.base().addr()) as u64).to_ne_bytes();
            }
            Argument::I32(value) => word[..4].copy_from_slice(&value.to_ne_bytes()),
            Argument::I64(value) => word = value.to_ne_bytes(),
            Argument::F32(value) => word[..4].copy_from_slice(&value.to_ne_bytes()),
            Argument::F64(value) => word = value.to_ne_bytes(),
        }
        u64::from_ne_bytes(word)
    }
}

/// How a kernel is launched.
pub(super) struct Shape {
    pub(super) grid: [u32; 3],
    pub(super) threads: u32,
    pub(super) shared_bytes: usize,
    pub(super) seed: u64,
    pub(super) seconds: u64,
}

/// A compiled kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    entry: Entry,
    parameters: String,
    path: PathBuf,
    _library: Library,
}

/// A launch that several threads work on.
#[derive(Clone, Copy)]
struct Running(*mut c_void);

// SAFETY: the runtime hands out blocks to any number of threads.
unsafe impl Send for Running {}

impl Kernel {
    pub(super) fn load(path: &Path) -> Result<Self, String> {
        loaded().map_err(Clone::clone)?;
        let open = || -> Result<Self, libloading::Error> {
            // SAFETY: the library was made from our sources; it runs no code when it is loaded. The symbols are those of EMULATION_ENTRY.
            unsafe {
                let library = Library::open(Some(path), RTLD_NOW | RTLD_LOCAL)?;
                let entry = *library.get::<Entry>(b"emulation_entry\0")?;
                let letters = *library.get::<*const c_char>(b"emulation_parameters\0")?;
                let parameters = CStr::from_ptr(letters).to_string_lossy().into_owned();
                Ok(Self { entry, parameters, path: path.to_owned(), _library: library })
            }
        };
        open().map_err(|error| error.to_string())
    }

    /// Runs it to its end.
    pub(super) fn run(&self, shape: &Shape, arguments: &[Argument<'_>]) -> Result<(), String> {
        let letters: String = arguments.iter().map(Argument::letter).collect();
        if letters != self.parameters {
            return Err(format!(
                "arguments {letters} for parameters {} (p pointer, i 32, l 64 bits, f float, d double)",
                self.parameters
            ));
        }
        let memories: Vec<&Memory> = arguments
            .iter()
            .filter_map(|argument| if let Argument::Pointer(memory) = argument { *memory } else { None })
            .collect();
        let allocations: Vec<Allocation> = memories
            .iter()
            .map(|memory| Allocation {
                name: memory.name.as_ptr(),
                base: memory.base(),
                bytes: memory.bytes as u64,
            })
            .collect();
        let mut words: Vec<u64> = arguments.iter().map(Argument::word).collect();
        let mut pointers: Vec<*mut c_void> =
            words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let runtime = loaded().map_err(Clone::clone)?;
        let shared_bytes = u32::try_from(shape.shared_bytes).map_err(|error| error.to_string())?;
        let num_allocations = u32::try_from(allocations.len()).map_err(|error| error.to_string())?;
        // SAFETY: the arguments have the types of the parameters, and what is pointed to outlives the launch, which is freed below.
        let launch = Running(unsafe {
            (runtime.launch)(
                self.entry,
                pointers.as_mut_ptr(),
                allocations.as_ptr(),
                num_allocations,
                shape.grid.as_ptr(),
                shape.threads,
                shared_bytes,
                shape.seed,
                shape.seconds,
            )
        });
        if launch.0.is_null() {
            return Err(format!(
                "a block of {} threads with {shared_bytes} bytes of shared memory",
                shape.threads
            ));
        }
        let blocks: u64 = shape.grid.iter().map(|&blocks| u64::from(blocks)).product();
        let cores =
            std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64).min(MAX_WORKERS);
        std::thread::scope(|scope| {
            let work = move |launch: Running| {
                // SAFETY: the launch is freed only after the scope.
                unsafe { (runtime.run)(launch.0) }
            };
            for _ in 1..blocks.min(cores) {
                scope.spawn(move || work(launch));
            }
            work(launch);
        });
        // SAFETY: all threads have left the launch; the message is copied before it is freed.
        let message = unsafe {
            (runtime.join)(launch.0);
            let message = (runtime.message)(launch.0);
            let message =
                (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned());
            (runtime.free_launch)(launch.0);
            message
        };
        if let Some(message) = message {
            return Err(with_lines(&message, &self.path));
        }
        match memories.iter().find(|memory| !memory.guards_hold()) {
            Some(memory) => Err(format!("bytes next to `{}` were written", memory.name.to_string_lossy())),
            None => Ok(()),
        }
    }
}
