//! `swiglu` and `swiglu_and_linear` with dense weights against the oracle; that of INT4 weights is in `linear_int4.rs`.

use dsa80_cuda::CudaTensor;
use dsa80_cuda::linear::{LinearTiles, LinearWorkspace};
use dsa80_cuda::repack_int4::RepackInt4Tile;
use dsa80_cuda::swiglu::{SwiGlu, swiglu, swiglu_and_linear};
use dsa80_reference::{DType, HostData, HostLinear, HostTensor, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Interval, Pair, TestDevice, Values, half_ulp_bf16};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::linear::{fine, outputs_l2, small_tiles, sum_error};

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    columns: usize,
    intermediate: usize,
    /// Of the gate and the up projection.
    weights: (DType, DType),
    /// The product beside it.
    beside: Option<Beside>,
    seed: u64,
}

/// A product of the same input.
#[derive(Debug, Clone, Copy)]
struct Beside {
    features: usize,
    weight: DType,
    floats: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    let tokens = prop_oneof![1..=8_usize, 33..=50_usize];
    let beside = prop_oneof![Just(None), beside(1..=70_usize).prop_map(Some)];
    (tokens, 1..=40_usize, 1..=70_usize, beside, any::<u64>()).prop_map(
        |(tokens, columns, intermediate, beside, seed)| {
            let weights = (DType::Bf16, DType::Bf16);
            Case { tokens, columns: 8 * columns, intermediate, weights, beside, seed }
        },
    )
}

fn beside(features: impl Strategy<Value = usize>) -> impl Strategy<Value = Beside> {
    let weight = select(vec![DType::Bf16, DType::Bf16, DType::Bf16, DType::F32]);
    (features, weight, any::<bool>()).prop_map(|(features, weight, floats)| Beside {
        features,
        weight,
        floats,
    })
}

fn projection(case: &Case, dtype: DType, seed: u64) -> HostTensor {
    let values = fine(case.seed ^ seed, -3, case.intermediate * case.columns);
    let data = match dtype {
        DType::Bf16 => HostData::Bf16(values.iter().map(|&x| bf16::from_f64(x)).collect()),
        DType::F16 => HostData::F16(values.iter().map(|&x| f16::from_f64(x)).collect()),
        _ => HostData::F32(values.iter().map(|&x| x as f32).collect()),
    };
    HostTensor { shape: vec![case.intermediate, case.columns], data }
}

