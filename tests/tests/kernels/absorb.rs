//! `absorb_query` and `absorb_output` against the oracle.

use dsa80_cuda::absorb::{AbsorbTile, AbsorbTokens, absorb_output, absorb_query};
use dsa80_cuda::linear_many::LinearTile;
use dsa80_cuda::rope::{RopeDims, RopeTile, rope};
use dsa80_cuda::{CudaTensor, Limits, Tile};
use dsa80_reference::{DType, DeviceTensor, Kernels, RopeLayout};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Pair, TestDevice, Values, half_ulp_bf16};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::linear::{fine, sum_error};

const FEW: LinearTile = LinearTile {
    tokens: 16,
    features: 64,
    token_warps: 1,
    feature_warps: 2,
    stages: 2,
    blocks: 1,
    ahead: true,
};
const MANY: LinearTile = LinearTile {
    tokens: 32,
    features: 64,
    token_warps: 2,
    feature_warps: 1,
    stages: 3,
    blocks: 1,
    ahead: false,
};
const TILE: AbsorbTile = AbsorbTile { few: FEW, many: MANY };

/// The dims of a model's heads, and the tokens of a step.
#[derive(Debug, Clone, Copy)]
struct Variant {
    tokens: (usize, usize),
    nope: usize,
    v: usize,
    rope: usize,
    rank: usize,
    kv_b: DType,
    query: bool,
    tile: AbsorbTile,
}

const fn variant(
    query: bool,
    tokens: (usize, usize),
    [nope, v, rope, rank]: [usize; 4],
    kv_b: DType,
) -> Variant {
    Variant { tokens, nope, v, rope, rank, kv_b, query, tile: TILE }
}

const QUERY: Variant = variant(true, (1, 32), [72, 16, 8, 88], DType::Bf16);
const OUTPUT: Variant = variant(false, (1, 32), [16, 72, 8, 136], DType::Bf16);

/// Both products with every type of weight, in few programs: whole vectors and single elements.
const VARIANTS: &[Variant] = &[
    QUERY,
    variant(true, (1, 32), [16, 32, 8, 32], DType::Bf16),
    variant(true, (33, 70), [13, 6, 6, 65], DType::F16),
    variant(true, (1, 20), [16, 16, 8, 72], DType::F32),
    OUTPUT,
    variant(false, (33, 70), [8, 9, 8, 65], DType::F32),
    variant(false, (33, 50), [16, 32, 8, 32], DType::F16),
];

#[derive(Debug, Clone)]
struct Case {
    variant: Variant,
    tokens: usize,
    heads: usize,
    values: Values,
    seed: u64,
}

fn cases(variants: impl Strategy<Value = Variant>) -> impl Strategy<Value = Case> {
    variants.prop_flat_map(|variant| {
        let sizes = (variant.tokens.0..=variant.tokens.1, select(vec![1_usize, 2, 3, 8]));
        (sizes, Values::any_of(&Values::ORDINARY), any::<u64>())
            .prop_map(move |((tokens, heads), values, seed)| Case { variant, tokens, heads, values, seed })
    })
}

