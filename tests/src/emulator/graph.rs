//! Captured launches: their arguments are kept, and what those point to is read when they are replayed.

use dsa80_cuda::{Arg, Device, Launch, Program};
use dsa80_reference::Result;

use super::{EmulatedBuffer, Emulator};

/// Launches that were captured, in their order.
#[derive(Debug)]
pub struct EmulatedGraph(pub(super) Vec<Captured>);

/// One launch of a graph.
#[derive(Debug)]
pub(super) struct Captured {
    program: Program,
    entry: &'static str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: usize,
    shape: String,
    args: Vec<CapturedArg>,
}

#[derive(Debug)]
enum CapturedArg {
    Buffer(EmulatedBuffer),
    Null,
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
}

impl CapturedArg {
    fn new(arg: &Arg<'_, EmulatedBuffer>) -> Self {
        match *arg {
            Arg::Buffer(buffer) => CapturedArg::Buffer(buffer.clone()),
            Arg::Null => CapturedArg::Null,
            Arg::I32(value) => CapturedArg::I32(value),
            Arg::I64(value) => CapturedArg::I64(value),
            Arg::F32(value) => CapturedArg::F32(value),
            Arg::F64(value) => CapturedArg::F64(value),
        }
    }

    fn arg(&self) -> Arg<'_, EmulatedBuffer> {
        match self {
            CapturedArg::Buffer(buffer) => Arg::Buffer(buffer),
            CapturedArg::Null => Arg::Null,
            CapturedArg::I32(value) => Arg::I32(*value),
            CapturedArg::I64(value) => Arg::I64(*value),
            CapturedArg::F32(value) => Arg::F32(*value),
            CapturedArg::F64(value) => Arg::F64(*value),
        }
    }
}

impl Captured {
    pub(super) fn new(launch: &Launch<'_, EmulatedBuffer>) -> Self {
        Self {
            program: launch.program.clone(),
            entry: launch.entry,
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            shape: launch.shape.clone(),
            args: launch.args.iter().map(CapturedArg::new).collect(),
        }
    }

    /// The kernel and the shape.
    pub(super) fn key(&self) -> (String, String) {
        (self.program.name_of(self.entry), self.shape.clone())
    }

    pub(super) fn launch(&self, emulator: &Emulator) -> Result<()> {
        let args: Vec<Arg<'_, EmulatedBuffer>> = self.args.iter().map(CapturedArg::arg).collect();
        emulator.launch(&Launch {
            program: &self.program,
            entry: self.entry,
            grid: self.grid,
            threads: self.threads,
            shared_bytes: self.shared_bytes,
            shape: self.shape.clone(),
            args: &args,
        })
    }
}
