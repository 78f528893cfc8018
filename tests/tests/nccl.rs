//! NCCL between the GPUs that there are: what it computes, that it can be recorded, broken off, and what it costs beside our own kernels.
//! With one GPU a group of one rank; without any, or without NCCL, nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use dsa80_cuda::communicator::PATIENCE;
use dsa80_cuda::{
    Cuda, CudaTensor, Device, Gpu, Nccl, NcclCommunicator, PeerCommunicator, Placement, Sources, Tiles,
};
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::runner::{INDEX_LOGITS, Rank};
use dsa80_reference::{Communicator, DType};
use dsa80_tests::fixture;
use dsa80_tests::judge::{self, BF16_BOUND_OF_ONE_PROMPT, Bf16Distance};
use dsa80_tests::parity::devices::tell;
use dsa80_tests::prompt::{self, Run};

type Tensor = CudaTensor<Arc<Gpu>>;

/// At most `most` GPUs; none where there is no NCCL.
fn gpus(most: usize) -> Vec<Arc<Gpu>> {
    let count = dsa80_cuda::devices().map_or(0, |devices| devices.len());
    if count == 0 {
        tell("left out: NCCL (there is no GPU; run this binary on a machine with one, or better two)");
        return Vec::new();
    }
    match Nccl::load() {
        Ok(nccl) => tell(&format!("NCCL {}, {} of {count} GPUs", nccl.version(), count.min(most))),
        Err(error) => {
            tell(&format!("left out: NCCL ({error})"));
            return Vec::new();
        }
    }
    (0..count.min(most)).map(|ordinal| Arc::new(Gpu::open(ordinal, Sources::Embedded).unwrap())).collect()
}

/// Runs `body` on every rank, each on its own thread. A rank that leaves breaks the group: what bodies return stays until all have ended.
fn on_ranks<C: Communicator<Tensor>, R: Send>(
    gpus: &[Arc<Gpu>],
    ranks: Vec<C>,
    body: impl Fn(Arc<Gpu>, C) -> R + Sync,
) -> Vec<R> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads =
            gpus.iter().zip(ranks).map(|(gpu, rank)| scope.spawn(move || body(Arc::clone(gpu), rank)));
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn floats(gpu: &Arc<Gpu>, shape: &[usize], values: &[f32]) -> Tensor {
    let tensor = CudaTensor::alloc(gpu, "x", DType::Float, shape).unwrap();
    gpu.write(tensor.buffer(), 0, bytemuck::cast_slice(values)).unwrap();
    tensor
}

