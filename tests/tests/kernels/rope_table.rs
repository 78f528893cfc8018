//! `rope_table` against the oracle.

use dsa80_cuda::rope_table::{RopeTableTile, rope_table};
use dsa80_cuda::{Limits, Tile};
use dsa80_reference::{Batch, DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, F32_UNIT, TestDevice, assert_close};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;

#[derive(Debug, Clone)]
struct Case {
    positions: Vec<i32>,
    pairs: usize,
    theta: f64,
    tile: RopeTableTile,
}

fn cases(tiles: impl Strategy<Value = usize>, max_rows: usize) -> impl Strategy<Value = Case> {
    let position = prop_oneof![0..1 << 20, 0..64, Just(0), Just(1 << 20), Just(i32::MAX - 1)];
    let theta = select(&[1e4, 1e6, 8e6, 1.0, 2.5][..]);
    let pairs = prop_oneof![Just(32_usize), Just(4), 1..70_usize];
    (vec(position, 0..=max_rows), pairs, theta, tiles).prop_map(|(positions, pairs, theta, warps)| {
        let tile = RopeTableTile { warps };
        Case { positions, pairs, theta, tile }
    })
}

/// A batch of tokens at these positions, of a sequence that is long enough.
fn batch(positions: &[i32]) -> Batch {
    let mut batch = BatchCase::of(16, &[(0, positions.len())]).batch;
    batch.positions = positions.to_vec();
    batch.context_lens = vec![i32::MAX];
    batch
}

fn run(device: &TestDevice, case: Case) {
    let Case { positions, pairs, theta, tile } = case;
    let shape = [positions.len(), pairs, 2];
    let (host, on_device) = parity::batch(device, &batch(&positions));
    let bytes = parity::twice(device, || {
        let mut cos_sin = parity::poisoned(device, "cos_sin", DType::Float, &shape);
        rope_table(device, &tile, &on_device, theta, &mut cos_sin).unwrap();
        parity::read_bytes(device, &cos_sin)
    });
    let mut expected = parity::oracle().alloc(DType::Float, &shape).unwrap();
    parity::oracle().rope_table(&host, theta, &mut expected).unwrap();
    let expected = parity::oracle().read(&expected).unwrap();
    // The analysis beside the kernel, and what the oracle's own power and product are off by.
    let bound = |i: usize| {
        let (position, pair) = (f64::from(positions[i / 2 / pairs]), (i / 2 % pairs) as f64);
        let exponent = pair / pairs as f64 * theta.ln();
        let angle = position * (-exponent).exp();
        let relative = (3.0 * pair + 2.0 * exponent + 6.0) * f64::EPSILON / 2.0;
        1.01 * F32_UNIT * expected[i].abs()
            + 2.0_f64.powi(-43)
            + if pair > 0.0 { angle * relative } else { 0.0 }
    };
    assert_close("cos_sin", 2 * pairs, &parity::numbers(DType::Float, &bytes), &expected, 1e-5, bound);
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("rope_table", cases(Just(2), 12), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let tiles = RopeTableTile::candidates((), &Limits::a100());
    parity::check_on_gpu("rope_table_at_size", cases(select(tiles).prop_map(|tile| tile.warps), 8192), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // In single precision, near a position of 2^20.
        (
            "const double angle = positions[row] * frequency;",
            "const double angle = float(positions[row]) * float(frequency);",
        ),
        ("place >= static_cast<int64_t>(rows) * pairs", "place >= static_cast<int64_t>(rows) * pairs - 1"),
        ("fma(-quarters, 6.123233995736766036e-17, ", "(0 * quarters + "),
        ("float>(-sine), static_cast<float>(cosine)", "float>(sine), static_cast<float>(cosine)"),
        ("float>(sine), static_cast<float>(-cosine)", "float>(sine), static_cast<float>(cosine)"),
        ("if (bits & 1)", "if (bits & 3)"),
        // A term less.
        ("    sum = fma(sum, s, -1.0 / 5040.0);\n", ""),
    ] {
        let fault = Fault { file: "rope_table.cu", find, replace };
        parity::catches(fault, cases(Just(2), 12), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let (_, batch) = parity::batch(device, &batch(&[3, 4]));
        let run = |dtype, shape: &[usize], theta| {
            let mut cos_sin = parity::poisoned(device, "tensor", dtype, shape);
            let outcome = rope_table(device, &RopeTableTile { warps: 1 }, &batch, theta, &mut cos_sin);
            outcome.unwrap_err().to_string()
        };
        expect(run(DType::Float, &[2, 8], 1e6), &["rope_table: `cos_sin`", "3 dimensions"]);
        expect(run(DType::Float, &[3, 4, 2], 1e6), &["`cos_sin`", "[2, dim / 2, 2]"]);
        expect(run(DType::Act, &[2, 4, 2], 1e6), &["`cos_sin` holds activations"]);
        for theta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            expect(run(DType::Float, &[2, 4, 2], theta), &["`theta`", "a positive number"]);
        }
    });
}
