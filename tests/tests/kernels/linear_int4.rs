//! `linear_int4` against the oracle.

use dsa80_cuda::linear_int4::{
    LinearInt4Tile, LinearInt4Tiles, LinearInt4Tokens, LinearInt4WideTile, LinearInt4Workspace, linear_int4,
    swiglu_int4,
};
use dsa80_cuda::repack_int4::RepackInt4Tile;
use dsa80_cuda::{Int4Shape, Limits, PackedInt4, Tile};
use dsa80_reference::sampling::uniform;
use dsa80_reference::{DType, HostInt4, HostLinear, HostTensor, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Interval, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::int4_weights::{Format, int4};

/// One of the two ways.
#[derive(Debug, Clone, Copy)]
enum Way {
    Few(LinearInt4Tile),
    Wide(LinearInt4WideTile),
}

impl Way {
    /// Tiles that lead every step this way.
    fn tiles(self) -> LinearInt4Tiles {
        let safe = LinearInt4Tiles::safe();
        match self {
            Way::Few(tile) => {
                LinearInt4Tiles { few_8: tile, few_16: tile, few_32: tile, few_tokens: usize::MAX, ..safe }
            }
            Way::Wide(tile) => LinearInt4Tiles { medium: tile, many: tile, few_tokens: 0, ..safe },
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Variant {
    way: Way,
    format: Format,
    inner: usize,
    out: DType,
}

const fn few(warps: usize, row_tiles: usize, token_tiles: usize, stages: usize, split_blocks: usize) -> Way {
    Way::Few(LinearInt4Tile { warps, row_tiles, token_tiles, stages, blocks: 1, split_blocks })
}

const fn wide(
    [warps_rows, warps_tokens]: [usize; 2],
    row_tiles: usize,
    token_tiles: usize,
    stages: usize,
    steps: usize,
    split_blocks: usize,
) -> Way {
    Way::Wide(LinearInt4WideTile {
        warps_rows,
        warps_tokens,
        row_tiles,
        token_tiles,
        stages,
        steps,
        blocks: 1,
        split_blocks,
    })
}

const fn format(scales: DType, group_size: usize, zero_points: bool) -> Format {
    Format { scales, group_size, zero_points }
}

/// Every constant of both kernels in few programs.
const FEW: &[Variant] = &[
    Variant { way: few(2, 1, 1, 2, 2), format: format(DType::Bf16, 32, true), inner: 288, out: DType::Act },
    Variant {
        way: few(1, 2, 2, 1, 2),
        format: format(DType::F16, 128, false),
        inner: 320,
        out: DType::Float,
    },
    Variant { way: few(3, 1, 4, 1, 0), format: format(DType::F32, 20, true), inner: 20, out: DType::Act },
];
const WIDE: &[Variant] = &[
    Variant {
        way: wide([1, 2], 2, 2, 2, 1, 2),
        format: format(DType::Bf16, 32, true),
        inner: 288,
        out: DType::Act,
    },
    Variant {
        way: wide([2, 1], 3, 2, 3, 2, 0),
        format: format(DType::Bf16, 64, false),
        inner: 320,
        out: DType::Float,
    },
    Variant {
        way: wide([1, 1], 1, 4, 2, 2, 1),
        format: format(DType::F32, 96, true),
        inner: 220,
        out: DType::Act,
    },
];

#[derive(Debug, Clone, Copy)]
struct Case {
    variant: Variant,
    tokens: usize,
    features: usize,
    values: Values,
    seed: u64,
}

fn cases(
    variants: impl Strategy<Value = Variant>,
    max_tokens: usize,
    max_features: usize,
) -> impl Strategy<Value = Case> {
    (variants, 0..=max_tokens, 1..=max_features, Values::any_of(&Values::ORDINARY), any::<u64>()).prop_map(
        |(variant, tokens, features, values, seed)| Case { variant, tokens, features, values, seed },
    )
}

/// How far sums may be off, `[T, out]`: the error analysis beside the kernels, with a group and two additions for every product.
fn errors(x: &[f64], weight: &HostInt4) -> Vec<f64> {
    let (inner, dense) = (weight.in_features, weight.dequantise().to_f32());
    let rows = x.chunks_exact(inner).flat_map(|x| dense.chunks_exact(inner).map(move |w| (x, w)));
    rows.map(|(x, w)| {
        let magnitudes: f64 = x.iter().zip(w).map(|(x, w)| (x * f64::from(*w)).abs()).sum();
        (2 * inner + 64) as f64 * 2.0 * F32_UNIT * magnitudes + 1e-37
    })
    .collect()
}

fn run(device: &TestDevice, case: Case) {
    let Variant { format, inner, .. } = case.variant;
    run_with(device, case, int4(case.features, inner, format, case.seed));
}

/// With scales of zero, and such that one group's products are next to nothing beside another's.
fn run_far(device: &TestDevice, case: Case) {
    let Variant { format, inner, .. } = case.variant;
    let mut host = int4(case.features, inner, format, case.seed);
    let far = |(i, scale)| {
        let choice = uniform(case.seed, 4, i as u32) * FAR.len() as f32;
        scale * FAR[choice as usize]
    };
    let scales = host.scales.to_f32().into_iter().enumerate().map(far).collect();
    host.scales = HostTensor::f32(host.scales.shape.clone(), scales);
    run_with(device, case, host);
}

/// What scales are multiplied with, as powers of two: a step in between is longer than a bf16 factor can make up for.
const FAR: [f32; 6] =
    [0.0, 1.0, 1.0, 1.0 / (1_u128 << 126) as f32, 1.0 / (1_u64 << 50) as f32, (1_u64 << 50) as f32];

fn run_with(device: &TestDevice, case: Case, host: HostInt4) {
    let Case { variant: Variant { way, inner, out: dtype, .. }, tokens, features, values, seed } = case;
    let x = Pair::new(device, "x", DType::Act, &[tokens, inner], &values.take(seed ^ 1, tokens * inner));
    let weight = PackedInt4::upload(device, &RepackInt4Tile { warps: 2 }, &host).unwrap();
    let tiles = way.tiles();
    let workspace = LinearInt4Workspace::alloc(device, &tiles).unwrap();
    let found = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", dtype, &[tokens, features]);
        linear_int4(device, &tiles, &workspace, &x.device, &weight, &mut out).unwrap();
        parity::read_bytes(device, &out)
    });
    let found = parity::numbers(dtype, &found);

    let oracle = parity::oracle();
    let [mut expected, mut exact] =
        [dtype, DType::Float].map(|dtype| oracle.alloc(dtype, &[tokens, features]).unwrap());
    let on_host = oracle.upload_int4(host.clone()).unwrap();
    oracle.linear_int4(&x.host, &on_host, &mut expected).unwrap();
    oracle.linear_int4(&x.host, &on_host, &mut exact).unwrap();
    let (expected, exact) = (oracle.read(&expected).unwrap(), oracle.read(&exact).unwrap());
    let error = errors(&oracle.read(&x.host).unwrap(), &host);
    let bound = |i: usize| {
        let interval = Interval::around(exact[i], error[i]);
        if dtype == DType::Act { interval.round_bf16().farthest(expected[i]) } else { error[i] }
    };
    let relative_l2 = if dtype == DType::Act { 2.5e-3 } else { 1e-4 };
    parity::assert_close("out", features, &found, &expected, relative_l2, bound);
}

/// The same for a gate and its up projection: the oracle's sums, and what their errors become behind the SwiGLU.
fn run_swiglu(device: &TestDevice, case: Case) {
    let Case { variant: Variant { way, format, inner, .. }, tokens, features, values, seed } = case;
    let projections = [seed, seed ^ 2].map(|seed| int4(features, inner, format, seed));
    let x = Pair::new(device, "x", DType::Act, &[tokens, inner], &values.take(seed ^ 1, tokens * inner));
    let [gate, up] = &projections;
    let weight = PackedInt4::upload_gate_up(device, &RepackInt4Tile { warps: 2 }, gate, up).unwrap();
    let tiles = way.tiles();
    let workspace = LinearInt4Workspace::alloc(device, &tiles).unwrap();
    let found = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", DType::Act, &[tokens, features]);
        swiglu_int4(device, &tiles, &workspace, &x.device, &weight, &mut out).unwrap();
        parity::read_bytes(device, &out)
    });
    let found = parity::numbers(DType::Act, &found);

    let oracle = parity::oracle();
    let [gates, ups] = projections.each_ref().map(|host| {
        let mut exact = oracle.alloc(DType::Float, &[tokens, features]).unwrap();
        oracle.linear_int4(&x.host, &oracle.upload_int4(host.clone()).unwrap(), &mut exact).unwrap();
        let errors = errors(&oracle.read(&x.host).unwrap(), host);
        (oracle.read(&exact).unwrap(), errors)
    });
    let mut expected = oracle.alloc(DType::Act, &[tokens, features]).unwrap();
    let [gate, up] = projections.map(HostLinear::Int4);
    oracle.swiglu(&x.host, &oracle.upload_swiglu(gate, up).unwrap(), &mut expected).unwrap();
    let expected = oracle.read(&expected).unwrap();
    let bound = |i: usize| {
        let (g, u) = (gates.0[i], ups.0[i]);
        let silu = g / (1.0 + (-g).exp());
        // The slope of silu is 1.1 at most; then what the kernel's own arithmetic adds, beside what is flushed to zero.
        let error = 1.1 * gates.1[i] * (u.abs() + ups.1[i]) + silu.abs() * ups.1[i];
        let own = (2.0 * g.abs().min(100.0) + 12.0) * F32_UNIT * (silu * u).abs();
        Interval::around(silu * u, error + own + 1e-35 * (1.0 + u.abs())).round_bf16().farthest(expected[i])
    };
    parity::assert_close("out", features, &found, &expected, 2.5e-3, bound);
}

