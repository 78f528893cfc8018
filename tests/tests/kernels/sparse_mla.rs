//! `sparse_mla` against the oracle.

use dsa80_cuda::Tile;
use dsa80_cuda::absorb::{AbsorbTile, AbsorbTokens};
use dsa80_cuda::sparse_mla::{
    SparseMlaDims, SparseMlaTile, SparseMlaTiles, SparseMlaWorkspace, sparse_mla, sparse_mla_output,
};
use dsa80_reference::fp8::{self, MLA_GROUP, MlaRow};
use dsa80_reference::sampling::uniform;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Batches, F32_UNIT, Pair, TestDevice, Values};
use half::bf16;
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone, Copy)]
struct Variant {
    dims: SparseMlaDims,
    fp8: bool,
    tile: SparseMlaTile,
}

const fn variant(
    (kv_lora_rank, rope): (usize, usize),
    fp8: bool,
    (warps, stages): (usize, usize),
    split_blocks: usize,
    through_l1: bool,
) -> Variant {
    let tile = SparseMlaTile { warps, stages, split_blocks, through_l1 };
    Variant { dims: SparseMlaDims { kv_lora_rank, rope }, fp8, tile }
}

/// Every way through the kernel in few programs: odd and even numbers of steps and half ones, groups of a scale that are whole, short and
/// alone, one warp and several. The last two also have groups of heads that are not whole.
const VARIANTS: &[Variant] = &[
    variant((64, 16), false, (2, 2), 16, true),
    variant((48, 16), false, (1, 3), 16, false),
    variant((32, 32), false, (3, 2), 1, true),
    variant((144, 16), true, (2, 2), 16, true),
    variant((32, 16), true, (1, 2), 4, false),
    variant((32, 8), false, (2, 3), 16, true),
    variant((32, 24), true, (2, 2), 1, true),
];

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    variant: Variant,
    heads: usize,
    k: usize,
    /// Of 8 places, how many are holes.
    holes: usize,
    /// Of queries and of cache rows.
    values: (Values, Values),
    scale: f64,
    seed: u64,
}

/// Products of what is huge with what is not tiny leave the softmax without meaning.
const VALUES: &[(Values, Values)] = &[
    (Values::Normal, Values::Normal),
    (Values::Ties, Values::Ties),
    (Values::Outliers, Values::Negative),
    (Values::Normal, Values::Outliers),
    (Values::Tiny, Values::Huge),
    (Values::Huge, Values::Tiny),
    (Values::Zeros, Values::Normal),
];

fn cases(variants: impl Strategy<Value = Variant>, size: usize, k: usize) -> impl Strategy<Value = Case> {
    let batches =
        Batches { page_sizes: &[1, 3, 16, 64], max_seqs: 3, max_computed: size, max_chunk: 8 }.any();
    let holes = prop_oneof![2 => Just(0_usize), 2 => 1..8_usize, 1 => Just(8)];
    let values = prop_oneof![Just((Values::Normal, Values::Normal)), select(VALUES)];
    let shape = (select(&[(8_usize, 2_usize), (16, 4), (24, 13)][..]), 0..=k, holes);
    (batches, variants, shape, values, select(&[0.1, 1.0][..]), any::<u64>()).prop_map(
        |(batch, variant, ((whole, some), k, holes), values, scale, seed)| {
            let heads = if variant.dims.rope.is_multiple_of(16) { whole } else { some };
            Case { batch, variant, heads, k, holes, values, scale, seed }
        },
    )
}

impl Case {
    fn width(&self) -> usize {
        self.variant.dims.kv_lora_rank + self.variant.dims.rope
    }

    fn layout(&self) -> MlaRow {
        MlaRow { kv_lora_rank: self.variant.dims.kv_lora_rank, rope: self.variant.dims.rope }
    }

