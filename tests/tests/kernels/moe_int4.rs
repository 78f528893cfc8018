//! `moe_int4` against the oracle.

use dsa80_cuda::int4::Int4Shape;
use dsa80_cuda::moe_int4::{
    ExpertsInt4, MoeInt4Dims, MoeInt4Tile, MoeInt4Tiles, MoeInt4Workspace, MoeLoad, moe_int4,
};
use dsa80_cuda::moe_int4_pairs::{DownTile, MoeInt4PairsTile};
use dsa80_cuda::repack_int4::RepackInt4Tile;
use dsa80_cuda::{CudaTensor, Limits, Tile};
use dsa80_reference::{DType, HostExpert, HostLinear, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::experts::{Layer, Routing, Step, relative_l2};

/// The repacking has a test of its own.
const REPACK: RepackInt4Tile = RepackInt4Tile { warps: 4 };

/// Which way the step goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Pairs,
    Sorted,
}

#[derive(Debug, Clone, Copy)]
struct Variant {
    layer: Layer,
    pairs: MoeInt4PairsTile,
    sorted: MoeInt4Tile,
}

/// A layer, tokens of an item, and tiles in the order of their fields.
const fn variant(
    layer: Layer,
    tokens: usize,
    [pairs, gate_up, down]: [[usize; 7]; 3],
    [warps, row_tiles, k_tiles]: [usize; 3],
) -> Variant {
    let pairs = MoeInt4PairsTile {
        max_tokens: 8,
        gate_up: MoeInt4Tile::of(8, pairs, down).gate_up,
        down: DownTile { warps, row_tiles, k_tiles },
    };
    Variant { layer, pairs, sorted: MoeInt4Tile::of(tokens, gate_up, down) }
}

/// Every constant of the kernels in few programs: inputs and features that fill their tiles and that do not, one warp and several in both
/// directions, groups of half a tile, of a tile, of more, and one for all inputs.
const VARIANTS: &[Variant] = &[
    variant(
        Layer {
            hidden: 256,
            intermediate: 72,
            experts: 5,
            groups: (128, 32),
            scales: DType::Bf16,
            zero_points: true,
        },
        8,
        [[1, 2, 1, 1, 2, 1, 1], [2, 2, 2, 1, 3, 2, 1], [2, 1, 1, 2, 2, 3, 1]],
        [2, 1, 1],
    ),
    variant(
        Layer {
            hidden: 192,
            intermediate: 20,
            experts: 4,
            groups: (64, 20),
            scales: DType::F16,
            zero_points: false,
        },
        48,
        [[1, 1, 2, 2, 2, 1, 1], [1, 4, 1, 1, 2, 1, 1], [1, 1, 3, 1, 2, 2, 1]],
        [3, 2, 4],
    ),
    variant(
        Layer {
            hidden: 72,
            intermediate: 96,
            experts: 16,
            groups: (72, 32),
            scales: DType::F32,
            zero_points: true,
        },
        24,
        [[1, 2, 2, 1, 3, 2, 1], [2, 1, 1, 1, 4, 1, 1], [1, 2, 2, 1, 4, 1, 1]],
        [2, 2, 2],
    ),
];

#[derive(Debug, Clone, Copy)]
struct Case {
    variant: Variant,
    way: Way,
    step: Step,
}

fn cases(
    variants: impl Strategy<Value = Variant>,
    tokens: usize,
    values: &'static [Values],
) -> impl Strategy<Value = Case> {
    let way = select(vec![Way::Pairs, Way::Sorted]);
    (variants, way, Step::any(tokens, 4, values)).prop_map(|(variant, way, step)| Case {
        variant,
        way,
        step: Step { top_k: step.top_k.min(variant.layer.experts), ..step },
    })
}

/// What the sums of the experts are taken of: their squares must be numbers, for `silu * up` is one.
const VALUES: [Values; 5] = [Values::Normal, Values::Ties, Values::Negative, Values::Zeros, Values::Outliers];

