//! `latent_rope` against the oracle.

use dsa80_cuda::latent_rope::{LatentRopeDims, LatentRopeTile, latent_rope};
use dsa80_cuda::{Limits, Tile};
use dsa80_reference::fp8::MlaRow;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Batches, F32_UNIT, Interval, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::{self, Layout, assert_rows_outside_are_skipped, expect};

const EPS: f64 = 1e-5;

#[derive(Debug, Clone, Copy)]
struct Variant {
    dims: LatentRopeDims,
    weight: DType,
    tile: LatentRopeTile,
}

const fn variant((rank, rope): (usize, usize), weight: DType, (warps, vector): (usize, usize)) -> Variant {
    let dims = LatentRopeDims { kv_lora_rank: rank, rope };
    Variant { dims, weight, tile: LatentRopeTile { warps, vector } }
}

/// Every constant of the kernel in few programs: groups of a scale that are whole, short and alone; more pairs than lanes.
const VARIANTS: &[Variant] = &[
    variant((512, 64), DType::Bf16, (4, 4)),
    variant((512, 64), DType::F32, (1, 8)),
    variant((16, 8), DType::Bf16, (2, 8)),
    variant((400, 72), DType::F16, (2, 8)),
    variant((144, 16), DType::Bf16, (4, 4)),
];

type Case = cache_rows::Case<Variant>;

fn cases(variants: impl Strategy<Value = Variant>, size: usize) -> impl Strategy<Value = Case> {
    let batches =
        Batches { page_sizes: &[1, 3, 16, 64], max_seqs: 4, max_computed: size, max_chunk: size }.any();
    (batches, variants, any::<bool>(), Values::any_of(&Values::ORDINARY), any::<u64>())
        .prop_map(|(batch, variant, fp8, values, seed)| Case { batch, variant, fp8, values, seed })
}

/// The tensors of a case.
struct Inputs {
    x: Pair,
    weight: Pair,
    cos_sin: Pair,
}

impl Inputs {
    fn new(device: &TestDevice, case: &Case) -> Self {
        let LatentRopeDims { kv_lora_rank: rank, rope } = case.variant.dims;
        let (rows, seed) = (case.batch.batch.num_tokens(), case.seed);
        let x = case.values.take(seed, rows * (rank + rope));
        let weight: Vec<f64> = Values::Normal.take(seed ^ 1, rank).iter().map(|x| 1.0 + 0.5 * x).collect();
        Self {
            x: Pair::new(device, "x", DType::Act, &[rows, rank + rope], &x),
            weight: Pair::weight(device, "weight", case.variant.weight, &[rank], &weight),
            cos_sin: case.cos_sin(device, rope),
        }
    }

    /// What the cache's rows may be: the error analysis beside the kernel.
    fn intervals(&self, case: &Case) -> Vec<Interval> {
        let LatentRopeDims { kv_lora_rank: rank, rope } = case.variant.dims;
        let read = |pair: &Pair| parity::oracle().read(&pair.host).unwrap();
        let (x, weight, turns) = (read(&self.x), read(&self.weight), read(&self.cos_sin));
        let vector = case.variant.tile.vector;
        let roundings = (rank.div_ceil(32 * vector) * vector + 10) as f64;
        let relative = roundings * F32_UNIT / 2.0 + 7.0 * F32_UNIT;
        let mut out = Vec::new();
        for (x, turns) in x.chunks(rank + rope).zip(turns.chunks(rope)) {
            let (latent, key) = x.split_at(rank);
            let root = (latent.iter().map(|x| x * x).sum::<f64>() / rank as f64 + EPS).sqrt();
            out.extend(latent.iter().zip(&weight).map(|(x, weight)| {
                let normed = weight * x / root;
                Interval::around(normed, 1.01 * relative * normed.abs()).round_bf16()
            }));
            for (pair, turn) in key.chunks(2).zip(turns.chunks(2)) {
                let turned = |a: f64, b: f64, cos: f64, sin: f64| {
                    let error = 2.0 * F32_UNIT * ((a * cos).abs() + (b * sin).abs());
                    Interval::around(a * cos + b * sin, 1.01 * error).round_bf16()
                };
                out.push(turned(pair[0], pair[1], turn[0], -turn[1]));
                out.push(turned(pair[1], pair[0], turn[0], turn[1]));
            }
        }
        out
    }

