//! `linear_split` against the oracle, and against `linear`, whose kernels it has.

use dsa80_cuda::CudaTensor;
use dsa80_cuda::linear::{LinearTiles, LinearWorkspace, linear};
use dsa80_cuda::linear_split::linear_split;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, Pair, TestDevice, Values, half_ulp_bf16};
use half::bf16;
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::linear::{fine, outputs_l2, small_tiles, sum_error};

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    columns: usize,
    /// Features of each output, and whether it holds floats.
    outs: Vec<(usize, bool)>,
    /// Rows of the weight below the last that counts.
    below: usize,
    weight: DType,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let tokens = prop_oneof![1..=8_usize, 33..=50_usize];
    let width = prop_oneof![Just(32), Just(40), 0..=60_usize];
    let outs = prop::collection::vec((width, any::<bool>()), 1..=4);
    let below = prop_oneof![Just(0), 1..=20_usize];
    (tokens, 1..=40_usize, outs, below, any::<u64>()).prop_map(|(tokens, columns, outs, below, seed)| Case {
        tokens,
        columns: 8 * columns,
        outs,
        below,
        weight: DType::Bf16,
        seed,
    })
}

fn run(device: &TestDevice, case: Case, tiles: &LinearTiles) {
    let Case { tokens, columns, outs, below, weight: dtype, seed } = case;
    let x =
        Pair::new(device, "x", DType::Act, &[tokens, columns], &Values::Normal.take(seed, tokens * columns));
    let features: usize = outs.iter().map(|(width, _)| width).sum();
    let numbers = fine(seed ^ 1, 0, (features + below) * columns);
    let weight = Pair::weight(device, "weight", dtype, &[features + below, columns], &numbers);
    let workspace = LinearWorkspace::alloc(device, tiles).unwrap();
    let type_of = |floats| if floats { DType::Float } else { DType::Act };
    let bytes = parity::twice(device, || {
        let mut tensors: Vec<CudaTensor<TestDevice>> = outs
            .iter()
            .map(|&(width, floats)| parity::poisoned(device, "out", type_of(floats), &[tokens, width]))
            .collect();
        let mut all: Vec<_> = tensors.iter_mut().collect();
        linear_split(device, tiles, &workspace, &x.device, &weight.device, &mut all).unwrap();
        tensors.iter().flat_map(|out| parity::read_bytes(device, out)).collect()
    });

    // The same sums as those of one output; a library may add them up in another order.
    let whole = (below == 0 && !tiles.gemm).then(|| {
        let mut whole = parity::poisoned(device, "whole", DType::Float, &[tokens, features]);
        linear(device, tiles, &workspace, &x.device, &weight.device, &mut whole).unwrap();
        parity::read(device, &whole)
    });
    let oracle = parity::oracle();
    let mut expected: Vec<_> = outs
        .iter()
        .map(|&(width, floats)| oracle.alloc(type_of(floats), &[tokens, width]).unwrap())
        .collect();
    oracle.linear_split(&x.host, &weight.host, &mut expected.iter_mut().collect::<Vec<_>>()).unwrap();
    let (xs, weights) = (oracle.read(&x.host).unwrap(), oracle.read(&weight.host).unwrap());
    let (mut rest, mut start) = (&bytes[..], 0);
    for (&(width, floats), expected) in outs.iter().zip(&expected) {
        let (own, others) = rest.split_at(tokens * width * if floats { 4 } else { 2 });
        let found = parity::numbers(type_of(floats), own);
        if let Some(whole) = &whole {
            // Not from_f64, which drops the last bits of an f32 before it rounds.
            let rounded = |x: &f64| if floats { *x } else { bf16::from_f32(*x as f32).to_f64() };
            let of_row = |row: &[f64]| row[start..start + width].iter().map(rounded).collect::<Vec<_>>();
            let columns: Vec<f64> = whole.chunks(features.max(1)).flat_map(of_row).collect();
            parity::assert_same("out", width, &found, &columns);
        }
        let expected = oracle.read(expected).unwrap();
        let magnitude = |i: usize| {
            let (x, w) = (&xs[i / width * columns..], &weights[(start + i % width) * columns..]);
            x[..columns].iter().zip(w).map(|(x, w)| (x * w).abs()).sum::<f64>()
        };
        let magnitudes: Vec<f64> = (0..expected.len()).map(magnitude).collect();
        let bound = |i: usize| {
            let error = sum_error(columns, dtype, magnitudes[i]);
            if floats { error } else { error + 2.0 * half_ulp_bf16(expected[i].abs() + error) }
        };
        let relative_l2 = outputs_l2(type_of(floats), columns, &magnitudes, &expected);
        parity::assert_close("out", width, &found, &expected, relative_l2, bound);
        (rest, start) = (others, start + width);
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
    let widths = select(vec![&[512, 96][..], &[256, 96, 128, 32], &[300, 41, 19]]);
    let floats = any::<[bool; 4]>();
    let cases =
        (tokens, weights, widths, floats, any::<u64>()).prop_map(|(tokens, weight, widths, floats, seed)| {
            Case {
                tokens,
                columns: 1024,
                outs: widths.iter().copied().zip(floats).collect(),
                below: 0,
                weight,
                seed,
            }
        });
    parity::check_on_gpu("linear_split_at_size", cases, |device, case| {
        for gemm in [false, true] {
            run(device, case.clone(), &LinearTiles { gemm, ..LinearTiles::safe() });
        }
    });
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The border between outputs, where each begins, and whether it holds floats.
        ("if (row < first_end) return", "if (row <= first_end) return"),
        ("return {second, first_end, second_end,", "return {second, 0, second_end,"),
        (
            "return {third, second_end, third_end, (floats & 4)",
            "return {third, second_end, third_end, (floats & 2)",
        ),
        ("return {fourth, third_end, features,", "return {third, third_end, features,"),
        ("if (row + COUNT > own.end) {", "if (false) {"),
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
        let run = |mut outs: Vec<CudaTensor<TestDevice>>| {
            let mut outs: Vec<_> = outs.iter_mut().collect();
            linear_split(device, &tiles, &workspace, &x, &weight, &mut outs).unwrap_err().to_string()
        };
        let act = |shape: &[usize]| tensor(DType::Act, shape);
        expect(run(vec![act(&[2, 8]), act(&[2, 17])]), &["linear_split: `weight`", "[at least 25, 16]"]);
        expect(run(vec![act(&[2, 8]), act(&[1, 16])]), &["`outs[1]`", "[2, 16]"]);
        expect(run(vec![tensor(DType::Index, &[2, 8]), act(&[2, 16])]), &["`outs[0]` holds indices"]);
        expect(run(vec![]), &["`outs` is 0", "1 to 4 tensors"]);
        expect(run((0..5).map(|_| act(&[2, 1])).collect()), &["`outs` is 5"]);
    });
}
