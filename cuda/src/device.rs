//! What a launcher needs of a device: memory, and a way to run one kernel. A GPU is one; the emulator of the tests is another.

use std::sync::Arc;

use dsa80_reference::buffers::HostMemory;
use dsa80_reference::{RecordedKernel, Result, host_times};

/// What a device offers a block, as far as tiles are validated against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The device's name, as results carry it.
    pub name: String,
    /// Compute capability, `(8, 0)` for an A100.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block can ask for, in bytes.
    pub shared_per_block: usize,
    /// Shared memory of a multiprocessor, in bytes; every resident block takes [`BLOCK_RESERVED_SHARED`] beside its own.
    pub shared_per_multiprocessor: usize,
    /// 32-bit registers of a multiprocessor.
    pub registers_per_multiprocessor: u32,
    /// Threads that a multiprocessor holds.
    pub threads_per_multiprocessor: u32,
}

/// Shared memory that the driver takes of every resident block, in bytes (sm_80 and sm_90).
pub const BLOCK_RESERVED_SHARED: usize = 1024;

impl Limits {
    /// An A100: what every pinned tile must fit (CUDA C++ programming guide, table of technical specifications, 8.0).
    pub fn a100() -> Self {
        Self {
            name: "NVIDIA A100".into(),
            compute_capability: (8, 0),
            multiprocessors: 108,
            shared_per_block: 163 * 1024,
            shared_per_multiprocessor: 164 * 1024,
            registers_per_multiprocessor: 65536,
            threads_per_multiprocessor: 2048,
        }
    }

    /// Blocks of `threads` threads with `registers` registers a thread and `shared` bytes that a multiprocessor holds.
    pub fn resident_blocks(&self, threads: u32, registers: u32, shared: usize) -> u32 {
        // Registers are handed out to warps in units of 256.
        let warps = threads.div_ceil(32).max(1);
        let registers_per_block = warps * (registers.max(1) * 32).next_multiple_of(256);
        let by_shared = self.shared_per_multiprocessor / (shared + BLOCK_RESERVED_SHARED);
        (self.threads_per_multiprocessor / (32 * warps))
            .min(self.registers_per_multiprocessor / registers_per_block)
            .min(u32::try_from(by_shared).unwrap_or(u32::MAX))
            .min(32)
    }
}

/// A kernel source with its constants fixed: what is compiled, and the key under which it is cached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Program {
    /// The file in `kernels/`, `"top_k.cu"`.
    pub source: &'static str,
    /// `-D` constants: the tile, and what the tile's shapes fix.
    pub defines: Vec<(&'static str, String)>,
}

/// One entry of a program, and how it is launched: what a compile check without a GPU needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramEntry {
    /// What is compiled.
    pub program: Program,
    /// The `KERNEL` function of it.
    pub entry: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: usize,
    /// The variant, in words.
    pub variant: String,
}

impl Program {
    /// A source with constants that are numbers.
    pub(crate) fn new(
        source: &'static str,
        defines: impl IntoIterator<Item = (&'static str, usize)>,
    ) -> Self {
        let defines = defines.into_iter().map(|(name, value)| (name, value.to_string())).collect();
        Self { source, defines }
    }

    /// The kernel's name: the source's, without its ending.
    pub fn kernel(&self) -> &'static str {
        self.source.strip_suffix(".cu").unwrap_or(self.source)
    }

    /// What tables call an entry of it: the entry alone where that names the kernel.
    pub fn name_of(&self, entry: &str) -> String {
        let kernel = self.kernel();
        if entry.starts_with(kernel) { entry.to_owned() } else { format!("{kernel}: {entry}") }
    }

    /// The constants as `NAME=value`, for errors and tables.
    pub fn defines_in_words(&self) -> String {
        let words: Vec<String> = self.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        words.join(" ")
    }
}

/// One argument of a kernel, in the order of its parameters.
#[derive(Debug)]
pub enum Arg<'a, B> {
    /// A pointer to the start of a buffer.
    Buffer(&'a B),
    /// A null pointer, for a parameter that a variant does not use.
    Null,
    /// `int32_t`.
    I32(i32),
    /// `int64_t`.
    I64(i64),
    /// `float`.
    F32(f32),
    /// `double`.
    F64(f64),
}

/// One kernel launch.
#[derive(Debug)]
pub struct Launch<'a, B> {
    /// What to run.
    pub program: &'a Program,
    /// The `KERNEL` function of it.
    pub entry: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: usize,
    /// The shape, in words, for errors.
    pub shape: String,
    /// The kernel's parameters.
    pub args: &'a [Arg<'a, B>],
}

/// A product of bf16 matrices whose rows are dense and aligned to 16 bytes: `out[t, o] = weight[o] . x[t]`.
#[derive(Debug)]
pub struct Gemm<'a, B> {
    /// Who asks, for errors.
    pub kernel: &'static str,
    /// `[tokens, columns]`.
    pub x: &'a B,
    /// `[at least first_row + features, columns]`.
    pub weight: &'a B,
    /// The row of the weight that is the first feature.
    pub first_row: usize,
    /// `[tokens, features]`, bf16 or f32.
    pub out: &'a B,
    /// Whether the outputs are f32.
    pub floats: bool,
    /// Rows of `x`.
    pub tokens: usize,
    /// Columns of `x` and of the weight.
    pub columns: usize,
    /// Columns of `out`.
    pub features: usize,
}