fn run(device: &TestDevice, case: Case) {
    let Case { variant, way, step } = case;
    let experts = variant.layer.experts(step.seed);
    let inputs = step.inputs(device, variant.layer.hidden, variant.layer.experts);
    let on_device = ExpertsInt4::upload(device, &REPACK, experts.clone()).unwrap();
    let max_tokens = if way == Way::Pairs { 1024 } else { 0 };
    let tiles = MoeInt4Tiles {
        pairs: MoeInt4PairsTile { max_tokens, ..variant.pairs },
        few: variant.sorted,
        some: variant.sorted,
        many: variant.sorted,
    };
    let Layer { hidden, intermediate, experts: count, .. } = variant.layer;
    let workspace =
        MoeInt4Workspace::alloc(device, step.tokens, step.top_k, hidden, intermediate, count).unwrap();
    let found = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", DType::Act, &[step.tokens, hidden]);
        moe_int4(
            device,
            &tiles,
            &workspace,
            &inputs.x.device,
            &inputs.ids.device,
            &inputs.weights.device,
            &on_device,
            inputs.shared.as_ref().map(|shared| &shared.device),
            &mut out,
        )
        .unwrap();
        parity::read_bytes(device, &out)
    });
    let host = parity::oracle().upload_experts_int4(experts.clone()).unwrap();
    let mut expected = parity::oracle().alloc(DType::Act, &[step.tokens, hidden]).unwrap();
    let shared = inputs.shared.as_ref().map(|shared| &shared.host);
    parity::oracle()
        .moe_int4(&inputs.x.host, &inputs.ids.host, &inputs.weights.host, &host, shared, &mut expected)
        .unwrap();
    let expected = parity::oracle().read(&expected).unwrap();
    let packed = way == Way::Sorted && variant.sorted.down.row_tiles % 2 == 0;
    let bounds = inputs.bounds(&experts, &expected, if packed { 1.0 / 8192.0 } else { 0.0 });
    let found = parity::numbers(DType::Act, &found);
    parity::assert_close("out", hidden, &found, &expected, relative_l2(&expected, &bounds), |i| bounds[i]);
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("moe_int4", cases(select(VARIANTS), 40, &VALUES), run);
}

/// GLM-5.2's projections with few experts, at TP=8 and TP=1; the benchmark checks sampled rows of whole layers and all tiles.
#[test]
fn agrees_with_the_oracle_at_size() {
    let variant = |load, tile: usize, group_size, intermediate: usize| {
        let layer = Layer {
            hidden: 6144,
            intermediate,
            experts: 2048 / intermediate,
            groups: (group_size, group_size),
            scales: DType::Bf16,
            zero_points: group_size == 32,
        };
        let shape = (layer.hidden, layer.intermediate);
        let dims = MoeInt4Dims::new(shape, group_size, layer.scales, layer.zero_points, load);
        let limits = Limits::a100();
        let pairs = MoeInt4PairsTile::candidates(dims, &limits)[tile];
        Variant { layer, pairs, sorted: MoeInt4Tile::candidates(dims, &limits)[tile] }
    };
    let variants = [
        variant(MoeLoad::Many, 4, 128, 256),
        variant(MoeLoad::Few, 1, 32, 256),
        variant(MoeLoad::Some, 1, 128, 2048),
    ];
    let steps = [
        (Way::Pairs, 1, Routing::Any),
        (Way::Pairs, 4, Routing::Skewed),
        (Way::Sorted, 9, Routing::Any),
        (Way::Sorted, 20, Routing::Skewed),
        (Way::Sorted, 20, Routing::One),
    ];
    parity::large_cases(|device| {
        for variant in variants {
            for (i, (way, tokens, routing)) in steps.into_iter().enumerate() {
                let (top_k, shared) = (variant.layer.experts.min(3), i % 2 == 0);
                let values = Values::Normal;
                let step = Step { tokens, top_k, routing, values, shared, seed: i as u64 };
                run(device, Case { variant, way, step });
            }
        }
    });
}

