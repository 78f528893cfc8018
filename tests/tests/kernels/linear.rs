//! `linear` against the oracle. `lm_head`, which has the same kernels, shares the cases.

use dsa80_cuda::linear::{LinearTiles, LinearTokens, LinearWorkspace, linear};
use dsa80_cuda::linear_few::{LinearFewSize, LinearFewTile, LinearWidth};
use dsa80_cuda::linear_many::LinearTile;
use dsa80_cuda::lm_head::lm_head;
use dsa80_cuda::{CudaTensor, Limits, Tile};
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Pair, TestDevice, Values, half_ulp_bf16};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;

/// One way through the kernels: the tokens that take it, and what is compiled for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variant {
    tokens: (usize, usize),
    /// At most, and what they are a multiple of.
    columns: (usize, usize),
    features: usize,
    weight: DType,
    few: LinearFewTile,
    many: LinearTile,
    /// Whether the device's own library takes it, where there is one.
    gemm: bool,
}

const FEW: LinearFewTile = LinearFewTile { warps: 2, row_tiles: 1, columns: 64, stages: 3, blocks: 1 };
const MANY: LinearTile = LinearTile {
    tokens: 16,
    features: 64,
    token_warps: 1,
    feature_warps: 1,
    stages: 2,
    blocks: 1,
    ahead: true,
};

const fn few(
    tokens: (usize, usize),
    columns: (usize, usize),
    weight: DType,
    [warps, row_tiles, columns_of_step, stages]: [usize; 4],
) -> Variant {
    let few = LinearFewTile { warps, row_tiles, columns: columns_of_step, stages, blocks: 1 };
    Variant { tokens, columns, features: 70, weight, few, many: MANY, gemm: false }
}

const fn many(
    tokens: (usize, usize),
    columns: (usize, usize),
    weight: DType,
    [tile_tokens, features, token_warps, feature_warps, stages]: [usize; 5],
) -> Variant {
    let ahead = stages == 2;
    let many =
        LinearTile { tokens: tile_tokens, features, token_warps, feature_warps, stages, blocks: 1, ahead };
    Variant { tokens, columns, features: 150, weight, few: FEW, many, gemm: false }
}

/// The middling weight, with one block an output and with several that share it.
const WHOLE: Variant = few((1, 8), (400, 8), DType::Bf16, [2, 1, 64, 3]);
const SHARED: Variant = few((17, 32), (2400, 8), DType::Bf16, [2, 4, 128, 2]);
const TILES: Variant = many((33, 60), (800, 8), DType::Bf16, [16, 64, 1, 2, 2]);

/// Three tiles, which most numbers of blocks share.
const LONG: Variant = Variant { tokens: (33, 48), columns: (2400, 8), features: 64, ..TILES };

/// Every constant of the kernels, in few programs.
pub(crate) const VARIANTS: &[Variant] = &[
    WHOLE,
    SHARED,
    few((9, 16), (90, 1), DType::F16, [3, 2, 64, 4]),
    few((1, 8), (300, 8), DType::F32, [2, 1, 64, 6]),
    TILES,
    many((129, 150), (200, 8), DType::F16, [64, 128, 2, 4, 3]),
    many((33, 50), (100, 1), DType::F32, [32, 64, 1, 2, 2]),
];

#[derive(Debug, Clone)]
pub(crate) struct Case {
    variant: Variant,
    tokens: usize,
    columns: usize,
    features: usize,
    floats: bool,
    /// Powers of two that the weight is of.
    weight_power: i32,
    values: Values,
    seed: u64,
}

pub(crate) fn cases(variants: impl Strategy<Value = Variant>) -> impl Strategy<Value = Case> {
    variants.prop_flat_map(|variant| {
        let (most, multiple) = variant.columns;
        let sizes = (variant.tokens.0..=variant.tokens.1, 1..=most / multiple, 1..=variant.features);
        let power = select(vec![0, 0, -17, 10]);
        (sizes, any::<bool>(), power, Values::any_of(&Values::ORDINARY), any::<u64>()).prop_map(
            move |((tokens, columns, features), floats, weight_power, values, seed)| {
                let columns = columns * multiple;
                Case { variant, tokens, columns, features, floats, weight_power, values, seed }
            },
        )
    })
}

