//! The devices that a parity test runs on.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use dsa80_cuda::{Arg, Device, Gemm, Gpu, Launch, Limits, Sources};
use dsa80_reference::{RecordedKernel, Result};

use super::compare::assert_same;
use crate::emulator::{Emulator, Fault};

/// A device of a test: so that one body runs on all of them.
#[derive(Debug)]
pub enum TestDevice {
    /// The kernels' sources on the CPU.
    Emulator(Box<Emulator>),
    /// A GPU.
    Gpu(Box<Gpu>),
}

/// Memory of a [`TestDevice`].
#[derive(Debug, Clone)]
pub enum TestBuffer {
    /// The emulator's.
    Emulator(<Emulator as Device>::Buffer),
    /// A GPU's.
    Gpu(<Gpu as Device>::Buffer),
}

/// Launches that a [`TestDevice`] has captured.
#[derive(Debug)]
pub enum TestGraph {
    /// By the emulator.
    Emulator(<Emulator as Device>::Graph),
    /// By a GPU.
    Gpu(<Gpu as Device>::Graph),
}

impl TestDevice {
    /// Whether this is a GPU, which takes cases that would be slow in emulation.
    pub fn is_gpu(&self) -> bool {
        matches!(self, TestDevice::Gpu(_))
    }
}

impl std::fmt::Display for TestDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.limits().name)
    }
}

impl TestBuffer {
    fn emulated(&self) -> &<Emulator as Device>::Buffer {
        match self {
            TestBuffer::Emulator(buffer) => buffer,
            TestBuffer::Gpu(_) => panic!("a GPU's buffer on the emulator"),
        }
    }

    fn on_gpu(&self) -> &<Gpu as Device>::Buffer {
        match self {
            TestBuffer::Gpu(buffer) => buffer,
            TestBuffer::Emulator(_) => panic!("an emulated buffer on a GPU"),
        }
    }
}

impl Device for TestDevice {
    type Buffer = TestBuffer;
    type Graph = TestGraph;

