//! `sparse_mla_wide` against the oracle: one token's rows, and the union of neighbours'.

use dsa80_cuda::sparse_mla::SparseMlaDims;
use dsa80_cuda::sparse_mla_merge::Partials;
use dsa80_cuda::sparse_mla_union::{SparseMlaUnionTile, SparseMlaUnionWorkspace, sparse_mla_union};
use dsa80_cuda::sparse_mla_wide::{QUERIES, Selection, SparseMlaWideTile, sparse_mla_wide};
use dsa80_cuda::{CudaTensor, Limits, Tile};
use dsa80_reference::sampling::uniform;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Batches, F32_UNIT, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

pub(crate) const UNION_TILE: SparseMlaUnionTile = SparseMlaUnionTile { threads: 64, blocks: 1, window: 512 };

/// Head dims with an even and an odd number of steps, full and short shares of the columns.
const SMALL: &[SparseMlaDims] =
    &[SparseMlaDims { kv_lora_rank: 32, rope: 16 }, SparseMlaDims { kv_lora_rank: 144, rope: 32 }];

const TILES: &[SparseMlaWideTile] = &[
    SparseMlaWideTile { keys: 64, stages: 2, l1: false },
    SparseMlaWideTile { keys: 32, stages: 4, l1: true },
];

const GLM: SparseMlaDims = SparseMlaDims { kv_lora_rank: 512, rope: 64 };

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    dims: SparseMlaDims,
    tile: SparseMlaWideTile,
    heads: usize,
    /// Tokens that share a block.
    group: usize,
    k: usize,
    /// Blocks that share the keys, with partial results.
    splits: Option<usize>,
    /// Unions that are left alone are longer.
    most: usize,
    values: Values,
    seed: u64,
}

fn cases(
    dims: &'static [SparseMlaDims],
    tiles: &'static [SparseMlaWideTile],
    size: usize,
) -> impl Strategy<Value = Case> {
    let batches = Batches { page_sizes: &[1, 3, 16], max_seqs: 3, max_computed: size, max_chunk: 20 }.any();
    let groups = select(vec![(1, 64), (1, 5), (1, 72), (2, 32), (4, 16), (8, 8), (8, 11)]);
    let tiles = (select(dims), select(tiles));
    let k = prop_oneof![1..=size, Just(32), Just(0)];
    let splits = prop_oneof![Just(None), Just(None), (1..=5_usize).prop_map(Some)];
    let most = prop_oneof![Just(usize::MAX), 0..=size];
    (batches, tiles, groups, k, splits, most, Values::any_of(&Values::ORDINARY), any::<u64>()).prop_map(
        |(batch, (dims, tile), (group, heads), k, splits, most, values, seed)| Case {
            batch,
            dims,
            tile,
            heads,
            group,
            k,
            splits,
            most,
            values,
            seed,
        },
    )
}

/// `[T, k]` selections: any number of visible positions, in any order or ascending, holes at the end or anywhere.
pub(crate) fn selections(batch: &BatchCase, k: usize, seed: u64) -> Vec<i32> {
    let batch = &batch.batch;
    let mut out = vec![-1; batch.num_tokens() * k];
    for t in 0..if k == 0 { 0 } else { batch.num_tokens() } {
        let draw = |i: usize| f64::from(uniform(seed, t as u32, i as u32));
        let visible = batch.visible(t);
        let mut positions: Vec<i32> = (0..visible as i32).collect();
        positions.sort_by(|&a, &b| draw(a as usize).total_cmp(&draw(b as usize)));
        let most = k.min(visible);
        positions.truncate(if draw(visible) < 0.5 {
            most
        } else {
            (draw(visible + 1) * (most + 1) as f64) as usize
        });
        if draw(visible + 2) < 0.5 {
            positions.sort_unstable();
        }
        let anywhere = draw(visible + 3) < 0.3;
        let mut places: Vec<usize> = (0..k).collect();
        if anywhere {
            places.sort_by(|&a, &b| draw(visible + 4 + a).total_cmp(&draw(visible + 4 + b)));
        }
        for (place, position) in places.into_iter().zip(positions) {
            out[t * k + place] = position;
        }
    }
    out
}

/// Entries that each group's union has.
pub(crate) fn union_entries(batch: &BatchCase, selections: &[i32], group: usize, k: usize) -> Vec<Vec<i32>> {
    let host = &batch.batch;
    (0..host.num_tokens().div_ceil(group))
        .map(|g| {
            let mut members = std::collections::BTreeMap::new();
            for t in g * group..((g + 1) * group).min(host.num_tokens()) {
                for &position in selections[t * k..][..k].iter().filter(|&&position| position >= 0) {
                    *members
                        .entry((host.seq_ids[t], position, host.slot(t, position as usize)))
                        .or_insert(0) |= 1 << (t % group);
                }
            }
            members.into_iter().map(|((_, _, slot), members)| (slot as i32) << 8 | members).collect()
        })
        .collect()
}