fn read(gpu: &Arc<Gpu>, tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0_f32; tensor.len()];
    gpu.read(tensor.buffer(), 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

#[test]
fn collectives_compute_what_they_should_also_from_a_graph() {
    let gpus = gpus(8);
    for world_size in [1, 2, 4, 8].into_iter().filter(|&ranks| ranks <= gpus.len()) {
        let gpus = &gpus[..world_size];
        let ranks = NcclCommunicator::group(gpus, PATIENCE).unwrap();
        on_ranks(gpus, ranks, |gpu, rank| {
            let (r, n) = (rank.rank() as f32, world_size as f32);
            let total = (0..world_size).sum::<usize>() as f32;
            let mut x = floats(&gpu, &[2, 3], &[r; 6]);
            rank.all_reduce(&mut x).unwrap();
            rank.check().unwrap();
            assert_eq!(read(&gpu, &x), [total; 6]);

            let mut halves = CudaTensor::alloc(&gpu, "halves", DType::Act, &[1, 4]).unwrap();
            let bits = half::bf16::from_f32(r + 0.5).to_bits();
            gpu.write(halves.buffer(), 0, bytemuck::cast_slice(&[bits; 4])).unwrap();
            rank.all_reduce(&mut halves).unwrap();
            let mut sums = [0_u16; 4];
            gpu.read(halves.buffer(), 0, bytemuck::cast_slice_mut(&mut sums)).unwrap();
            assert_eq!(sums, [half::bf16::from_f32(total + 0.5 * n).to_bits(); 4]);

            // Rows that lie apart in the whole.
            let shard = floats(&gpu, &[3, 2], &[0.0, 1.0, 10.0, 11.0, 20.0, 21.0].map(|x| x + 100.0 * r));
            let mut whole = floats(&gpu, &[3, 2 * world_size], &vec![0.0; 6 * world_size]);
            rank.all_gather(&shard, &mut whole).unwrap();
            let row = |row: usize| {
                (0..world_size).flat_map(move |rank| {
                    let first = (100 * rank + 10 * row) as f32;
                    [first, first + 1.0]
                })
            };
            assert_eq!(read(&gpu, &whole), (0..3).flat_map(row).collect::<Vec<f32>>());

            // Two at once, of more rows than are stacked at a time, and rows that are long enough to be gathered in place.
            let rows = 5 * (1 << 20) / world_size;
            let numbers = |columns: usize, rows: usize| -> Vec<f32> {
                (0..rows * columns).map(|i| (i % 1_000_003) as f32 + 0.25 * r).collect()
            };
            let wide = 20_000 / world_size;
            for (rows, columns, next) in [(rows, 1, 2), (2, 3, wide), (1, 3, 5), (3, wide, 4)] {
                let shards =
                    [columns, next].map(|columns| floats(&gpu, &[rows, columns], &numbers(columns, rows)));
                let mut outs = [columns, next].map(|columns| {
                    floats(&gpu, &[rows, columns * world_size], &vec![-1.0; rows * columns * world_size])
                });
                rank.all_gather_each(&[&shards[0], &shards[1]], &mut outs.each_mut()[..]).unwrap();
                for (out, columns) in outs.iter().zip([columns, next]) {
                    let expected = |i: usize| {
                        let (row, of) = (i / (columns * world_size), i % (columns * world_size));
                        ((row * columns + of % columns) % 1_000_003) as f32 + 0.25 * (of / columns) as f32
                    };
                    let found = read(&gpu, out);
                    let wrong = found.iter().enumerate().position(|(i, &x)| x != expected(i));
                    assert_eq!(wrong, None, "{rows} rows of {columns} columns of {world_size} ranks");
                }
            }

            let mut x = floats(&gpu, &[5], &[r; 5]);
            rank.broadcast(&mut x, world_size - 1).unwrap();
            assert_eq!(read(&gpu, &x), [n - 1.0; 5]);
            assert!(rank.broadcast(&mut x, world_size).is_err());
            rank.barrier().unwrap();

            // Sums of what the replay before left.
            let mut x = floats(&gpu, &[4], &[1.0; 4]);
            let graph = gpu
                .capture(|| {
                    rank.all_reduce(&mut x)?;
                    rank.all_gather(&shard, &mut whole)
                })
                .unwrap();
            for _ in 0..3 {
                graph.launch().unwrap();
            }
            assert_eq!(read(&gpu, &x), [n * n * n; 4]);
            rank.check().unwrap();
            drop(graph);
            rank
        });
    }
}

#[test]
fn a_group_that_is_broken_off_fails_with_the_reason() {
    let gpus = gpus(2);
    for world_size in 1..=gpus.len() {
        let gpus = &gpus[..world_size];
        let ranks = NcclCommunicator::group(gpus, PATIENCE).unwrap();
        let meet = Barrier::new(world_size);
        let started = Instant::now();
        on_ranks(gpus, ranks, |gpu, rank| {
            let mut x = floats(&gpu, &[4], &[1.0; 4]);
            rank.all_reduce(&mut x).unwrap();
            gpu.synchronize().unwrap();
            meet.wait();
            if rank.rank() == 0 {
                let breaker = rank.breaker().unwrap();
                let other = std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(300));
                    breaker("rank 1 has closed its connection");
                });
                // With two ranks this waits for one that does not come.
                let _ = rank.all_reduce(&mut x);
                let _ = gpu.synchronize();
                other.join().unwrap();
                let error = rank.check().unwrap_err().to_string();
                assert!(error.contains("rank 1 has closed its connection"), "{error}");
                assert!(rank.all_reduce(&mut x).unwrap_err().to_string().contains("rank 1 has closed"));
            }
            meet.wait();
        });
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    }
}