fn run(device: &TestDevice, case: Case, tiles: &LinearTiles) {
    let &Case { tokens, columns, intermediate, weights, seed, .. } = &case;
    let x =
        Pair::new(device, "x", DType::Act, &[tokens, columns], &Values::Normal.take(seed, tokens * columns));
    let projections = [projection(&case, weights.0, 1), projection(&case, weights.1, 2)];
    let [gate, up] = projections.clone().map(HostLinear::Dense);
    let uploaded = SwiGlu::upload(device, &RepackInt4Tile { warps: 1 }, gate.clone(), up.clone()).unwrap();
    let SwiGlu::Dense(weight) = uploaded else { panic!("dense projections are packed as INT4") };
    let workspace = LinearWorkspace::alloc(device, tiles).unwrap();
    let shape = [tokens, intermediate];
    let product = case.beside.map(|beside| {
        let numbers = fine(seed ^ 3, -3, beside.features * columns);
        let shape = [beside.features, columns];
        (beside, Pair::weight(device, "weight", beside.weight, &shape, &numbers))
    });
    let mut found = parity::twice(device, || {
        let mut out: CudaTensor<TestDevice> = parity::poisoned(device, "out", DType::Act, &shape);
        let Some((Beside { features, floats, .. }, other)) = &product else {
            swiglu(device, tiles, &workspace, &x.device, &weight, &mut out).unwrap();
            return parity::read_bytes(device, &out);
        };
        let dtype = if *floats { DType::Float } else { DType::Act };
        let mut other_out = parity::poisoned(device, "weight_out", dtype, &[tokens, *features]);
        let (x, other) = (&x.device, &other.device);
        swiglu_and_linear(device, tiles, &workspace, x, &weight, &mut out, other, &mut other_out).unwrap();
        [parity::read_bytes(device, &out), parity::read_bytes(device, &other_out)].concat()
    });
    let found_beside = found.split_off(2 * tokens * intermediate);
    let found = parity::numbers(DType::Act, &found);
    if let Some((beside, other)) = &product {
        check_beside(*beside, &x, other, &found_beside);
    }

    let oracle = parity::oracle();
    let mut expected = oracle.alloc(DType::Act, &shape).unwrap();
    oracle.swiglu(&x.host, &oracle.upload_swiglu(gate, up).unwrap(), &mut expected).unwrap();
    let expected = oracle.read(&expected).unwrap();
    let xs = oracle.read(&x.host).unwrap();
    // An f32 weight beside another makes both f32: three pieces.
    let pieces = if weights.0 == weights.1 { weights.0 } else { DType::F32 };
    // What a projection gives, and how far the kernel's sum may be from it.
    let [gates, ups] = projections.map(|weight| {
        let weight = weight.to_f32();
        let mut sums = Vec::with_capacity(tokens * intermediate);
        for x in xs.chunks(columns) {
            sums.extend(weight.chunks(columns).map(|w| {
                let products = || w.iter().zip(x).map(|(&w, x)| f64::from(w) * x);
                let magnitude = products().map(f64::abs).sum::<f64>();
                (products().sum::<f64>(), sum_error(columns, pieces, magnitude))
            }));
        }
        sums
    });
    let bound = |i: usize| {
        let ((g, g_off), (u, u_off)) = (gates[i], ups[i]);
        let silu = g / (1.0 + (-g).exp());
        // The slope of silu is 1.1 at most; then what the kernel's own arithmetic adds, beside what is flushed to zero.
        let error = 1.1 * g_off * (u.abs() + u_off) + silu.abs() * u_off;
        let own = (2.0 * g.abs().min(100.0) + 12.0) * F32_UNIT * (silu * u).abs();
        Interval::around(silu * u, error + own + 1e-35 * (1.0 + u.abs())).round_bf16().farthest(expected[i])
    };
    parity::assert_close("out", intermediate, &found, &expected, 2.5e-3, bound);
}

fn check_beside(Beside { features, weight, floats }: Beside, x: &Pair, other: &Pair, found: &[u8]) {
    let oracle = parity::oracle();
    let (xs, weights) = (oracle.read(&x.host).unwrap(), oracle.read(&other.host).unwrap());
    let columns = weights.len() / features;
    let dtype = if floats { DType::Float } else { DType::Act };
    let mut expected = oracle.alloc(dtype, &[xs.len() / columns, features]).unwrap();
    oracle.linear(&x.host, &other.host, &mut expected).unwrap();
    let expected = oracle.read(&expected).unwrap();
    let magnitude = |i: usize| {
        let (x, w) = (&xs[i / features * columns..], &weights[i % features * columns..]);
        x[..columns].iter().zip(w).map(|(x, w)| (x * w).abs()).sum::<f64>()
    };
    let magnitudes: Vec<f64> = (0..expected.len()).map(magnitude).collect();
    let bound = |i: usize| {
        let error = sum_error(columns, weight, magnitudes[i]);
        if floats { error } else { error + 2.0 * half_ulp_bf16(expected[i].abs() + error) }
    };
    let relative_l2 = outputs_l2(dtype, columns, &magnitudes, &expected);
    parity::assert_close(
        "weight_out",
        features,
        &parity::numbers(dtype, found),
        &expected,
        relative_l2,
        bound,
    );
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("swiglu", cases(), |device, case| run(device, case, &small_tiles()));
}

