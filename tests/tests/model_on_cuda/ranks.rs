//! A model cut into ranks: all of them on one device, or a device each.

use std::sync::{Arc, Mutex};

use dsa80_cuda::{Cuda, Device, PeerCommunicator, Placement, Tiles, communicator};
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::runner::{INDEX_LOGITS, Rank};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge::{self, Bf16Distance};
use dsa80_tests::parity::{TestDevice, devices};
use dsa80_tests::prompt::{self, Run};

const PAGE_SIZE: usize = 16;

/// Runs the prompt on a rank for every device, and returns what came out, which is the same on all of them.
fn run(fixture: &Fixture, devices: Vec<TestDevice>, placement: Placement) -> Run {
    let devices: Vec<Arc<TestDevice>> = devices.into_iter().map(Arc::new).collect();
    let communicators = PeerCommunicator::group(devices.clone(), placement, communicator::PATIENCE).unwrap();
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let limits = judge::limits(fixture, PAGE_SIZE);
    let pages = prompt::scattered_pages(&limits, 0);
    let pieces = prompt::pieces(fixture.tokens.len(), 64);
    let runs: Vec<Run> = std::thread::scope(|scope| {
        let ranks = devices.into_iter().zip(communicators).map(|(device, communicator)| {
            let (checkpoint, limits, pages, pieces) = (&checkpoint, &limits, &pages, &pieces);
            scope.spawn(move || {
                let tiles = Tiles::for_gpu(&device.limits().name, None).unwrap();
                let cuda = Cuda::new(device, tiles);
                let mut rank =
                    Rank::load(cuda, Box::new(communicator), checkpoint, limits, INDEX_LOGITS).unwrap();
                prompt::run(&mut rank, &fixture.tokens, pages, PAGE_SIZE, pieces).unwrap()
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for run in &runs[1..] {
        assert!(run.logits == runs[0].logits, "ranks differ");
    }
    runs.into_iter().next().unwrap()
}

/// The fixture that can be cut into eight, in as many ranks as `ways` says.
fn compare(ways: &[usize], placement: Placement, device: impl Fn(usize) -> Option<TestDevice>) {
    let fixture = Fixture::open(fixture::root().join("cases/int4_asym_g32_tp8")).unwrap();
    let mut distances = Vec::new();
    for &ranks in ways {
        let Some(devices) = (0..ranks).map(&device).collect::<Option<Vec<_>>>() else { return };
        let run = run(&fixture, devices, placement);
        let way = format!("{ranks} ranks");
        distances.push((fixture.name.clone(), Bf16Distance::of(&fixture, &way, &run)));
    }
    judge::assert_as_bf16("cut into ranks", &distances);
}

#[test]
fn eight_ranks_in_emulation_are_as_far_from_hf_as_hf_in_bf16() {
    compare(&[8], Placement::Together, |_| devices::emulator());
}

#[test]
fn ranks_with_a_device_each_in_emulation_are_as_far_from_hf_as_hf_in_bf16() {
    compare(&[2], Placement::Apart, |_| devices::emulator());
}

#[test]
fn ranks_that_share_a_gpu_are_as_far_from_hf_as_hf_in_bf16() {
    compare(&[2, 4, 8], Placement::Together, |_| devices::gpu());
}

#[test]
fn ranks_on_a_gpu_each_are_as_far_from_hf_as_hf_in_bf16() {
    let count = devices::gpus().len();
    let ways: Vec<usize> = [2, 4, 8].into_iter().filter(|&ranks| ranks <= count).collect();
    for ranks in ways {
        let gpus = Mutex::new(devices::gpus());
        let next = |_| gpus.lock().unwrap().pop().map(|gpu| TestDevice::Gpu(Box::new(gpu)));
        compare(&[ranks], Placement::Apart, next);
    }
}
