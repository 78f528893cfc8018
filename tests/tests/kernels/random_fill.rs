//! `random_fill` against the numbers of the definition, to the bit.

use dsa80_cuda::random_fill::{Rows, random, random_fill};
use dsa80_cuda::repack_int4::RepackInt4Tile;
use dsa80_cuda::{Cuda, CudaTensor, Int4Shape, PackedInt4, Tile, Tiles};
use dsa80_reference::{DType, HostLinear, Kernels, RandomFormat, RandomLinear, RandomTensor};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, TestDevice, devices};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;

const WEIGHTS: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

#[derive(Debug, Clone)]
struct Case {
    tensor: RandomTensor,
    /// Rows that lie together, and how many rows of something else lie before and between them.
    together: usize,
    before: usize,
    between: usize,
}

fn cases(max_rows: usize, max_columns: usize) -> impl Strategy<Value = Case> {
    // Numbers around zero, of which a half has subnormal ones, and far from it.
    let values =
        select(&[(0.0, 1.0), (0.0, 1e-3), (0.0, 1e-6), (1.0, 0.3), (-3e-3, 1e-3), (500.0, 499.0)][..]);
    (
        0..=max_rows,
        1..=max_columns,
        select(&WEIGHTS[..]),
        values,
        any::<u32>(),
        1..=9_usize,
        0..=5_usize,
        0..=9_usize,
    )
        .prop_map(|(rows, columns, dtype, (centre, spread), seed, together, before, between)| Case {
            tensor: RandomTensor::new([rows, columns], dtype, centre, spread, seed),
            together,
            before,
            between,
        })
}

fn run(device: &TestDevice, Case { tensor, together, before, between }: Case) {
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let places = Rows { together, stride: together + between, first: before };
    let height = before + rows.div_ceil(together) * (together + between);
    let found = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", tensor.dtype, &[height, columns]);
        random_fill(device, &tensor, places, &mut out).unwrap();
        parity::read_bytes(device, &out)
    });
    let poison = parity::poisoned(device, "out", tensor.dtype, &[height, columns]);
    let mut expected = parity::read_bytes(device, &poison);
    let numbers = tensor.make();
    let width = expected.len() / height.max(1);
    let numbers = parity::weight_bytes(&numbers);
    for (row, bytes) in numbers.chunks(width.max(1)).enumerate() {
        let place = before + row / together * (together + between) + row % together;
        expected[place * width..][..width].copy_from_slice(bytes);
    }
    parity::assert_same("out", width.max(1), &found, &expected);
}

#[test]
fn agrees_with_the_definition_to_the_bit() {
    parity::check("random_fill", cases(30, 40), run);
}

#[test]
fn agrees_with_the_definition_at_size() {
    parity::check_on_gpu("random_fill_at_size", cases(3000, 3000), run);
}

#[test]
fn planted_faults_are_seen() {
    for (file, find, replace) in [
        ("random.cuh", "0x846ca68bu", "0x846ca68du"),
        ("random.cuh", "x ^ x >> 15", "x ^ x >> 16"),
        ("random_fill.cu", "if (4 * word + i >= count) return;", "if (4 * word + i > count) return;"),
        ("random_fill.cu", "bits >> 8 * i & 255u", "bits >> 8 * (3 - i) & 255u"),
        ("random_fill.cu", "255u) - 255)", "255u) - 256)"),
        ("random_fill.cu", "column = 0, ++row;", "column = 0;"),
        ("random_fill.cu", "row / together * stride", "row / together * together"),
        // Ties of a half go up; its subnormals are cut off.
        ("random_fill.cu", "(magnitude >> 13 & 1u)", "1u"),
        ("random_fill.cu", "magnitude < 0x38800000u", "magnitude < 0x33800000u"),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(30, 40), run);
    }
}

/// Packed weights, and those of a SwiGLU and of experts, are those that an upload of their numbers gives.
#[test]
fn packed_weights_are_those_of_an_upload() {
    parity::small_cases(|device| {
        let tile = RepackInt4Tile::safe(());
        for (zero_points, scales, group_size) in
            [(true, DType::Bf16, 32), (false, DType::F16, 64), (true, DType::F32, 100)]
        {
            let format = RandomFormat::Int4 { group_size, scales, zero_points };
            let weight =
                |seed| RandomLinear { out_features: 44, in_features: 100, format, deviation: 0.1, seed };
            let (gate, up) = (weight(1), weight(2));
            let HostLinear::Int4(host) = gate.make() else { panic!("INT4 was asked for") };
            let HostLinear::Int4(host_up) = up.make() else { panic!("INT4 was asked for") };
            let expected = PackedInt4::upload(device, &tile, &host).unwrap().read(device, 0).unwrap();
            let found = PackedInt4::random(device, &tile, &[&gate]).unwrap();
            assert_eq!(*found.shape(), Int4Shape::of(&[&host]).unwrap());
            assert!(found.read(device, 0).unwrap() == expected, "{format:?}");
            let both = PackedInt4::upload_gate_up(device, &tile, &host, &host_up).unwrap();
            let found = PackedInt4::random(device, &tile, &[&gate, &up]).unwrap();
            assert!(found.read(device, 0).unwrap() == both.read(device, 0).unwrap(), "{format:?}");
        }
    });
}

