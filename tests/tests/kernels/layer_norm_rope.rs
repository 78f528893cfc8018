//! `layer_norm_rope` against the oracle.

use dsa80_cuda::layer_norm_rope::{LayerNormRopeDims, LayerNormRopeTile, layer_norm_rope};
use dsa80_cuda::{Limits, Tile};
use dsa80_reference::fp8::{IndexerPage, decode};
use dsa80_reference::{DType, Kernels, RopeLayout};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Batches, F32_UNIT, Interval, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::{self, Layout, assert_rows_outside_are_skipped, expect};

const EPS: f64 = 1e-6;

#[derive(Debug, Clone, Copy)]
struct Variant {
    dims: LayerNormRopeDims,
    layout: RopeLayout,
    weight: DType,
    bias: DType,
    tile: LayerNormRopeTile,
}

const fn variant(
    (width, rope): (usize, usize),
    layout: RopeLayout,
    weight: DType,
    bias: DType,
    (warps, vector): (usize, usize),
) -> Variant {
    let (dims, tile) = (LayerNormRopeDims { width, rope }, LayerNormRopeTile { warps, vector });
    Variant { dims, layout, weight, bias, tile }
}

/// Every constant of the kernel in few programs: rows of one chunk and of several, full and short ones.
const VARIANTS: &[Variant] = &[
    variant((128, 64), RopeLayout::Interleaved, DType::Bf16, DType::Bf16, (4, 4)),
    variant((128, 64), RopeLayout::Half, DType::F32, DType::F32, (1, 8)),
    variant((16, 6), RopeLayout::Interleaved, DType::F16, DType::Bf16, (2, 8)),
    variant((272, 100), RopeLayout::Half, DType::Bf16, DType::F16, (2, 4)),
];

type Case = cache_rows::Case<Variant>;

fn cases(variants: impl Strategy<Value = Variant>, size: usize) -> impl Strategy<Value = Case> {
    let batches = |page_sizes| Batches { page_sizes, max_seqs: 4, max_computed: size, max_chunk: size }.any();
    let caches = prop_oneof![
        batches(&[1, 3, 16]).prop_map(|batch| (batch, false)),
        batches(&[4, 64]).prop_map(|batch| (batch, true)),
    ];
    (caches, variants, Values::any_of(&Values::ORDINARY), any::<u64>())
        .prop_map(|((batch, fp8), variant, values, seed)| Case { batch, variant, fp8, values, seed })
}

/// The tensors of a case.
struct Inputs {
    x: Pair,
    weight: Pair,
    bias: Pair,
    cos_sin: Pair,
}

impl Inputs {
    fn new(device: &TestDevice, case: &Case) -> Self {
        let LayerNormRopeDims { width, rope } = case.variant.dims;
        let (rows, seed) = (case.batch.batch.num_tokens(), case.seed);
        let normals = |seed, scale: f64, offset: f64, n| -> Vec<f64> {
            Values::Normal.take(seed, n).iter().map(|x| offset + scale * x).collect()
        };
        let x = case.values.take(seed, rows * width);
        let weight = normals(seed ^ 1, 0.5, 1.0, width);
        let bias = normals(seed ^ 2, 0.3, 0.0, width);
        Self {
            x: Pair::new(device, "x", DType::Act, &[rows, width], &x),
            weight: Pair::weight(device, "weight", case.variant.weight, &[width], &weight),
            bias: Pair::weight(device, "bias", case.variant.bias, &[width], &bias),
            cos_sin: case.cos_sin(device, rope),
        }
    }

