//! The model on the CUDA backend: on a GPU where there is one, and a little of it in emulation.
//!
//! A GPU machine needs no Rust: build here (`cargo test -p dsa80-tests --test model_on_cuda --no-run`), carry the binary and `fixtures/`,
//! run there with `DSA80_FIXTURES` naming that folder.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod capture;
mod drafts;
mod dry;
mod dummy;
mod emulated;
mod engine;
mod fixtures;
mod graphs;
mod kernel_by_kernel;
mod layers;
mod loading;
mod measured;
mod memory;
mod ranks;
mod serve;
mod step_times;

use std::sync::Mutex;

use dsa80_cuda::{Cuda, Device, Tiles};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::parity::TestDevice;
use dsa80_tests::parity::devices;

/// The backend on a GPU, with the tiles that are pinned for it; nothing where there is none.
fn on_gpu() -> Option<Cuda<TestDevice>> {
    devices::gpu().map(|gpu| {
        let tiles = Tiles::for_gpu(&gpu.limits().name, None).unwrap();
        Cuda::new(gpu, tiles)
    })
}

/// The backend on the emulator, with tiles that fit any device.
fn emulated() -> Option<Cuda<TestDevice>> {
    devices::emulator().map(|emulator| Cuda::new(emulator, Tiles::default()))
}

/// Runs `body` over every fixture on a GPU, several at a time: most of their time is the compiler's. The first panic is reported by its
/// fixture, after all have had their turn.
fn every_fixture_on_a_gpu(body: impl Fn(Cuda<TestDevice>, &Fixture) + Sync) {
    if devices::gpu().is_none() {
        return;
    }
    let fixtures = Mutex::new(fixture::all().unwrap());
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(8) {
            scope.spawn(|| {
                loop {
                    let Some(fixture) = fixtures.lock().unwrap().pop() else { return };
                    let run = || body(on_gpu().unwrap(), &fixture);
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err() {
                        failed.lock().unwrap().push(fixture.name);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "failed: {failed:?}");
}