#[test]
fn few_tokens_agree_with_the_oracle() {
    parity::check("linear_int4", cases(select(FEW), 40, 70), run);
}

#[test]
fn many_tokens_agree_with_the_oracle() {
    parity::check("linear_int4_wide", cases(select(WIDE), 70, 110), run);
}

#[test]
fn scales_may_lie_far_apart() {
    let variants = select(vec![FEW[2], WIDE[2], Variant { inner: 380, out: DType::Float, ..WIDE[2] }]);
    let cases = cases(variants, 24, 40).prop_map(|case| Case { values: Values::Normal, ..case });
    parity::check("linear_int4_far", cases, run_far);
}

/// Values whose products of two sums are numbers.
const FOR_PRODUCTS: [Values; 5] =
    [Values::Normal, Values::Ties, Values::Negative, Values::Zeros, Values::Outliers];

#[test]
fn swiglus_agree_with_the_oracle() {
    let cases = |variants, tokens, features| {
        let values = Values::any_of(&FOR_PRODUCTS);
        (cases(variants, tokens, features), values).prop_map(|(case, values)| Case { values, ..case })
    };
    parity::check("swiglu_int4", cases(select(vec![FEW[0], WIDE[2]]), 24, 30), run_swiglu);
}

#[test]
fn swiglus_agree_with_the_oracle_at_size() {
    let tiles = [
        Way::Few(LinearInt4Tile::safe(LinearInt4Tokens::UpTo8)),
        Way::Few(LinearInt4Tile::safe(LinearInt4Tokens::UpTo32)),
        Way::Wide(LinearInt4WideTile::safe(())),
    ];
    let formats = vec![format(DType::Bf16, 128, false), format(DType::Bf16, 32, true)];
    let variants = (select(tiles.to_vec()), select(formats), select(vec![256, 6144]))
        .prop_map(|(way, format, inner)| Variant { way, format, inner, out: DType::Act });
    let cases = (cases(variants, 200, 300), Values::any_of(&FOR_PRODUCTS))
        .prop_map(|(case, values)| Case { values, ..case });
    parity::check_on_gpu("swiglu_int4_at_size", cases, run_swiglu);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let limits = Limits::a100();
    let few = [LinearInt4Tokens::UpTo8, LinearInt4Tokens::UpTo16, LinearInt4Tokens::UpTo32]
        .into_iter()
        .flat_map(|tokens| LinearInt4Tile::candidates(tokens, &limits))
        .map(Way::Few);
    let wide = LinearInt4WideTile::candidates((), &limits).into_iter().map(Way::Wide);
    let formats = [
        format(DType::Bf16, 128, false),
        format(DType::Bf16, 32, true),
        format(DType::F16, 64, true),
        format(DType::F32, 6144, false),
    ];
    let variants = (
        select(few.chain(wide).collect::<Vec<_>>()),
        select(formats.to_vec()),
        select(vec![256, 2048, 2056, 6144]),
        select(vec![DType::Act, DType::Float]),
    )
        .prop_map(|(way, mut format, inner, out)| {
            format.group_size = format.group_size.min(inner);
            Variant { way, format, inner, out }
        });
    parity::check_on_gpu("linear_int4_at_size", cases(variants, 300, 700), run);
}

