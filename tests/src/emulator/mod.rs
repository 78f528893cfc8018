//! A [`Device`] that is the CPU: the kernels' own sources, compiled by the host's C++ compiler against `tests/emulation/emulation.h`.
//!
//! Slow and strict: every load and store is checked, and what a GPU would let pass now and then is an error here, always, with its place:
//! out of bounds, misaligned, a race in shared memory, a read of what was never written or is still under way, a barrier or a warp
//! collective that not all reach.

mod compile;
mod graph;
mod runtime;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dsa80_cuda::{Arg, Device, Launch, Limits, Program, Sources};
use dsa80_reference::{Error, RecordedKernel, Result};

use compile::Unit;
use graph::Captured;
use runtime::{Argument, Kernel, Memory};

pub use graph::EmulatedGraph;
pub use runtime::EmulatedBuffer;

/// A change of one place of a source: a planted fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault<'a> {
    /// The file in `kernels/`.
    pub file: &'a str,
    /// What stands there, exactly once.
    pub find: &'a str,
    /// What stands there then.
    pub replace: &'a str,
}

/// The emulated device.
#[derive(Debug)]
pub struct Emulator {
    limits: Limits,
    sources: Sources,
    changed: BTreeMap<String, String>,
    seed: AtomicU64,
    seconds: u64,
    /// Bytes that may still be allocated.
    memory: AtomicUsize,
    kernels: Mutex<HashMap<(Program, &'static str), Arc<Kernel>>>,
    /// The launches of the capture that is under way.
    capture: Mutex<Option<Vec<Captured>>>,
}

impl Emulator {
    /// The embedded kernels.
    ///
    /// # Errors
    /// Says what this machine lacks.
    pub fn new() -> Result<Self, String> {
        Self::from_sources(Sources::Embedded)
    }

    /// The kernels of `sources`.
    ///
    /// # Errors
    /// Says what this machine lacks.
    pub fn from_sources(sources: Sources) -> Result<Self, String> {
        Self::available()?;
        // Few multiprocessors, so that persistent grids are small.
        let limits = Limits { name: "emulated A100".into(), multiprocessors: 4, ..Limits::a100() };
        Ok(Self {
            limits,
            sources,
            changed: BTreeMap::new(),
            seed: AtomicU64::new(0),
            seconds: 300,
            memory: AtomicUsize::new(usize::MAX),
            kernels: Mutex::default(),
            capture: Mutex::default(),
        })
    }

    /// Whether kernels can be emulated here.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn available() -> Result<(), String> {
        if !cfg!(target_os = "linux") {
            return Err("the emulator runs on Linux".into());
        }
        runtime::loaded().map(|_| ()).map_err(Clone::clone)
    }

    /// Plants faults.
    ///
    /// # Errors
    /// A place to change is not there, or there more than once.
    pub fn with_faults(mut self, faults: &[Fault<'_>]) -> Result<Self> {
        for fault in faults {
            let text = self.read(fault.file)?;
            let found = text.matches(fault.find).count();
            if found != 1 {
                return Err(refuse(format!(
                    "{} has {found} of {:?}, expected one to change",
                    fault.file, fault.find
                )));
            }
            let text = text.replacen(fault.find, fault.replace, 1);
            self.changed.insert(fault.file.to_owned(), text);
        }
        Ok(self)
    }

    /// Another order of warps, lanes and blocks.
    pub fn set_seed(&self, seed: u64) {
        self.seed.store(seed, Ordering::Relaxed);
    }

    /// Multiprocessors that launchers size persistent grids by.
    #[must_use]
    pub fn with_multiprocessors(mut self, multiprocessors: u32) -> Self {
        self.limits.multiprocessors = multiprocessors;
        self
    }

    /// Lets no more than so many further bytes be allocated: memory that runs out. What is freed does not come back.
    pub fn set_memory(&self, bytes: usize) {
        self.memory.store(bytes, Ordering::Relaxed);
    }

    /// Seconds after which a launch is given up, 300 unless said otherwise.
    #[must_use]
    pub fn with_time_limit(mut self, seconds: u64) -> Self {
        self.seconds = seconds;
        self
    }

    fn read(&self, file: &str) -> Result<Cow<'static, str>> {
        match self.changed.get(file) {
            Some(text) => Ok(Cow::Owned(text.clone())),
            None => self.sources.read(file),
        }
    }

