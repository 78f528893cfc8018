//! Small kernels, launched from source text.

use std::io::Write;

use dsa80_cuda::{Arg, Device, Launch, Program, Sources};
use dsa80_tests::emulator::{EmulatedBuffer, Emulator};

const SOURCE: &str = "snippet.cu";
const HEADER: &str = include_str!("../../../cuda/kernels/ptx.cuh");

/// A kernel called `kernel`, and a device that has it.
pub(crate) struct Snippet {
    pub(crate) emulator: Emulator,
    program: Program,
    _folder: tempfile::TempDir,
}

impl Snippet {
    /// `body` follows the include of `ptx.cuh`, on the same line. Nothing, with a word on stderr, where nothing can be emulated.
    pub(crate) fn new(body: &str) -> Option<Self> {
        if let Err(reason) = Emulator::available() {
            let message = format!("left out: a test of the emulator ({reason})");
            assert!(std::env::var_os("DSA80_REQUIRE_ALL").is_none(), "{message}");
            let _ = writeln!(std::io::stderr(), "{message}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ptx.cuh"), HEADER).unwrap();
        std::fs::write(folder.path().join(SOURCE), format!("#include \"ptx.cuh\"\n{body}\n")).unwrap();
        let emulator = Emulator::from_sources(Sources::Folder(folder.path().to_owned())).unwrap();
        Some(Self { emulator, program: Program { source: SOURCE, defines: Vec::new() }, _folder: folder })
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
        self.launch_grid([blocks, 1, 1], threads, shared_bytes, args)
    }

    pub(crate) fn launch_grid(
        &self,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: usize,
        args: &[Arg<'_, EmulatedBuffer>],
    ) -> Result<(), String> {
        self.emulator
            .launch(&Launch {
                program: &self.program,
                entry: "kernel",
                grid,
                threads,
                shared_bytes,
                shape: "snippet".into(),
                args,
            })
            .map_err(|error| error.to_string())
    }
}

/// Launches `body` with one block and a buffer `a` of 64 words, under several seeds, and returns the words.
///
/// # Panics
/// The launch fails.
pub(crate) fn runs(threads: u32, shared_bytes: usize, body: &str) {
    let Some(snippet) = Snippet::new(body) else { return };
    for seed in 0..8 {
        snippet.emulator.set_seed(seed);
        let a = snippet.buffer("a", &[7u32; 64]);
        if let Err(error) = snippet.launch(1, threads, shared_bytes, &[Arg::Buffer(&a)]) {
            panic!("seed {seed}: {error}\n{body}");
        }
    }
}

/// As [`runs`], for a launch that must fail, whatever the seed, with a message that has all of `words` and the line of `body` that is
/// marked `// here`.
///
/// # Panics
/// It does not.
pub(crate) fn fails(threads: u32, shared_bytes: usize, body: &str, words: &[&str]) {
    let Some(snippet) = Snippet::new(body) else { return };
    let marked =
        body.lines().position(|line| line.contains("// here")).map(|line| format!("snippet.cu:{}", line + 2));
    for seed in 0..8 {
        snippet.emulator.set_seed(seed);
        let a = snippet.buffer("a", &[7u32; 64]);
        let error = match snippet.launch(1, threads, shared_bytes, &[Arg::Buffer(&a)]) {
            Ok(()) => panic!("seed {seed}: no error, expected {words:?}\n{body}"),
            Err(error) => error,
        };
        for word in words.iter().copied().chain(marked.as_deref()) {
            assert!(error.contains(word), "seed {seed}: no {word:?} in {error:?}\n{body}");
        }
    }
}