    /// Distinct visible positions in no order, with holes among them.
    fn places(&self) -> Vec<i32> {
        let mut all = Vec::new();
        for t in 0..self.batch.batch.num_tokens() {
            let seed = self.seed ^ ((t as u64) << 32);
            let mut positions: Vec<i32> = (0..self.batch.batch.visible(t) as i32).collect();
            positions.sort_by(|&a, &b| uniform(seed, 1, a as u32).total_cmp(&uniform(seed, 1, b as u32)));
            let mut positions = positions.into_iter();
            all.extend((0..self.k).map(|i| {
                let hole = uniform(seed, 2, i as u32) * 8.0 < self.holes as f32;
                if hole { -1 } else { positions.next().unwrap_or(-1) }
            }));
        }
        all
    }

    /// The cache's rows as numbers, and as a tensor; NaN where no sequence has a page.
    fn cache(&self, device: &TestDevice) -> (Vec<Vec<f64>>, Pair) {
        let (slots, width, page_size) = (self.batch.slots(), self.width(), self.batch.batch.page_size);
        let rank = self.variant.dims.kv_lora_rank;
        let mut rows: Vec<Vec<f64>> =
            self.values.1.take(self.seed ^ 1, slots * width).chunks(width).map(<[f64]>::to_vec).collect();
        let unused = |slot: usize| !self.batch.used[slot / page_size];
        if !self.variant.fp8 {
            (0..slots).filter(|&slot| unused(slot)).for_each(|slot| rows[slot].fill(f64::NAN));
            let shape = [self.batch.pages, page_size, width];
            return (rows.clone(), Pair::new(device, "cache", DType::Act, &shape, &rows.concat()));
        }
        let layout = self.layout();
        let mut bytes = Vec::new();
        for (slot, row) in rows.iter_mut().enumerate() {
            let mut out = vec![0; layout.row_bytes()];
            for group in 0..layout.groups() {
                let columns = group * MLA_GROUP..((group + 1) * MLA_GROUP).min(rank);
                let values: Vec<f32> = row[columns.clone()].iter().map(|&x| x as f32).collect();
                let scale = fp8::quantise(&values, &mut out[columns.clone()]);
                out[layout.scales()][4 * group..][..4].copy_from_slice(&scale.to_le_bytes());
                for column in columns {
                    row[column] = f64::from(fp8::decode(out[column])) * f64::from(scale);
                }
            }
            for (x, bytes) in row[rank..].iter().zip(out[layout.rotary()].chunks_exact_mut(2)) {
                bytes.copy_from_slice(&bf16::from_f64(*x).to_le_bytes());
            }
            if unused(slot) {
                out.fill(0x7f);
            }
            bytes.extend(out);
        }
        let shape = [self.batch.pages, page_size, layout.row_bytes()];
        (rows, Pair::bytes(device, "cache", &shape, &bytes))
    }

