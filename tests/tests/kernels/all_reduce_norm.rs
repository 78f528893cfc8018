//! `all_reduce_norm` of ranks that share a device: to the bit what `all_reduce` and `rms_norm_residual` give one after the other.

use std::time::Duration;

use dsa80_cuda::all_reduce::{AllReduceTile, Shots, all_reduce_in};
use dsa80_cuda::all_reduce_norm::{AllReduceNormTile, NormParts, all_reduce_norm};
use dsa80_cuda::exchange::{self, Exchange, ExchangeDims};
use dsa80_cuda::rms_norm::{RmsNormTile, rms_norm_residual};
use dsa80_cuda::{CudaTensor, Device};
use dsa80_reference::DType;
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, Pair, TestDevice, Values, devices};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;

type Buffer = <TestDevice as Device>::Buffer;
type Tensor = CudaTensor<TestDevice>;

#[derive(Debug, Clone, Copy)]
struct Variant {
    ranks: usize,
    width: usize,
    weight: DType,
    vectors: usize,
    slot_bytes: usize,
}

/// Rows of one warp and of several, of whole chunks and not, moved 16 bytes at a time and less; slots of one row and of several.
const VARIANTS: &[Variant] = &[
    Variant { ranks: 2, width: 1096, weight: DType::Bf16, vectors: 2, slot_bytes: 2 * 2192 },
    Variant { ranks: 3, width: 35, weight: DType::F16, vectors: 1, slot_bytes: 432 },
    Variant { ranks: 8, width: 40, weight: DType::F32, vectors: 1, slot_bytes: 80 },
    Variant { ranks: 4, width: 20, weight: DType::Bf16, vectors: 4, slot_bytes: 96 },
];

#[derive(Debug, Clone)]
struct Case {
    variant: Variant,
    /// Launch by launch on the same workspaces and residuals.
    rows: Vec<usize>,
    blocks: usize,
    values: Values,
    eps: f64,
    seed: u64,
}

fn cases(variants: &'static [Variant]) -> impl Strategy<Value = Case> {
    let values = Values::any_of(&Values::ORDINARY);
    let rows = proptest::collection::vec(0..28_usize, 1..4);
    (select(variants), rows, 1..4_usize, values, select(&[1e-5, 0.25][..]), any::<u64>()).prop_map(
        |(variant, rows, blocks, values, eps, seed)| Case { variant, rows, blocks, values, eps, seed },
    )
}

fn exchange(device: &TestDevice, dims: ExchangeDims) -> Exchange<Buffer> {
    let workspaces = (0..dims.ranks).map(|_| exchange::alloc_workspace(device, dims).unwrap()).collect();
    Exchange { dims, workspaces, first_rank: 0, patience: Duration::from_secs(60) }
}

/// What the ranks of a launch have: x of its own on every rank, everything else alike.
struct Ranks {
    x: Vec<Tensor>,
    residual: Vec<Tensor>,
    weight: Vec<Tensor>,
    out: Vec<Tensor>,
}

impl Ranks {
    fn new(device: &TestDevice, case: &Case, rows: usize) -> Self {
        let Case { variant: Variant { ranks, width, weight, .. }, ref values, seed, .. } = *case;
        let shape = [rows, width];
        let make = |dtype, salt: u64| {
            let numbers = values.take(seed ^ salt << 32, rows * width);
            Pair::new(device, "tensor", dtype, &shape, &numbers).device
        };
        let weights = Values::Normal.take(seed, width);
        let every = 0..ranks as u64;
        Self {
            x: every.clone().map(|rank| make(DType::Act, 1 + rank)).collect(),
            residual: every.clone().map(|_| make(DType::Float, 99)).collect(),
            weight: every
                .clone()
                .map(|_| Pair::weight(device, "weight", weight, &[width], &weights).device)
                .collect(),
            out: every.map(|_| parity::poisoned(device, "out", DType::Act, &shape)).collect(),
        }
    }

    fn parts(&self) -> NormParts<'_, TestDevice> {
        NormParts { x: &self.x, residual: &self.residual, weight: &self.weight, out: &self.out }
    }
}

/// The two kernels one after the other: what every rank's residual and norm are.
fn apart(device: &TestDevice, case: &Case, exchange: &Exchange<Buffer>, rows: usize) -> [Vec<u8>; 2] {
    let mut ranks = Ranks::new(device, case, rows);
    let tile = AllReduceTile { threads: 32, blocks: 2 };
    all_reduce_in(Shots::One, device, &tile, exchange, &ranks.x).unwrap();
    let tile = RmsNormTile { vectors: case.variant.vectors, blocks: 1 };
    let (residual, out) = (&mut ranks.residual[0], &mut ranks.out[0]);
    rms_norm_residual(device, &tile, &ranks.x[0], residual, &ranks.weight[0], case.eps, out).unwrap();
    [parity::read_bytes(device, residual), parity::read_bytes(device, out)]
}