    /// What the cache's rows may be: the error analysis beside the kernel.
    fn intervals(&self, case: &Case) -> Vec<Interval> {
        let LayerNormRopeDims { width, rope } = case.variant.dims;
        let read = |pair: &Pair| parity::oracle().read(&pair.host).unwrap();
        let (x, weight, bias, turns) =
            (read(&self.x), read(&self.weight), read(&self.bias), read(&self.cos_sin));
        let vector = case.variant.tile.vector;
        let additions = (width.div_ceil(32 * vector) * vector + 5) as f64;
        let mut out = Vec::new();
        for (x, turns) in x.chunks(width).zip(turns.chunks(rope)) {
            let mean = x.iter().sum::<f64>() / width as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let deviation = (variance + EPS).sqrt();
            let mean_error =
                (additions + 2.0) * F32_UNIT * x.iter().map(|x| x.abs()).sum::<f64>() / width as f64;
            let deviation_error = (additions + 7.0) * F32_UNIT / 2.0
                + mean_error.powi(2) / (2.0 * (variance + EPS))
                + 4.0 * F32_UNIT;
            let mut row: Vec<Interval> = (0..width)
                .map(|c| {
                    let centred = x[c] - mean;
                    let normed = weight[c] * centred / deviation;
                    let error = weight[c].abs() * (mean_error + F32_UNIT * centred.abs()) / deviation
                        + normed.abs() * (deviation_error + 3.0 * F32_UNIT)
                        + F32_UNIT * (normed + bias[c]).abs();
                    Interval::around(normed + bias[c], 1.01 * error).round_bf16()
                })
                .collect();
            for (j, turn) in turns.chunks(2).enumerate() {
                let (first, second) = match case.variant.layout {
                    RopeLayout::Interleaved => (2 * j, 2 * j + 1),
                    RopeLayout::Half => (j, j + rope / 2),
                };
                let (a, b, cos, sin) = (row[first], row[second], turn[0], turn[1]);
                let turned = |a: Interval, b: Interval, cos: f64, sin: f64| {
                    let error = 2.0 * F32_UNIT * (a.magnitude() * cos.abs() + b.magnitude() * sin.abs());
                    (a * cos + b * sin).widened(1.01 * error).round_bf16()
                };
                row[first] = turned(a, b, cos, -sin);
                row[second] = turned(b, a, cos, sin);
            }
            out.extend(row);
        }
        out
    }

    fn launch(&self, device: &TestDevice, case: &Case) -> Vec<u8> {
        let Variant { layout: pairs, tile, .. } = case.variant;
        let Self { x, weight, bias, cos_sin } = self;
        let (x, weight, bias, cos_sin) = (&x.device, &weight.device, &bias.device, &cos_sin.device);
        case.written(device, layout(case), |batch, cache| {
            layer_norm_rope(device, &tile, batch, x, weight, bias, EPS, pairs, cos_sin, cache)
        })
    }
}

fn layout(case: &Case) -> Layout {
    Layout::Indexer(IndexerPage { page_size: case.batch.batch.page_size, width: case.variant.dims.width })
}

fn run(device: &TestDevice, case: Case) {
    let inputs = Inputs::new(device, &case);
    let found = parity::twice(device, || inputs.launch(device, &case));
    let Inputs { x, weight, bias, cos_sin } = &inputs;
    let (x, weight, bias, cos_sin) = (&x.host, &weight.host, &bias.host, &cos_sin.host);
    case.check(device, layout(&case), &inputs.intervals(&case), &found, |batch, cache| {
        let pairs = case.variant.layout;
        parity::oracle().layer_norm_rope(batch, x, weight, bias, EPS, pairs, cos_sin, cache)
    });
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("layer_norm_rope", cases(select(VARIANTS), 24), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let glm = LayerNormRopeDims { width: 128, rope: 64 };
    let variants = select(LayerNormRopeTile::candidates(glm, &Limits::a100())).prop_flat_map(move |tile| {
        let layout = select(vec![RopeLayout::Interleaved, RopeLayout::Half]);
        layout.prop_map(move |layout| {
            variant((glm.width, glm.rope), layout, DType::Bf16, DType::Bf16, (tile.warps, tile.vector))
        })
    });
    parity::check_on_gpu("layer_norm_rope_at_size", cases(variants, 400), run);
}

#[test]
fn planted_faults_are_seen() {
    let row = "layer_norm_rope.cuh";
    let kernel = "layer_norm_rope.cu";
    for (file, find, replace) in [
        // A lane that is beyond the row counts for the variance.
        (row, "y[chunk][i] = inside ? y[chunk][i] - mean : 0.0f;", "y[chunk][i] -= mean;"),
        // The other half of a pair is read before it is there.
        (row, "        __syncwarp();\n", ""),
        // The last row of a block is left out, a row after the last is written.
        (kernel, "if (row >= rows) return;", "if (row >= rows - 1) return;"),
        (kernel, "if (row >= rows) return;", "if (row > rows) return;"),
        // The scale of the neighbouring row.
        (row, "[place] = scale;", "[place ^ 1] = scale;"),
        // Not rounded between the norm and the rotation.
        (row, "+ b[chunk][i];\n        round_to_bf16(y[chunk], words[chunk]);", "+ b[chunk][i];"),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(select(VARIANTS), 24), run);
    }
}

