//! A model cut into ranks: all of them on one device, or a device each.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dsa80_cuda::all_reduce::{AllReduceTiles, Shots};
use dsa80_cuda::communicator::PATIENCE;
use dsa80_cuda::crossover::Crossover;
use dsa80_cuda::{Cuda, CudaTensor, Device, PeerCommunicator, Placement, Tiles};
use dsa80_model::LaunchError;
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{Engine, EngineOptions, Request, StepLimits};
use dsa80_model::runner::{INDEX_LOGITS, Probe, Rank, RankGroup, RankParts, WeightSource};
use dsa80_reference::communicator::SingleRank;
use dsa80_reference::{Batch, Communicator, DType, HostTensor, Kernels, SamplingParams, SequenceSlice};
use dsa80_tests::bodies;
use dsa80_tests::engine::collect;
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge;
use dsa80_tests::layers::FirstLatents;
use dsa80_tests::parity::{TestDevice, devices};
use dsa80_tests::prompt::{self, Run};

use super::graphs::{Sequence, step, target};

const PAGE_SIZE: usize = 16;

type OnDevice = Cuda<Arc<TestDevice>>;

/// What `body` gives on a rank for every device, which is the same on all of them.
fn on_every_rank<R: Send + PartialEq>(
    fixture: &Fixture,
    devices: Vec<TestDevice>,
    (placement, tiles): (Placement, AllReduceTiles),
    body: impl Fn(&mut Rank<OnDevice>, &StepLimits) -> R + Sync,
) -> R {
    let devices: Vec<Arc<TestDevice>> = devices.into_iter().map(Arc::new).collect();
    let communicators = PeerCommunicator::group(devices.clone(), tiles, placement, PATIENCE).unwrap();
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let limits = judge::limits(fixture, PAGE_SIZE);
    let parts = devices.into_iter().zip(communicators).map(|(device, communicator)| {
        let tiles = Tiles::for_gpu(&device.limits().name, None).unwrap();
        RankParts { kernels: Cuda::new(device, tiles), communicator: Box::new(communicator) as _ }
    });
    let results = bodies::on_ranks(&checkpoint, &limits, parts.collect(), |rank| body(rank, &limits));
    assert!(results[1..].iter().all(|result| *result == results[0]), "ranks differ");
    results.into_iter().next().unwrap()
}

/// The first `len` tokens in pieces. Nothing looks in: sums and norms are one launch.
fn run(rank: &mut Rank<OnDevice>, limits: &StepLimits, tokens: &[u32]) -> Run {
    let pages = prompt::scattered_pages(limits, 0);
    let mut run = Run::default();
    for piece in prompt::pieces(tokens.len(), 64) {
        let (token_ids, computed_len) = (&tokens[piece.clone()], piece.start);
        let slice = SequenceSlice { token_ids, computed_len, pages: &pages };
        rank.forward(&Batch::new(PAGE_SIZE, &[slice]).unwrap(), None).unwrap();
        run.logits.extend(rank.logits(&(0..piece.len()).collect::<Vec<_>>()).unwrap());
    }
    run
}

/// The first `len` tokens one by one, each a step, from graphs or launched.
fn decode(rank: &mut Rank<OnDevice>, limits: &StepLimits, tokens: &[u32], graphs: bool) -> Run {
    if graphs {
        let one = StepLimits { max_batch_seqs: 1, ..*limits };
        assert!(rank.record_graphs(&one).unwrap() > 0, "nothing is recorded");
    }
    let (pages, target) = (prompt::scattered_pages(limits, 2), target(SamplingParams::default()));
    let mut sequence = Sequence { computed: 0, pages, target };
    let mut run = Run::default();
    for computed in 0..tokens.len() {
        sequence.computed = computed;
        rank.step(&step(std::slice::from_ref(&sequence), tokens)).unwrap();
        run.logits.extend(rank.logits(&[0]).unwrap());
    }
    run
}

/// Every sum in so many shots, whatever its size.
fn always(shots: Shots) -> AllReduceTiles {
    let bytes = if shots == Shots::One { usize::MAX } else { 0 };
    let crossover = Crossover { all_reduce_bytes: bytes, all_reduce_norm_bytes: bytes };
    AllReduceTiles { crossover: Some(crossover), ..AllReduceTiles::safe() }
}