#[test]
fn agrees_with_the_oracle_on_the_longest_prefill() {
    let groups = (128, 32);
    let layer =
        Layer { hidden: 256, intermediate: 32, experts: 256, groups, scales: DType::Bf16, zero_points: true };
    let shape = (layer.hidden, layer.intermediate);
    let dims = MoeInt4Dims::new(shape, 32, layer.scales, layer.zero_points, MoeLoad::Many);
    let limits = Limits::a100();
    let pairs = MoeInt4PairsTile::candidates(dims, &limits)[0];
    let variant = Variant { layer, pairs, sorted: MoeInt4Tile::candidates(dims, &limits)[0] };
    parity::large_cases(|device| {
        for routing in [Routing::Any, Routing::Skewed, Routing::One] {
            let values = Values::Normal;
            let step = Step { tokens: 8192, top_k: 8, routing, values, shared: true, seed: 8 };
            run(device, Case { variant, way: Way::Sorted, step });
        }
    });
}

/// With the one of the variants that the fault lies in: a fault costs as many compilations as there are variants.
#[test]
fn planted_faults_are_seen() {
    let catches = |variant: usize, file, find, replace| {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(Just(VARIANTS[variant]), 40, &[Values::Normal]), run);
    };
    // Two nibbles are swapped.
    catches(2, "int4.cuh", "a[2] = fma_bf16x2(word >> 8 &", "a[2] = fma_bf16x2(word >> 12 &");
    // A group begins one unit early.
    catches(2, "moe_int4.cu", "(input / GROUP_SIZE)", "((input + 32) / GROUP_SIZE)");
    catches(2, "moe_int4_down.cu", "(input / GROUP_SIZE)", "((input + 32) / GROUP_SIZE)");
    // The zero point is ignored.
    catches(2, "moe_int4.cu", "int4_offsets_64th(zero,", "int4_offsets_64th(0,");
    catches(2, "moe_int4_down.cu", "int4_offsets_64th(zero[j][unit],", "int4_offsets_64th(0,");
    // The last token of an expert is dropped, or that of a full item.
    let count = "min(count - i * item_tokens, item_tokens)";
    catches(2, "moe_sort.cu", count, "min(count - i * item_tokens - 1, item_tokens)");
    catches(0, "moe_int4.cu", "token >= share.count", "token >= min(share.count, TOKENS - 1)");
    // A column's warps do not wait for each other, nor the columns.
    catches(0, "moe_int4.cu", "                sync_column(column);\n", "");
    catches(0, "moe_int4.cu", "    if (!first) __syncthreads();\n", "");
    // What fills up a tile of tokens is missing.
    catches(2, "moe_int4.cu", "copy * ROWS >= filled", "copy * ROWS >= rows");
    // A block leaves out items, or its next share has the tokens of the share before.
    catches(0, "moe_int4.cu", "item += items_a_step", "item += items_a_step + 1");
    catches(0, "moe_int4.cu", "next = after;\n            find_pairs(args);", "next = after;");
    // A share that is shorter than the ring leaves the next one's weights out.
    catches(2, "moe_int4.cu", "if (i >= alone) source_x.copy_weights();", "");
    // What a warp counted is not yet there.
    catches(2, "moe_sort.cu", "    __syncthreads();\n\n    int2 before", "    int2 before");
    // The sums of a row group go on in the next one.
    catches(0, "moe_int4.cu", "acc[r][n][c] = 0.0f;", "acc[r][n][c] = acc[r][n][c];");
    // The halves of odd rows are not swapped where they are read.
    catches(2, "moe_int4.cu", "((t + 4) ^ (row & 1) << 2)", "(t + 4)");
    // Of two tiles of tokens, the second is the first once more.
    catches(1, "moe_int4.cu", "min(n + 1, last) * 64", "n * 64");
    // The second of the row tiles that are loaded at once takes the first one's rows.
    catches(1, "moe_int4_down.cu", "min(first_job + i * WARPS,", "min(first_job,");
    // The weights of the token before.
    let weight = "topk_weights[token * top_k + k]";
    catches(2, "moe_sum.cu", weight, "topk_weights[(token > 0 ? token - 1 : 0) * top_k + k]");
    // A packed number loses its sign; a largest one beyond its 14 bits; the scale is that of some of the four.
    catches(2, "moe_parts.cuh", "(static_cast<int32_t>(part.y << 8) >> 18)", "(part.y << 8 >> 18)");
    catches(2, "moe_parts.cuh", "(266u - exponent) << 23", "(267u - exponent) << 23");
    catches(2, "moe_parts.cuh", "max_nan(fabsf(four[2]), fabsf(four[3]))", "fabsf(four[2])");
    // Without the shared expert.
    catches(2, "moe_int4_down.cu", "beside + sum", "sum");
}

