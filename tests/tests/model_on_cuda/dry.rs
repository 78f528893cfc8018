//! Every program that the fixtures launch, compiled for an A100 without a GPU: none may spill.

use std::collections::HashSet;
use std::io::Write;
use std::sync::{Arc, Mutex};

use dsa80_cuda::gpu::Compiler;
use dsa80_cuda::{Cuda, Device, Launch, Limits, Program, Sources, Tiles};
use dsa80_reference::{Error, Result};
use dsa80_tests::fixture;
use dsa80_tests::judge::{self, limits};
use dsa80_tests::prompt;

/// Compiles what is launched, and computes nothing: all memory reads as zeros.
struct Dry {
    limits: Limits,
    compiler: Arc<Compiler>,
    seen: Arc<Mutex<HashSet<Program>>>,
}

impl Device for Dry {
    type Buffer = usize;

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
        let taken = compiled.resources(launch.entry).filter(|taken| !taken.uses_local_memory());
        taken.map(|_| ()).ok_or_else(|| Error::Backend {
            backend: "dry",
            message: format!("{} ({}): {:?}", launch.entry, launch.shape, compiled.resources),
        })
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
    let a100 = Limits { name: "NVIDIA A100-SXM4-80GB".into(), ..Limits::a100() };
    let seen = Arc::new(Mutex::new(HashSet::new()));
    for fixture in fixture::all().unwrap() {
        let device =
            Dry { limits: a100.clone(), compiler: Arc::clone(&compiler), seen: Arc::clone(&seen) };
        let tiles = Tiles::for_gpu(&a100.name, None).unwrap();
        let mut rank = judge::load(Cuda::new(device, tiles), &fixture, 16).unwrap();
        let pages = prompt::scattered_pages(&limits(&fixture, 16), 0);
        let len = fixture.tokens.len();
        for last in [len, 64, 20, 1] {
            let pieces: Vec<_> = [0..len - last, len - last..len].into_iter().filter(|piece| !piece.is_empty()).collect();
            prompt::run(&mut rank, &fixture.tokens, &pages, 16, &pieces).unwrap();
        }
    }
    println!("{} programs", seen.lock().unwrap().len());
}
