//! `silu_mul` against the oracle.

use dsa80_cuda::silu_mul::{SiluMulTile, silu_mul};
use dsa80_cuda::{Limits, Tile};
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Interval, Pair, TestDevice, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;

/// Rounding to bf16 flips where the oracle's value is close to a boundary: rarely, and by one step.
const RELATIVE_L2: f64 = 2.5e-3;

#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    width: usize,
    tile: SiluMulTile,
    values: [Values; 2],
    /// Of the gates: where an exponential neither vanishes nor overflows, and where it does.
    scale: f64,
    seed: u64,
}

fn cases(
    tiles: impl Strategy<Value = SiluMulTile>,
    max_rows: usize,
    max_width: usize,
) -> impl Strategy<Value = Case> {
    const ANY: [Values; 8] = [
        Values::Normal,
        Values::Ties,
        Values::Huge,
        Values::Enormous,
        Values::Tiny,
        Values::Negative,
        Values::Zeros,
        Values::Outliers,
    ];
    let values = || Values::any_of(&ANY);
    let scale = select(&[1.0, 1.0, 4.0, 32.0][..]);
    (0..=max_rows, 1..=max_width, tiles, [values(), values()], scale, any::<u64>())
        .prop_map(|(rows, width, tile, values, scale, seed)| Case { rows, width, tile, values, scale, seed })
}

/// What SwiGLU may be: the error analysis beside the kernel.
fn interval(gate: f64, up: f64) -> Interval {
    let product = gate / (1.0 + (-gate).exp()) * up;
    let relative = (2.0 * gate.abs().min(100.0) + 10.0) * F32_UNIT;
    let error = product.abs() * relative + 2.0_f64.powi(-119) * up.abs() + 2.0_f64.powi(-148);
    Interval::around(product, 1.01 * error).round_bf16()
}

fn run(device: &TestDevice, case: Case) {
    let (shape, count) = ([case.rows, case.width], case.rows * case.width);
    let gate: Vec<f64> = case.values[0].take(case.seed, count).iter().map(|x| case.scale * x).collect();
    let gate = Pair::new(device, "gate", DType::Act, &shape, &gate);
    let up = Pair::new(device, "up", DType::Act, &shape, &case.values[1].take(case.seed ^ 1, count));
    let bytes = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", DType::Act, &shape);
        silu_mul(device, &case.tile, &gate.device, &up.device, &mut out).unwrap();
        parity::read_bytes(device, &out)
    });
    let oracle = parity::oracle();
    let mut expected = oracle.alloc(DType::Act, &shape).unwrap();
    oracle.silu_mul(&gate.host, &up.host, &mut expected).unwrap();
    let expected = oracle.read(&expected).unwrap();
    let (gates, ups) = (oracle.read(&gate.host).unwrap(), oracle.read(&up.host).unwrap());
    let found = parity::numbers(DType::Act, &bytes);
    assert_close("out", case.width, &found, &expected, RELATIVE_L2, |i| {
        interval(gates[i], ups[i]).bound(expected[i])
    });
}

const TILE: SiluMulTile = SiluMulTile { warps: 1, vectors: 2 };

#[test]
fn agrees_with_the_oracle() {
    parity::check("silu_mul", cases(Just(TILE), 5, 300), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let tiles = select(SiluMulTile::candidates((), &Limits::a100()));
    parity::check_on_gpu("silu_mul_at_size", cases(tiles, 300, 1600), run);
}

#[test]
fn planted_faults_are_seen() {
    const ROWS: &str = "silu_mul.cu";
    const ELEMENT: &str = "silu.cuh";
    for (file, find, replace) in [
        (ELEMENT, "gate * -1.4426950408889634f", "gate * 1.4426950408889634f"),
        (ELEMENT, "gate * -1.4426950408889634f", "gate * -1.44f"),
        // The last vector; the few after it; one too many of them.
        (ROWS, "if (place < whole) store", "if (place < whole - VECTOR) store"),
        (ROWS, "gridDim.x - 1 && place < count", "gridDim.x && place < count"),
        (ROWS, "&& place < count)", "&& place <= count)"),
        // A thread's second vector is its first.
        (ROWS, "load_bf16<VECTOR>(up + place, ups[i]);", "load_bf16<VECTOR>(up + start, ups[i]);"),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(Just(TILE), 5, 300), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let act = |shape: &[usize]| tensor(DType::Act, shape);
        let run =
            |gate: &_, up: &_, mut out| silu_mul(device, &TILE, gate, up, &mut out).unwrap_err().to_string();
        let x = act(&[2, 6]);
        expect(run(&act(&[12]), &x, act(&[2, 6])), &["silu_mul: `gate`", "2 dimensions"]);
        expect(run(&tensor(DType::Float, &[2, 6]), &x, act(&[2, 6])), &["`gate` holds floats"]);
        expect(run(&x, &act(&[3, 6]), act(&[2, 6])), &["`up`", "[2, 6]"]);
        expect(run(&x, &tensor(DType::Float, &[2, 6]), act(&[2, 6])), &["`up` holds floats"]);
        expect(run(&x, &x, act(&[2, 7])), &["`out`", "[2, 6]"]);
        expect(run(&x, &x, tensor(DType::Float, &[2, 6])), &["`out` holds floats"]);
    });
}