const BOTH: [Shots; 2] = [Shots::One, Shots::Two];

fn fixture() -> Fixture {
    Fixture::open(fixture::root().join("cases/int4_asym_g32_tp8")).unwrap()
}

/// Every fixture that so many ranks divide.
fn fixtures_of(ranks: usize) -> Vec<Fixture> {
    let mut fixtures = fixture::all().unwrap();
    fixtures.retain(|fixture| Checkpoint::open(&fixture.dir).unwrap().config().check_tp(ranks).is_ok());
    assert!(!fixtures.is_empty(), "{ranks} ranks divide no fixture");
    fixtures
}

/// A fixture in so many ranks, in each of these ways: as close to HF as it must be, and every time with the same bits, on every rank.
fn compare(
    fixture: &Fixture,
    ranks: usize,
    ways: &[Shots],
    placement: Placement,
    device: impl Fn(usize) -> Option<TestDevice>,
) {
    let mut first: Option<Run> = None;
    for shots in ways {
        let Some(devices) = (0..ranks).map(&device).collect::<Option<Vec<_>>>() else { return };
        let run = on_every_rank(fixture, devices, (placement, always(*shots)), |rank, limits| {
            run(rank, limits, &fixture.tokens)
        });
        if let Some(first) = &first {
            assert!(run == *first, "{}: {ranks} ranks differ from run to run: {ways:?}", fixture.name);
            continue;
        }
        let way = format!("{ranks} ranks, {shots:?}");
        bodies::close(fixture, &way, &run);
        first = Some(run);
    }
}

/// In one shot, in two, and once more.
const AGAIN: [Shots; 3] = [Shots::One, Shots::Two, Shots::One];

#[test]
fn eight_ranks_in_emulation_are_as_far_from_hf_as_hf_in_bf16() {
    compare(&fixture(), 8, &BOTH, Placement::Together, |_| devices::emulator());
}

/// Every fixture in one of both ways, and one in both.
#[test]
fn ranks_with_a_device_each_in_emulation_are_as_far_from_hf_as_hf_in_bf16() {
    for (fixture, shots) in fixtures_of(2).iter().zip(BOTH.into_iter().cycle()) {
        let ways = if fixture.name == "int4_asym_g32_tp8" { &AGAIN[..] } else { &[shots] };
        compare(fixture, 2, ways, Placement::Apart, |_| devices::emulator());
    }
}

/// More than two that push into each other's memory.
#[test]
fn four_and_eight_ranks_with_a_device_each_in_emulation_are_as_far_from_hf_as_hf_in_bf16() {
    for (ranks, ways) in [(4, &BOTH[..]), (8, &BOTH[1..])] {
        compare(&fixture(), ranks, ways, Placement::Apart, |_| devices::emulator());
    }
}

/// What ranks gather before its norms is what one rank multiplies, to the bit: of one token, of a few, and of as many as a tile of its own
/// serves.
fn compare_latents(ways: &[usize], lengths: &[usize], device: impl Fn(usize) -> Option<TestDevice>) {
    let fixture = fixture();
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let of = |rank: &mut Rank<OnDevice>, limits: &StepLimits| -> Vec<FirstLatents> {
        let pages = prompt::scattered_pages(limits, 0);
        let latents =
            |&len: &usize| FirstLatents::of(rank, &fixture.tokens[..len], &pages, PAGE_SIZE).unwrap();
        lengths.iter().map(latents).collect()
    };
    let Some(alone) = device(0) else { return };
    let cuda = Cuda::new(Arc::new(alone), Tiles::default());
    let limits = judge::limits(&fixture, PAGE_SIZE);
    let single = Box::new(SingleRank::default());
    let whole = of(&mut Rank::load(cuda, single, &checkpoint, &limits, INDEX_LOGITS).unwrap(), &limits);
    for &ranks in ways {
        let Some(devices) = (0..ranks).map(&device).collect::<Option<Vec<_>>>() else { return };
        let shared = on_every_rank(&fixture, devices, (Placement::Together, AllReduceTiles::safe()), of);
        assert!(whole.iter().all(|latents| latents.q_a.iter().chain(&latents.kv_a).all(|x| x.is_finite())));
        assert!(shared == whole, "{ranks} ranks: q_a and kv_a differ");
    }
}