/// Numbers with more bits than any weight has.
pub(crate) fn fine(seed: u64, power: i32, n: usize) -> Vec<f64> {
    let scale = 2.0_f64.powi(power);
    let part = |stream: u64, i| Values::Normal.at(seed ^ (stream << 32), i);
    (0..n).map(|i| scale * (part(1, i) + part(2, i) / 256.0 + part(3, i) / 65536.0)).collect()
}

/// How far a sum of products may be off, `magnitude` the sum of their magnitudes. The products of two bf16 numbers are exact; a tensor
/// core adds 16 of them to a sum, each of the 17 cut off below 2^-23 of the largest; adding parts up rounds some more.
pub(crate) fn sum_error(columns: usize, weight: DType, magnitude: f64) -> f64 {
    let roundings = columns.next_multiple_of(64) * pieces(weight) * 17 / 16 + 64;
    2.0 * F32_UNIT * roundings as f64 * magnitude + 1e-37
}

fn pieces(weight: DType) -> usize {
    match weight {
        DType::Bf16 => 1,
        DType::F16 => 2,
        _ => 3,
    }
}

/// The relative L2 error of such sums. Every 16 columns a sum is cut off, by half a unit of what it is in the mean, half of what it
/// becomes: that adds up. What is constant is measured, not derived: 2.2e-6 was the most that an H100 showed.
fn sum_l2(columns: usize) -> f64 {
    3e-6 + columns as f64 / 32.0 * F32_UNIT
}

/// That of outputs: what is rounded to bf16 is off by that, and sums that cancel by what their terms are.
pub(crate) fn outputs_l2(dtype: DType, columns: usize, magnitudes: &[f64], expected: &[f64]) -> f64 {
    let relative_l2 = if dtype == DType::Act { 2.5e-3 } else { sum_l2(columns) };
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let cancelled = (norm(magnitudes) / norm(expected)).max(1.0) / (columns as f64).sqrt();
    relative_l2 * cancelled.max(1.0)
}

struct Inputs {
    x: Pair,
    weight: Pair,
    /// The rows of `x` that `lm_head` takes.
    rows: Option<(Pair, Vec<i32>)>,
}

impl Inputs {
    fn new(device: &TestDevice, case: &Case, gathers: bool) -> Self {
        let &Case { tokens, columns, features, seed, .. } = case;
        let x_rows = if gathers { tokens / 2 + 3 } else { tokens };
        let x = case.values.take(seed, x_rows * columns);
        let weight = fine(seed ^ 1, case.weight_power, features * columns);
        let rows: Vec<i32> =
            (0..tokens).map(|i| ((seed >> 8) as usize + i * 7) % x_rows).map(|row| row as i32).collect();
        Self {
            x: Pair::new(device, "x", DType::Act, &[x_rows, columns], &x),
            weight: Pair::weight(device, "weight", case.variant.weight, &[features, columns], &weight),
            rows: gathers.then(|| (Pair::index(device, "rows", &[tokens], &rows), rows)),
        }
    }

    fn launch(
        &self,
        device: &TestDevice,
        case: &Case,
        workspace: &LinearWorkspace<TestDevice>,
        out: &mut CudaTensor<TestDevice>,
    ) {
        let (tiles, x, weight) = (tiles(&case.variant), &self.x.device, &self.weight.device);
        match &self.rows {
            None => linear(device, &tiles, workspace, x, weight, out).unwrap(),
            Some((rows, _)) => lm_head(device, &tiles, workspace, x, &rows.device, weight, out).unwrap(),
        }
    }

