//! The device that a GPU is: one context, one stream, programs compiled at run time and kept.

mod cache;
mod compiler;
mod graph;
mod memory;
mod nvrtc;
mod resources;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use dsa80_reference::{Error, Result};

pub use self::cache::Compiled;
pub use self::compiler::Compiler;
pub use self::graph::Graph;
pub use self::memory::GpuBuffer;
pub use self::resources::Resources;
use crate::device::{Arg, Device, Launch, Limits, Program};
use crate::probe::{self, ProbeError};
use crate::sources::Sources;

/// A GPU. Everything runs in the order of one stream.
#[derive(Debug)]
pub struct Gpu {
    limits: Limits,
    driver_version: String,
    l2_bytes: usize,
    compiler: Compiler,
    // Before the context, which unloads them.
    modules: Mutex<HashMap<Program, Module>>,
    history: Mutex<History>,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

/// What was launched.
#[derive(Debug, Default)]
struct History {
    last: Option<(&'static str, &'static str)>,
    recorded: Option<Vec<Launched>>,
}

/// A launch, as results carry it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launched {
    /// The program.
    pub program: Program,
    /// The `KERNEL` function of it.
    pub entry: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: usize,
}

#[derive(Debug)]
struct Module {
    handle: sys::CUmodule,
    compiled: Arc<Compiled>,
    functions: Vec<Function>,
}

/// A kernel that can be launched.
#[derive(Debug, Clone, Copy)]
struct Function {
    entry: &'static str,
    handle: sys::CUfunction,
    shared_bytes: usize,
    parameters: Parameters,
}

// SAFETY: the handles are names that the driver gives out; it locks what they stand for itself.
unsafe impl Send for Module {}

/// The bytes of each parameter, to be compared with the arguments of every launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parameters {
    count: usize,
    bytes: [u8; MAX_ARGS],
}

const MAX_ARGS: usize = 48;

impl Gpu {
    /// Opens the GPU `ordinal`, with kernels from `sources`.
    ///
    /// # Errors
    /// There is no driver, no such GPU or no run-time compiler, each with what to do about it.
    pub fn open(ordinal: usize, sources: Sources) -> Result<Self> {
        Self::with_cache(ordinal, sources, None)
    }

