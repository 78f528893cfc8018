//! `rope` against the oracle.

use dsa80_cuda::rope::{RopeDims, RopeTile, rope};
use dsa80_cuda::{Limits, Tile};
use dsa80_reference::{DType, Kernels, RopeLayout};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Interval, Pair, TestDevice, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;

/// Rounding to bf16 flips where the oracle's value is close to a boundary: rarely, and by one step.
const RELATIVE_L2: f64 = 2.5e-3;

#[derive(Debug, Clone, Copy)]
struct Variant {
    dims: RopeDims,
    tile: RopeTile,
}

const fn variant(
    heads: usize,
    (width, offset, rope): (usize, usize, usize),
    layout: RopeLayout,
    warps: usize,
) -> Variant {
    Variant { dims: RopeDims { heads, width, offset, rope, layout }, tile: RopeTile { warps } }
}

/// Every constant of the kernel in few programs: 16-byte loads, shorter ones, and columns that are not even aligned as pairs.
const VARIANTS: &[Variant] = &[
    variant(20, (24, 8, 16), RopeLayout::Interleaved, 1),
    variant(3, (27, 2, 18), RopeLayout::Interleaved, 1),
    variant(7, (26, 2, 20), RopeLayout::Half, 2),
    variant(2, (8, 1, 6), RopeLayout::Half, 1),
];

#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    variant: Variant,
    values: Values,
    seed: u64,
}

fn cases(variants: impl Strategy<Value = Variant>, max_rows: usize) -> impl Strategy<Value = Case> {
    (0..=max_rows, variants, Values::any_of(&Values::ORDINARY), any::<u64>())
        .prop_map(|(rows, variant, values, seed)| Case { rows, variant, values, seed })
}

fn run(device: &TestDevice, case: Case) {
    let Variant { dims, tile } = case.variant;
    let RopeDims { heads, width, offset, rope: dim, layout } = dims;
    let shape = [case.rows, heads, width];
    let x = case.values.take(case.seed, shape.iter().product());
    let turns = (0..case.rows * dim / 2).flat_map(|i| {
        let (sin, cos) = (37.0 * Values::Normal.at(case.seed ^ 3, i)).sin_cos();
        [cos, sin]
    });
    let turns: Vec<f64> = turns.collect();
    let cos_sin = Pair::new(device, "cos_sin", DType::Float, &[case.rows, dim / 2, 2], &turns);
    let bytes = parity::twice(device, || {
        let mut x = Pair::new(device, "x", DType::Act, &shape, &x).device;
        rope(device, &tile, &mut x, offset, layout, &cos_sin.device).unwrap();
        parity::read_bytes(device, &x)
    });
    let found = parity::numbers(DType::Act, &bytes);

    let oracle = parity::oracle();
    let mut expected = Pair::new(device, "x", DType::Act, &shape, &x).host;
    oracle.rope(&mut expected, offset, layout, &cos_sin.host).unwrap();
    let expected = oracle.read(&expected).unwrap();
    let turns = oracle.read(&cos_sin.host).unwrap();
    // What does not rotate stays as it is.
    let mut intervals: Vec<Interval> = x.iter().map(|&x| Interval::around(x, 0.0)).collect();
    for (i, (head, x)) in intervals.chunks_mut(width).zip(x.chunks(width)).enumerate() {
        let (head, x) = (&mut head[offset..], &x[offset..]);
        for (j, turn) in turns[i / heads * dim..][..dim].chunks(2).enumerate() {
            let (first, second) = match layout {
                RopeLayout::Interleaved => (2 * j, 2 * j + 1),
                RopeLayout::Half => (j, j + dim / 2),
            };
            let (a, b, cos, sin) = (x[first], x[second], turn[0], turn[1]);
            let turned = |a: f64, b: f64, sin: f64| {
                let error = 2.0 * F32_UNIT * ((a * cos).abs() + (b * sin).abs());
                Interval::around(a * cos + b * sin, 1.01 * error).round_bf16()
            };
            head[first] = turned(a, b, -sin);
            head[second] = turned(b, a, sin);
        }
    }
    assert_close("x", width, &found, &expected, RELATIVE_L2, |i| intervals[i].bound(expected[i]));
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("rope", cases(select(VARIANTS), 9), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let shapes = [(8, (256, 192, 64)), (64, (256, 192, 64)), (32, (128, 0, 64)), (4, (24, 16, 8))];
    let layouts = [RopeLayout::Interleaved, RopeLayout::Half];
    let variants =
        (select(shapes.to_vec()), select(layouts.to_vec())).prop_flat_map(|((heads, columns), layout)| {
            let dims = variant(heads, columns, layout, 1).dims;
            select(RopeTile::candidates(dims, &Limits::a100())).prop_map(move |tile| Variant { dims, tile })
        });
    parity::check_on_gpu("rope_at_size", cases(variants, 150), run);
}

#[test]
fn agrees_with_the_oracle_on_the_longest_prefill() {
    parity::large_cases(|device| {
        let variant = variant(8, (256, 192, 64), RopeLayout::Interleaved, 8);
        run(device, Case { rows: 8192, variant, values: Values::Ties, seed: 3 });
    });
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The wrong pairs, of either layout.
        ("pair + i * PAIRS", "pair + i * (PAIRS - 1)"),
        ("HALF ? GROUP + i : 2 * i + 1", "HALF ? 2 * GROUP - 1 - i : 2 * i + 1"),
        ("HALF ? i : 2 * i,", "HALF ? i : 2 * i ^ 2,"),
        ("turns[2 * i], turns[2 * i + 1]);", "turns[2 * i], -turns[2 * i + 1]);"),
        // The turns of the first token, of the pair before.
        ("cos_sin + row * PAIRS", "cos_sin"),
        // The last pairs of the last head; the head before.
        ("unit < heads * GROUPS", "unit < heads * GROUPS - 1"),
        ("const int head = unit / GROUPS", "const int head = (unit + 1) / GROUPS"),
    ] {
        let fault = Fault { file: "rope.cu", find, replace };
        parity::catches(fault, cases(select(VARIANTS), 9), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let turns = |shape: &[usize]| tensor(DType::Float, shape);
        let run = |mut x, offset, cos_sin: &_| {
            let outcome = rope(device, &RopeTile { warps: 1 }, &mut x, offset, RopeLayout::Half, cos_sin);
            outcome.unwrap_err().to_string()
        };
        let x = || tensor(DType::Act, &[2, 3, 8]);
        expect(run(tensor(DType::Act, &[2, 24]), 0, &turns(&[2, 2, 2])), &["rope: `x`", "3 dimensions"]);
        expect(run(turns(&[2, 3, 8]), 0, &turns(&[2, 2, 2])), &["`x` holds floats"]);
        expect(run(x(), 0, &turns(&[3, 2, 2])), &["`cos_sin`", "[2, dim / 2, 2]"]);
        expect(run(x(), 0, &turns(&[2, 2, 3])), &["`cos_sin`"]);
        expect(run(x(), 0, &tensor(DType::Act, &[2, 2, 2])), &["`cos_sin` holds activations"]);
        expect(run(x(), 5, &turns(&[2, 2, 2])), &["`offset` is 5", "room for 4 columns in 8"]);
        expect(run(x(), 0, &turns(&[2, 5, 2])), &["room for 10 columns in 8"]);
        expect(run(x(), usize::MAX, &turns(&[2, 2, 2])), &["room for 4 columns"]);
    });
}