    fn launch(&self, device: &TestDevice, case: &Case) -> Vec<u8> {
        let (x, weight, cos_sin) = (&self.x.device, &self.weight.device, &self.cos_sin.device);
        case.written(device, layout(case), |batch, cache| {
            latent_rope(device, &case.variant.tile, batch, x, weight, EPS, cos_sin, cache)
        })
    }
}

fn layout(case: &Case) -> Layout {
    let LatentRopeDims { kv_lora_rank, rope } = case.variant.dims;
    Layout::Mla(MlaRow { kv_lora_rank, rope })
}

fn run(device: &TestDevice, case: Case) {
    let inputs = Inputs::new(device, &case);
    let found = parity::twice(device, || inputs.launch(device, &case));
    let (x, weight, cos_sin) = (&inputs.x.host, &inputs.weight.host, &inputs.cos_sin.host);
    case.check(device, layout(&case), &inputs.intervals(&case), &found, |batch, cache| {
        parity::oracle().latent_rope(batch, x, weight, EPS, cos_sin, cache)
    });
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("latent_rope", cases(select(VARIANTS), 24), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let glm = LatentRopeDims { kv_lora_rank: 512, rope: 64 };
    let variants = select(LatentRopeTile::candidates(glm, &Limits::a100()))
        .prop_map(move |tile| variant((glm.kv_lora_rank, glm.rope), DType::Bf16, (tile.warps, tile.vector)));
    parity::check_on_gpu("latent_rope_at_size", cases(variants, 400), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // A mean over one column too many.
        (
            "rsqrtf(warp_sum(squares) * (1.0f / RANK) + eps)",
            "rsqrtf(warp_sum(squares) * (1.0f / (RANK + 1)) + eps)",
        ),
        // The tail of a row is dropped, and what pads it.
        (
            "if (column < RANK) {\n                store",
            "if (column < RANK - GROUP) {\n                store",
        ),
        ("(ROW_BYTES - USED_BYTES) / 4", "0"),
        // The second group's scale for the first as well.
        ("lane / GROUP_LANES == group;", "lane / GROUP_LANES >= group;"),
        // A slot is not checked.
        ("if (slot < 0 || slot >= slots) return;", "if (slot >= slots - 1) return;"),
        // The turn goes the other way.
        ("turn_pair(a, b, turn.x, turn.y);", "turn_pair(a, b, turn.x, -turn.y);"),
    ] {
        let fault = Fault { file: "latent_rope.cuh", find, replace };
        parity::catches(fault, cases(select(VARIANTS), 24), run);
    }
}

#[test]
fn rows_whose_slot_is_outside_the_cache_are_skipped() {
    assert_rows_outside_are_skipped(VARIANTS[0], (2 * 576, 656), |device, case| {
        Inputs::new(device, case).launch(device, case)
    });
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let (_, batch) = parity::batch(device, &BatchCase::of(3, &[(0, 2)]).batch);
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let (x, weight) = (tensor(DType::Act, &[2, 24]), tensor(DType::F32, &[16]));
        let cos_sin = tensor(DType::Float, &[2, 4, 2]);
        let tile = LatentRopeTile { warps: 4, vector: 4 };
        let run = |x: &_, weight: &_, cos_sin: &_, mut cache| {
            latent_rope(device, &tile, &batch, x, weight, EPS, cos_sin, &mut cache).unwrap_err().to_string()
        };
        let cache = || tensor(DType::Act, &[4, 3, 24]);
        expect(run(&tensor(DType::Act, &[2, 25]), &weight, &cos_sin, cache()), &["`x`", "[2, 16 + 8]"]);
        expect(run(&x, &tensor(DType::Act, &[16]), &cos_sin, cache()), &["`weight` holds activations"]);
        expect(run(&x, &weight, &tensor(DType::Act, &[2, 4, 2]), cache()), &["`cos_sin` holds activations"]);
        expect(run(&x, &weight, &cos_sin, tensor(DType::Fp8, &[4, 3, 24])), &["`cache`", "[pages, 3, 48]"]);
        expect(run(&x, &weight, &cos_sin, tensor(DType::Index, &[4, 3, 24])), &["`cache` holds indices"]);
        let (wide, cos_sin) = (tensor(DType::Act, &[2, 20]), tensor(DType::Float, &[2, 2, 2]));
        expect(run(&wide, &weight, &cos_sin, tensor(DType::Act, &[4, 3, 20])), &["4 rotary columns"]);
    });
}
