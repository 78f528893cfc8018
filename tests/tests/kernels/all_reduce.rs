//! `all_reduce`, `all_gather` and `broadcast` of ranks that share a device, to the bit.

use std::time::Duration;

use dsa80_cuda::all_gather::{Gathered, all_gather, broadcast};
use dsa80_cuda::all_reduce::{AllReduceTile, Shots, all_reduce_in};
use dsa80_cuda::exchange::{self, Exchange, ExchangeDims};
use dsa80_cuda::{CudaTensor, Device};
use dsa80_reference::{DType, Error};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, Pair, TestDevice, Values, devices};
use half::bf16;
use proptest::prelude::*;
use proptest::sample::select;

type Buffer = <TestDevice as Device>::Buffer;

#[derive(Debug, Clone, Copy)]
struct Variant {
    ranks: usize,
    dtype: DType,
    /// Elements are a multiple of this, and so moved one by one or sixteen bytes at a time.
    step: usize,
}

const VARIANTS: &[Variant] = &[
    Variant { ranks: 2, dtype: DType::Act, step: 8 },
    Variant { ranks: 3, dtype: DType::Float, step: 1 },
    Variant { ranks: 8, dtype: DType::Act, step: 1 },
    Variant { ranks: 8, dtype: DType::Float, step: 4 },
];

#[derive(Debug, Clone)]
struct Case {
    variant: Variant,
    /// Of each rank, launch by launch on the same workspaces.
    lengths: Vec<usize>,
    blocks: usize,
    slot_bytes: usize,
    values: Values,
    seed: u64,
}

fn cases(variants: &'static [Variant]) -> impl Strategy<Value = Case> {
    let values = Values::any_of(&Values::ORDINARY);
    // Several exchanges of a block, or several vectors of a thread.
    let sizes = select(&[(80_usize, 64_usize), (800, 2048)][..]).prop_flat_map(|(longest, slot_bytes)| {
        (proptest::collection::vec(0..longest, 1..5), Just(slot_bytes))
    });
    (select(variants), sizes, 1..4_usize, values, any::<u64>()).prop_map(
        |(variant, (lengths, slot_bytes), blocks, values, seed)| Case {
            variant,
            lengths,
            blocks,
            slot_bytes,
            values,
            seed,
        },
    )
}

fn exchange(device: &TestDevice, ranks: usize, slot_bytes: usize, first_rank: usize) -> Exchange<Buffer> {
    let dims = ExchangeDims { ranks, channels: 2, slot_bytes };
    let workspaces = (0..ranks).map(|_| exchange::alloc_workspace(device, dims).unwrap()).collect();
    Exchange { dims, workspaces, first_rank, patience: Duration::from_secs(60) }
}

/// A rank's tensor, and what lies in it.
fn tensor(
    device: &TestDevice,
    variant: Variant,
    shape: &[usize],
    values: &Values,
    seed: u64,
    rank: usize,
) -> (CudaTensor<TestDevice>, Vec<f64>) {
    let by = if variant.dtype == DType::Float { 1.0 / 3.0 } else { 1.0 };
    let numbers = values.take(seed ^ (rank as u64) << 32, shape.iter().product());
    let numbers: Vec<f64> = numbers.iter().map(|x| x * by).collect();
    let tensor = Pair::new(device, "data", variant.dtype, shape, &numbers).device;
    let held = parity::numbers(variant.dtype, &parity::read_bytes(device, &tensor));
    (tensor, held)
}

/// Every rank's.
fn tensors(
    device: &TestDevice,
    variant: Variant,
    shape: &[usize],
    values: &Values,
    seed: u64,
) -> (Vec<CudaTensor<TestDevice>>, Vec<Vec<f64>>) {
    (0..variant.ranks).map(|rank| tensor(device, variant, shape, values, seed, rank)).unzip()
}

/// What the contract says, to the bit: f32, in rank order, rounded once.
fn summed(dtype: DType, parts: &[Vec<f64>]) -> Vec<f64> {
    (0..parts[0].len())
        .map(|i| {
            let sum = parts[1..].iter().fold(parts[0][i] as f32, |sum, part| sum + part[i] as f32);
            if dtype == DType::Act { bf16::from_f32(sum).to_f64() } else { f64::from(sum) }
        })
        .collect()
}

fn assert_all_hold(device: &TestDevice, dtype: DType, tensors: &[CudaTensor<TestDevice>], expected: &[f64]) {
    for (rank, tensor) in tensors.iter().enumerate() {
        let found = parity::numbers(dtype, &parity::read_bytes(device, tensor));
        let same = found.iter().zip(expected).all(|(a, b)| a == b || (a.is_nan() && b.is_nan()));
        assert!(same && found.len() == expected.len(), "rank {rank}: {found:?}\nexpected {expected:?}");
    }
}