    /// For every output the sum of its products' magnitudes.
    fn magnitudes(&self, case: &Case) -> Vec<f64> {
        let read = |pair: &Pair| parity::oracle().read(&pair.host).unwrap();
        let (x, weight, columns) = (read(&self.x), read(&self.weight), case.columns);
        let row = |token: usize| self.rows.as_ref().map_or(token, |(_, rows)| rows[token] as usize);
        let mut magnitudes = Vec::with_capacity(case.tokens * case.features);
        for token in 0..case.tokens {
            let x = &x[row(token) * columns..][..columns];
            magnitudes.extend(
                weight.chunks(columns).map(|w| w.iter().zip(x).map(|(w, x)| (w * x).abs()).sum::<f64>()),
            );
        }
        magnitudes
    }
}

/// Tiles for small shapes, whose programs these tests compile anyway.
pub(crate) fn small_tiles() -> LinearTiles {
    LinearTiles { up_to_32: [SHARED.few; 4], middle: TILES.many, many: TILES.many, ..tiles(&WHOLE) }
}

fn tiles(&Variant { few, many, gemm, .. }: &Variant) -> LinearTiles {
    LinearTiles { up_to_8: [few; 4], up_to_32: [few; 4], middle: many, many, gemm }
}

pub(crate) fn run(device: &TestDevice, case: Case, gathers: bool) {
    let inputs = Inputs::new(device, &case, gathers);
    let dtype = if case.floats || gathers { DType::Float } else { DType::Act };
    let shape = [case.tokens, case.features];
    let mut expected = Pair::poisoned(device, "out", dtype, &shape);
    // One workspace for all runs: each leaves it as it was.
    let workspace = LinearWorkspace::alloc(device, &tiles(&case.variant)).unwrap();
    let other = Inputs::new(device, &Case { seed: case.seed ^ 0xff00, ..case.clone() }, gathers);
    other.launch(device, &case, &workspace, &mut parity::poisoned(device, "out", dtype, &shape));
    let found = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", dtype, &shape);
        inputs.launch(device, &case, &workspace, &mut out);
        parity::read_bytes(device, &out)
    });
    let (x, weight, oracle) = (&inputs.x.host, &inputs.weight.host, parity::oracle());
    match &inputs.rows {
        None => oracle.linear(x, weight, &mut expected.host).unwrap(),
        Some((rows, _)) => oracle.lm_head(x, &rows.host, weight, &mut expected.host).unwrap(),
    }
    let (found, expected) = (parity::numbers(dtype, &found), oracle.read(&expected.host).unwrap());
    let magnitudes = inputs.magnitudes(&case);
    let bound = |i: usize| {
        let error = sum_error(case.columns, case.variant.weight, magnitudes[i]);
        // A sum on either side of a rounding boundary: half a step of each.
        if dtype == DType::Act { error + 2.0 * half_ulp_bf16(expected[i].abs() + error) } else { error }
    };
    let relative_l2 = outputs_l2(dtype, case.columns, &magnitudes, &expected);
    parity::assert_close("out", case.features, &found, &expected, relative_l2, bound);
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("linear", cases(select(VARIANTS)), |device, case| run(device, case, false));
}

/// GLM-5.2's shapes and the sizes of a step, with every tile.
#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let limits = Limits::a100();
    let all = |tokens| {
        let size = LinearFewSize { tokens, width: LinearWidth::More };
        LinearFewTile::candidates(size, &limits)
    };
    let few = |class, tokens: (usize, usize)| {
        select(all(class)).prop_map(move |few| Variant {
            tokens,
            columns: (2048, 512),
            features: 700,
            weight: DType::Bf16,
            few,
            many: MANY,
            gemm: false,
        })
    };
    let many = |class, tokens: (usize, usize)| {
        select(LinearTile::candidates(class, &limits)).prop_map(move |many| Variant {
            tokens,
            columns: (2048, 512),
            features: 700,
            weight: DType::Bf16,
            few: FEW,
            many,
            gemm: false,
        })
    };
    let variants = prop_oneof![
        few(LinearTokens::UpTo8, (1, 8)),
        few(LinearTokens::UpTo32, (9, 32)),
        many(LinearTokens::Middle, (33, 128)),
        many(LinearTokens::Many, (129, 300)),
    ];
    let weights = select(vec![DType::Bf16, DType::Bf16, DType::F16, DType::F32]);
    let variants = (variants, weights).prop_map(|(variant, weight)| Variant { weight, ..variant });
    parity::check_on_gpu("linear_at_size", cases(variants), |device, case| run(device, case, false));
    parity::large_cases(|device| {
        for (tokens, columns, features) in
            [(1, 6144, 2624), (32, 2048, 2048), (64, 2048, 6144), (300, 6144, 2624), (257, 20, 768)]
        {
            let safe = LinearTiles::safe();
            let variant = Variant { few: safe.up_to_32[2], many: safe.many, ..WHOLE };
            let case = Case {
                variant,
                tokens,
                columns,
                features,
                floats: false,
                weight_power: -4,
                values: Values::Normal,
                seed: 3,
            };
            run(device, case, false);
        }
    });
}