#[test]
fn what_ranks_gather_in_emulation_is_what_one_multiplies() {
    compare_latents(&[2, 8], &[1, 5, 40], |_| devices::emulator());
}

#[test]
fn what_ranks_that_share_a_gpu_gather_is_what_one_multiplies() {
    compare_latents(&[2, 4, 8], &[1, 5, 40], |_| devices::gpu());
}

#[test]
fn ranks_that_share_a_gpu_are_as_far_from_hf_as_hf_in_bf16() {
    for ranks in [2, 4, 8] {
        for fixture in fixtures_of(ranks) {
            compare(&fixture, ranks, &BOTH, Placement::Together, |_| devices::gpu());
        }
    }
}

/// GPUs that reach each other, for as many ranks as there can be.
fn groups_of_gpus() -> impl Iterator<Item = (usize, impl Fn(usize) -> Option<TestDevice>)> {
    let count = devices::gpus().len();
    for ranks in [2, 4, 8].into_iter().filter(|&ranks| count > 1 && ranks > count) {
        devices::tell(&format!("left out: {ranks} ranks on a GPU each (there are {count})"));
    }
    // The most first: a time limit cuts off what is last.
    [8, 4, 2].into_iter().filter(move |&ranks| ranks <= count).map(|ranks| {
        let gpus = Mutex::new(Vec::new());
        let next = move |rank| {
            let mut gpus = gpus.lock().unwrap();
            if rank == 0 {
                *gpus = devices::gpus();
                gpus.truncate(ranks);
            }
            Some(TestDevice::Gpu(Box::new(gpus.remove(0))))
        };
        (ranks, next)
    })
}

#[test]
fn ranks_on_a_gpu_each_are_as_far_from_hf_as_hf_in_bf16() {
    let _alone = devices::one_group_at_a_time();
    for (ranks, next) in groups_of_gpus() {
        for fixture in fixtures_of(ranks) {
            compare(&fixture, ranks, &AGAIN, Placement::Apart, &next);
        }
    }
}

/// Two ranks: steps from graphs beside the same steps launched, and returns those of the graphs.
fn compare_graphs(ranks: usize, len: usize, device: impl Fn(usize) -> Option<TestDevice>) -> Option<Run> {
    let fixture = fixture();
    let mut runs = Vec::new();
    for shots in BOTH {
        for graphs in [true, false] {
            let devices = (0..ranks).map(&device).collect::<Option<Vec<_>>>()?;
            let way = (Placement::Apart, always(shots));
            runs.push(on_every_rank(&fixture, devices, way, |rank, limits| {
                decode(rank, limits, &fixture.tokens[..len], graphs)
            }));
        }
    }
    assert!(runs.iter().all(|run| *run == runs[0]), "{ranks} ranks: graphs, or the other way, differ");
    runs.into_iter().next()
}

#[test]
fn steps_of_several_ranks_from_graphs_are_the_launched_ones_bit_for_bit() {
    let _alone = devices::one_group_at_a_time();
    compare_graphs(2, 6, |_| devices::emulator());
    for (ranks, next) in groups_of_gpus() {
        let fixture = fixture();
        let Some(run) = compare_graphs(ranks, fixture.tokens.len(), next) else { return };
        let way = format!("{ranks} ranks, graphs");
        bodies::close(&fixture, &way, &run);
    }
}