    /// [`open`](Self::open) with cubins kept in the folder `cache`.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn with_cache(ordinal: usize, sources: Sources, cache: Option<PathBuf>) -> Result<Self> {
        let devices = probe::devices().map_err(|error| match error {
            ProbeError::NoDriver => {
                refuse("there is no CUDA driver: libcuda cannot be loaded; install NVIDIA's driver".into())
            }
            ProbeError::Driver(message) => refuse(message),
        })?;
        if ordinal >= devices.len() {
            return Err(refuse(format!("there is no GPU {ordinal}: the driver lists {}", devices.len())));
        }
        let failed = |error| refuse(driver_message(error));
        let context = CudaContext::new(ordinal).map_err(failed)?;
        // SAFETY: everything runs on the one stream made below, so no buffer needs events to order its uses; and events inside a
        // captured graph would not be allowed.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed)?;
        let limits = read_limits(&context).map_err(failed)?;
        let l2_bytes = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).map_err(failed)?;
        let driver = driver_version().map_err(failed)?;
        let compiler = Compiler::new(sources, limits.compute_capability, Some(driver.0), cache)?;
        Ok(Self {
            limits,
            driver_version: format!("{}.{}", driver.0, driver.1),
            l2_bytes: l2_bytes.unsigned_abs() as usize,
            compiler,
            modules: Mutex::default(),
            history: Mutex::default(),
            stream,
            context,
        })
    }

    /// The newest CUDA version that the driver knows, `"12.8"`.
    pub fn driver_version(&self) -> &str {
        &self.driver_version
    }

    /// The size of the L2 cache.
    pub fn l2_bytes(&self) -> usize {
        self.l2_bytes
    }

    /// What compiles the programs.
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// Free and total memory, in bytes.
    ///
    /// # Errors
    /// The driver does not answer.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(|error| refuse(driver_message(error)))
    }

    /// Waits for everything launched before.
    ///
    /// # Errors
    /// A launch before failed.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|error| self.failed_later(error))
    }

    /// Fills a buffer with one byte.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn fill(&self, buffer: &GpuBuffer, byte: u8) -> Result<()> {
        self.bind()?;
        // SAFETY: the range is the buffer's own.
        unsafe {
            result::memset_d8_async(buffer.pointer(), byte, buffer.bytes(), self.stream.cu_stream())
        }
        .map_err(|error| refuse(driver_message(error)))
    }

    /// Compiles and loads a program without launching it, and says what it takes.
    ///
    /// # Errors
    /// The program does not compile or load.
    pub fn prepare(&self, program: &Program) -> Result<Arc<Compiled>> {
        self.bind()?;
        let mut modules = lock(&self.modules);
        self.module(&mut modules, program).map(|module| module.compiled.clone())
    }

    /// What `launches` launches, beside launching it.
    ///
    /// # Errors
    /// `launches` failed.
    pub fn record(&self, launches: impl FnOnce() -> Result<()>) -> Result<Vec<Launched>> {
        lock(&self.history).recorded = Some(Vec::new());
        let launched = launches();
        let recorded = lock(&self.history).recorded.take().unwrap_or_default();
        launched.map(|()| recorded)
    }

    fn module<'a>(
        &self,
        modules: &'a mut HashMap<Program, Module>,
        program: &Program,
    ) -> Result<&'a mut Module> {
        if !modules.contains_key(program) {
            let compiled = Arc::new(self.compiler.compile(program)?);
            // SAFETY: the image is a whole cubin, from NVRTC or checked against its checksum; the driver copies it.
            let handle = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast()) }
                .map_err(|error| launch_error(program, program.defines_in_words(), driver_message(error)))?;
            modules.insert(program.clone(), Module { handle, compiled, functions: Vec::new() });
        }
        modules.get_mut(program).ok_or_else(|| refuse("a module vanished".into()))
    }

    fn function(&self, launch: &Launch<'_, GpuBuffer>) -> Result<Function> {
        let mut modules = lock(&self.modules);
        let module = self.module(&mut modules, launch.program)?;
        let known = module
            .functions
            .iter()
            .find(|function| function.entry == launch.entry && function.shared_bytes >= launch.shared_bytes);
        if let Some(function) = known {
            return Ok(*function);
        }
        let function = load_function(module.handle, launch.entry, launch.shared_bytes).map_err(|error| {
            let asked = format!("{} with {} bytes of shared memory", launch.entry, launch.shared_bytes);
            launch_error(launch.program, launch.shape.clone(), format!("{asked}: {}", driver_message(error)))
        })?;
        module.functions.retain(|known| known.entry != launch.entry);
        module.functions.push(function);
        Ok(function)
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| refuse(driver_message(error)))
    }

    /// An error that the driver reports after the launch that caused it.
    fn failed_later(&self, error: DriverError) -> Error {
        let last = lock(&self.history).last.map_or(String::new(), |(kernel, entry)| {
            format!(
                " (the last launch was {entry} of {kernel}; with CUDA_LAUNCH_BLOCKING=1 the one that fails is named)"
            )
        });
        refuse(format!("{}{last}", driver_message(error)))
    }
}

impl Device for Gpu {
    type Buffer = GpuBuffer;

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<GpuBuffer> {
        GpuBuffer::alloc(&self.context, name, bytes)
    }