#[test]
fn agrees_with_the_oracle_at_size() {
    let tokens = select(vec![1_usize, 8, 32, 100, 300]);
    let weights = select(vec![
        (DType::Bf16, DType::Bf16),
        (DType::F16, DType::F16),
        (DType::F32, DType::F32),
        (DType::Bf16, DType::F16),
    ]);
    let beside = prop_oneof![Just(None), beside(select(vec![256_usize, 100])).prop_map(Some)];
    let cases = (tokens, weights, select(vec![256_usize, 300]), beside, any::<u64>()).prop_map(
        |(tokens, weights, intermediate, beside, seed)| Case {
            tokens,
            columns: 1024,
            intermediate,
            weights,
            beside,
            seed,
        },
    );
    parity::check_on_gpu("swiglu_at_size", cases, |device, case| run(device, case, &LinearTiles::safe()));
}

#[test]
fn planted_faults_are_seen() {
    for (file, find, replace) in [
        // Gate and up change places; a gate meets its neighbour's up projection; the last feature is dropped.
        ("linear.cuh", "swiglu(gate[i], up[i])", "swiglu(up[i], gate[i])"),
        ("linear_few.cu", "sum_of(ups, i + 2);", "sum_of(ups, i + 3);"),
        ("linear_tiles.cuh", "c[m][n + 1][2 * half], c[m][n + 1]", "c[m][n][2 * half], c[m][n + 1]"),
        ("linear.cuh", "feature, first_end, own.floats", "feature, first_end - 1, own.floats"),
        // The weight beside it: its rows, its outputs, and where they end.
        ("linear_few.cu", "(block - own_blocks) * FEATURES", "block * FEATURES"),
        ("linear_few.cu", "first_output = first_end, features", "features"),
        ("linear_few.cu", "features = second_end - first_end, outputs", "outputs"),
        ("linear_few.cu", "outputs.features = second_end;", ""),
        ("linear_few.cu", "        activates = false;\n", ""),
        ("linear_few.cu", "block >= own_blocks) {", "block > own_blocks) {"),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(), |device, case| run(device, case, &small_tiles()));
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tiles = LinearTiles::safe();
        let workspace = LinearWorkspace::alloc(device, &tiles).unwrap();
        let upload = |gate: [usize; 2], up: [usize; 2]| {
            let dense = |shape: [usize; 2]| {
                HostLinear::Dense(HostTensor::bf16(shape, vec![bf16::ONE; shape[0] * shape[1]]))
            };
            SwiGlu::upload(device, &RepackInt4Tile { warps: 1 }, dense(gate), dense(up))
        };
        let error = upload([8, 16], [9, 16]).err().map(|error| error.to_string()).unwrap_or_default();
        expect(error, &["upload_swiglu: `up_proj`", "[8, 16]"]);
        let SwiGlu::Dense(weight_of_eight) = upload([8, 16], [8, 16]).unwrap() else { panic!() };
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let run = |x: &_, mut out| {
            swiglu(device, &tiles, &workspace, x, &weight_of_eight, &mut out).unwrap_err().to_string()
        };
        let x = tensor(DType::Act, &[2, 16]);
        expect(run(&tensor(DType::Act, &[2, 8]), tensor(DType::Act, &[2, 8])), &["swiglu: `x`", "[2, 16]"]);
        expect(run(&x, tensor(DType::Act, &[2, 16])), &["`out`", "[2, 8]"]);
        expect(run(&x, tensor(DType::Float, &[2, 8])), &["`out` holds floats"]);
        let beside = |weight: &_, mut weight_out| {
            let mut out = tensor(DType::Act, &[2, 8]);
            let both = swiglu_and_linear(
                device,
                &tiles,
                &workspace,
                &x,
                &weight_of_eight,
                &mut out,
                weight,
                &mut weight_out,
            );
            both.unwrap_err().to_string()
        };
        let other = tensor(DType::Bf16, &[5, 16]);
        expect(beside(&other, tensor(DType::Act, &[2, 6])), &["swiglu_and_linear: `weight_out`", "[2, 5]"]);
        expect(beside(&other, tensor(DType::Index, &[2, 5])), &["`weight_out` holds indices"]);
        expect(beside(&tensor(DType::Bf16, &[5, 8]), tensor(DType::Act, &[2, 5])), &["`x`", "[2, 8]"]);
    });
}