/// How long rank 1, which waits on its GPU for a sum that rank 0 does not come to, goes on when `instead` happens to rank 0; and why it ends.
fn end(gpus: &[Arc<Gpu>], instead: impl Fn(NcclCommunicator) + Sync) -> (String, Duration) {
    let ranks = NcclCommunicator::group(gpus, PATIENCE).unwrap();
    let meet = Barrier::new(gpus.len());
    let mut ends = on_ranks(gpus, ranks, |gpu, rank| {
        let mut x = floats(&gpu, &[4], &[1.0; 4]);
        rank.all_reduce(&mut x).unwrap();
        gpu.synchronize().unwrap();
        meet.wait();
        if rank.rank() == 0 {
            std::thread::sleep(Duration::from_millis(300));
            let failed = Instant::now();
            instead(rank);
            return (String::new(), failed);
        }
        // Launched, or broken off before it was.
        let _ = rank.all_reduce(&mut x);
        let _ = gpu.synchronize();
        let error = rank.check().unwrap_err().to_string();
        (error, Instant::now())
    });
    let [(_, failed), (error, ended)] = [ends.remove(0), ends.remove(0)];
    (error, ended.duration_since(failed))
}

#[test]
fn a_rank_that_fails_or_leaves_ends_the_others_of_its_process_at_once() {
    let gpus = gpus(2);
    if gpus.len() < 2 {
        return tell(&format!("left out: NCCL between two GPUs (there are {})", gpus.len()));
    }
    let (failed, took) = end(&gpus, |rank| rank.abort("out of pages"));
    println!("a rank that fails ends the other after {took:?}: {failed}");
    assert!(failed.contains("rank 1 of 2: a collective was broken off: rank 0: out of pages"), "{failed}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    let (left, took) = end(&gpus, drop);
    println!("a rank that leaves ends the other after {took:?}: {left}");
    assert!(left.contains("rank 0 has left"), "{left}");
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[test]
fn a_rank_that_does_not_join_is_not_waited_for() {
    let gpus = gpus(1);
    let Some(gpu) = gpus.first() else { return };
    let id = Nccl::load().unwrap().unique_id().unwrap();
    let started = Instant::now();
    let patience = Duration::from_secs(1);
    let error = NcclCommunicator::join(Arc::clone(gpu), id, [0, 2], patience, &|| None).unwrap_err();
    assert!(error.to_string().contains("have not joined NCCL's group within 1s"), "{error}");
    let failed = || Some("rank 1 has closed its connection".to_owned());
    let error = NcclCommunicator::join(Arc::clone(gpu), id, [0, 2], PATIENCE, &failed).unwrap_err();
    assert!(error.to_string().contains("rank 1 has closed its connection"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(30));
}

/// The fixture's prompt on a rank for every GPU: what came out, which is the same on all of them.
fn run<C>(fixture: &fixture::Fixture, gpus: &[Arc<Gpu>], ranks: Vec<C>) -> Run
where
    C: Communicator<Tensor> + 'static,
{
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let limits = judge::limits(fixture, 16);
    let pages = prompt::scattered_pages(&limits, 0);
    let pieces = prompt::pieces(fixture.tokens.len(), 64);
    let runs = on_ranks(gpus, ranks, |gpu, communicator| {
        let cuda = Cuda::new(Arc::clone(&gpu), Tiles::for_gpu(&gpu.limits().name, None).unwrap());
        let mut rank = Rank::load(cuda, Box::new(communicator), &checkpoint, &limits, INDEX_LOGITS).unwrap();
        let run = prompt::run(&mut rank, &fixture.tokens, &pages, 16, &pieces).unwrap();
        (run, rank)
    });
    assert!(runs.iter().all(|(run, _)| run.logits == runs[0].0.logits), "ranks differ");
    runs.into_iter().next().unwrap().0
}

#[test]
fn every_fixture_in_ranks_is_as_far_from_hf_as_hf_in_bf16() {
    let gpus = gpus(8);
    // The most first: a time limit cuts off what is last.
    for ranks in [8, 4, 2] {
        let Some(gpus) = gpus.get(..ranks) else {
            tell(&format!("left out: NCCL between {ranks} GPUs (there are {})", gpus.len()));
            continue;
        };
        for fixture in fixture::all().unwrap() {
            if Checkpoint::open(&fixture.dir).unwrap().config().check_tp(ranks).is_err() {
                continue;
            }
            let nccl = || run(&fixture, gpus, NcclCommunicator::group(gpus, PATIENCE).unwrap());
            let first = nccl();
            assert!(nccl().logits == first.logits, "two runs differ");
            let way = format!("{ranks} ranks, NCCL");
            let distance = Bf16Distance::of(&fixture, &way, &first);
            distance.assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, &way);
        }
    }
}

/// What the watch of `dsa80 bench step` counts with.
#[test]
fn moments_of_a_recorded_step_are_those_of_its_last_replay() {
    for gpu in gpus(1) {
        let rank = NcclCommunicator::group(&[Arc::clone(&gpu)], PATIENCE).unwrap().remove(0);
        let mut x = floats(&gpu, &[1 << 22], &vec![1.0; 1 << 22]);
        let mut few = floats(&gpu, &[1], &[1.0]);
        rank.all_reduce(&mut x).unwrap();
        let launched = [gpu.moment().unwrap(), gpu.moment().unwrap()];
        assert!(!launched[0].is_recorded() && launched[0].us_until(&launched[1]).unwrap() >= 0.0);
        let source = floats(&gpu, &[1 << 22], &vec![2.0; 1 << 22]);
        let mut moments = Vec::new();
        let graph = gpu
            .capture(|| {
                moments = vec![gpu.moment()?];
                rank.all_gather(&source, &mut x)?;
                moments.push(gpu.moment()?);
                rank.all_reduce(&mut few)?;
                moments.push(gpu.moment()?);
                Ok(())
            })
            .unwrap();
        let whole = gpu.time(3, || graph.launch()).unwrap();
        let [long, short] = [0, 1].map(|at| moments[at].us_until(&moments[at + 1]).unwrap());
        println!("16 MiB copied in {long:.1} us, nothing in {short:.1}, both in {:.1}", whole[2]);
        assert!(moments.iter().all(dsa80_cuda::gpu::Moment::is_recorded));
        assert!(long > short && short >= 0.0 && long + short <= whole[2] + 1.0, "{long} {short} {whole:?}");
    }
}

const IN_A_GRAPH: usize = 20;

/// The median over replays of the microseconds of one `all_reduce` of `tokens` x 6144 bf16, on the slowest GPU.
fn microseconds<C: Communicator<Tensor>>(gpus: &[Arc<Gpu>], ranks: Vec<C>, tokens: usize) -> f64 {
    let meet = Barrier::new(gpus.len());
    let times = on_ranks(gpus, ranks, |gpu, rank| {
        let mut x = CudaTensor::alloc(&gpu, "x", DType::Act, &[tokens, 6144]).unwrap();
        gpu.write(x.buffer(), 0, &vec![0; tokens * 6144 * 2]).unwrap();
        rank.all_reduce(&mut x).unwrap();
        gpu.synchronize().unwrap();
        let graph = gpu.capture(|| (0..IN_A_GRAPH).try_for_each(|_| rank.all_reduce(&mut x))).unwrap();
        meet.wait();
        let mut times = gpu.time(14, || graph.launch()).unwrap().split_off(4);
        rank.check().unwrap();
        meet.wait();
        drop(rank);
        times.sort_by(f64::total_cmp);
        times[times.len() / 2] / IN_A_GRAPH as f64
    });
    times.into_iter().fold(0.0, f64::max)
}

#[test]
fn microseconds_beside_our_own() {
    let gpus = gpus(8);
    for world_size in [2, 4, 8].into_iter().filter(|&ranks| ranks <= gpus.len()) {
        let gpus = &gpus[..world_size];
        for gpu in gpus {
            gpus.iter().try_for_each(|other| gpu.reach(other)).unwrap();
        }
        for tokens in [1, 32, 256, 2048] {
            let limits = gpus[0].limits();
            let tiles = Tiles::for_gpu(&limits.name, None).unwrap().all_reduce(limits);
            let own = PeerCommunicator::group(gpus.to_vec(), tiles, Placement::Apart, PATIENCE).unwrap();
            let own = microseconds(gpus, own, tokens);
            let nccl = microseconds(gpus, NcclCommunicator::group(gpus, PATIENCE).unwrap(), tokens);
            println!("{world_size} GPUs, {tokens} x 6144 bf16: own {own:.1} us, NCCL {nccl:.1} us");
        }
    }
}
