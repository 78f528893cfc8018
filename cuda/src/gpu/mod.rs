//! The device that a GPU is: one context, one stream, programs compiled at run time and kept.

mod cache;
mod compiler;
mod cublaslt;
mod graph;
mod libraries;
mod memory;
pub(crate) mod nccl;
mod nvrtc;
mod peers;
mod pinned;
mod resources;
mod sieve;
mod staging;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use dsa80_reference::buffers::HostMemory;
use dsa80_reference::{Error, RecordedKernel, Result};

pub use self::cache::Compiled;
pub use self::compiler::Compiler;
use self::cublaslt::{CublasLt, Pointers, Shape};
pub use self::graph::{Graph, Moment};
pub use self::memory::GpuBuffer;
pub use self::nccl::{Nccl, NcclId};
use self::pinned::Pinned;
pub use self::resources::Resources;
use self::sieve::Sieve;
use self::staging::Staging;
use crate::device::{Arg, Device, Gemm, Launch, Limits, Program};
use crate::probe::{self, ProbeError};
use crate::sources::Sources;

/// A GPU. Everything runs in the order of one stream.
#[derive(Debug)]
pub struct Gpu {
    limits: Limits,
    driver_version: String,
    l2_bytes: usize,
    compiler: Compiler,
    modules: Arc<Modules>,
    history: Mutex<History>,
    capturing: AtomicBool,
    /// What the capture under way has marked.
    moments: Mutex<Vec<Arc<CudaEvent>>>,
    /// Made by the first large copy.
    staging: Mutex<Option<Staging>>,
    // Loaded with the first product that it may take.
    cublaslt: OnceLock<Option<Arc<CublasLt>>>,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

/// What was launched.
#[derive(Debug, Default)]
struct History {
    last: Option<(&'static str, &'static str)>,
    recorded: Option<Vec<Launched>>,
    sieve: Option<Sieve>,
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

/// Every program that was loaded, kept as long as anything can launch it.
#[derive(Debug)]
struct Modules {
    loaded: Mutex<HashMap<Program, Module>>,
    stream: Arc<CudaStream>,
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
            modules: Arc::new(Modules { loaded: Mutex::default(), stream: stream.clone() }),
            history: Mutex::default(),
            capturing: AtomicBool::new(false),
            moments: Mutex::default(),
            staging: Mutex::default(),
            cublaslt: OnceLock::new(),
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
        unsafe { result::memset_d8_async(buffer.pointer(), byte, buffer.bytes(), self.stream.cu_stream()) }
            .map_err(|error| refuse(driver_message(error)))
    }