/// A probe sees the whole residual stream, for which sums and norms are launches of their own.
#[test]
fn sums_with_norms_are_sums_and_then_norms() {
    struct Sees(Vec<f64>);
    impl Probe for Sees {
        fn hidden(&mut self, _layer: usize, values: &[f64]) {
            self.0.extend_from_slice(values);
        }
    }
    let fixture = fixture();
    let tokens = &fixture.tokens[..9];
    let body = |rank: &mut Rank<OnDevice>, limits: &StepLimits| {
        let fused = run(rank, limits, tokens);
        let pages = prompt::scattered_pages(limits, 0);
        let slice = SequenceSlice { token_ids: tokens, computed_len: 0, pages: &pages };
        let mut seen = Sees(Vec::new());
        rank.forward(&Batch::new(PAGE_SIZE, &[slice]).unwrap(), Some(&mut seen)).unwrap();
        let apart = rank.logits(&(0..tokens.len()).collect::<Vec<_>>()).unwrap();
        assert!(fused.logits == apart, "in one launch and in two");
        seen.0
    };
    for (placement, ranks) in [(Placement::Together, 4), (Placement::Apart, 2)] {
        let streams = BOTH.map(|shots| {
            let devices = (0..ranks).map(|_| devices::emulator()).collect::<Option<Vec<_>>>()?;
            Some(on_every_rank(&fixture, devices, (placement, always(shots)), body))
        });
        assert!(streams[0] == streams[1], "{placement:?}: one shot and two differ");
    }
}

/// They would deal a sum's work differently.
#[test]
fn peers_that_differ_are_refused() {
    let with = |multiprocessors| match devices::emulator()? {
        TestDevice::Emulator(emulator) => {
            Some(TestDevice::Emulator(Box::new(emulator.with_multiprocessors(multiprocessors))))
        }
        TestDevice::Gpu(_) => None,
    };
    let group = |counts: [u32; 3]| {
        let devices: Vec<_> = counts.into_iter().map(with).collect::<Option<_>>()?;
        Some(PeerCommunicator::group(devices, AllReduceTiles::safe(), Placement::Apart, PATIENCE).map(drop))
    };
    let Some(alike) = group([8, 8, 8]) else { return };
    alike.unwrap();
    let error = group([8, 8, 6]).unwrap().unwrap_err().to_string();
    assert!(
        error.contains("6 on rank 2's") && error.contains("expected 8") && error.contains("NCCL"),
        "{error}"
    );
}

