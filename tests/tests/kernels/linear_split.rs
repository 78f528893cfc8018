//! `linear_split` against the oracle, and against `linear`, whose kernels it has.

use dsa80_cuda::CudaTensor;
use dsa80_cuda::linear::{LinearTiles, LinearWorkspace, linear};
use dsa80_cuda::linear_split::linear_split;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, Pair, TestDevice, Values, half_ulp_bf16};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::linear::{fine, outputs_l2, small_tiles, sum_error};

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    columns: usize,
    /// Features of either output.
    widths: (usize, usize),
    weight: DType,
    floats: bool,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let tokens = prop_oneof![1..=8_usize, 33..=50_usize];
    let widths = prop_oneof![Just((32, 40)), (0..=40_usize, 1..=60_usize)];
    (tokens, 1..=40_usize, widths, any::<bool>(), any::<u64>()).prop_map(
        |(tokens, columns, widths, floats, seed)| Case {
            tokens,
            columns: 8 * columns,
            widths,
            weight: DType::Bf16,
            floats,
            seed,
        },
    )
}

fn run(device: &TestDevice, case: Case, tiles: &LinearTiles) {
    let Case { tokens, columns, widths: (a, b), weight, floats, seed } = case;
    let x =
        Pair::new(device, "x", DType::Act, &[tokens, columns], &Values::Normal.take(seed, tokens * columns));
    let numbers = fine(seed ^ 1, 0, (a + b) * columns);
    let weight = Pair::weight(device, "weight", weight, &[a + b, columns], &numbers);
    let dtype = if floats { DType::Float } else { DType::Act };
    let workspace = LinearWorkspace::alloc(device, tiles).unwrap();
    let out = |width| -> CudaTensor<TestDevice> { parity::poisoned(device, "out", dtype, &[tokens, width]) };
    let found = parity::twice(device, || {
        let (mut first, mut second) = (out(a), out(b));
        linear_split(device, tiles, &workspace, &x.device, &weight.device, &mut first, &mut second).unwrap();
        [parity::read_bytes(device, &first), parity::read_bytes(device, &second)].concat()
    });
    let found = parity::numbers(dtype, &found);
    let (first, second) = found.split_at(tokens * a);

    // The same sums as those of the whole weight.
    let mut whole = out(a + b);
    linear(device, tiles, &workspace, &x.device, &weight.device, &mut whole).unwrap();
    let whole = parity::read(device, &whole);
    let columns_of = |all: &[f64], start: usize, width: usize| -> Vec<f64> {
        all.chunks(a + b).flat_map(|row| row[start..start + width].to_vec()).collect()
    };
    parity::assert_same("first", a, first, &columns_of(&whole, 0, a));
    parity::assert_same("second", b, second, &columns_of(&whole, a, b));

    let oracle = parity::oracle();
    let mut outs = [a, b].map(|width| oracle.alloc(dtype, &[tokens, width]).unwrap());
    let [expected_first, expected_second] = &mut outs;
    oracle.linear_split(&x.host, &weight.host, expected_first, expected_second).unwrap();
    let (xs, weights) = (oracle.read(&x.host).unwrap(), oracle.read(&weight.host).unwrap());
    for (name, found, expected, start, width) in
        [("first", first, &outs[0], 0, a), ("second", second, &outs[1], a, b)]
    {
        let expected = oracle.read(expected).unwrap();
        let magnitude = |i: usize| {
            let (x, w) = (&xs[i / width * columns..], &weights[(start + i % width) * columns..]);
            x[..columns].iter().zip(w).map(|(x, w)| (x * w).abs()).sum::<f64>()
        };
        let magnitudes: Vec<f64> = (0..expected.len()).map(magnitude).collect();
        let bound = |i: usize| {
            let error = sum_error(columns, case.weight, magnitudes[i]);
            if floats { error } else { error + 2.0 * half_ulp_bf16(expected[i].abs() + error) }
        };
        let relative_l2 = outputs_l2(dtype, columns, &magnitudes, &expected);
        parity::assert_close(name, width, found, &expected, relative_l2, bound);
    }
}

#[test]
fn agrees_with_the_oracle_and_with_linear() {
    parity::check("linear_split", cases(), |device, case| run(device, case, &small_tiles()));
}

#[test]
fn agrees_with_the_oracle_at_size() {
    let tokens = select(vec![1_usize, 8, 32, 100, 300]);
    let weights = select(vec![DType::Bf16, DType::F16, DType::F32]);
    let cases = (tokens, weights, any::<bool>(), any::<u64>()).prop_map(|(tokens, weight, floats, seed)| {
        Case { tokens, columns: 1024, widths: (512, 96), weight, floats, seed }
    });
    parity::check_on_gpu("linear_split_at_size", cases, |device, case| {
        run(device, case, &LinearTiles::safe())
    });
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The border between the outputs, and where the second begins.
        (
            "const bool upper = row >= split;\n        const int start",
            "const bool upper = row > split;\n        const int start",
        ),
        ("const int start = upper ? split : 0,", "const int start = 0,"),
        ("if (row < split && row + COUNT > split) {", "if (false) {"),
        ("const int column = upper ? row - split : row;", "const int column = row;"),
    ] {
        let fault = Fault { file: "linear.cuh", find, replace };
        parity::catches(fault, cases(), |device, case| run(device, case, &small_tiles()));
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tiles = LinearTiles::safe();
        let workspace = LinearWorkspace::alloc(device, &tiles).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let (x, weight) = (tensor(DType::Act, &[2, 16]), tensor(DType::Bf16, &[24, 16]));
        let run = |mut first, mut second| {
            linear_split(device, &tiles, &workspace, &x, &weight, &mut first, &mut second)
                .unwrap_err()
                .to_string()
        };
        let act = |shape: &[usize]| tensor(DType::Act, shape);
        expect(run(act(&[2, 8]), act(&[2, 15])), &["linear_split: `weight`", "[23, 16]"]);
        expect(run(act(&[2, 8]), act(&[1, 16])), &["`second`", "[2, 16]"]);
        expect(run(act(&[2, 8]), tensor(DType::Float, &[2, 16])), &["`second` holds floats"]);
        expect(run(tensor(DType::Index, &[2, 8]), act(&[2, 16])), &["`first` holds indices"]);
    });
}