    /// Compiles and loads a program without launching it, and says what it takes.
    ///
    /// # Errors
    /// The program does not compile or load.
    pub fn prepare(&self, program: &Program) -> Result<Arc<Compiled>> {
        self.bind()?;
        let mut modules = lock(&self.modules.loaded);
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
        let mut modules = lock(&self.modules.loaded);
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

    /// NVIDIA's library of products, where there is one.
    fn cublaslt(&self) -> Result<Option<&Arc<CublasLt>>> {
        if let Some(known) = self.cublaslt.get() {
            return Ok(known.as_ref());
        }
        self.refuse_in_capture("loaded", "cuBLASLt")?;
        let major = self.driver_version.split('.').next().and_then(|major| major.parse().ok());
        let loaded = CublasLt::load(&self.context, major)?.map(Arc::new);
        Ok(self.cublaslt.get_or_init(|| loaded).as_ref())
    }

    /// Whether products of many tokens are those of NVIDIA's library.
    ///
    /// # Errors
    /// The library is there and does not work.
    pub fn has_gemm(&self) -> Result<bool> {
        self.bind()?;
        self.cublaslt().map(|library| library.is_some())
    }

    /// What a captured graph would do at the wrong time, or not at all.
    fn refuse_in_capture(&self, what: &str, name: &str) -> Result<()> {
        if self.capturing.load(Ordering::Relaxed) {
            return Err(refuse(format!("`{name}` cannot be {what} while launches are captured")));
        }
        Ok(())
    }

    /// Copies pinned memory of the host, which has been read when this returns.
    fn write_pinned(&self, destination: sys::CUdeviceptr, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's destination holds as many bytes; the source is borrowed until the wait.
        unsafe { result::memcpy_htod_async(destination, bytes, self.stream.cu_stream()) }
            .map_err(|error| self.failed_later(error))?;
        self.synchronize()
    }

    pub(crate) fn bind(&self) -> Result<()> {
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
    type Graph = Graph;

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn host_memory(&self) -> Option<Arc<dyn HostMemory>> {
        Some(Arc::new(Pinned::new(Arc::clone(&self.context))))
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<GpuBuffer> {
        self.refuse_in_capture("allocated", name)?;
        GpuBuffer::alloc(&self.context, name, bytes)
    }

    fn write(&self, buffer: &GpuBuffer, offset: usize, bytes: &[u8]) -> Result<()> {
        self.refuse_in_capture("written", buffer.name())?;
        let destination = buffer.range(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        if bytes.len() >= staging::SMALLEST {
            if pinned::is_pinned(bytes) {
                return self.write_pinned(destination, bytes);
            }
            let mut staging = lock(&self.staging);
            let copied = match &mut *staging {
                Some(staging) => Ok(staging),
                none => Staging::new(&self.context).map(|staging| none.insert(staging)),
            };
            // SAFETY: the destination holds as many bytes, and freeing it waits for the stream; the context is current.
            return copied
                .and_then(|staging| unsafe { staging.copy(destination, bytes, self.stream.cu_stream()) })
                .map_err(|error| self.failed_later(error));
        }
        // SAFETY: the destination holds as many bytes; the source is pageable memory, which the driver has copied when it returns.
        unsafe { result::memcpy_htod_async(destination, bytes, self.stream.cu_stream()) }
            .map_err(|error| self.failed_later(error))
    }

    fn read(&self, buffer: &GpuBuffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.refuse_in_capture("read", buffer.name())?;
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
        if self.leaves_out(|| (launch.program.name_of(launch.entry), launch.shape.clone())) {
            return Ok(());
        }
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
        // SAFETY: the function belongs to a module that `self` keeps loaded; count and sizes of the arguments were
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

    fn capture(&self, launches: impl FnMut() -> Result<()>) -> Result<Graph> {
        Gpu::capture(self, launches)
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        graph.launch()
    }

    fn capture_kernels(&self, launches: impl FnMut() -> Result<()>) -> Result<Vec<RecordedKernel<Graph>>> {
        Gpu::capture_kernels(self, launches)
    }

    fn time_replays(&self, graph: &Graph, times: usize) -> Result<Vec<f64>> {
        self.time(times, || graph.launch())
    }

    fn gemm(&self, product: &Gemm<'_, GpuBuffer>) -> Result<bool> {
        self.bind()?;
        let Some(library) = self.cublaslt()? else { return Ok(false) };
        let &Gemm { kernel, first_row, floats, tokens, columns, features, .. } = product;
        let (row_bytes, out_bytes) = (2 * columns, if floats { 4 } else { 2 });
        let pointers = Pointers {
            x: product.x.range(0, tokens * row_bytes)?,
            weight: product.weight.range(first_row * row_bytes, features * row_bytes)?,
            out: product.out.range(0, tokens * features * out_bytes)?,
        };
        if !columns.is_multiple_of(8) || !(features * out_bytes).is_multiple_of(16) {
            return Ok(false);
        }
        let shape = Shape { tokens, columns, features, floats };
        let words = || format!("{tokens} x {columns} -> {features}");
        if let Some(launched) = self.leaves_out_product(|| (format!("{kernel}: cublasLtMatmul"), words())) {
            return Ok(launched);
        }
        // SAFETY: the ranges were compared with the buffers; allocations are aligned to 256 bytes, rows to 16.
        let launched = unsafe { library.multiply(shape, pointers, self.stream.cu_stream().cast()) }
            .map_err(|error| Error::Launch { kernel, shape: words(), message: error.to_string() })?;
        self.has_answered(launched);
        if launched {
            lock(&self.history).last = Some((kernel, "cublasLtMatmul"));
        }
        Ok(launched)
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        // A destructor has nobody to tell; a broken context has said so before.
        if self.stream.context().bind_to_thread().is_err() || self.stream.synchronize().is_err() {
            return;
        }
        for (_, module) in lock(&self.loaded).drain() {
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
        Arg::F64(value) => (value.to_bits(), 8),
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
        if unsafe { sys::cuFuncGetParamInfo(handle, index, &raw mut offset, &raw mut size) }.result().is_err()
        {
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Past the test runner, which keeps what a test that passes prints.
    fn tell(left_out: &Error) {
        let _ = writeln!(std::io::stderr(), "left out: {left_out}");
    }

    /// A folder with one kernel, and the GPU with its sources; nothing where there is no GPU.
    fn gpu_with(kernel: &str) -> Option<(tempfile::TempDir, Gpu)> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("add.cu"), kernel).unwrap();
        let cache = Some(folder.path().join("cache"));
        match Gpu::with_cache(0, Sources::Folder(folder.path().to_owned()), cache) {
            Ok(gpu) => Some((folder, gpu)),
            Err(error) => {
                let words = ["no CUDA driver", "run-time compiler", "the driver lists", "CUDA_ERROR"];
                assert!(words.iter().any(|word| error.to_string().contains(word)), "{error}");
                tell(&error);
                None
            }
        }
    }

    const ADD: &str = "extern \"C\" __global__ void add(float* out, float what, int count) {\n  \
        extern __shared__ float shared[];\n  shared[threadIdx.x] = what * FACTOR;\n  __syncthreads();\n  \
        if (threadIdx.x < count) out[threadIdx.x] += shared[threadIdx.x];\n}\n";

    fn launch(gpu: &Gpu, program: &Program, shared_bytes: usize, args: &[Arg<'_, GpuBuffer>]) -> Result<()> {
        let shape = "4 numbers".to_owned();
        gpu.launch(&Launch { program, entry: "add", grid: [1; 3], threads: 32, shared_bytes, shape, args })
    }

    #[test]
    fn launches_are_captured_and_replayed() {
        let Some((_folder, gpu)) = gpu_with(ADD) else { return };
        let program = Program { source: "add.cu", defines: vec![("FACTOR", "2.0f".to_owned())] };
        let out = gpu.alloc("out", 16).unwrap();
        gpu.write(&out, 0, bytemuck::cast_slice(&[1.0_f32, 2.0, 3.0, 4.0])).unwrap();
        let args = [Arg::Buffer(&out), Arg::F32(0.5), Arg::I32(4)];
        // More shared memory than a kernel gets unasked.
        launch(&gpu, &program, 96 * 1024, &args).unwrap();
        let graph = gpu
            .capture(|| {
                assert!(gpu.alloc("more", 4).unwrap_err().to_string().contains("captured"));
                assert!(gpu.read(&out, 0, &mut [0]).unwrap_err().to_string().contains("captured"));
                (0..10).try_for_each(|_| launch(&gpu, &program, 96 * 1024, &args))
            })
            .unwrap();
        let times = gpu.time(3, || graph.launch()).unwrap();
        assert!(times.len() == 3 && times.iter().all(|&us| us > 0.0), "{times:?}");
        let mut numbers = [0.0_f32; 4];
        gpu.read(&out, 0, bytemuck::cast_slice_mut(&mut numbers)).unwrap();
        assert_eq!(numbers, [32.0, 33.0, 34.0, 35.0]);
        assert!(gpu.capture(|| Ok(())).is_ok_and(|graph| graph.launch().is_ok()));
        assert!(gpu.prepare(&program).unwrap().resources("add").unwrap().registers > 0);
    }

    #[test]
    fn a_launch_that_cannot_be_says_why() {
        let Some((_folder, gpu)) = gpu_with(ADD) else { return };
        let program = Program { source: "add.cu", defines: vec![("FACTOR", "1.0f".to_owned())] };
        let out = gpu.alloc("out", 16).unwrap();
        for (shared_bytes, args, words) in [
            (
                128,
                vec![Arg::Buffer(&out), Arg::F32(0.5)],
                "parameters of [8, 4, 4] bytes, and was given [8, 4]",
            ),
            (128, vec![Arg::Buffer(&out), Arg::F32(0.5), Arg::I64(4)], "was given [8, 4, 8]"),
            (1 << 20, vec![Arg::Buffer(&out), Arg::F32(0.5), Arg::I32(4)], "CUDA_ERROR"),
        ] {
            let error = launch(&gpu, &program, shared_bytes, &args).unwrap_err();
            assert!(matches!(error, Error::Launch { kernel: "add", .. }), "{error:?}");
            assert!(error.to_string().contains(words), "{error}");
        }
        let error = gpu.write(&out, 12, &[0; 5]).unwrap_err().to_string();
        assert!(error.contains("`out` has 16 bytes; 5 from 12 on"), "{error}");
        let error = gpu.alloc("everything", 1 << 50).unwrap_err().to_string();
        assert!(error.contains("`everything` of 1125899906842624 bytes"), "{error}");
    }

    #[test]
    fn what_does_not_compile_is_shown_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("add.cu"), "#include \"types.cuh\"\nnumber x = ;\n").unwrap();
        std::fs::write(folder.path().join("types.cuh"), "typedef int number;\n").unwrap();
        let sources = Sources::Folder(folder.path().to_owned());
        let compiler = match Compiler::new(sources, (8, 0), None, Some(folder.path().join("cache"))) {
            Ok(compiler) => compiler,
            Err(error) => {
                assert!(error.to_string().contains("run-time compiler"), "{error}");
                return tell(&error);
            }
        };
        let program = Program { source: "add.cu", defines: Vec::new() };
        let error = compiler.compile(&program).unwrap_err().to_string();
        assert!(error.starts_with("add (") && error.contains("add.cu(2): error"), "{error}");
        std::fs::write(folder.path().join("add.cu"), ADD).unwrap();
        let program = Program { source: "add.cu", defines: vec![("FACTOR", "1.0f".to_owned())] };
        let compiled = compiler.compile(&program).unwrap();
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "a cubin is an ELF file");
        assert_eq!(compiler.compile(&program).unwrap(), compiled);
    }
}