/// Memory and launches, in the order of one stream.
pub trait Device: Send {
    /// Device memory. Kernels write through it: it is shared like a pointer, and freed with its last clone.
    type Buffer: Clone + Send + Sync + std::fmt::Debug;
    /// Launches that were captured.
    type Graph: Send;

    /// What tiles are validated against.
    fn limits(&self) -> &Limits;

    /// Memory of the host that copies to the device are fastest from, if any is.
    fn host_memory(&self) -> Option<Arc<dyn HostMemory>> {
        None
    }

    /// Allocates `bytes`; the contents are unspecified. `name` is what errors call it.
    ///
    /// # Errors
    /// Memory runs out.
    fn alloc(&self, name: &str, bytes: usize) -> Result<Self::Buffer>;

    /// Copies `bytes` to `offset` bytes into the buffer.
    ///
    /// # Errors
    /// The range lies outside the buffer; the device failed.
    fn write(&self, buffer: &Self::Buffer, offset: usize, bytes: &[u8]) -> Result<()>;

    /// Copies from `offset` bytes into the buffer. Waits for everything launched before.
    ///
    /// # Errors
    /// The range lies outside the buffer; the device, or a launch before, failed.
    fn read(&self, buffer: &Self::Buffer, offset: usize, bytes: &mut [u8]) -> Result<()>;

    /// Compiles (or finds) the program and launches it; does not wait. After a first launch of the same program it neither compiles
    /// nor allocates, so it can be captured in a graph.
    ///
    /// # Errors
    /// The program does not compile; the launch is refused.
    fn launch(&self, launch: &Launch<'_, Self::Buffer>) -> Result<()>;

    /// Captures what `launches` launches, without running it. The programs must have been launched before: loading one cannot be captured.
    ///
    /// # Errors
    /// `launches` failed, or did more than launch.
    fn capture(&self, launches: impl FnMut() -> Result<()>) -> Result<Self::Graph>;

    /// Launches all that was captured, on the memory that it was captured with; does not wait.
    ///
    /// # Errors
    /// The device failed.
    fn replay(&self, graph: &Self::Graph) -> Result<()>;

    /// Captures the launches of every kernel, on every shape, by themselves, in the order of their first. None on a device that has no use
    /// for it.
    ///
    /// # Errors
    /// As for [`capture`](Self::capture).
    fn capture_kernels(
        &self,
        _launches: impl FnMut() -> Result<()>,
    ) -> Result<Vec<RecordedKernel<Self::Graph>>> {
        Ok(Vec::new())
    }

    /// Microseconds of each of `times` replays, one after the other. Waits for the last. Unless a device has a clock of its own, it does not
    /// run ahead of the host.
    ///
    /// # Errors
    /// The device failed.
    fn time_replays(&self, graph: &Self::Graph, times: usize) -> Result<Vec<f64>> {
        host_times(times, || self.replay(graph))
    }

    /// Launches the product by the device's own library, in the order of the stream, with sums in f32. False where there is no such
    /// library, or none for this shape: then nothing was launched. After a first launch of the same shape it can be captured in a graph.
    ///
    /// # Errors
    /// The library refuses, or would have to be loaded while launches are captured.
    fn gemm(&self, _product: &Gemm<'_, Self::Buffer>) -> Result<bool> {
        Ok(false)
    }
}

/// A device that several share: a backend, and the communicator that launches between its launches.
impl<D: Device + Sync> Device for Arc<D> {
    type Buffer = D::Buffer;
    type Graph = D::Graph;

    fn limits(&self) -> &Limits {
        (**self).limits()
    }

    fn host_memory(&self) -> Option<Arc<dyn HostMemory>> {
        (**self).host_memory()
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<D::Buffer> {
        (**self).alloc(name, bytes)
    }

    fn write(&self, buffer: &D::Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        (**self).write(buffer, offset, bytes)
    }

    fn read(&self, buffer: &D::Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        (**self).read(buffer, offset, bytes)
    }

    fn launch(&self, launch: &Launch<'_, D::Buffer>) -> Result<()> {
        (**self).launch(launch)
    }

    fn capture(&self, launches: impl FnMut() -> Result<()>) -> Result<D::Graph> {
        (**self).capture(launches)
    }

    fn replay(&self, graph: &D::Graph) -> Result<()> {
        (**self).replay(graph)
    }

    fn capture_kernels(&self, launches: impl FnMut() -> Result<()>) -> Result<Vec<RecordedKernel<D::Graph>>> {
        (**self).capture_kernels(launches)
    }

    fn time_replays(&self, graph: &D::Graph, times: usize) -> Result<Vec<f64>> {
        (**self).time_replays(graph, times)
    }

    fn gemm(&self, product: &Gemm<'_, D::Buffer>) -> Result<bool> {
        (**self).gemm(product)
    }
}