fn assert_well(device: &TestDevice, exchange: &Exchange<Buffer>) {
    for workspace in &exchange.workspaces {
        assert_eq!(exchange::failure(device, workspace, exchange.patience).unwrap(), None);
    }
}

/// Gathers a tensor, or two in a launch, of so many steps of columns each. Returns rank 0's first.
fn gather(
    device: &TestDevice,
    exchange: &Exchange<Buffer>,
    Case { variant, values, .. }: &Case,
    widths: &[usize],
    seed: u64,
) -> Vec<u8> {
    let columns = |width: usize| variant.step * width;
    let made: Vec<_> = widths
        .iter()
        .zip(seed..)
        .map(|(&width, seed)| {
            let (shards, parts) = tensors(device, *variant, &[3, columns(width)], values, seed);
            let shape = [3, columns(width) * variant.ranks];
            let poisoned = |_| parity::poisoned(device, "out", variant.dtype, &shape);
            (shards, parts, (0..variant.ranks).map(poisoned).collect::<Vec<_>>())
        })
        .collect();
    let gathered: Vec<_> = made.iter().map(|(shards, _, outs)| Gathered { shards, outs }).collect();
    all_gather(device, exchange, &gathered).unwrap();
    for (&width, (_, parts, outs)) in widths.iter().zip(&made) {
        let columns = columns(width);
        let row = |row: usize| parts.iter().flat_map(move |part| &part[row * columns..(row + 1) * columns]);
        assert_all_hold(device, variant.dtype, outs, &(0..3).flat_map(row).copied().collect::<Vec<f64>>());
    }
    parity::read_bytes(device, &made[0].2[0])
}

/// The three collectives in turn on the same workspaces.
fn run(device: &TestDevice, case: Case) {
    let Case { variant, ref lengths, blocks, slot_bytes, ref values, seed } = case;
    let dtype = variant.dtype;
    let tile = AllReduceTile { threads: 32, blocks };
    parity::twice(device, || {
        let exchange = exchange(device, variant.ranks, slot_bytes, 0);
        let mut bytes = Vec::new();
        for (launch, length) in lengths.iter().enumerate() {
            let length = length * variant.step;
            let seed = seed.wrapping_add(launch as u64);
            for shots in [Shots::One, Shots::Two] {
                let (data, parts) = tensors(device, variant, &[length], values, seed);
                all_reduce_in(shots, device, &tile, &exchange, &data).unwrap();
                assert_all_hold(device, dtype, &data, &summed(dtype, &parts));
                bytes.extend(parity::read_bytes(device, &data[0]));
            }
            let whole = gather(device, &exchange, &case, &[1 + launch], seed);
            gather(device, &exchange, &case, &[1 + launch, 1 + length % 5], seed);
            bytes.extend(whole);
            let shape = [3, variant.step * (1 + length % 29)];
            let (shards, parts) = tensors(device, variant, &shape, values, seed);
            let root = launch % variant.ranks;
            broadcast(device, &exchange, &shards, root).unwrap();
            assert_all_hold(device, dtype, &shards, &parts[root]);
        }
        assert_well(device, &exchange);
        bytes
    });
}

#[test]
fn every_rank_has_the_sum_the_whole_and_the_roots() {
    parity::check("all_reduce", cases(VARIANTS), run);
}

#[test]
fn planted_faults_are_seen() {
    for (file, find, replace) in [
        // Another order on every rank.
        ("exchange.cuh", "parts[source] = part;", "parts[(source + channel.rank) % RANKS] = part;"),
        // Everybody's columns where the first rank's belong, and the second tensor's rows as long as the first one's.
        ("all_gather.cu", "* RANKS + source) * width", "* RANKS + 0) * width"),
        ("all_gather.cu", "width = next ? next_columns : columns;", "width = columns;"),
        // What others than the root say, that they have come, is taken for data.
        ("all_gather.cu", "if (source == root) tensors.store", "tensors.store"),
        // The last segment runs over.
        (
            "exchange.cuh",
            "return left < count ? static_cast<int>(left > 0 ? left : 0) : count;",
            "return count;",
        ),
        // Words that are not there are taken, and those that were are found again.
        ("exchange.cuh", "return all;", "return true;"),
        ("exchange.cuh", "        nothing.put(", "        if (false) nothing.put("),
        // A share's first piece, again and again; of a thread's sums only the first.
        ("all_reduce.cu", "return start + of * share + done;", "return start + of * share;"),
        ("all_reduce.cu", "{ x.store(data, to + i); }", "{ if (i < THREADS) x.store(data, to + i); }"),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(&VARIANTS[1..2]), run);
    }
    // The other words of a vector are not there.
    let first_word = Fault {
        file: "exchange.cuh",
        find: "i < CELL_WORDS; ++i) all = all",
        replace: "i < 1; ++i) all = all",
    };
    parity::catches(first_word, cases(&VARIANTS[3..4]), run);
}

