//! Every program that the fixtures launch, compiled for an A100 without a GPU: none may spill.

use std::collections::HashSet;
use std::io::Write;
use std::sync::{Arc, Mutex};

use dsa80_cuda::gpu::Compiler;
use dsa80_cuda::{Cuda, Device, Launch, Limits, Program, Sources, Tiles};
use dsa80_model::engine::{SampleTarget, Step};
use dsa80_reference::{Batch, Error, Result, SamplingParams, SequenceSlice};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::glm;
use dsa80_tests::{judge, prompt};

/// The compiler of `cuda/requirements.txt`: which registers another one takes is not for this test.
const PINNED: &str = "12.8";

/// Compiles what is launched, and computes nothing: all memory reads as zeros.
struct Dry {
    limits: Limits,
    compiler: Arc<Compiler>,
    seen: Arc<Mutex<HashSet<Program>>>,
}

impl Device for Dry {
    type Buffer = usize;
    type Graph = ();

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn alloc(&self, _name: &str, bytes: usize) -> Result<usize> {
        Ok(bytes)
    }

    fn write(&self, buffer: &usize, offset: usize, bytes: &[u8]) -> Result<()> {
        assert!(offset + bytes.len() <= *buffer, "{} bytes at {offset} of {buffer}", bytes.len());
        Ok(())
    }

    fn read(&self, buffer: &usize, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.write(buffer, offset, bytes)?;
        bytes.fill(0);
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_, usize>) -> Result<()> {
        if !self.seen.lock().unwrap().insert(launch.program.clone()) {
            return Ok(());
        }
        let compiled = self.compiler.compile(launch.program)?;
        let spills = compiled.resources(launch.entry).is_none_or(|taken| taken.uses_local_memory());
        if spills && self.compiler.nvrtc_version() == PINNED {
            let message = format!("{} ({}): {:?}", launch.entry, launch.shape, compiled.resources);
            return Err(Error::Backend { backend: "dry", message });
        }
        Ok(())
    }

    fn capture(&self, mut launches: impl FnMut() -> Result<()>) -> Result<()> {
        launches()
    }

    fn replay(&self, (): &()) -> Result<()> {
        Ok(())
    }
}

#[test]
fn what_the_fixtures_launch_compiles_for_an_a100_without_spills() {
    let compiler = match Compiler::new(Sources::Embedded, (8, 0), None, None) {
        Ok(compiler) => Arc::new(compiler),
        Err(reason) => {
            let message = format!("left out: compiling what the model launches ({reason})");
            assert!(std::env::var_os("DSA80_REQUIRE_ALL").is_none(), "{message}");
            // Not `println!`, which the test runner keeps to itself when a test passes.
            return writeln!(std::io::stderr(), "{message}").unwrap();
        }
    };
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let fixtures = Mutex::new(fixture::all().unwrap());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let Some(fixture) = fixtures.lock().unwrap().pop() else { return };
                    run(&fixture, Arc::clone(&compiler), Arc::clone(&seen));
                }
            });
        }
    });
    let small = seen.lock().unwrap().len();
    run_glm(Arc::clone(&compiler), Arc::clone(&seen));
    println!("{} programs, {small} of them for small models", seen.lock().unwrap().len());
}

fn a100(compiler: Arc<Compiler>, seen: Arc<Mutex<HashSet<Program>>>) -> Cuda<Dry> {
    let limits = Limits { name: "NVIDIA A100-SXM4-80GB".into(), ..Limits::a100() };
    let tiles = Tiles::for_gpu(&limits.name, None).unwrap();
    Cuda::new(Dry { limits, compiler, seen }, tiles)
}

/// GLM-5.2's own shapes: a prompt longer than the indexer selects, then 1 to 64 sequences.
fn run_glm(compiler: Arc<Compiler>, seen: Arc<Mutex<HashSet<Program>>>) {
    let mut limits = prompt::limits(4096, 64, 1000);
    limits.max_batch_seqs = 64;
    let mut rank = judge::load_weights(a100(compiler, seen), &glm::shard(8, 2048, 1000), &limits).unwrap();
    let pages: Vec<u32> = (0..64).collect();
    for (sequences, computed, tokens) in [
        (1, 0, 2560),
        (1, 2560, 100),
        (1, 4095, 1),
        (8, 4095, 1),
        (16, 4095, 1),
        (32, 4095, 1),
        (64, 4095, 1),
    ] {
        let token_ids = vec![0; tokens];
        let slice = SequenceSlice { token_ids: &token_ids, computed_len: computed, pages: &pages };
        let batch = Batch::new(64, &vec![slice; sequences]).unwrap();
        rank.step(&Step { batch, targets: vec![greedy(), drawn()] }).unwrap();
    }
}

fn greedy() -> SampleTarget {
    SampleTarget {
        row: 0,
        params: Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() }),
        prompt: Arc::default(),
        output: Vec::new(),
        banned: Arc::default(),
        position: 0,
        forced: None,
        logprobs: Some(20),
    }
}

/// With every filter.
fn drawn() -> SampleTarget {
    let params = SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.01, ..SamplingParams::default() };
    SampleTarget { params: Arc::new(params), ..greedy() }
}

/// The prompt at once, and with a last step of many tokens, of few, and of one.
fn run(fixture: &Fixture, compiler: Arc<Compiler>, seen: Arc<Mutex<HashSet<Program>>>) {
    let mut rank = judge::load(a100(compiler, seen), fixture, 16).unwrap();
    let pages = prompt::scattered_pages(&judge::limits(fixture, 16), 0);
    let len = fixture.tokens.len();
    for last in [len, 64, 20, 1] {
        let pieces = [0..len - last, len - last..len].into_iter().filter(|piece| !piece.is_empty());
        let pieces: Vec<_> = pieces.collect();
        prompt::run(&mut rank, &fixture.tokens, &pages, 16, &pieces).unwrap();
    }
}