fn run(device: &TestDevice, case: Case) {
    let Case { variant, tokens, heads, values, seed } = case;
    let Variant { nope, v, rope: rotary, rank, query, .. } = variant;
    let (x_width, columns) = if query { (nope + rotary, nope) } else { (rank, rank) };
    let (out_width, features) = if query { (rank + rotary, rank) } else { (v, v) };
    let x = Pair::new(
        device,
        "x",
        DType::Act,
        &[tokens, heads, x_width],
        &values.take(seed, tokens * heads * x_width),
    );
    let shape = [heads, nope + v, rank];
    let weights = fine(seed ^ 1, -3, shape.iter().product());
    let kv_b = Pair::weight(device, "kv_b", variant.kv_b, &shape, &weights);
    let turns: Vec<f64> = (0..tokens * rotary / 2)
        .flat_map(|i| {
            let (sin, cos) = (37.0 * Values::Normal.at(seed ^ 3, i)).sin_cos();
            [cos, sin]
        })
        .collect();
    let cos_sin = Pair::new(device, "cos_sin", DType::Float, &[tokens, rotary / 2, 2], &turns);
    let mut expected = Pair::poisoned(device, "out", DType::Act, &[tokens, heads, out_width]);
    let found = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", DType::Act, &[tokens, heads, out_width]);
        let (tile, x, kv_b) = (&variant.tile, &x.device, &kv_b.device);
        if query {
            absorb_query(device, tile, x, kv_b, &cos_sin.device, &mut out).unwrap();
        } else {
            absorb_output(device, tile, x, kv_b, &mut out).unwrap();
        }
        parity::read_bytes(device, &out)
    });
    let oracle = parity::oracle();
    if query {
        oracle.absorb_query(&x.host, &kv_b.host, &cos_sin.host, &mut expected.host).unwrap();
    } else {
        oracle.absorb_output(&x.host, &kv_b.host, &mut expected.host).unwrap();
    }
    if query {
        assert_rotary_of_rope(device, variant, x.device, &cos_sin.device, &found);
    }
    let (x, weights) = (oracle.read(&x.host).unwrap(), oracle.read(&kv_b.host).unwrap());
    let turns = oracle.read(&cos_sin.host).unwrap();
    let (found, expected) = (parity::numbers(DType::Act, &found), oracle.read(&expected.host).unwrap());
    let x_of = |i: usize| &x[i * x_width..][..x_width];
    let mut magnitudes = Vec::with_capacity(expected.len());
    for i in 0..tokens * heads {
        let x = &x_of(i)[..columns];
        let head = &weights[i % heads * (nope + v) * rank..][..(nope + v) * rank];
        let at = |k: usize, f: usize| if query { head[k * rank + f] } else { head[(nope + f) * rank + k] };
        magnitudes.extend(
            (0..features).map(|f| x.iter().enumerate().map(|(k, x)| (x * at(k, f)).abs()).sum::<f64>()),
        );
        // What a pair's products add up to, below zero: these are no sums of `columns`.
        let pairs = x_of(i)[columns..].chunks(2).zip(turns[i / heads * rotary..].chunks(2));
        for (pair, turn) in pairs.filter(|_| query) {
            magnitudes.push(-(pair[0] * turn[0]).abs() - (pair[1] * turn[1]).abs());
            magnitudes.push(-(pair[1] * turn[0]).abs() - (pair[0] * turn[1]).abs());
        }
    }
    let bound = |i: usize| {
        let error = if i % out_width < features {
            sum_error(columns, variant.kv_b, magnitudes[i])
        } else {
            2.0 * F32_UNIT * magnitudes[i].abs()
        };
        error + 2.0 * half_ulp_bf16(expected[i].abs() + error)
    };
    parity::assert_close("out", out_width, &found, &expected, 2.5e-3, bound);
}

/// The rotary columns of `out` have the bits that `rope` gives those of `q`.
fn assert_rotary_of_rope(
    device: &TestDevice,
    Variant { nope, rope: rotary, rank, .. }: Variant,
    mut q: CudaTensor<TestDevice>,
    cos_sin: &CudaTensor<TestDevice>,
    out: &[u8],
) {
    let layout = RopeLayout::Interleaved;
    let dims = RopeDims { heads: q.shape()[1], width: nope + rotary, offset: nope, rope: rotary, layout };
    rope(device, &RopeTile::safe(dims), &mut q, nope, layout, cos_sin).unwrap();
    let q = parity::read_bytes(device, &q);
    let rotary_of = |bytes: &[u8], width: usize| -> Vec<u8> {
        bytes.chunks(2 * width).flat_map(|row| row[2 * (width - rotary)..].to_vec()).collect()
    };
    parity::assert_same("rotary", 2 * rotary, &rotary_of(out, rank + rotary), &rotary_of(&q, nope + rotary));
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("absorb", cases(select(VARIANTS)), run);
}

