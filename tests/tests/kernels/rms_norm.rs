//! `rms_norm` and `rms_norm_residual` against the oracle.

use dsa80_cuda::rms_norm::{RmsNormDims, RmsNormTile, rms_norm, rms_norm_residual};
use dsa80_cuda::{CudaTensor, Limits, Tile};
use dsa80_reference::cpu::Real;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Interval, Pair, TestDevice, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;

/// Rounding to bf16 flips where the oracle's value is close to a boundary: rarely, and by one step.
const RELATIVE_L2: f64 = 2.5e-3;

#[derive(Debug, Clone, Copy)]
struct Variant {
    width: usize,
    weight: DType,
    rows: Rows,
    tile: RmsNormTile,
}

/// What is normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rows {
    Acts,
    Floats,
    Residual,
}

const fn variant(width: usize, weight: DType, rows: Rows, (vectors, blocks): (usize, usize)) -> Variant {
    Variant { width, weight, rows, tile: RmsNormTile { vectors, blocks } }
}

/// Every constant of the kernel in few programs: rows of one warp and of several, of whole chunks and not, aligned and not.
const VARIANTS: &[Variant] = &[
    variant(1096, DType::Bf16, Rows::Residual, (2, 1)),
    variant(264, DType::F32, Rows::Floats, (1, 1)),
    variant(35, DType::F16, Rows::Residual, (1, 1)),
    variant(20, DType::Bf16, Rows::Acts, (4, 32)),
];

#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    variant: Variant,
    values: Values,
    eps: f64,
    seed: u64,
}

fn cases(variants: impl Strategy<Value = Variant>, max_rows: usize) -> impl Strategy<Value = Case> {
    let values = Values::any_of(&Values::ORDINARY);
    (0..=max_rows, variants, values, select(&[1e-5, 1e-6, 0.25][..]), any::<u64>())
        .prop_map(|(rows, variant, values, eps, seed)| Case { rows, variant, values, eps, seed })
}

/// What the norms of `x` may be: the error analysis beside the kernel.
fn intervals(case: &Case, x: &[f64], weight: &[f64]) -> Vec<Interval> {
    let width = case.variant.width;
    // A thread has no more values than this.
    let additions = 32.0 + 10.0;
    let mut out = Vec::new();
    for x in x.chunks(width) {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / width as f64;
        let reciprocal = 1.0 / (mean + case.eps).sqrt();
        let error = (additions + 7.0) * F32_UNIT / 2.0 + 4.0 * F32_UNIT + 3.0 * F32_UNIT;
        out.extend(x.iter().zip(weight).map(|(x, weight)| {
            let normed = weight * x * reciprocal;
            Interval::around(normed, 1.01 * error * normed.abs()).round_bf16()
        }));
    }
    out
}

fn run(device: &TestDevice, case: Case) {
    let Variant { width, weight, rows, tile } = case.variant;
    let shape = [case.rows, width];
    let pair = |name, dtype, seed| {
        // Not bf16 numbers, where floats are wanted.
        let by = if dtype == DType::Float { 1.0 / 3.0 } else { 1.0 };
        let values = case.values.take(seed, case.rows * width);
        Pair::new(device, name, dtype, &shape, &values.iter().map(|x| x * by).collect::<Vec<f64>>())
    };
    let x = pair("x", if rows == Rows::Floats { DType::Float } else { DType::Act }, case.seed);
    let residual = || pair("residual", DType::Float, case.seed ^ 1);
    let weights: Vec<f64> = Values::Normal.take(case.seed ^ 2, width).iter().map(|w| 1.0 + 0.5 * w).collect();
    let weight = Pair::weight(device, "weight", weight, &[width], &weights);
    let oracle = parity::oracle();

    let bytes = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", DType::Act, &shape);
        if rows != Rows::Residual {
            rms_norm(device, &tile, &x.device, &weight.device, case.eps, &mut out).unwrap();
            return parity::read_bytes(device, &out);
        }
        let mut sum = residual();
        rms_norm_residual(device, &tile, &x.device, &mut sum.device, &weight.device, case.eps, &mut out)
            .unwrap();
        [parity::read_bytes(device, &sum.device), parity::read_bytes(device, &out)].concat()
    });
    let (sums, norms) = bytes.split_at(if rows == Rows::Residual { 4 * case.rows * width } else { 0 });
    let (sums, found) = (parity::numbers(DType::Float, sums), parity::numbers(DType::Act, norms));

    let mut expected = oracle.alloc(DType::Act, &shape).unwrap();
    let mut normed = oracle.read(&x.host).unwrap();
    if rows == Rows::Residual {
        let mut sum = residual().host;
        oracle.rms_norm_residual(&x.host, &mut sum, &weight.host, case.eps, &mut expected).unwrap();
        normed = oracle.read(&sum).unwrap();
        let bound = |i: usize| F32_UNIT * normed[i].abs() + f64::from(f32::MIN_POSITIVE);
        assert_close("residual", width, &sums, &normed, F32_UNIT, bound);
    } else {
        oracle.rms_norm(&x.host, &weight.host, case.eps, &mut expected).unwrap();
    }
    let expected = oracle.read(&expected).unwrap();
    let intervals = intervals(&case, &normed, &oracle.read(&weight.host).unwrap());
    assert_close("out", width, &found, &expected, RELATIVE_L2, |i| intervals[i].bound(expected[i]));
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("rms_norm", cases(select(VARIANTS), 11), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let variants = select(&[6144, 2048, 512, 128][..]).prop_flat_map(|width| {
        let tiles = RmsNormTile::candidates(RmsNormDims { width }, &Limits::a100());
        let weights = select(&[DType::Bf16, DType::Bf16, DType::F16, DType::F32][..]);
        let rows = select(&[Rows::Acts, Rows::Floats, Rows::Residual][..]);
        (select(tiles), weights, rows).prop_map(move |(tile, weight, rows)| Variant {
            width,
            weight,
            rows,
            tile,
        })
    });
    parity::check_on_gpu("rms_norm_at_size", cases(variants, 250), run);
}