/// Of a GPU's own library: sizes that it takes, and some that it does not.
#[test]
fn agrees_with_the_oracle_by_the_library() {
    let safe = LinearTiles::safe();
    let tokens = select(vec![(33, 128), (129, 300)]);
    let sizes = select(vec![((6144, 8), 704), ((2048, 512), 2624), ((300, 1), 70)]);
    let variants = (tokens, sizes).prop_map(move |(tokens, (columns, features))| Variant {
        tokens,
        columns,
        features,
        many: safe.many,
        gemm: true,
        ..WHOLE
    });
    parity::check_on_gpu("linear_by_library", cases(variants), |device, mut case| {
        // Most features are not whole vectors, and go another way.
        if case.seed % 4 != 0 {
            case.features = case.features.next_multiple_of(8);
        }
        run(device, case, false);
    });
    parity::large_cases(|device| {
        let values = Values::Normal;
        for (tokens, columns, features) in [(1024, 6144, 2624), (128, 2048, 6144), (64, 2048, 2048)] {
            for floats in [false, true] {
                let variant = Variant { many: safe.many, gemm: true, ..WHOLE };
                let case =
                    Case { variant, tokens, columns, features, floats, weight_power: -4, values, seed: 3 };
                run(device, case, false);
            }
        }
    });
}

#[test]
fn planted_faults_are_seen() {
    for (variant, file, find, replace) in [
        // The last columns, the last features and the last token are left out.
        (WHOLE, "linear_few.cu", "tokens = x_left > 0 ?", "tokens = x_left > 8 ?"),
        (TILES, "linear.cuh", "valid && column < columns;", "valid && column + 8 < columns;"),
        (WHOLE, "linear.cuh", "if (row + i < features) store_one(", "if (row + i + 1 < features) store_one("),
        (WHOLE, "linear_few.cu", "X_VECTORS, tokens - 1);", "X_VECTORS, tokens - 2);"),
        // A step is multiplied before it is there; parts are added before they are.
        (WHOLE, "linear_few.cu", "cp_async_wait<TILE_STAGES - 2>();", "cp_async_wait<TILE_STAGES - 1>();"),
        // A lane reads what others copy, and copies over what others read.
        (WHOLE, "linear_few.cu", "        __syncwarp();\n", ""),
        // Vectors of odd rows lie where a reader does not look for them.
        (WHOLE, "linear_few.cu", "lane / WEIGHT_VECTORS, vector)];", "lane / WEIGHT_VECTORS + 1, vector)];"),
        (
            WHOLE,
            "linear_few.cu",
            "    }\n    __syncthreads();\n\n    const bool adds",
            "    }\n\n    const bool adds",
        ),
        // Parts are added before they are there, or twice; what blocks share is not left as it was.
        (SHARED, "linear_few.cu", "words[k] != NOT_THERE", "true"),
        (SHARED, "linear_few.cu", "if (first + j == self) {", "if (false) {"),
        (SHARED, "linear_few.cu", "make_float4(none, none, none, none)", "batch[j]"),
        (SHARED, "linear_few.cu", "if (adds && threadIdx.x == 0) arrivals[block] = 0;", ""),
        (LONG, "linear.cuh", "1u) + 1 == blocks", "1u) == blocks"),
        (LONG, "linear.cuh", "if (flag) *arrivals = 0;", ""),
        (TILES, "linear_tiles.cuh", "if (last_part && last_pair) {", "if (false) {"),
        (
            TILES,
            "linear.cu",
            "static_cast<int64_t>(block) + (block == first)",
            "static_cast<int64_t>(block) + (block != first)",
        ),
        (TILES, "linear_tiles.cuh", "if (row >= tokens) continue;", "if (row >= tokens - 1) continue;"),
        // The last piece of an f32 is left out.
        (
            VARIANTS[3],
            "linear_few.cu",
            "piece < PIECES; ++piece) {\n                    const",
            "piece < PIECES - 1; ++piece) {\n                    const",
        ),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(Just(variant)), |device, case| run(device, case, false));
    }
}