/// Pairs of experts that do not exist give nothing, whichever way.
#[test]
fn experts_that_do_not_exist_are_skipped() {
    parity::small_cases(|device| {
        let Variant { layer, pairs, sorted } = VARIANTS[1];
        let experts = ExpertsInt4::upload(device, &REPACK, layer.experts(3)).unwrap();
        let step = Step {
            tokens: 5,
            top_k: 3,
            routing: Routing::Any,
            values: Values::Normal,
            shared: true,
            seed: 3,
        };
        let inputs = step.inputs(device, layer.hidden, layer.experts);
        let mut ids = step.ids(layer.experts);
        let mut weights = parity::read(device, &inputs.weights.device);
        for (i, id) in [(0, -1), (4, 4), (7, i32::MAX), (12, i32::MIN), (13, 100), (14, -7)] {
            (ids[i], weights[i]) = (id, 0.0);
        }
        let shape = [step.tokens, step.top_k];
        let wild = Pair::new(device, "weights", DType::Float, &shape, &[1.0; 15]);
        let weights = Pair::new(device, "weights", DType::Float, &shape, &weights);
        // What is skipped has a weight all the same.
        let mut both = parity::read(device, &wild.device);
        let known = parity::read(device, &weights.device);
        for (both, known) in both.iter_mut().zip(&known).filter(|(_, known)| **known != 0.0) {
            *both = *known;
        }
        let wild = Pair::new(device, "weights", DType::Float, &shape, &both);
        let wild_ids = CudaTensor::alloc(device, "ids", DType::Index, &shape).unwrap();
        dsa80_cuda::Device::write(device, wild_ids.buffer(), 0, bytemuck::cast_slice(&ids)).unwrap();
        let tame: Vec<i32> = ids.iter().map(|&id| if (0..4).contains(&id) { id } else { 0 }).collect();
        let tame = Pair::index(device, "ids", &shape, &tame);
        let workspace =
            MoeInt4Workspace::alloc(device, 5, 3, layer.hidden, layer.intermediate, layer.experts).unwrap();
        for max_tokens in [0, 8] {
            let tiles = MoeInt4Tiles {
                pairs: MoeInt4PairsTile { max_tokens, ..pairs },
                few: sorted,
                some: sorted,
                many: sorted,
            };
            let run = |ids: &_, weights: &_| {
                let mut out = parity::poisoned(device, "out", DType::Act, &[5, layer.hidden]);
                let shared = inputs.shared.as_ref().map(|shared| &shared.device);
                let x = &inputs.x.device;
                moe_int4(device, &tiles, &workspace, x, ids, weights, &experts, shared, &mut out).unwrap();
                parity::read(device, &out)
            };
            let (found, expected) = (run(&wild_ids, &wild.device), run(&tame.device, &weights.device));
            parity::assert_same("out", layer.hidden, &found, &expected);
        }
    });
}

#[test]
fn an_empty_step_launches_nothing() {
    parity::small_cases(|device| {
        let Variant { layer, .. } = VARIANTS[1];
        let experts = ExpertsInt4::upload(device, &REPACK, layer.experts(3)).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let x = tensor(DType::Act, &[0, layer.hidden]);
        let (ids, weights) = (tensor(DType::Index, &[0, 2]), tensor(DType::Float, &[0, 2]));
        let workspace = MoeInt4Workspace::alloc(device, 1, 2, layer.hidden, layer.intermediate, 4).unwrap();
        let tiles = MoeInt4Tiles::safe(dims(layer));
        let mut out = tensor(DType::Act, &[0, layer.hidden]);
        moe_int4(device, &tiles, &workspace, &x, &ids, &weights, &experts, None, &mut out).unwrap();
    });
}