/// Keys that are their bias, with a scale of one: what is quantised is known to the bit.
fn ties(device: &TestDevice) {
    let (tie, step) = (|code: u8| (decode(code) + decode(code + 1)) / 2.0, decode(1));
    let values = [
        448.0,
        tie(0x00),
        tie(0x01),
        tie(0x07),
        tie(0x08),
        -tie(0x3a),
        tie(0x3b),
        tie(0x7d),
        step,
        -step,
        0.0,
    ];
    let bias: Vec<f64> = (0..32).map(|i| f64::from(values[i % values.len()])).collect();
    let tensor = |dtype, shape: &[usize], value| {
        Pair::new(device, "tensor", dtype, shape, &vec![value; shape.iter().product()])
    };
    let (x, mut turns) = (tensor(DType::Act, &[1, 32], 1.5), vec![0.0; 16]);
    turns.iter_mut().step_by(2).for_each(|cos| *cos = 1.0);
    let cos_sin = Pair::new(device, "cos_sin", DType::Float, &[1, 8, 2], &turns);
    let weight = Pair::weight(device, "weight", DType::Bf16, &[32], &[0.0; 32]);
    let bias = Pair::weight(device, "bias", DType::Bf16, &[32], &bias);
    let (host_batch, batch) = parity::batch(device, &BatchCase::of(4, &[(0, 1)]).batch);
    let mut cache = Pair::poisoned(device, "cache", DType::Fp8, &[3, 4, 36]);
    let (tile, layout) = (LayerNormRopeTile { warps: 2, vector: 4 }, RopeLayout::Interleaved);
    let (x, weight, bias, cos_sin) = (&x, &weight, &bias, &cos_sin);
    layer_norm_rope(
        device,
        &tile,
        &batch,
        &x.device,
        &weight.device,
        &bias.device,
        EPS,
        layout,
        &cos_sin.device,
        &mut cache.device,
    )
    .unwrap();
    parity::oracle()
        .layer_norm_rope(
            &host_batch,
            &x.host,
            &weight.host,
            &bias.host,
            EPS,
            layout,
            &cos_sin.host,
            &mut cache.host,
        )
        .unwrap();
    let expected = parity::oracle().read_bytes(&cache.host).unwrap();
    parity::assert_same("cache", 144, &parity::read_bytes(device, &cache.device), &expected);
}

#[test]
fn ties_of_8_bits_go_to_the_even_code() {
    parity::small_cases(ties);
    let fault = Fault {
        file: "fp8.cuh",
        find: "magnitude + 0x7ffffu + (magnitude >> 20 & 1u)",
        replace: "magnitude + 0x80000u",
    };
    parity::catches(fault, Just(()), |device, ()| ties(device));
}

#[test]
fn rows_whose_slot_is_outside_the_cache_are_skipped() {
    assert_rows_outside_are_skipped(VARIANTS[0], (256, 132), |device, case| {
        Inputs::new(device, case).launch(device, case)
    });
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let (_, batch) = parity::batch(device, &BatchCase::of(3, &[(0, 2)]).batch);
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let (x, weight) = (tensor(DType::Act, &[2, 16]), tensor(DType::Bf16, &[16]));
        let cos_sin = tensor(DType::Float, &[2, 4, 2]);
        let tile = LayerNormRopeTile { warps: 4, vector: 4 };
        let run = |x: &_, weight: &_, cos_sin: &_, mut cache| {
            let layout = RopeLayout::Half;
            let outcome =
                layer_norm_rope(device, &tile, &batch, x, weight, weight, EPS, layout, cos_sin, &mut cache);
            outcome.unwrap_err().to_string()
        };
        let cache = || tensor(DType::Act, &[4, 3, 16]);
        expect(run(&tensor(DType::Act, &[3, 16]), &weight, &cos_sin, cache()), &["`x`", "[2, D]"]);
        expect(run(&tensor(DType::Float, &[2, 16]), &weight, &cos_sin, cache()), &["`x` holds floats"]);
        expect(run(&x, &tensor(DType::Bf16, &[8]), &cos_sin, cache()), &["`weight`", "[16]"]);
        expect(run(&x, &x, &cos_sin, cache()), &["`weight`"]);
        expect(run(&x, &weight, &tensor(DType::Float, &[2, 9, 2]), cache()), &["18 rotary columns"]);
        expect(run(&x, &weight, &tensor(DType::Float, &[1, 4, 2]), cache()), &["`cos_sin`"]);
        expect(run(&x, &weight, &cos_sin, tensor(DType::Act, &[4, 4, 16])), &["`cache`", "[pages, 3, 16]"]);
        expect(run(&x, &weight, &cos_sin, tensor(DType::Float, &[4, 3, 16])), &["`cache` holds floats"]);
        expect(run(&x, &weight, &cos_sin, tensor(DType::Fp8, &[4, 3, 20])), &["`page_size` is 3"]);
    });
}