    fn kernel(&self, program: &Program, entry: &'static str) -> Result<Arc<Kernel>> {
        let key = (program.clone(), entry);
        if let Some(kernel) = lock(&self.kernels).get(&key) {
            return Ok(Arc::clone(kernel));
        }
        self.refuse_in_capture("launched for the first time", entry)?;
        let unit = Unit::new(program, entry, |file| self.read(file))?;
        let kernel = Arc::new(Kernel::load(&unit.compiled().map_err(refuse)?).map_err(refuse)?);
        lock(&self.kernels).insert(key, Arc::clone(&kernel));
        Ok(kernel)
    }

    /// What a GPU cannot capture, in its words.
    fn refuse_in_capture(&self, what: &str, name: &str) -> Result<()> {
        if lock(&self.capture).is_some() {
            return Err(refuse(format!("`{name}` cannot be {what} while launches are captured")));
        }
        Ok(())
    }
}

impl Device for Emulator {
    type Buffer = EmulatedBuffer;
    type Graph = EmulatedGraph;

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<EmulatedBuffer> {
        self.refuse_in_capture("allocated", name)?;
        let left = |left: usize| left.checked_sub(bytes);
        let memory = match self.memory.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left) {
            Ok(_) => Memory::alloc(name, bytes),
            Err(_) => None,
        };
        memory
            .map(EmulatedBuffer::new)
            .ok_or_else(|| refuse(format!("no memory for `{name}`, {bytes} bytes")))
    }

    fn write(&self, buffer: &EmulatedBuffer, offset: usize, bytes: &[u8]) -> Result<()> {
        self.refuse_in_capture("written", &buffer.memory().name())?;
        buffer.memory().write(offset, bytes).map_err(refuse)
    }

    fn read(&self, buffer: &EmulatedBuffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.refuse_in_capture("read", &buffer.memory().name())?;
        buffer.memory().read(offset, bytes).map_err(refuse)
    }

    fn launch(&self, launch: &Launch<'_, EmulatedBuffer>) -> Result<()> {
        let place = |message: String| refuse(format!("{} ({}): {message}", launch.entry, launch.shape));
        if launch.shared_bytes > self.limits.shared_per_block {
            let message = format!(
                "a block asks for {} bytes of shared memory, there are {}",
                launch.shared_bytes, self.limits.shared_per_block
            );
            return Err(place(message));
        }
        if launch.grid[1] > 65535 || launch.grid[2] > 65535 || launch.grid.contains(&0) {
            return Err(place(format!("a grid of {:?} blocks", launch.grid)));
        }
        let kernel = self.kernel(launch.program, launch.entry).map_err(|error| place(error.to_string()))?;
        if let Some(capture) = &mut *lock(&self.capture) {
            capture.push(Captured::new(launch));
            return Ok(());
        }
        let arguments: Vec<Argument<'_>> = launch
            .args
            .iter()
            .map(|arg| match *arg {
                Arg::Buffer(buffer) => Argument::Pointer(Some(buffer.memory())),
                Arg::Null => Argument::Pointer(None),
                Arg::I32(value) => Argument::I32(value),
                Arg::I64(value) => Argument::I64(value),
                Arg::F32(value) => Argument::F32(value),
                Arg::F64(value) => Argument::F64(value),
            })
            .collect();
        let shape = runtime::Shape {
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            seed: self.seed.load(Ordering::Relaxed),
            seconds: self.seconds,
        };
        kernel.run(&shape, &arguments).map_err(place)
    }

    fn capture(&self, mut launches: impl FnMut() -> Result<()>) -> Result<EmulatedGraph> {
        self.refuse_in_capture("captured", "a graph")?;
        *lock(&self.capture) = Some(Vec::new());
        let launched = launches();
        let captured = lock(&self.capture).take().unwrap_or_default();
        launched.map(|()| EmulatedGraph(captured))
    }

    fn replay(&self, graph: &EmulatedGraph) -> Result<()> {
        self.refuse_in_capture("replayed", "a graph")?;
        graph.0.iter().try_for_each(|captured| captured.launch(self))
    }

    fn capture_kernels(
        &self,
        launches: impl FnMut() -> Result<()>,
    ) -> Result<Vec<RecordedKernel<EmulatedGraph>>> {
        let EmulatedGraph(captured) = self.capture(launches)?;
        let mut kernels: Vec<RecordedKernel<EmulatedGraph>> = Vec::new();
        for launch in captured {
            let (name, shape) = launch.key();
            let known = kernels.iter_mut().find(|kernel| kernel.name == name && kernel.shape == shape);
            match known {
                Some(kernel) => {
                    kernel.launches += 1;
                    kernel.graph.0.push(launch);
                }
                None => {
                    let graph = EmulatedGraph(vec![launch]);
                    kernels.push(RecordedKernel { name, shape, launches: 1, graph });
                }
            }
        }
        Ok(kernels)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refuse(message: String) -> Error {
    Error::Backend { backend: "emulator", message }
}