    /// How far an element may be from the oracle's.
    ///
    /// A score is off by what f32 sums of `width` products lose, its weight by the exponential of that (and of its own rounding); weights
    /// are then rounded to bf16, and the sum of them with values runs in f32. Values enter in full, and once more through the sum of the
    /// weights. What is relative to a maximum that may lag by 2^8 underflows below 2^-118. The output is rounded to bf16.
    fn bounds(&self, q: &[f64], rows: &[Vec<f64>], places: &[i32], expected: &[f64]) -> (Vec<f64>, f64) {
        let (rank, width, batch) = (self.variant.dims.kv_lora_rank, self.width(), &self.batch.batch);
        let mut bounds = Vec::new();
        let mut worst = 0.0_f64;
        for (i, q) in q.chunks(width).enumerate() {
            let t = i / self.heads;
            let selected: Vec<&Vec<f64>> = places[t * self.k..][..self.k]
                .iter()
                .filter_map(|&position| Some(&rows[batch.slot(t, usize::try_from(position).ok()?)]))
                .collect();
            let score = |row: &&Vec<f64>| {
                let products = || q.iter().zip(row.iter()).map(|(q, c)| q * c);
                let (dot, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                let lost = self.scale * size * (width as f64 + 8.0) * 2.0 * F32_UNIT;
                (self.scale * dot, lost + (self.scale * dot).abs() * 4.0 * F32_UNIT + 8.0 * F32_UNIT)
            };
            let scores: Vec<(f64, f64)> = selected.iter().map(score).collect();
            let most = scores.iter().fold(f64::NEG_INFINITY, |most, score| most.max(score.0));
            let lost = scores.iter().fold(0.0_f64, |lost, score| lost.max(score.1));
            let total: f64 = scores.iter().map(|score| (score.0 - most).exp()).sum();
            let sums = 2.0 * F32_UNIT * (self.k as f64 + 64.0);
            let relative = (2.0 * lost).exp_m1() + sums;
            worst = worst.max(relative);
            let rounding = (-8.0_f64).exp2();
            let (mut weighted, mut largest, mut sizes) =
                (vec![0.0; rank], vec![0.0_f64; rank], vec![0.0; rank]);
            for (row, score) in selected.iter().zip(&scores) {
                let weight = (score.0 - most).exp() / total;
                for column in 0..rank {
                    let value = row[column].abs();
                    weighted[column] += weight * value;
                    largest[column] = largest[column].max(value);
                    sizes[column] += value;
                }
            }
            for column in 0..rank {
                let out = expected[i * rank + column].abs();
                let error = (weighted[column] + out) * (rounding + relative);
                // However wrong the weights are, the output lies among the values.
                let error = error.min(2.02 * largest[column]) + sizes[column] * (-118.0_f64).exp2();
                bounds.push(error + parity::half_ulp_bf16(out + error));
            }
        }
        (bounds, worst)
    }
}

fn run_with(device: &TestDevice, case: &Case, tiles: &SparseMlaTiles) {
    let (tokens, rank) = (case.batch.batch.num_tokens(), case.variant.dims.kv_lora_rank);
    let (host_batch, batch) = parity::batch(device, &case.batch.batch);
    let q_shape = [tokens, case.heads, case.width()];
    let q_values = case.values.0.take(case.seed, q_shape.iter().product());
    let q = Pair::new(device, "q", DType::Act, &q_shape, &q_values);
    let (rows, cache) = case.cache(device);
    let places = case.places();
    let topk_indices = Pair::index(device, "topk_indices", &[tokens, case.k], &places);
    let oracle = parity::oracle();
    let out_shape = [tokens, case.heads, rank];
    let mut out = oracle.alloc(DType::Act, &out_shape).unwrap();
    oracle.sparse_mla(&host_batch, &q.host, &cache.host, &topk_indices.host, case.scale, &mut out).unwrap();
    let expected = oracle.read(&out).unwrap();

    let found = parity::twice(device, || {
        let workspace =
            SparseMlaWorkspace::alloc(device, tiles, case.variant.dims, tokens, case.heads, case.k).unwrap();
        let (q, cache, topk_indices) = (&q.device, &cache.device, &topk_indices.device);
        let mut out = parity::poisoned(device, "out", DType::Act, &out_shape);
        // Twice with the same workspace: it is left as it was found.
        for _ in 0..2 {
            sparse_mla(device, tiles, &workspace, &batch, q, cache, topk_indices, case.scale, &mut out)
                .unwrap();
        }
        parity::read_bytes(device, &out)
    });
    let found = parity::numbers(DType::Act, &found);
    let (bounds, relative) = case.bounds(&q_values, &rows, &places, &expected);
    // Where scores themselves are uncertain, only the elements' bounds say something. An 8-bit row's scale is rounded with its weight:
    // with few rows that is not averaged out.
    let relative_l2 = match (relative < 1e-4, case.variant.fp8) {
        (true, false) => 2.5e-3,
        (true, true) => 5e-3,
        (false, _) => f64::INFINITY,
    };
    parity::assert_close("out", rank, &found, &expected, relative_l2, |i| bounds[i]);
}

/// Groups of 8 heads, however many there are.
fn narrow(Variant { tile, dims, .. }: Variant) -> SparseMlaTiles {
    SparseMlaTiles {
        decode: tile,
        prefill: tile,
        wide_heads: usize::MAX,
        union_tokens: 0,
        ..SparseMlaTiles::safe(dims)
    }
}

fn run(device: &TestDevice, case: Case) {
    run_with(device, &case, &narrow(case.variant));
}

/// Rows of a head of `kv_b` that the output does not take.
const NOPE: usize = 3;

/// Which latent column is a feature of a head, by weights that hand columns on as they are; but for two of them.
fn column(head: usize, feature: usize, rank: usize) -> usize {
    (feature + 5 * head + 1) % rank
}

/// The output of heads, whose weights choose columns: so they have the bits, and the bounds, of the latent one.
fn run_output_with(device: &TestDevice, case: &Case, tiles: &SparseMlaTiles, weight: DType) {
    let (tokens, rank, heads) = (case.batch.batch.num_tokens(), case.variant.dims.kv_lora_rank, case.heads);
    let (host_batch, batch) = parity::batch(device, &case.batch.batch);
    let q_shape = [tokens, heads, case.width()];
    let q_values = case.values.0.take(case.seed, q_shape.iter().product());
    let q = Pair::new(device, "q", DType::Act, &q_shape, &q_values);
    let (rows, cache) = case.cache(device);
    let places = case.places();
    let topk_indices = Pair::index(device, "topk_indices", &[tokens, case.k], &places);
    let v = rank - 2;
    let mut chosen = vec![7.0; heads * (NOPE + v) * rank];
    for head in 0..heads {
        for feature in 0..v {
            let row = &mut chosen[(head * (NOPE + v) + NOPE + feature) * rank..][..rank];
            row.fill(0.0);
            row[column(head, feature, rank)] = 1.0;
        }
    }
    let kv_b = Pair::weight(device, "kv_b", weight, &[heads, NOPE + v, rank], &chosen);
    let oracle = parity::oracle();
    let mut o_latent = oracle.alloc(DType::Act, &[tokens, heads, rank]).unwrap();
    let mut out = oracle.alloc(DType::Act, &[tokens, heads, v]).unwrap();
    let (cached, topk) = (&cache.host, &topk_indices.host);
    oracle
        .sparse_mla_output(
            &host_batch,
            &q.host,
            cached,
            topk,
            case.scale,
            &kv_b.host,
            &mut o_latent,
            &mut out,
        )
        .unwrap();
    let (latent, expected) = (oracle.read(&o_latent).unwrap(), oracle.read(&out).unwrap());

    let found = parity::twice(device, || {
        let workspace =
            SparseMlaWorkspace::alloc(device, tiles, case.variant.dims, tokens, heads, case.k).unwrap();
        let mut o_latent = parity::poisoned(device, "o_latent", DType::Act, &[tokens, heads, rank]);
        let mut out = parity::poisoned(device, "out", DType::Act, &[tokens, heads, v]);
        sparse_mla_output(
            device,
            tiles,
            &AbsorbTile::safe(AbsorbTokens::Few),
            &workspace,
            &batch,
            &q.device,
            &cache.device,
            &topk_indices.device,
            case.scale,
            &kv_b.device,
            &mut o_latent,
            &mut out,
        )
        .unwrap();
        parity::read_bytes(device, &out)
    });
    let found = parity::numbers(DType::Act, &found);
    let (bounds, _) = case.bounds(&q_values, &rows, &places, &latent);
    parity::assert_close("out", v, &found, &expected, f64::INFINITY, |i| {
        let (head, feature) = (i / v % heads, i % v);
        bounds[i / v * rank + column(head, feature, rank)]
    });
}

fn run_output(device: &TestDevice, case: Case) {
    run_output_with(device, &case, &narrow(case.variant), DType::Bf16);
}

/// Decode steps of a few tokens, whose splits are merged by what multiplies.
fn decode_cases(variants: impl Strategy<Value = Variant>) -> impl Strategy<Value = Case> {
    let whole =
        |variant: Variant| Variant { tile: SparseMlaTile { split_blocks: 16, ..variant.tile }, ..variant };
    (cases(variants.prop_map(whole), 60, 100), 1..=9_usize).prop_map(|(mut case, sequences)| {
        let sequences: Vec<(usize, usize)> = (0..sequences).map(|i| (90 + 7 * i, 1)).collect();
        case.batch = BatchCase::of(16, &sequences);
        case.k = 64 + case.k / 4;
        case
    })
}

#[test]
fn its_heads_output_agrees_with_the_oracle() {
    parity::check("sparse_mla_output", decode_cases(select(VARIANTS)), run_output);
    parity::small_cases(|device| {
        // One split; more than a block merges; weights of another type; nothing selected; nothing at all.
        let one = by_hand(VARIANTS[0], &[(5, 1)], 8, 0);
        let many = many_splits();
        let ten: Vec<(usize, usize)> = (0..10).map(|i| (150 + i, 1)).collect();
        let ten = by_hand(VARIANTS[1], &ten, 130, 1);
        for case in
            [&one, &many, &ten, &by_hand(VARIANTS[0], &[(70, 2)], 60, 8), &by_hand(VARIANTS[0], &[], 7, 0)]
        {
            run_output_with(device, case, &narrow(case.variant), DType::Bf16);
            run_output_with(device, case, &narrow(case.variant), DType::F32);
        }
    });
}

/// GLM-5.2's dims, where a device is fast enough.
#[test]
fn its_heads_output_agrees_with_the_oracle_at_size() {
    let dims = SparseMlaDims { kv_lora_rank: 512, rope: 64 };
    let tile = SparseMlaTile::safe(dims);
    let sequences = [1, 2, 4, 8, 9, 32];
    let cases = (cases(Just(Variant { dims, fp8: false, tile }), 60, 100), select(sequences.to_vec()))
        .prop_map(|(mut case, sequences)| {
            let sequences: Vec<(usize, usize)> = (0..sequences).map(|i| (2100 + 7 * i, 1)).collect();
            (case.batch, case.k, case.heads) = (BatchCase::of(64, &sequences), 2048, 8);
            case
        });
    parity::check_on_gpu("sparse_mla_output_at_size", cases, run_output);
}

#[test]
fn faults_planted_in_its_heads_output_are_seen() {
    let file = "absorb_merged.cu";
    for (find, replace) in [
        // Sums are read before warps have written them: of the splits, of the merged rows and the weights, of the product.
        ("    if (shares > 1) {\n        __syncthreads();", "    if (shares > 1) {"),
        ("    cp_async_wait<0>();\n    __syncthreads();", "    cp_async_wait<0>();"),
        ("    cp_async_wait<0>();", ""),
        ("= c[i];\n    __syncthreads();", "= c[i];"),
        // Another head's weights, and the query's rows of them.
        (
            "(static_cast<int64_t>(head) * rows + rows",
            "(static_cast<int64_t>(max(head - 1, 0)) * rows + rows",
        ),
        ("* rows + rows - features + first_feature", "* rows + first_feature"),
        // Features that are not there are written; splits count alike, or those from the 33rd on not at all.
        ("if (first_feature + feature >= features) continue;", ""),
        ("low *= inverse;", "low = inverse;"),
        ("split < 32 ? low : high", "split < 32 ? low : 0.0f"),
        // The last split of each share, and what one share adds.
        ("if (first + j < end) parts", "if (first + j < end - 1) parts"),
        ("share < shares; ++share", "share < shares - 1; ++share"),
    ] {
        let cases = prop_oneof![decode_cases(select(VARIANTS)), Just(more_splits_than_lanes())];
        parity::catches(Fault { file, find, replace }, cases, run_output);
    }
}

/// More splits than a warp has lanes.
fn more_splits_than_lanes() -> Case {
    by_hand(VARIANTS[1], &[(4300, 1)], 4200, 1)
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("sparse_mla", cases(select(VARIANTS), 60, 100), run);
}

/// The tiles that serve, in GLM-5.2's dims.
#[test]
fn agrees_with_the_oracle_at_size() {
    let glm = SparseMlaDims { kv_lora_rank: 512, rope: 64 };
    let tiles =
        [SparseMlaTile::safe(glm), SparseMlaTile { warps: 4, stages: 2, split_blocks: 1, through_l1: false }];
    let variants =
        (select(tiles.to_vec()), any::<bool>()).prop_map(move |(tile, fp8)| Variant { dims: glm, fp8, tile });
    parity::check_on_gpu("sparse_mla_at_size", cases(variants, 5000, 2048), run);
}

/// What is promised at most: 256 sequences with up to 6 rows each, 8192 rows of a prefill; 64 heads, too.
#[test]
fn the_widest_batch_and_the_most_rows() {
    let glm = SparseMlaDims { kv_lora_rank: 512, rope: 64 };
    let tile = SparseMlaTile::safe(glm);
    let decode: Vec<(usize, usize)> = (0..256).map(|i| (300 + i * 37 % 401, 1 + i % 6)).collect();
    let prefill = [(128, 128); 64];
    parity::large_cases(|device| {
        for (sequences, heads, k, fp8) in [
            (&decode[..], 8, 256, false),
            (&decode, 8, 256, true),
            (&decode[..64], 64, 128, false),
            (&prefill, 8, 64, false),
            (&prefill, 8, 64, true),
        ] {
            let case = Case { heads, ..by_hand(Variant { dims: glm, fp8, tile }, sequences, k, 1) };
            run_with(device, &case, &SparseMlaTiles::safe(glm));
        }
    });
}

/// A written-out case: three sequences, eight heads.
fn by_hand(variant: Variant, sequences: &[(usize, usize)], k: usize, holes: usize) -> Case {
    let values = (Values::Normal, Values::Normal);
    Case { batch: BatchCase::of(4, sequences), variant, heads: 8, k, holes, values, scale: 0.3, seed: 3 }
}

#[test]
fn nothing_selected_gives_zeros() {
    parity::small_cases(|device| {
        for &variant in &[VARIANTS[0], VARIANTS[3]] {
            run(device, by_hand(variant, &[(70, 2)], 60, 8));
            run(device, by_hand(variant, &[(70, 2)], 0, 0));
            run(device, by_hand(variant, &[], 7, 0));
        }
    });
}

/// One warp's every step is a split of its own: more of them than one warp merges.
fn many_splits() -> Case {
    by_hand(VARIANTS[1], &[(350, 1)], 300, 1)
}

#[test]
fn several_warps_merge_many_splits() {
    parity::small_cases(|device| run(device, many_splits()));
    let fault = Fault {
        file: "sparse_mla_merge.cu",
        find: "    __syncthreads();\n    if (warp != 0",
        replace: "    if (warp != 0",
    };
    parity::catches(fault, Just(many_splits()), run);
}

/// The launcher of the contract: many heads, and tokens that share rows, beside what the narrow kernel does.
#[test]
fn every_way_agrees_with_the_oracle() {
    parity::small_cases(|device| {
        // With half of a union's rows allowed, some groups go one way and some the other.
        for (heads, sequences, k, wide_queries, union_tokens, union_quarters) in [
            (32, &[(50, 1), (20, 2)][..], 40, 0, 0, 0),
            (32, &[(300, 1)][..], 200, 0, 0, 0),
            (32, &[(300, 1)][..], 200, 33, 0, 0),
            (32, &[][..], 200, 0, 0, 0),
            (8, &[(5, 3), (40, 20)][..], 40, 0, 8, 5),
            (8, &[(40, 24)][..], 40, 0, 8, 4000),
        ] {
            let mut case = by_hand(VARIANTS[0], sequences, k, 1);
            case.heads = heads;
            let ways = SparseMlaTiles {
                wide_heads: 24,
                wide_queries,
                union_tokens,
                union_quarters,
                ..narrow(case.variant)
            };
            run_with(device, &case, &ways);
        }
    });
}

#[test]
fn planted_faults_are_seen() {
    for (file, find, replace) in [
        // A stage is refilled while lanes still read it.
        ("sparse_mla.cu", "lane);\n        __syncwarp();\n#pragma unroll", "lane);\n#pragma unroll"),
        // Warps add up what others have not yet written.
        ("sparse_mla.cu", "factor, tile, lane);\n    __syncthreads();", "factor, tile, lane);"),
        // Keys that do not fill a block are dropped.
        (
            "sparse_mla.cu",
            "const int all_blocks = (k + KEYS - 1) / KEYS;",
            "const int all_blocks = k / KEYS;",
        ),
        // The row before the page's, and the page before.
        ("sparse_mla.cuh", "position - block * page_size};", "max(position - block * page_size - 1, 0)};"),
        ("sparse_mla.cuh", "{__ldg(pages + block),", "{__ldg(pages + max(block - 1, 0)),"),
        // Holes weigh as much as a row of zeros.
        (
            "sparse_mla.cu",
            "s[0] = low ? s[0] * scale_log2 : negative_infinity();",
            "s[0] = s[0] * scale_log2;",
        ),
        // Splits are added up as if they were relative to the same maximum.
        (
            "sparse_mla_merge.cu",
            "const float factor = exp2_approx(maximum - finite_base(most));",
            "const float factor = 1.0f;",
        ),
        // A row ends in half a step of whatever the memory held; heads that are not there are written.
        (
            "sparse_mla.cu",
            "chunk * 16) = make_uint4(0, 0, 0, 0);",
            "chunk * 16) = make_uint4(~0u, ~0u, ~0u, ~0u);",
        ),
        ("sparse_mla.cu", "min(HEADS, heads - static_cast<int>(blockIdx.y) * HEADS)", "HEADS"),
        // A group of an 8-bit row gets its neighbour's scale.
        ("sparse_mla.cu", "(row + KV_LORA_RANK)[group];", "(row + KV_LORA_RANK)[0];"),
    ] {
        parity::catches(Fault { file, find, replace }, cases(select(VARIANTS), 60, 100), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let (_, batch) = parity::batch(device, &BatchCase::of(3, &[(0, 2)]).batch);
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let dims = VARIANTS[0].dims;
        let tiles = narrow(VARIANTS[0]);
        let workspace = SparseMlaWorkspace::alloc(device, &tiles, dims, 2, 8, 5).unwrap();
        let run = |q: &_, cache: &_, topk: &_, mut out, words: &[&str]| {
            let error = sparse_mla(device, &tiles, &workspace, &batch, q, cache, topk, 1.0, &mut out);
            let error = error.unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        let (q, cache) = (tensor(DType::Act, &[2, 8, 80]), tensor(DType::Act, &[4, 3, 80]));
        let topk = tensor(DType::Index, &[2, 5]);
        let out = || tensor(DType::Act, &[2, 8, 64]);
        run(&tensor(DType::Act, &[3, 8, 80]), &cache, &topk, out(), &["`q`"]);
        run(&q, &tensor(DType::Act, &[4, 3, 72]), &topk, out(), &["`cache`", "[pages, 3, 80]"]);
        run(&q, &tensor(DType::Fp8, &[4, 3, 80]), &topk, out(), &["`cache`", "[pages, 3, 112]"]);
        run(&q, &cache, &tensor(DType::Index, &[1, 5]), out(), &["`topk_indices`", "[2, k]"]);
        run(&q, &cache, &tensor(DType::Act, &[2, 5]), out(), &["`topk_indices` holds activations"]);
        run(&q, &cache, &topk, tensor(DType::Act, &[2, 8, 70]), &["70 columns", "multiple of 16"]);
        run(&q, &cache, &topk, tensor(DType::Act, &[2, 8, 96]), &["`out`", "at most 80"]);
    });
}