#[test]
fn agrees_with_the_oracle_on_the_longest_prefill() {
    let variant = Variant {
        way: Way::Wide(LinearInt4WideTile::candidates((), &Limits::a100())[0]),
        format: format(DType::Bf16, 32, true),
        inner: 1024,
        out: DType::Act,
    };
    parity::large_cases(|device| {
        run(device, Case { variant, tokens: 8192, features: 72, values: Values::Normal, seed: 8 });
    });
}

#[test]
fn planted_faults_are_seen() {
    let (few_32, few_128, wide_32, wide_96) = (FEW[0], FEW[1], WIDE[0], WIDE[2]);
    for (file, variant, find, replace) in [
        // Two nibbles change places.
        ("int4.cuh", few_32, "word >> (4 * p)", "word >> (4 * (p ^ 2))"),
        // A group ends one word late.
        ("linear_int4.cuh", few_32, "64 * k_tile + 32 * part;", "64 * k_tile + 16 * part;"),
        ("linear_int4.cuh", wide_96, "64 * k_tile + 32 * part;", "64 * k_tile + 32 * part - 32;"),
        // Zero points are ignored.
        ("linear_int4.cu", few_32, "low = int4_offset(zeros), high", "high"),
        ("linear_int4_wide.cu", wide_32, "ZERO_POINTS ? step.zeros[row_tile + r][part][g] : 0x88u", "0x88u"),
        // Sums keep the unit of the first group.
        ("linear_int4_wide.cu", wide_32, "rows[r][i].unit = scale;", ""),
        // Barriers are missing.
        ("linear_int4.cu", few_32, "    __syncthreads();\n    const int splits", "    const int splits"),
        ("linear_int4_wide.cu", wide_32, "        __syncthreads();\n", ""),
        (
            "linear_int4_wide.cu",
            wide_32,
            "cp_async_wait<TILE_STAGES - 2>()",
            "cp_async_wait<TILE_STAGES - 1>()",
        ),
        (
            "linear_int4.cuh",
            few_32,
            "    __threadfence();\n    __syncthreads();\n    bool last",
            "    bool last",
        ),
        // The last inputs and the last token are left out.
        (
            "linear_int4.cu",
            few_128,
            "const int end = min(static_cast<int>(blockIdx.y + 1) * k_tiles_per_split, weight.k_tiles);",
            "const int end = min(static_cast<int>(blockIdx.y + 1) * k_tiles_per_split, weight.k_tiles - 1);",
        ),
        ("linear_int4.cuh", few_128, "column >= tokens) continue", "column >= tokens - 1) continue"),
        ("linear_int4_wide.cu", wide_32, "/ 8), tokens - 1);", "/ 8), tokens - 2);"),
        // A split's sums are left out; a ticket is kept.
        (
            "linear_int4_wide.cu",
            wide_32,
            "for (int split = 0; split < splits; ++split)",
            "for (int split = 1; split < splits; ++split)",
        ),
        ("linear_int4.cuh", few_32, "if (last) atomicExch(ticket, 0u);", ""),
    ] {
        parity::catches(Fault { file, find, replace }, cases(Just(variant), 24, 40), run);
    }
    for (find, replace) in [
        // A scale of zero is the last one again; weights are not less where the unit is more.
        ("factor = nothing ? 0 :", "factor ="),
        ("exponent * 0x00800080u", "0x3f803f80u"),
    ] {
        let fault = Fault { file: "linear_int4_wide.cu", find, replace };
        let cases = cases(Just(wide_96), 24, 40).prop_map(|case| Case { values: Values::Normal, ..case });
        parity::catches(fault, cases, run_far);
    }
    // The gate's and the up projection's rows change places.
    let fault = Fault { file: "linear_int4.cuh", find: "swiglu(c.x, c.z)", replace: "swiglu(c.z, c.x)" };
    parity::catches(fault, cases(Just(few_32), 24, 40), run_swiglu);
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tiles = LinearInt4Tiles::safe();
        let workspace = LinearInt4Workspace::alloc(device, &tiles).unwrap();
        let weight = int4(16, 64, format(DType::Bf16, 32, false), 1);
        let packed = PackedInt4::upload(device, &RepackInt4Tile { warps: 2 }, &weight).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let refused = |x, packed: &_, mut out| {
            linear_int4(device, &tiles, &workspace, &x, packed, &mut out).unwrap_err().to_string()
        };
        let (x, out) = (|| tensor(DType::Act, &[2, 64]), || tensor(DType::Act, &[2, 16]));
        expect(refused(tensor(DType::Act, &[2, 32]), &packed, out()), &["linear_int4", "`x`", "[T, 64]"]);
        expect(refused(tensor(DType::Act, &[2, 8, 8]), &packed, out()), &["`x`", "2 dimensions"]);
        expect(refused(tensor(DType::Float, &[2, 64]), &packed, out()), &["`x` holds floats"]);
        expect(refused(x(), &packed, tensor(DType::Act, &[3, 16])), &["`out`", "[2, 16]"]);
        expect(refused(x(), &packed, tensor(DType::Index, &[2, 16])), &["`out` holds indices"]);
        let shape = Int4Shape::of(&[&weight, &weight]).unwrap();
        let gate_up = PackedInt4::alloc(device, "gate and up", shape, 1).unwrap();
        expect(refused(x(), &gate_up, out()), &["`weight`", "one weight"]);
        let refused = |packed: &_, mut out| {
            swiglu_int4(device, &tiles, &workspace, &x(), packed, &mut out).unwrap_err().to_string()
        };
        expect(refused(&packed, out()), &["swiglu_int4", "`weight`", "a gate and its up projection"]);
        expect(refused(&gate_up, tensor(DType::Float, &[2, 16])), &["swiglu_int4", "`out` holds floats"]);
    });
}