/// What the backend makes of random weights is what it makes of their numbers: of every kind of weight, by a product with it.
#[test]
fn the_backend_computes_with_random_weights_as_with_their_numbers() {
    for device in devices::emulator().into_iter().chain(devices::gpu()) {
        let cuda = Cuda::new(device, Tiles::default());
        let dense = RandomFormat::Dense(DType::Bf16);
        let int4 = RandomFormat::Int4 { group_size: 32, scales: DType::Bf16, zero_points: true };
        let mut x = cuda.alloc(DType::Act, &[3, 64]).unwrap();
        cuda.write(&(0..192).map(|i| f64::from(i % 13) - 6.0).collect::<Vec<_>>(), &mut x).unwrap();
        // 44 features: the last eight rows of a SwiGLU are not full.
        for (gate_format, up_format) in [(dense, dense), (int4, int4), (dense, int4)] {
            let weight = |format, seed| {
                HostLinear::Random(RandomLinear {
                    out_features: 44,
                    in_features: 64,
                    format,
                    deviation: 0.1,
                    seed,
                })
            };
            let (gate, up) = (weight(gate_format, 1), weight(up_format, 2));
            let product = |gate: HostLinear, up: HostLinear| {
                let weights = cuda.upload_swiglu(gate, up).unwrap();
                let mut out = parity::poisoned(cuda.device(), "out", DType::Act, &[3, 44]);
                cuda.swiglu(&x, &weights, &mut out).unwrap();
                cuda.read(&out).unwrap()
            };
            let expected = product(gate.clone().made(), up.clone().made());
            assert!(expected.iter().all(|y| y.is_finite()));
            assert_eq!(product(gate, up), expected, "{gate_format:?}, {up_format:?}");
        }
    }
}

#[test]
fn tensors_lie_one_below_the_other() {
    parity::small_cases(|device| {
        let tensor = |rows, seed| RandomTensor::new([rows, 6], DType::Bf16, 0.0, 1.0, seed);
        let both = random(device, &[tensor(3, 1), tensor(4, 2)]).unwrap();
        let expected =
            [tensor(3, 1), tensor(4, 2)].map(|tensor| parity::weight_bytes(&tensor.make()).to_vec()).concat();
        parity::assert_same("both", 12, &parity::read_bytes(device, &both), &expected);
    });
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tensor = |shape: &[usize], dtype| RandomTensor::new(shape, dtype, 0.0, 1.0, 1);
        let refused = |tensors: &[RandomTensor]| random(device, tensors).unwrap_err().to_string();
        expect(refused(&[]), &["random: `tensors` is none"]);
        expect(refused(&[tensor(&[2], DType::Act)]), &["expected a weight", "activations"]);
        let bf16 = tensor(&[2, 3], DType::Bf16);
        expect(refused(&[bf16.clone(), tensor(&[2, 4], DType::Bf16)]), &["rows of [3]", "[2, 4]"]);
        expect(refused(&[bf16.clone(), tensor(&[2, 3], DType::F32)]), &["bf16 weights", "f32 weights"]);
        let mut out = CudaTensor::alloc(device, "out", DType::Bf16, &[2, 3]).unwrap();
        let rows = Rows { together: 1, stride: 2, first: 0 };
        expect(
            random_fill(device, &bf16, rows, &mut out).unwrap_err().to_string(),
            &["`out`", "Some(3) rows of 3"],
        );
        let tile = RepackInt4Tile::safe(());
        let weight =
            |format| RandomLinear { out_features: 8, in_features: 64, format, deviation: 1.0, seed: 1 };
        let refused =
            |weights: &[&RandomLinear]| PackedInt4::random(device, &tile, weights).unwrap_err().to_string();
        let int4 = |group_size| RandomFormat::Int4 { group_size, scales: DType::Bf16, zero_points: false };
        expect(refused(&[&weight(RandomFormat::Dense(DType::Bf16))]), &["`weights` is unquantised", "INT4"]);
        expect(refused(&[&weight(int4(16))]), &["`group_size` is 16"]);
        expect(refused(&[&weight(int4(32)), &weight(int4(64))]), &["one format"]);
    });
}