struct Inputs {
    q: Pair,
    cache: Pair,
    topk_indices: Pair,
    selections: Vec<i32>,
    scale: f64,
}

impl Inputs {
    fn new(device: &TestDevice, case: &Case) -> Self {
        let Case { batch, dims, heads, k, values, seed, .. } = case;
        let (tokens, width) = (batch.batch.num_tokens(), dims.kv_lora_rank + dims.rope);
        let page = batch.batch.page_size * width;
        // Rows that no sequence has must not reach the result.
        let mut rows = values.take(seed ^ 1, batch.pages * page);
        for (rows, _) in rows.chunks_mut(page).zip(&batch.used).filter(|(_, used)| !**used) {
            rows.fill(f64::NAN);
        }
        let selections = selections(batch, *k, *seed);
        Self {
            q: Pair::new(
                device,
                "q",
                DType::Act,
                &[tokens, *heads, width],
                &values.take(*seed, tokens * heads * width),
            ),
            cache: Pair::new(
                device,
                "cache",
                DType::Act,
                &[batch.pages, batch.batch.page_size, width],
                &rows,
            ),
            topk_indices: Pair::index(device, "topk_indices", &[tokens, *k], &selections),
            selections,
            scale: 1.0 / (width as f64).sqrt(),
        }
    }

    fn launch(&self, device: &TestDevice, case: &Case) -> Vec<u8> {
        let Case { dims, tile, heads, group, k, most, .. } = *case;
        let (_, batch) = parity::batch(device, &case.batch.batch);
        let tokens = case.batch.batch.num_tokens();
        let workspace = SparseMlaUnionWorkspace::alloc(device, tokens, k).unwrap();
        let selection = if group == 1 {
            Selection::Token(&self.topk_indices.device)
        } else {
            sparse_mla_union(device, &UNION_TILE, &workspace, &batch, &self.topk_indices.device, group)
                .unwrap();
            Selection::Group { union: &workspace, group, k, most }
        };
        let mut out = parity::poisoned(device, "out", DType::Act, &[tokens, heads, dims.kv_lora_rank]);
        let splits = case.splits.unwrap_or(0);
        let partial =
            |name, width| parity::poisoned(device, name, DType::Float, &[tokens, heads, splits, width]);
        let [values, maxima, sums] =
            [("out", dims.kv_lora_rank), ("max", 1), ("sum", 1)].map(|(name, width)| partial(name, width));
        let partials = case.splits.map(|splits| Partials {
            splits,
            out: values.buffer(),
            max: maxima.buffer(),
            sum: sums.buffer(),
        });
        let (q, cache) = (&self.q.device, &self.cache.device);
        sparse_mla_wide(device, &tile, &batch, q, cache, selection, self.scale, partials.as_ref(), &mut out)
            .unwrap();
        let read = |tensor: &CudaTensor<TestDevice>| parity::read_bytes(device, tensor);
        if case.splits.is_none() { read(&out) } else { [read(&values), read(&maxima), read(&sums)].concat() }
    }
}

/// The output that the bytes of a launch stand for.
fn output(case: &Case, bytes: &[u8]) -> Vec<f64> {
    let Some(splits) = case.splits else { return parity::numbers(DType::Act, bytes) };
    let rank = case.dims.kv_lora_rank;
    let rows = case.batch.batch.num_tokens() * case.heads;
    let numbers = parity::numbers(DType::Float, bytes);
    let (values, rest) = numbers.split_at(rows * splits * rank);
    let (maxima, sums) = rest.split_at(rows * splits);
    (0..rows * rank)
        .map(|i| {
            let (row, column) = (i / rank, i % rank);
            let splits = row * splits..(row + 1) * splits;
            let most = maxima[splits.clone()].iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let merged = |part: &dyn Fn(usize) -> f64| -> f64 {
                splits
                    .clone()
                    .map(|s| {
                        part(s) * if maxima[s] == f64::NEG_INFINITY { 0.0 } else { (maxima[s] - most).exp2() }
                    })
                    .sum()
            };
            let total = merged(&|s| sums[s]);
            // What was left alone stays NaN.
            if sums[splits.start].is_nan() {
                return f64::NAN;
            }
            if total == 0.0 { 0.0 } else { merged(&|s| values[s * rank + column]) / total }
        })
        .collect()
}