/// The bits of a word that is not there yet, as data.
#[test]
fn a_word_of_all_ones_arrives_as_another_nan() {
    parity::small_cases(|device| {
        for variant in [VARIANTS[0], VARIANTS[3]] {
            let mut exchange = exchange(device, variant.ranks, 64, 0);
            exchange.patience = Duration::from_secs(5);
            let tile = AllReduceTile { threads: 32, blocks: 2 };
            for shots in [Shots::One, Shots::Two] {
                let (data, parts) = tensors(device, variant, &[9 * variant.step], &Values::Normal, 1);
                for tensor in &data {
                    let bytes = parity::read_bytes(device, tensor).len();
                    device.write(tensor.buffer(), 0, &vec![0xff; bytes]).unwrap();
                }
                all_reduce_in(shots, device, &tile, &exchange, &data).unwrap();
                assert_all_hold(device, variant.dtype, &data, &vec![f64::NAN; parts[0].len()]);
            }
            assert_well(device, &exchange);
        }
    });
}

/// Ranks with a launch each, which meet in the middle of it, many times.
fn assert_launches_meet(devices: &[&TestDevice], dims: ExchangeDims, tokens: &[usize], patience: Duration) {
    let variant = Variant { ranks: dims.ranks, dtype: DType::Act, step: 8 };
    let alloc = |device: &&TestDevice| exchange::alloc_workspace(*device, dims).unwrap();
    let workspaces: Vec<Buffer> = devices.iter().map(alloc).collect();
    let exchange = |first_rank| Exchange { dims, workspaces: workspaces.clone(), first_rank, patience };
    for (round, length) in tokens.iter().enumerate() {
        for shots in [Shots::One, Shots::Two] {
            let seed = 2 * round as u64 + u64::from(shots == Shots::Two);
            let (data, parts): (Vec<_>, Vec<_>) = devices
                .iter()
                .enumerate()
                .map(|(rank, device)| {
                    let (tensor, held) = tensor(device, variant, &[*length], &Values::Normal, seed, rank);
                    (vec![tensor], held)
                })
                .unzip();
            std::thread::scope(|scope| {
                for (rank, (tensor, device)) in data.iter().zip(devices).enumerate() {
                    let own = exchange(rank);
                    scope.spawn(move || {
                        let tile = AllReduceTile { threads: 128, blocks: 24 };
                        all_reduce_in(shots, *device, &tile, &own, tensor).unwrap();
                    });
                }
            });
            for (device, tensor) in devices.iter().zip(&data) {
                assert_all_hold(device, variant.dtype, tensor, &summed(variant.dtype, &parts));
            }
        }
    }
    for (device, workspace) in devices.iter().zip(&workspaces) {
        assert_eq!(exchange::failure(*device, workspace, Duration::ZERO).unwrap(), None);
    }
}

/// Of four ranks: shares that are empty, and several exchanges of a channel.
const SEVERAL: ExchangeDims = ExchangeDims { ranks: 4, channels: 2, slot_bytes: 64 };
const LENGTHS: [usize; 4] = [0, 40, 80, 800];
const PATIENT: Duration = Duration::from_secs(60);

#[test]
fn launches_of_several_ranks_meet() {
    let Some(device) = devices::emulator() else { return };
    assert_launches_meet(&[&device; 4], SEVERAL, &LENGTHS, PATIENT);
}

/// What keeps a slot's uses apart. That `end_exchange` waits is not among it: without, a rank would have to be three exchanges ahead of a
/// thread of another that still resets, which emulation does not come to.
#[test]
fn planted_faults_between_exchanges_are_seen() {
    for (file, find, replace) in [
        // Every exchange in the same slots.
        ("exchange.cuh", "(epoch & 3)", "(epoch & 0)"),
        // An exchange that nobody counts.
        ("exchange.cuh", "DEVICE void next() { ++epoch; }", "DEVICE void next() { epoch += rank == 0; }"),
        // Where the last launch ended is forgotten by one rank.
        (
            "exchange.cuh",
            "own[EPOCHS + blockIdx.x] = epoch;",
            "own[EPOCHS + blockIdx.x] = rank == 1 ? 0 : epoch;",
        ),
    ] {
        let body = |device: &TestDevice, _| {
            assert_launches_meet(&[device; 4], SEVERAL, &LENGTHS, Duration::from_secs(1));
        };
        parity::catches(Fault { file, find, replace }, Just(()), body);
    }
}