/// GLM-5.2's heads, with every tile.
#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let limits = Limits::a100();
    let sizes = [(AbsorbTokens::Few, (1, 32)), (AbsorbTokens::Many, (33, 300))];
    let variants: Vec<Variant> = sizes
        .into_iter()
        .flat_map(|(class, tokens)| {
            AbsorbTile::candidates(class, &limits).into_iter().flat_map(move |tile| {
                [true, false].map(|query| {
                    let variant = variant(query, tokens, [192, 256, 64, 512], DType::Bf16);
                    Variant { tile, ..variant }
                })
            })
        })
        .collect();
    let weights = select(vec![DType::Bf16, DType::Bf16, DType::F16, DType::F32]);
    let variants = (select(variants), weights).prop_map(|(variant, kv_b)| Variant { kv_b, ..variant });
    parity::check_on_gpu("absorb_at_size", cases(variants), run);
}

#[test]
fn planted_faults_are_seen() {
    for (variant, file, find, replace) in [
        // The weight of the head before; the last token's rotary columns, those of another row, another token's turn, and a turn the
        // other way.
        (
            QUERY,
            "absorb.cu",
            "weight_head * head + weight_first",
            "weight_head * max(head - 1, 0) + weight_first",
        ),
        (QUERY, "absorb.cu", "i < rows * pieces", "i < (rows - 1) * pieces"),
        (QUERY, "absorb.cu", "x, row * x_stride + column", "x, column"),
        (QUERY, "absorb.cu", "cos_sin, row * rotary + column", "cos_sin, column"),
        (QUERY, "rows.cuh", "a = before * cos - b * sin;", "a = before * cos + b * sin;"),
        // The output's weights begin where the query's do.
        (OUTPUT, "absorb.cu", "+ weight_first)", ")"),
        // Columns beyond the last, and a matrix that is not turned.
        (QUERY, "linear_tiles.cuh", "outer + row < rows;", "outer + row < rows - 1;"),
        (QUERY, "linear_tiles.cuh", "ldmatrix_x4_trans(words", "ldmatrix_x4(words"),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(Just(variant)), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let cos_sin = tensor(DType::Float, &[1, 1, 2]);
        type Tensor = CudaTensor<TestDevice>;
        let query = |q: &Tensor, kv_b: &Tensor, mut out: Tensor| {
            absorb_query(device, &TILE, q, kv_b, &cos_sin, &mut out).unwrap_err().to_string()
        };
        let output = |o: &Tensor, kv_b: &Tensor, mut out: Tensor| {
            absorb_output(device, &TILE, o, kv_b, &mut out).unwrap_err().to_string()
        };
        let act = |shape: &[usize]| tensor(DType::Act, shape);
        let (q, kv_b) = (act(&[1, 2, 6]), tensor(DType::Bf16, &[2, 6, 8]));
        expect(query(&q, &kv_b, act(&[1, 2, 7])), &["absorb_query: `out`", "[1, 2, 8 + 2]"]);
        expect(query(&act(&[1, 2, 9]), &kv_b, act(&[1, 2, 10])), &["`q`", "nope at most the 6 rows"]);
        expect(query(&q, &act(&[2, 6, 8]), act(&[1, 2, 10])), &["`kv_b` holds activations"]);
        expect(query(&q, &tensor(DType::Bf16, &[3, 6, 8]), act(&[1, 2, 10])), &["`kv_b`", "[2, nope + v"]);
        expect(query(&q, &kv_b, tensor(DType::Float, &[1, 2, 10])), &["`out` holds floats"]);
        let o = act(&[1, 2, 8]);
        expect(output(&o, &kv_b, act(&[1, 2, 7])), &["absorb_output: `out`", "v at most the 6 rows"]);
        expect(output(&act(&[1, 2, 9]), &kv_b, act(&[1, 2, 2])), &["absorb_output: `kv_b`"]);
        expect(output(&tensor(DType::Float, &[1, 2, 8]), &kv_b, act(&[1, 2, 2])), &["`o` holds floats"]);
        // An empty step is no error.
        let mut out = act(&[0, 2, 10]);
        let none = tensor(DType::Float, &[0, 1, 2]);
        absorb_query(device, &TILE, &act(&[0, 2, 6]), &kv_b, &none, &mut out).unwrap();
        let mut out = act(&[1, 2, 10]);
        let error = absorb_query(device, &TILE, &q, &kv_b, &none, &mut out).unwrap_err().to_string();
        expect(error, &["absorb_query: `cos_sin`", "[1, dim / 2, 2]"]);
    });
}