/// The rows whose residual holds the sum, by rank.
fn kept(found: &[Vec<u8>], expected: &[u8], row_bytes: usize) -> Vec<Vec<bool>> {
    let rows = |bytes: &[u8]| bytes.chunks(row_bytes).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let expected = rows(expected);
    found.iter().map(|bytes| rows(bytes).iter().zip(&expected).map(|(a, b)| a == b).collect()).collect()
}

fn run(device: &TestDevice, case: Case) {
    let Variant { ranks: count, width, vectors, slot_bytes, .. } = case.variant;
    let dims = ExchangeDims { ranks: count, channels: 2, slot_bytes };
    let tile = AllReduceNormTile { vectors, blocks: case.blocks };
    parity::twice(device, || {
        let exchange = exchange(device, dims);
        let mut bytes = Vec::new();
        for &rows in &case.rows {
            let [residual, out] = apart(device, &case, &exchange, rows);
            for shots in [Shots::One, Shots::Two] {
                let ranks = Ranks::new(device, &case, rows);
                all_reduce_norm(shots, device, &tile, &exchange, &ranks.parts(), case.eps).unwrap();
                for (rank, found) in ranks.out.iter().enumerate() {
                    let found = parity::read_bytes(device, found);
                    assert!(found == out, "{shots:?}, {rows} rows: the norm of rank {rank} differs");
                    bytes.extend(found);
                }
                let residuals: Vec<Vec<u8>> =
                    ranks.residual.iter().map(|tensor| parity::read_bytes(device, tensor)).collect();
                let kept = kept(&residuals, &residual, 4 * width);
                for row in 0..rows {
                    let keepers = kept.iter().filter(|of_rank| of_rank[row]).count();
                    let enough = if shots == Shots::One { keepers == count } else { keepers >= 1 };
                    assert!(enough, "{shots:?}: {keepers} of {count} ranks have the sum of row {row}");
                }
                bytes.extend(residuals.concat());
            }
        }
        for workspace in &exchange.workspaces {
            assert_eq!(exchange::failure(device, workspace, exchange.patience).unwrap(), None);
        }
        bytes
    });
}

#[test]
fn every_rank_has_what_the_two_kernels_give() {
    parity::check("all_reduce_norm", cases(VARIANTS), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The first row is pushed again and again; another row's residual.
        ("rms::VECTORS + cell(row, chunk))", "rms::VECTORS + cell(0, chunk))"),
        (
            "count)\n                    rms::load_row(next, own.x, own.residual, static_cast<int64_t>(first + row + 1)",
            "count)\n                    rms::load_row(next, own.x, own.residual, static_cast<int64_t>(first + row)",
        ),
        (
            "{\n                    rms::load_row(next, own.x, own.residual, static_cast<int64_t>(first + row + 1)",
            "{\n                    rms::load_row(next, own.x, own.residual, static_cast<int64_t>(first + row)",
        ),
        // The sum is not rounded, so to say: only this rank's part is normed.
        ("current.x[chunk][i] = sum.words[i]", "current.x[chunk][i] = own.words[i]"),
        // The next row's sums of squares are written where this one's are read.
        ("        turn ^= 1;\n", ""),
        // Rows of the wrong keeper.
        ("kept = static_cast<int64_t>(from(keeper, done))", "kept = static_cast<int64_t>(from(rank, done))"),
        // A share's first piece, again and again.
        ("start + of * share + done;", "start + of * share;"),
    ] {
        let fault = Fault { file: "all_reduce_norm.cu", find, replace };
        parity::catches(fault, cases(&VARIANTS[1..2]), run);
    }
}

/// A row is kept by the same rank in every launch, so that a stream of sums is right: two layers of it.
#[test]
fn the_residual_stream_of_a_keeper_goes_on() {
    parity::small_cases(|device| {
        let case = Case {
            variant: VARIANTS[2],
            rows: vec![21],
            blocks: 2,
            values: Values::Normal,
            eps: 1e-5,
            seed: 5,
        };
        let Variant { ranks: count, vectors, slot_bytes, .. } = case.variant;
        let exchange = exchange(device, ExchangeDims { ranks: count, channels: 2, slot_bytes });
        let tile = AllReduceNormTile { vectors, blocks: 2 };
        let stream = |shots| {
            let mut ranks = Ranks::new(device, &case, 21);
            for layer in 0..3 {
                let next = Ranks::new(device, &Case { seed: layer, ..case.clone() }, 21);
                ranks.x = next.x;
                all_reduce_norm(shots, device, &tile, &exchange, &ranks.parts(), case.eps).unwrap();
            }
            ranks.out.iter().map(|out| parity::read_bytes(device, out)).collect::<Vec<_>>()
        };
        let (one, two) = (stream(Shots::One), stream(Shots::Two));
        assert!(one == two && one.iter().all(|out| *out == one[0]), "the streams part");
    });
}