#[test]
fn launches_of_several_gpus_meet() {
    let _alone = devices::one_group_at_a_time();
    let gpus: Vec<TestDevice> =
        devices::gpus().into_iter().map(|gpu| TestDevice::Gpu(Box::new(gpu))).collect();
    for ranks in [2, 4, 8].into_iter().filter(|&ranks| ranks <= gpus.len()) {
        let devices: Vec<&TestDevice> = gpus[..ranks].iter().collect();
        // The longest in several exchanges of a channel.
        let lengths = [8, 6144, 32 * 6144, 6152, 700 * 6144, 3 * 6144].repeat(3);
        assert_launches_meet(&devices, ExchangeDims::new(ranks).unwrap(), &lengths, PATIENT);
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_and_one_that_gives_up_ends_the_wait() {
    parity::small_cases(|device| {
        let variant = Variant { ranks: 2, dtype: DType::Float, step: 1 };
        let tile = AllReduceTile { threads: 32, blocks: 1 };
        let (data, _) = tensors(device, variant, &[5], &Values::Normal, 1);
        let mut exchange = exchange(device, 2, 64, 0);
        exchange.patience = Duration::from_millis(50);
        let reason = |exchange: &Exchange<Buffer>| {
            exchange::failure(device, &exchange.workspaces[0], exchange.patience).unwrap().unwrap()
        };
        all_reduce_in(Shots::One, device, &tile, &exchange, &data[..1]).unwrap();
        assert_eq!(reason(&exchange), "rank 1 has not come to a collective within 50ms");
        // Nobody waits for it again, however patient.
        exchange.patience = Duration::from_secs(1000);
        all_reduce_in(Shots::Two, device, &tile, &exchange, &data[..1]).unwrap();
        assert!(reason(&exchange).contains("rank 1"));

        let mut given_up = self::exchange(device, 2, 64, 0);
        given_up.patience = Duration::from_secs(1000);
        exchange::abort(device, &given_up.workspaces[0]).unwrap();
        all_reduce_in(Shots::One, device, &tile, &given_up, &data[..1]).unwrap();
        assert_eq!(reason(&given_up), "a rank has given up");
    });
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let exchange = exchange(device, 2, 64, 1);
        let tile = AllReduceTile { threads: 32, blocks: 1 };
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "data", dtype, shape);
        let act = |shape: &[usize]| tensor(DType::Act, shape);
        let reduced = |data: &[CudaTensor<_>]| all_reduce_in(Shots::One, device, &tile, &exchange, data);
        let refused = |result: Result<(), Error>, words: &[&str]| {
            let error = result.unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        refused(reduced(&[]), &["all_reduce", "those of 1 to 2 ranks"]);
        refused(reduced(&[act(&[4]), act(&[4])]), &["2 from rank 1 on"]);
        refused(reduced(&[tensor(DType::Index, &[4])]), &["`data` holds indices"]);
        let whole = Exchange { first_rank: 0, workspaces: exchange.workspaces.clone(), ..exchange };
        let both = |a, b| all_reduce_in(Shots::One, device, &tile, &whole, &[a, b]);
        refused(both(act(&[4]), act(&[2, 2])), &["`data`", "[4], as on the first rank"]);
        refused(both(act(&[4]), tensor(DType::Float, &[4])), &["element type of the first rank"]);
        let shards = [act(&[3, 2]), act(&[3, 2])];
        type Parts<'a> = &'a [CudaTensor<TestDevice>];
        let of =
            |shards: Parts<'_>, outs: Parts<'_>| all_gather(device, &whole, &[Gathered { shards, outs }]);
        refused(of(&shards, &[act(&[3, 2]), act(&[3, 4])]), &["all_gather", "[3, 2], as on"]);
        refused(of(&shards, &[act(&[6, 4]), act(&[6, 4])]), &["`out`", "[3, 4]"]);
        let (outs, float) = ([act(&[3, 4]), act(&[3, 4])], |columns| tensor(DType::Float, &[3, columns]));
        let (floats, wide) = ([float(2), float(2)], [float(4), float(4)]);
        let next = |others: Parts<'_>, wholes: Parts<'_>| {
            let first = Gathered { shards: &shards, outs: &outs };
            all_gather(device, &whole, &[first, Gathered { shards: others, outs: wholes }])
        };
        refused(next(&floats, &wide), &["all_gather", "element type of the first tensor"]);
        refused(next(&shards[..1], &outs[..1]), &["all_gather", "ranks of the second tensor", "2"]);
        refused(all_gather(device, &whole, &[]), &["all_gather", "1 to 2"]);
        refused(broadcast(device, &whole, &shards, 2), &["broadcast", "a rank below 2"]);
    });
}
