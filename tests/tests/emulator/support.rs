//! Small kernels, launched from source text.

use std::path::Path;

use dsa80_cuda::{Arg, Device, Launch, Program, Sources};
use dsa80_tests::emulator::{EmulatedBuffer, Emulator};

const SOURCE: &str = "snippet.cu";
const HEADER: &str = include_str!("../../../cuda/kernels/ptx.cuh");

/// A kernel called `kernel` and its device.
pub(crate) struct Snippet {
    emulator: Emulator,
    program: Program,
    _folder: tempfile::TempDir,
}

impl Snippet {
    /// `body` follows `#include "ptx.cuh"`.
    pub(crate) fn new(body: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "ptx.cuh", HEADER);
        write(folder.path(), SOURCE, &format!("#include \"ptx.cuh\"\n{body}"));
        let emulator = Emulator::from_sources(Sources::Folder(folder.path().to_owned())).unwrap();
        Self { emulator, program: Program { source: SOURCE, defines: Vec::new() }, _folder: folder }
    }

    pub(crate) fn emulator(&self) -> &Emulator {
        &self.emulator
    }

    pub(crate) fn buffer<T: bytemuck::NoUninit>(&self, name: &str, values: &[T]) -> EmulatedBuffer {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = self.emulator.alloc(name, bytes.len()).unwrap();
        self.emulator.write(&buffer, 0, bytes).unwrap();
        buffer
    }

    pub(crate) fn values<T: bytemuck::Pod>(&self, buffer: &EmulatedBuffer, count: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); count];
        self.emulator.read(buffer, 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
        values
    }

    pub(crate) fn launch(
        &self,
        blocks: u32,
        threads: u32,
        shared_bytes: usize,
        args: &[Arg<'_, EmulatedBuffer>],
    ) -> Result<(), String> {
        self.emulator
            .launch(&Launch {
                program: &self.program,
                entry: "kernel",
                grid: [blocks, 1, 1],
                threads,
                shared_bytes,
                shape: "snippet".into(),
                args,
            })
            .map_err(|error| error.to_string())
    }
}

fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).unwrap();
}

/// Whether the tests of this file can run; says so if not.
pub(crate) fn emulated() -> bool {
    match Emulator::available() {
        Ok(()) => true,
        Err(reason) => {
            let message = format!("left out: the emulator's own tests ({reason})");
            assert!(std::env::var_os("DSA80_REQUIRE_ALL").is_none(), "{message}");
            eprintln!("{message}");
            false
        }
    }
}