/// Ranks with a launch each, which meet in the middle of it.
fn assert_launches_meet(devices: &[&TestDevice], case: &Case, dims: ExchangeDims, rows: &[usize]) {
    let workspaces: Vec<Buffer> =
        devices.iter().map(|device| exchange::alloc_workspace(*device, dims).unwrap()).collect();
    let alone = exchange(devices[0], dims);
    for &rows in rows {
        let expected = apart(devices[0], case, &alone, rows);
        for shots in [Shots::One, Shots::Two] {
            // Every rank's tensors on its own device.
            let mut of_rank: Vec<Ranks> =
                devices.iter().map(|device| Ranks::new(device, case, rows)).collect();
            std::thread::scope(|scope| {
                for (rank, (device, tensors)) in devices.iter().zip(&mut of_rank).enumerate() {
                    let exchange = Exchange {
                        dims,
                        workspaces: workspaces.clone(),
                        first_rank: rank,
                        patience: Duration::from_secs(60),
                    };
                    scope.spawn(move || {
                        let only = rank..=rank;
                        let parts = NormParts {
                            x: &tensors.x[only.clone()],
                            residual: &tensors.residual[only.clone()],
                            weight: &tensors.weight[only.clone()],
                            out: &tensors.out[only],
                        };
                        let tile = AllReduceNormTile { vectors: case.variant.vectors, blocks: 24 };
                        all_reduce_norm(shots, *device, &tile, &exchange, &parts, case.eps).unwrap();
                    });
                }
            });
            for (rank, (device, tensors)) in devices.iter().zip(&of_rank).enumerate() {
                let found = parity::read_bytes(device, &tensors.out[rank]);
                assert!(found == expected[1], "{shots:?}, {rows} rows: the norm of rank {rank} differs");
            }
        }
    }
    for (device, workspace) in devices.iter().zip(&workspaces) {
        assert_eq!(exchange::failure(*device, workspace, Duration::ZERO).unwrap(), None);
    }
}

fn normal(variant: Variant) -> Case {
    Case { variant, rows: Vec::new(), blocks: 1, values: Values::Normal, eps: 1e-5, seed: 3 }
}

#[test]
fn launches_of_several_ranks_meet() {
    let Some(device) = devices::emulator() else { return };
    let variant = VARIANTS[3];
    let dims = ExchangeDims { ranks: variant.ranks, channels: 2, slot_bytes: variant.slot_bytes };
    assert_launches_meet(&[&device; 4], &normal(variant), dims, &[0, 1, 5, 40]);
}

#[test]
fn launches_of_several_gpus_meet() {
    let _alone = devices::one_group_at_a_time();
    let gpus: Vec<TestDevice> =
        devices::gpus().into_iter().map(|gpu| TestDevice::Gpu(Box::new(gpu))).collect();
    for ranks in [2, 4, 8].into_iter().filter(|&ranks| ranks <= gpus.len()) {
        let devices: Vec<&TestDevice> = gpus[..ranks].iter().collect();
        let variant = Variant { ranks, width: 6144, weight: DType::Bf16, vectors: 1, slot_bytes: 0 };
        let dims = ExchangeDims::new(ranks).unwrap();
        assert_launches_meet(&devices, &normal(variant), dims, &[1, 32, 7, 700, 3, 256]);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let variant = Variant { ranks: 2, ..VARIANTS[2] };
        let exchange = exchange(device, ExchangeDims { ranks: 2, channels: 2, slot_bytes: 80 });
        let tile = AllReduceNormTile { vectors: 1, blocks: 1 };
        let refused = |change: &dyn Fn(&mut Ranks), words: &[&str]| {
            let mut ranks = Ranks::new(device, &normal(variant), 3);
            change(&mut ranks);
            let done = all_reduce_norm(Shots::One, device, &tile, &exchange, &ranks.parts(), 1e-5);
            expect(done.unwrap_err().to_string(), words);
        };
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        refused(&|ranks| drop(ranks.weight.pop()), &["all_reduce_norm", "2 of `weight`, as of `x`"]);
        refused(&|ranks| ranks.x[1] = tensor(DType::Act, &[2, 40]), &["`x`", "as on the first rank"]);
        refused(&|ranks| ranks.residual[0] = tensor(DType::Act, &[3, 40]), &["`residual` holds activations"]);
        let wide = || tensor(DType::Act, &[3, 48]);
        refused(&|ranks| ranks.out = vec![wide(), wide()], &["`out`", "[3, 40]"]);
        refused(&|ranks| ranks.weight = vec![tensor(DType::F32, &[8]), tensor(DType::F32, &[8])], &["[40]"]);
        let too_wide = Variant { width: 48, ..variant };
        let ranks = Ranks::new(device, &normal(too_wide), 1);
        let done = all_reduce_norm(Shots::Two, device, &tile, &exchange, &ranks.parts(), 1e-5);
        expect(done.unwrap_err().to_string(), &["48 columns does not fit a slot of 80 bytes"]);
    });
}