    fn write(&self, buffer: &GpuBuffer, offset: usize, bytes: &[u8]) -> Result<()> {
        let destination = buffer.range(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the destination holds as many bytes; the source is pageable memory, which the driver has copied when it returns.
        unsafe { result::memcpy_htod_async(destination, bytes, self.stream.cu_stream()) }
            .map_err(|error| self.failed_later(error))
    }

    fn read(&self, buffer: &GpuBuffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let source = buffer.range(offset, bytes.len())?;
        self.bind()?;
        if !bytes.is_empty() {
            // SAFETY: the source holds as many bytes; `bytes` is borrowed until the wait below.
            unsafe { result::memcpy_dtoh_async(bytes, source, self.stream.cu_stream()) }
                .map_err(|error| self.failed_later(error))?;
        }
        self.synchronize()
    }

    fn launch(&self, launch: &Launch<'_, GpuBuffer>) -> Result<()> {
        self.bind()?;
        let function = self.function(launch)?;
        let refused = |message| launch_error(launch.program, launch.shape.clone(), message);
        let mut values = [0_u64; MAX_ARGS];
        let mut given = Parameters { count: launch.args.len(), bytes: [0; MAX_ARGS] };
        for ((value, bytes), arg) in values.iter_mut().zip(&mut given.bytes).zip(launch.args) {
            (*value, *bytes) = encode(arg);
        }
        if given != function.parameters {
            return Err(refused(format!(
                "{} has parameters of {:?} bytes, and was given {:?}",
                launch.entry,
                function.parameters.words(),
                given.words()
            )));
        }
        let mut pointers = values.each_mut().map(|value| std::ptr::from_mut(value).cast::<c_void>());
        let [x, y, z] = launch.grid;
        // SAFETY: the function belongs to a module that is never unloaded while `self` lives; count and sizes of the arguments were
        // compared with the parameters; what a kernel does with its pointers is the launcher's contract.
        unsafe {
            result::launch_kernel(
                function.handle,
                (x, y, z),
                (launch.threads, 1, 1),
                u32::try_from(launch.shared_bytes).unwrap_or(u32::MAX),
                self.stream.cu_stream(),
                &mut pointers,
            )
        }
        .map_err(|error| {
            let asked = format!(
                "{}<<<{:?}, {}, {}>>>",
                launch.entry, launch.grid, launch.threads, launch.shared_bytes
            );
            refused(format!("{asked}: {}", driver_message(error)))
        })?;
        let mut history = lock(&self.history);
        history.last = Some((launch.program.kernel(), launch.entry));
        if let Some(recorded) = &mut history.recorded {
            recorded.push(Launched {
                program: launch.program.clone(),
                entry: launch.entry,
                grid: launch.grid,
                threads: launch.threads,
                shared_bytes: launch.shared_bytes,
            });
        }
        Ok(())
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // A destructor has nobody to tell; a broken context has said so before.
        if self.context.bind_to_thread().is_err() || self.stream.synchronize().is_err() {
            return;
        }
        for (_, module) in lock(&self.modules).drain() {
            // SAFETY: loaded once, unloaded once, and nothing of it runs any more.
            let _ = unsafe { result::module::unload(module.handle) };
        }
    }
}

impl Parameters {
    fn words(&self) -> &[u8] {
        &self.bytes[..self.count.min(MAX_ARGS)]
    }
}

fn encode(arg: &Arg<'_, GpuBuffer>) -> (u64, u8) {
    match arg {
        Arg::Buffer(buffer) => (buffer.pointer(), 8),
        Arg::Null => (0, 8),
        // Little-endian hosts only, as CUDA's are: the low bytes come first.
        Arg::I32(value) => (u64::from(value.cast_unsigned()), 4),
        Arg::I64(value) => (value.cast_unsigned(), 8),
        Arg::F32(value) => (u64::from(value.to_bits()), 4),
    }
}

fn load_function(
    module: sys::CUmodule,
    entry: &'static str,
    shared_bytes: usize,
) -> Result<Function, DriverError> {
    let name = CString::new(entry).map_err(|_| DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND))?;
    // SAFETY: the module is loaded.
    let handle = unsafe { result::module::get_function(module, name) }?;
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let bytes = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
    // SAFETY: the function was just found.
    unsafe { result::function::set_function_attribute(handle, attribute, bytes) }?;
    let mut parameters = Parameters { count: 0, bytes: [0; MAX_ARGS] };
    for (index, bytes) in parameters.bytes.iter_mut().enumerate() {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: fills two size_t; an index past the last parameter is an error that ends the loop.
        if unsafe { sys::cuFuncGetParamInfo(handle, index, &raw mut offset, &raw mut size) }.result().is_err() {
            break;
        }
        *bytes = u8::try_from(size).unwrap_or(u8::MAX);
        parameters.count += 1;
    }
    Ok(Function { entry, handle, shared_bytes, parameters })
}

fn read_limits(context: &CudaContext) -> Result<Limits, DriverError> {
    let read = |attribute| context.attribute(attribute).map(i32::unsigned_abs);
    Ok(Limits {
        name: context.name()?,
        compute_capability: (
            read(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            read(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: read(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: read(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        shared_per_multiprocessor: read(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?
            as usize,
        registers_per_multiprocessor: read(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR)?,
        threads_per_multiprocessor: read(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
    })
}

fn driver_version() -> Result<(u32, u32), DriverError> {
    let mut version = 0;
    // SAFETY: fills one int.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    let version = version.unsigned_abs();
    Ok((version / 1000, version % 1000 / 10))
}

/// `CUDA_ERROR_OUT_OF_MEMORY: out of memory`.
fn driver_message(error: DriverError) -> String {
    let word = |text: Result<&std::ffi::CStr, DriverError>| {
        text.map_or(String::new(), |text| text.to_string_lossy().into_owned())
    };
    format!("{}: {}", word(error.error_name()), word(error.error_string()))
}

fn launch_error(program: &Program, shape: String, message: String) -> Error {
    Error::Launch { kernel: program.kernel(), shape, message }
}

fn refuse(message: String) -> Error {
    Error::Backend { backend: "cuda", message }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What it guards is whole between any two statements: a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