/// Rows that a slot, and the registers of a block, can hold are summed and normed in one launch; others are left to two.
#[test]
fn peers_norm_what_they_sum_where_it_fits() {
    for (width, fused) in [(64, true), (20_000, false)] {
        let Some(devices) = (0..2).map(|_| devices::emulator().map(Arc::new)).collect::<Option<Vec<_>>>()
        else {
            return;
        };
        let ranks =
            PeerCommunicator::group(devices.clone(), AllReduceTiles::safe(), Placement::Apart, PATIENCE)
                .unwrap();
        std::thread::scope(|scope| {
            for (device, communicator) in devices.into_iter().zip(ranks) {
                scope.spawn(move || {
                    let cuda = Cuda::new(device, Tiles::default());
                    let filled = |dtype, shape: &[usize], value| {
                        let mut tensor = cuda.alloc(dtype, shape).unwrap();
                        cuda.write(&vec![value; shape.iter().product()], &mut tensor).unwrap();
                        tensor
                    };
                    let shape = [3, width];
                    let (mut x, mut residual) =
                        (filled(DType::Act, &shape, 0.5), filled(DType::Float, &shape, 1.0));
                    let mut out = filled(DType::Act, &shape, 0.0);
                    let weight = cuda.upload(HostTensor::f32([width], vec![3.0; width])).unwrap();
                    let done = communicator.all_reduce_norm(&mut x, &mut residual, &weight, 0.0, &mut out);
                    assert_eq!(done.unwrap(), fused, "{width} columns");
                    let expected = if fused { (2.0, 3.0) } else { (1.0, 0.0) };
                    assert!(cuda.read(&residual).unwrap().iter().all(|&sum| sum == expected.0));
                    assert!(cuda.read(&out).unwrap().iter().all(|&norm| (norm - expected.1).abs() < 0.02));
                });
            }
        });
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
fn a_rank_that_comes_late_is_waited_for() {
    for placement in [Placement::Apart, Placement::Together] {
        let late = |rank: &dyn Communicator<CudaTensor<Arc<TestDevice>>>, tensor: &mut CudaTensor<_>| {
            std::thread::sleep(Duration::from_millis(300) * rank.rank() as u32);
            rank.all_reduce(tensor).and_then(|()| rank.check())
        };
        let (Some(one), Some(two)) = (devices::emulator(), devices::emulator()) else { return };
        let devices = [one, two].map(Arc::new);
        let ranks =
            PeerCommunicator::group(devices.to_vec(), AllReduceTiles::safe(), placement, PATIENCE).unwrap();
        let started = Instant::now();
        std::thread::scope(|scope| {
            for (device, rank) in devices.iter().zip(ranks) {
                scope.spawn(move || {
                    let mut tensor = CudaTensor::alloc(device, "x", DType::Float, &[4]).unwrap();
                    device.write(tensor.buffer(), 0, bytemuck::cast_slice(&[1.5_f32; 4])).unwrap();
                    late(&rank, &mut tensor).unwrap();
                    let mut sum = [0.0_f32; 4];
                    device.read(tensor.buffer(), 0, bytemuck::cast_slice_mut(&mut sum)).unwrap();
                    assert_eq!(sum, [3.0; 4], "{placement:?}");
                });
            }
        });
        assert!(started.elapsed() >= Duration::from_millis(300));
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

type Loaded = Result<RankGroup<OnDevice>, LaunchError>;

/// The device of the second of two ranks, which has so much memory, and the two, or why they could not be loaded.
fn two_ranks(memory: usize) -> Option<(Arc<TestDevice>, Loaded)> {
    let devices = [devices::emulator()?, devices::emulator()?].map(Arc::new);
    let tiles = AllReduceTiles::safe();
    let ranks = PeerCommunicator::group(devices.to_vec(), tiles, Placement::Apart, PATIENCE).unwrap();
    leave(&devices[1], memory);
    let fixture = fixture();
    let limits = StepLimits { max_batch_tokens: 32, ..judge::limits(&fixture, PAGE_SIZE) };
    let parts = devices.iter().zip(ranks).map(|(device, rank)| {
        let tiles = Tiles::for_gpu(&device.limits().name, None).unwrap();
        RankParts { kernels: Cuda::new(Arc::clone(device), tiles), communicator: Box::new(rank) as _ }
    });
    let weights: Arc<dyn WeightSource> = Arc::new(Checkpoint::open(&fixture.dir).unwrap());
    let group = RankGroup::load(parts.collect(), &weights, limits);
    let [_, second] = devices;
    Some((second, group))
}

/// What a device still has.
fn leave(device: &TestDevice, bytes: usize) {
    match device {
        TestDevice::Emulator(emulator) => emulator.set_memory(bytes),
        TestDevice::Gpu(_) => panic!("of a GPU others have the memory"),
    }
}

#[test]
fn a_rank_whose_memory_does_not_do_ends_the_launch_with_its_reason() {
    let Some((_, group)) = two_ranks(1 << 16) else { return };
    let error = group.err().unwrap().to_string();
    assert!(error.contains("no memory for `"), "{error}");
}

#[test]
fn a_rank_that_runs_out_of_memory_in_service_ends_all_with_its_reason() {
    let Some((second, model)) = two_ranks(usize::MAX) else { return };
    let options = EngineOptions {
        max_waiting: 4,
        eos_token_ids: Vec::new(),
        max_batch_tokens: 32,
        max_running: 2,
        enable_prefix_caching: false,
        step_timeout: Duration::from_secs(60),
    };
    let engine = Engine::start(Box::new(model.unwrap()), options);
    let ask = |tokens: usize| {
        let request = Request {
            prompt: fixture().tokens[..tokens].to_vec(),
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            max_tokens: 2,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: true,
            logprobs: None,
            prompt_logprobs: None,
        };
        collect(engine.submit(request).unwrap()).unwrap()
    };
    let answered = ask(2);
    assert_eq!((answered.failure, answered.tokens.len()), (None, 2));
    // Longer steps take more than there is.
    leave(&second, 0);
    let started = Instant::now();
    let failed = ask(30).failure.unwrap();
    assert!(failed.contains("rank 1: ") && failed.contains("no memory for `"), "{failed}");
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    assert!(!engine.is_alive() && engine.failure().unwrap().contains("no memory for `"));
}