#[test]
fn nothing_to_do_is_no_error() {
    parity::small_cases(|device| {
        let tiles = LinearTiles::safe();
        let workspace = LinearWorkspace::alloc(device, &tiles).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let weight = tensor(DType::Bf16, &[16, 8]);
        let mut out = tensor(DType::Act, &[0, 16]);
        linear(device, &tiles, &workspace, &tensor(DType::Act, &[0, 8]), &weight, &mut out).unwrap();
    });
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tiles = LinearTiles::safe();
        let workspace = LinearWorkspace::alloc(device, &tiles).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let run = |x: &_, weight: &_, mut out| {
            linear(device, &tiles, &workspace, x, weight, &mut out).unwrap_err().to_string()
        };
        let (x, weight) = (tensor(DType::Act, &[2, 16]), tensor(DType::Bf16, &[8, 16]));
        let out = || tensor(DType::Act, &[2, 8]);
        expect(run(&tensor(DType::Act, &[2, 15]), &weight, out()), &["linear: `x`", "[2, 16]"]);
        expect(run(&tensor(DType::Float, &[2, 16]), &weight, out()), &["`x` holds floats"]);
        expect(run(&x, &tensor(DType::Act, &[8, 16]), out()), &["`weight` holds activations"]);
        expect(run(&x, &tensor(DType::Bf16, &[8]), out()), &["`weight`", "2 dimensions"]);
        expect(run(&x, &tensor(DType::Bf16, &[8, 0]), out()), &["`weight`", "at least one column"]);
        expect(run(&x, &weight, tensor(DType::Act, &[2, 9])), &["`out`", "[2, 8]"]);
        expect(run(&x, &weight, tensor(DType::Index, &[2, 8])), &["`out` holds indices"]);
        let middle = LinearTile { tokens: 128, token_warps: 4, ..MANY };
        let other = LinearTiles { middle, gemm: false, ..tiles };
        let small =
            LinearTiles { middle: MANY, many: MANY, gemm: false, up_to_8: [FEW; 4], up_to_32: [FEW; 4] };
        let workspace = LinearWorkspace::alloc(device, &small).unwrap();
        let (x, weight) = (tensor(DType::Act, &[40, 1280]), tensor(DType::Bf16, &[8, 1280]));
        let mut out = tensor(DType::Act, &[40, 8]);
        let error = linear(device, &other, &workspace, &x, &weight, &mut out).unwrap_err().to_string();
        expect(error, &["the workspace was allocated for other tiles"]);
        let bad = LinearTiles { up_to_8: [LinearFewTile { warps: 20, ..FEW }; 4], ..tiles };
        let (x, weight) = (tensor(DType::Act, &[1, 8]), tensor(DType::Bf16, &[8, 8]));
        let mut out = tensor(DType::Act, &[1, 8]);
        let error = linear(device, &bad, &workspace, &x, &weight, &mut out).unwrap_err().to_string();
        expect(error, &["linear_few", "1 to 16 warps"]);
    });
}