/// Element-wise bounds. A weight is off by what its score is (one f32 rounding of the sum of magnitudes for each product and addition),
/// by the exponential and by its rounding to bf16; their sum by the first two. The result and the oracle's round once. Whatever the weights, the
/// result is a mean of the values.
fn bounds(case: &Case, inputs: &Inputs, expected: &[f64]) -> Vec<f64> {
    let read = |pair: &Pair| parity::oracle().read(&pair.host).unwrap();
    let (q, cache) = (read(&inputs.q), read(&inputs.cache));
    let (rank, k) = (case.dims.kv_lora_rank, case.k);
    let width = rank + case.dims.rope;
    let host = &case.batch.batch;
    let mut out = Vec::with_capacity(expected.len());
    for (row, q) in q.chunks(width).enumerate() {
        let t = row / case.heads;
        let rows: Vec<&[f64]> = inputs.selections[t * k..][..k]
            .iter()
            .filter_map(|&position| {
                Some(&cache[host.slot(t, usize::try_from(position).ok()?) * width..][..width])
            })
            .collect();
        let dot =
            |row: &&[f64], f: fn(f64) -> f64| -> f64 { q.iter().zip(*row).map(|(q, c)| f(q * c)).sum() };
        let scores: Vec<f64> = rows.iter().map(|row| inputs.scale * dot(row, |x| x)).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let total: f64 = weights.iter().sum();
        let error_of_scores = rows
            .iter()
            .map(|row| inputs.scale * dot(row, f64::abs) * (width + 4) as f64 * 2.0 * F32_UNIT)
            .fold(0.0, f64::max);
        // Far below the maximum, weights are flushed to zero.
        let of_sum = (2.0 * error_of_scores).exp_m1() + (rows.len() + 200) as f64 * 2.0 * F32_UNIT;
        let of_weights = of_sum + 2.0_f64.powi(-8);
        for column in 0..rank {
            let i = row * rank + column;
            let sum: f64 = rows.iter().zip(&weights).map(|(row, weight)| weight * row[column].abs()).sum();
            let largest = rows.iter().map(|row| row[column].abs()).fold(0.0, f64::max);
            let error = if total > 0.0 { sum / total * (of_weights + of_sum) } else { 0.0 };
            let anything = 2.0 * largest * (1.0 + 2.0_f64.powi(-8));
            let error = (1.01 * error).min(anything);
            out.push(error + 2.0 * parity::half_ulp_bf16(expected[i].abs() + error));
        }
    }
    out
}

fn run(device: &TestDevice, case: Case) {
    let inputs = Inputs::new(device, &case);
    let found = output(&case, &parity::twice(device, || inputs.launch(device, &case)));
    let oracle = parity::oracle();
    let (batch, _) = parity::batch(device, &case.batch.batch);
    let rank = case.dims.kv_lora_rank;
    let (q, cache, indices) = (&inputs.q.host, &inputs.cache.host, &inputs.topk_indices.host);
    let mut out = oracle.alloc(DType::Act, &[case.batch.batch.num_tokens(), case.heads, rank]).unwrap();
    oracle.sparse_mla(&batch, q, cache, indices, inputs.scale, &mut out).unwrap();
    let mut expected = oracle.read(&out).unwrap();
    let bounds = bounds(&case, &inputs, &expected);
    if case.group > 1 {
        let unions = union_entries(&case.batch, &inputs.selections, case.group, case.k);
        let group_size = case.group * case.heads * rank;
        for (_, expected) in
            unions.iter().zip(expected.chunks_mut(group_size)).filter(|(union, _)| union.len() > case.most)
        {
            expected.fill(f64::NAN);
        }
    }
    // Rounding the weights costs up to 1.6e-3 in the mean; two numbers that far apart, both rounded to bf16 (the oracle's output is, too), are
    // up to 2.7e-3 apart in the mean.
    let relative_l2 = if case.values == Values::Normal { 3e-3 } else { f64::INFINITY };
    parity::assert_close("out", rank, &found, &expected, relative_l2, |i| bounds[i]);
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("sparse_mla_wide", cases(SMALL, TILES, 150), run);
}

#[test]
fn agrees_with_the_oracle_in_glm_dims() {
    let case = |group, heads, splits| Case {
        batch: BatchCase::of(16, &[(130, 3), (0, 2)]),
        dims: GLM,
        tile: SparseMlaWideTile { keys: 64, stages: 2, l1: false },
        heads,
        group,
        k: 100,
        splits,
        most: usize::MAX,
        values: Values::Normal,
        seed: 7,
    };
    parity::small_cases(|device| {
        run(device, case(1, QUERIES, None));
        run(device, case(8, 8, Some(2)));
    });
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let tiles = SparseMlaWideTile::candidates(GLM, &Limits::a100()).leak();
    parity::check_on_gpu("sparse_mla_wide_at_size", cases(&[GLM], tiles, 3000), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The halves of a block do not wait for each other's maxima.
        ("        named_barrier(1 + block, 64);\n        bool rescaled", "        bool rescaled"),
        // A tile is read before it has arrived.
        ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
        // The last entries are left out.
        ("(count + KEYS - 1) / KEYS", "count / KEYS"),
        // A neighbour's rows.
        (
            "high_bit = 1u << (block * 2 + 1) * TILE_TOKENS / 8",
            "high_bit = 1u << block * 2 * TILE_TOKENS / 8",
        ),
        // What was accumulated is not rescaled.
        ("if (__syncthreads_or(rescaled))", "if (__syncthreads_or(rescaled) && tile == first_tile)"),
    ] {
        let fault = Fault { file: "sparse_mla_wide.cu", find, replace };
        parity::catches(fault, cases(SMALL, &TILES[..1], 150), run);
    }
}