#[test]
fn agrees_with_the_oracle_on_the_longest_prefill() {
    parity::large_cases(|device| {
        for rows in [Rows::Acts, Rows::Residual] {
            let tile = RmsNormTile { vectors: 3, blocks: 4 };
            let variant = Variant { width: 2048, weight: DType::Bf16, rows, tile };
            run(device, Case { rows: 8192, variant, values: Values::Ties, eps: 1e-5, seed: 3 });
        }
    });
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // Sums are read before they are there; the next row's are written before they were read.
        ("        __syncthreads();\n", ""),
        ("turn ^= 1;", ""),
        // The last vector of a row: not summed, not written.
        (
            "if (column(chunk) < WIDTH) {\n            const int64_t place",
            "if (column(chunk) < WIDTH - VECTOR) {\n            const int64_t place",
        ),
        (
            "if (column(chunk) < WIDTH) store_bf16<VECTOR>(out",
            "if (column(chunk) < WIDTH - VECTOR) store_bf16<VECTOR>(out",
        ),
        ("rsqrtf(mean + eps)", "rsqrtf(mean) + eps"),
        // The last warp's sum.
        ("lane < WARPS ?", "lane < WARPS - 1 ?"),
        // A row again instead of the next.
        ("(row + step) * WIDTH);", "row * WIDTH);"),
        ("values[chunk][i] += __uint", "values[chunk][i] -= __uint"),
    ] {
        let fault = Fault { file: "rms_norm.cuh", find, replace };
        parity::catches(fault, cases(select(&VARIANTS[1..3]), 11), run);
    }
}

/// Sums of equal magnitudes, known to the bit.
#[test]
fn a_row_of_powers_of_two_is_exact() {
    parity::small_cases(|device| {
        let tile = RmsNormTile { vectors: 4, blocks: 32 };
        let x: Vec<f64> = (0..20).map(|i| if i % 2 == 0 { 0.5 } else { -0.5 }).collect();
        let x = Pair::new(device, "x", DType::Act, &[1, 20], &x);
        let weight = Pair::weight(device, "weight", DType::Bf16, &[20], &[3.0; 20]);
        let mut out = parity::poisoned(device, "out", DType::Act, &[1, 20]);
        rms_norm(device, &tile, &x.device, &weight.device, 0.0, &mut out).unwrap();
        let found = parity::read(device, &out);
        assert!(
            found.iter().enumerate().all(|(i, y)| *y == if i % 2 == 0 { 3.0 } else { -3.0 }),
            "{found:?}"
        );
        assert_eq!(Real::round_bf16(3.0_f64), 3.0);
    });
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let act = |shape: &[usize]| tensor(DType::Act, shape);
        let tile = RmsNormTile { vectors: 1, blocks: 1 };
        let (x, weight) = (act(&[2, 16]), tensor(DType::Bf16, &[16]));
        let plain = |x: &CudaTensor<_>, weight: &_, mut out| {
            rms_norm(device, &tile, x, weight, 1e-5, &mut out).unwrap_err().to_string()
        };
        expect(plain(&act(&[2, 4, 4]), &weight, act(&[2, 16])), &["rms_norm: `x`", "2 dimensions"]);
        expect(plain(&tensor(DType::Index, &[2, 16]), &weight, act(&[2, 16])), &["`x` holds indices"]);
        expect(plain(&x, &tensor(DType::Bf16, &[8]), act(&[2, 16])), &["`weight`", "[16]"]);
        expect(plain(&x, &act(&[16]), act(&[2, 16])), &["`weight` holds activations"]);
        expect(plain(&x, &weight, act(&[3, 16])), &["`out`", "[2, 16]"]);
        expect(plain(&x, &weight, tensor(DType::Float, &[2, 16])), &["`out` holds floats"]);
        let wide = act(&[1, 40000]);
        expect(plain(&wide, &tensor(DType::Bf16, &[40000]), act(&[1, 40000])), &["40000 columns"]);
        let with = |mut residual, mut out| {
            rms_norm_residual(device, &tile, &x, &mut residual, &weight, 1e-5, &mut out)
                .unwrap_err()
                .to_string()
        };
        let floats = |shape: &[usize]| tensor(DType::Float, shape);
        expect(with(floats(&[1, 16]), act(&[2, 16])), &["rms_norm_residual: `residual`", "[2, 16]"]);
        expect(with(floats(&[2, 16]), act(&[2, 8])), &["rms_norm_residual: `out`"]);
        expect(with(act(&[2, 16]), act(&[2, 16])), &["`residual` holds activations"]);
    });
}