fn dims(layer: Layer) -> MoeInt4Dims {
    let (experts, load) = (layer.experts(0), MoeLoad::Few);
    let shape = |weights: &[&HostLinear]| {
        let int4 = weights.iter().map(|weight| match weight {
            HostLinear::Int4(weight) => weight,
            HostLinear::Dense(_) | HostLinear::Random(_) => panic!("all experts are INT4"),
        });
        Int4Shape::of(&int4.collect::<Vec<_>>()).unwrap()
    };
    let HostExpert { gate_proj, up_proj, down_proj } = &experts[0];
    MoeInt4Dims { gate_up: shape(&[gate_proj, up_proj]), down: shape(&[down_proj]), load }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let layer = Layer {
            hidden: 64,
            intermediate: 32,
            experts: 4,
            groups: (32, 32),
            scales: DType::Bf16,
            zero_points: false,
        };
        let upload =
            |experts| ExpertsInt4::upload(device, &REPACK, experts).map_err(|error| error.to_string());
        let all = || layer.experts(1);
        let experts = upload(all()).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let workspace = MoeInt4Workspace::alloc(device, 3, 2, 64, 32, 4).unwrap();
        let tiles = MoeInt4Tiles::safe(dims(layer));
        let x = tensor(DType::Act, &[3, 64]);
        let (ids, weights) = (tensor(DType::Index, &[3, 2]), tensor(DType::Float, &[3, 2]));
        let run = |tiles: &_, x: &_, ids: &_, weights: &_, shared, mut out| {
            moe_int4(device, tiles, &workspace, x, ids, weights, &experts, shared, &mut out)
                .unwrap_err()
                .to_string()
        };
        let out = || tensor(DType::Act, &[3, 64]);
        let wide = tensor(DType::Act, &[3, 128]);
        expect(run(&tiles, &wide, &ids, &weights, None, out()), &["moe_int4: `x`", "[3, 64]"]);
        expect(run(&tiles, &weights, &ids, &weights, None, out()), &["`x`"]);
        expect(run(&tiles, &x, &weights, &weights, None, out()), &["`topk_ids` holds floats"]);
        let four = tensor(DType::Float, &[3, 4]);
        expect(run(&tiles, &x, &ids, &four, None, out()), &["`topk_weights`", "[3, 2]"]);
        expect(run(&tiles, &x, &ids, &ids, None, out()), &["`topk_weights` holds indices"]);
        expect(run(&tiles, &x, &ids, &weights, Some(&wide), out()), &["`shared`", "[3, 64]"]);
        expect(
            run(&tiles, &x, &ids, &weights, None, tensor(DType::Float, &[3, 64])),
            &["`out` holds floats"],
        );
        let none = tensor(DType::Index, &[3, 0]);
        expect(run(&tiles, &x, &none, &tensor(DType::Float, &[3, 0]), None, out()), &["`topk_ids`"]);
        let (many, many_ids) = (tensor(DType::Act, &[3, 64]), tensor(DType::Index, &[3, 3]));
        let weights_of_3 = tensor(DType::Float, &[3, 3]);
        expect(run(&tiles, &many, &many_ids, &weights_of_3, None, out()), &["9", "allocated"]);
        let bad = MoeInt4PairsTile { down: DownTile { warps: 0, ..tiles.pairs.down }, ..tiles.pairs };
        let bad = MoeInt4Tiles { pairs: bad, ..tiles };
        expect(run(&bad, &x, &ids, &weights, None, out()), &["moe_int4_pairs: ", "1 to 16 warps"]);

        expect(upload(vec![]).unwrap_err(), &["upload_experts_int4: `experts` is 0"]);
        let mut experts = all();
        experts[2].up_proj = HostLinear::Dense(dsa80_reference::HostTensor::f32([32, 64], vec![0.0; 2048]));
        expect(
            upload(experts).unwrap_err(),
            &["`up_proj` is unquantised in expert 2", "`upload_experts` and `moe`"],
        );
        let mut experts = all();
        experts[1].down_proj = experts[1].gate_proj.clone();
        expect(upload(experts).unwrap_err(), &["`down_proj` has shape [32, 64], expected [64, 32]"]);
        let mut experts = all();
        experts[3].up_proj = Layer { groups: (64, 32), ..layer }.experts(1)[0].up_proj.clone();
        expect(upload(experts).unwrap_err(), &["groups of 64 in expert 3", "groups of 32"]);
    });
}