    fn limits(&self) -> &Limits {
        match self {
            TestDevice::Emulator(device) => device.limits(),
            TestDevice::Gpu(device) => device.limits(),
        }
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<TestBuffer> {
        match self {
            TestDevice::Emulator(device) => device.alloc(name, bytes).map(TestBuffer::Emulator),
            TestDevice::Gpu(device) => device.alloc(name, bytes).map(TestBuffer::Gpu),
        }
    }

    fn write(&self, buffer: &TestBuffer, offset: usize, bytes: &[u8]) -> Result<()> {
        match self {
            TestDevice::Emulator(device) => device.write(buffer.emulated(), offset, bytes),
            TestDevice::Gpu(device) => device.write(buffer.on_gpu(), offset, bytes),
        }
    }

    fn read(&self, buffer: &TestBuffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        match self {
            TestDevice::Emulator(device) => device.read(buffer.emulated(), offset, bytes),
            TestDevice::Gpu(device) => device.read(buffer.on_gpu(), offset, bytes),
        }
    }

    fn launch(&self, launch: &Launch<'_, TestBuffer>) -> Result<()> {
        match self {
            TestDevice::Emulator(device) => launch_on(device.as_ref(), launch, TestBuffer::emulated),
            TestDevice::Gpu(device) => launch_on(device.as_ref(), launch, TestBuffer::on_gpu),
        }
    }

    fn capture(&self, launches: impl FnMut() -> Result<()>) -> Result<TestGraph> {
        match self {
            TestDevice::Emulator(device) => device.capture(launches).map(TestGraph::Emulator),
            TestDevice::Gpu(device) => device.capture(launches).map(TestGraph::Gpu),
        }
    }

    fn replay(&self, graph: &TestGraph) -> Result<()> {
        match (self, graph) {
            (TestDevice::Emulator(device), TestGraph::Emulator(graph)) => device.replay(graph),
            (TestDevice::Gpu(device), TestGraph::Gpu(graph)) => device.replay(graph),
            _ => panic!("a graph of another device"),
        }
    }

    fn capture_kernels(
        &self,
        launches: impl FnMut() -> Result<()>,
    ) -> Result<Vec<RecordedKernel<TestGraph>>> {
        fn wrap<G>(kernel: RecordedKernel<G>, graph: fn(G) -> TestGraph) -> RecordedKernel<TestGraph> {
            let RecordedKernel { name, shape, launches, graph: captured } = kernel;
            RecordedKernel { name, shape, launches, graph: graph(captured) }
        }
        Ok(match self {
            TestDevice::Emulator(device) => {
                let kernels = device.capture_kernels(launches)?.into_iter();
                kernels.map(|kernel| wrap(kernel, TestGraph::Emulator)).collect()
            }
            TestDevice::Gpu(device) => {
                let kernels = device.capture_kernels(launches)?.into_iter();
                kernels.map(|kernel| wrap(kernel, TestGraph::Gpu)).collect()
            }
        })
    }

    fn gemm(&self, product: &Gemm<'_, TestBuffer>) -> Result<bool> {
        let TestDevice::Gpu(gpu) = self else { return Ok(false) };
        let &Gemm { kernel, x, weight, first_row, out, floats, tokens, columns, features } = product;
        let (x, weight, out) = (x.on_gpu(), weight.on_gpu(), out.on_gpu());
        gpu.gemm(&Gemm { kernel, x, weight, first_row, out, floats, tokens, columns, features })
    }
}

fn launch_on<D: Device>(
    device: &D,
    launch: &Launch<'_, TestBuffer>,
    buffer: impl Fn(&TestBuffer) -> &D::Buffer,
) -> Result<()> {
    let args: Vec<Arg<'_, D::Buffer>> = launch
        .args
        .iter()
        .map(|arg| match *arg {
            Arg::Buffer(argument) => Arg::Buffer(buffer(argument)),
            Arg::Null => Arg::Null,
            Arg::I32(value) => Arg::I32(value),
            Arg::I64(value) => Arg::I64(value),
            Arg::F32(value) => Arg::F32(value),
            Arg::F64(value) => Arg::F64(value),
        })
        .collect();
    device.launch(&Launch {
        program: launch.program,
        entry: launch.entry,
        grid: launch.grid,
        threads: launch.threads,
        shared_bytes: launch.shared_bytes,
        shape: launch.shape.clone(),
        args: &args,
    })
}

/// Runs `body` twice, in emulation with blocks and warps in another order, and panics unless both runs give the same bytes.
pub fn twice(device: &TestDevice, body: impl Fn() -> Vec<u8>) -> Vec<u8> {
    let [first, second] = [1, 2].map(|seed| {
        if let TestDevice::Emulator(emulator) = device {
            emulator.set_seed(seed);
        }
        body()
    });
    assert_same("two runs of the same launch", 1, &second, &first);
    first
}

/// The emulator, and a GPU where there is one. `DSA80_PARITY=gpu` or `=emulator` leaves the other out.
pub(super) fn all() -> Vec<TestDevice> {
    emulator().into_iter().chain(gpu()).collect()
}

/// The emulator, if the tests may use it.
pub fn emulator() -> Option<TestDevice> {
    static TOLD: Once = Once::new();
    if !wanted("emulator") {
        return None;
    }
    match Emulator::from_sources(sources()) {
        Ok(emulator) => Some(TestDevice::Emulator(Box::new(emulator))),
        Err(reason) => {
            let message = format!("left out: the kernels in emulation ({reason})");
            assert!(std::env::var_os("DSA80_REQUIRE_ALL").is_none(), "{message}");
            TOLD.call_once(|| tell(&message));
            None
        }
    }
}

/// An emulator with faults planted in the kernels, if the tests may use one.
pub(super) fn faulty(faults: &[Fault<'_>]) -> Option<TestDevice> {
    let Some(TestDevice::Emulator(emulator)) = emulator() else { return None };
    let emulator = emulator.with_faults(faults).expect("the place of a fault is there once");
    Some(TestDevice::Emulator(Box::new(emulator)))
}

/// A GPU, if the tests may use one.
pub fn gpu() -> Option<TestDevice> {
    static TOLD: Once = Once::new();
    if !wanted("gpu") {
        return None;
    }
    match Gpu::open(0, sources()) {
        Ok(gpu) => Some(TestDevice::Gpu(Box::new(gpu))),
        Err(reason) => {
            TOLD.call_once(|| tell(&format!("left out: the kernels on a GPU ({reason})")));
            None
        }
    }
}

/// Bytes that are free on the GPU, if there is one.
pub fn free_memory() -> Option<usize> {
    match gpu()? {
        TestDevice::Gpu(gpu) => gpu.memory().ok().map(|(free, _)| free),
        TestDevice::Emulator(_) => None,
    }
}

/// All GPUs, if the tests may use them, and each reaches the others' memory.
pub fn gpus() -> Vec<Gpu> {
    if !wanted("gpu") {
        return Vec::new();
    }
    let gpus: Vec<Gpu> = (0..).map_while(|ordinal| Gpu::open(ordinal, sources()).ok()).collect();
    if gpus.len() < 2 {
        tell(&format!("left out: several GPUs (there are {}, and it takes two)", gpus.len()));
    }
    match gpus.iter().try_for_each(|gpu| gpus.iter().try_for_each(|other| gpu.reach(other))) {
        Ok(()) => gpus,
        Err(reason) => {
            tell(&format!("left out: several GPUs ({reason})"));
            Vec::new()
        }
    }
}

/// Held while launches on several GPUs wait for each other: of two such groups at once, each can keep the other's GPU from what it waits for.
pub fn one_group_at_a_time() -> MutexGuard<'static, ()> {
    static GROUP: Mutex<()> = Mutex::new(());
    GROUP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The embedded kernels, or those of the folder `DSA80_KERNELS`: an edit then needs no rebuild.
fn sources() -> Sources {
    std::env::var_os("DSA80_KERNELS").map_or(Sources::Embedded, |folder| Sources::Folder(folder.into()))
}

pub(super) fn wanted(device: &str) -> bool {
    std::env::var_os("DSA80_PARITY").is_none_or(|only| only == device)
}

/// Says what a test leaves out, and what it found. Not `println!`, which the test runner keeps to itself when a test passes.
pub fn tell(message: &str) {
    let _ = writeln!(std::io::stderr(), "{message}");
}
