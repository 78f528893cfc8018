//! A model cut into ranks: all of them on one device, or a device each.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use dsa80_cuda::all_reduce::AllReduceTiles;
use dsa80_cuda::communicator::PATIENCE;
use dsa80_cuda::{Cuda, CudaTensor, Device, PeerCommunicator, Placement, Tiles};
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::runner::{INDEX_LOGITS, Rank};
use dsa80_reference::{Communicator, DType};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge::{self, BF16_BOUND_OF_ONE_PROMPT, Bf16Distance};
use dsa80_tests::parity::{TestDevice, devices};
use dsa80_tests::prompt::{self, Run};

const PAGE_SIZE: usize = 16;

/// Runs the prompt on a rank for every device, and returns what came out, which is the same on all of them.
fn run(fixture: &Fixture, devices: Vec<TestDevice>, placement: Placement) -> Run {
    let devices: Vec<Arc<TestDevice>> = devices.into_iter().map(Arc::new).collect();
    let communicators =
        PeerCommunicator::group(devices.clone(), AllReduceTiles::safe(), placement, PATIENCE).unwrap();
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
    for &ranks in ways {
        let Some(devices) = (0..ranks).map(&device).collect::<Option<Vec<_>>>() else { return };
        let run = run(&fixture, devices, placement);
        let way = format!("{ranks} ranks");
        let distance = Bf16Distance::of(&fixture, &way, &run);
        distance.assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, &way);
    }
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

/// What rank 0 hears in its first collective when rank 1 does `instead`.
fn first_error(
    placement: Placement,
    patience: Duration,
    instead: impl FnOnce(&dyn Communicator<CudaTensor<Arc<TestDevice>>>) + Send,
) -> Option<String> {
    let devices = [devices::emulator()?, devices::emulator()?].map(Arc::new);
    let mut ranks =
        PeerCommunicator::group(devices.to_vec(), AllReduceTiles::safe(), placement, patience).unwrap();
    let (other, own) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Rank 0 waits already, more often than not.
            std::thread::sleep(Duration::from_millis(100));
            instead(&other);
        });
        let mut tensor = CudaTensor::alloc(&devices[0], "x", DType::Act, &[4, 8]).unwrap();
        let ended = own.all_reduce(&mut tensor).and_then(|()| own.check());
        let later = own.all_reduce(&mut tensor).and_then(|()| own.check());
        assert!(later.is_err(), "a broken group goes on");
        Some(ended.unwrap_err().to_string())
    })
}

#[test]
fn a_rank_that_gives_up_ends_the_wait_of_the_others_with_its_reason() {
    for placement in [Placement::Apart, Placement::Together] {
        let Some(error) = first_error(placement, PATIENCE, |rank| rank.abort("out of pages")) else { return };
        assert!(error.contains("rank 1: out of pages"), "{placement:?}: {error}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let patience = Duration::from_millis(50);
    let stays_away = |_: &dyn Communicator<_>| std::thread::sleep(Duration::from_secs(1));
    let Some(error) = first_error(Placement::Apart, patience, stays_away) else { return };
    assert!(error.contains("rank 1 has not come to a collective within 50ms"), "{error}");
    // Its thread has ended, which the threads that meet are told.
    let Some(error) = first_error(Placement::Together, PATIENCE, |_| {}) else { return };
    assert!(error.contains("rank 1 has left"), "{error}");
}
