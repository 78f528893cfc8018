//! `indexer_logits` against the oracle.

use std::collections::BTreeSet;
use std::ops::Range;

use dsa80_cuda::indexer_logits::{
    DecodeTile, GeneralTile, IndexerLogitsDims, IndexerLogitsTile, indexer_logits,
};
use dsa80_cuda::{CudaTensor, Limits, Tile};
use dsa80_reference::fp8::IndexerPage;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Batches, F32_UNIT, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone, Copy)]
struct Variant {
    dims: IndexerLogitsDims,
    tile: IndexerLogitsTile,
}

const fn variant((heads, dims): (usize, usize), general: [usize; 7], decode: [usize; 6]) -> Variant {
    let [warps, groups, queries, stages, query_block, heads_at_once, blocks] = general;
    let general = GeneralTile { warps, groups, queries, stages, query_block, heads_at_once, blocks };
    let [warps, stages, queries, rows, heads_at_once, blocks] = decode;
    let decode = DecodeTile { warps, stages, queries, rows, heads_at_once, blocks };
    Variant { dims: IndexerLogitsDims { heads, dims }, tile: IndexerLogitsTile { general, decode } }
}

/// Padded heads and columns and none, one and two groups of keys, stages that are reused, query blocks with a rest. The last takes the kernel
/// for few rows whatever the batch.
const VARIANTS: &[Variant] = &[
    variant((4, 16), [1, 1, 2, 2, 5, 1, 1], [2, 2, 2, 2, 1, 1]),
    variant((32, 128), [2, 2, 1, 3, 8, 1, 1], [1, 3, 4, 6, 2, 1]),
    variant((13, 48), [2, 1, 3, 2, 4, 2, 1], [2, 2, 3, 1000, 1, 1]),
];

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    rows: Range<usize>,
    /// Columns beyond the longest context.
    spare: usize,
    variant: Variant,
    fp8: bool,
    q: Values,
    weights: Values,
    keys: Values,
    seed: u64,
}

const KEYS: [Values; 4] = [Values::Normal, Values::Ties, Values::Negative, Values::Outliers];
const WEIGHTS: [Values; 4] = [Values::Normal, Values::Ties, Values::Negative, Values::Zeros];

fn cases(variants: impl Strategy<Value = Variant>, size: usize) -> impl Strategy<Value = Case> {
    let batches =
        move |page_sizes| Batches { page_sizes, max_seqs: 4, max_computed: size, max_chunk: size / 8 }.any();
    let caches = prop_oneof![
        batches(&[1, 3, 16]).prop_map(|batch| (batch, false)),
        batches(&[4, 64]).prop_map(|batch| (batch, true)),
    ];
    let values = (Values::any_of(&Values::ORDINARY), Values::any_of(&WEIGHTS), Values::any_of(&KEYS));
    let rows = (any::<bool>(), 0.0..1.0_f64, 0.0..1.0_f64);
    (caches, rows, 0..5_usize, variants, values, any::<u64>()).prop_map(
        |((batch, fp8), (all, a, b), spare, variant, (q, weights, keys), seed)| {
            let tokens = batch.batch.num_tokens();
            let place = |share: f64| (share * (tokens + 1) as f64) as usize;
            let rows = if all { 0..tokens } else { place(a.min(b))..place(a.max(b)) };
            Case { batch, rows, spare, variant, fp8, q, weights, keys, seed }
        },
    )
}

/// The tensors of a case.
struct Inputs {
    q: Pair,
    weights: Pair,
    cache: Pair,
}

impl Inputs {
    /// With `change` applied to every number.
    fn new(device: &TestDevice, case: &Case, change: fn(f64) -> f64) -> Self {
        let IndexerLogitsDims { heads, dims } = case.variant.dims;
        let tokens = case.batch.batch.num_tokens();
        let take = |values: Values, seed, n| -> Vec<f64> {
            values.take(case.seed ^ seed, n).into_iter().map(change).collect()
        };
        let q = take(case.q, 1, tokens * heads * dims);
        // Not bf16 numbers: the weights are floats.
        let weights: Vec<f64> = take(case.weights, 2, tokens * heads).iter().map(|w| w / 3.0).collect();
        Self {
            q: Pair::new(device, "q", DType::Act, &[tokens, heads, dims], &q),
            weights: Pair::new(device, "weights", DType::Float, &[tokens, heads], &weights),
            cache: if case.fp8 { fp8_cache(device, case, change) } else { act_cache(device, case, change) },
        }
    }
}

/// The slots that hold a key of some sequence.
fn slots(case: &Case) -> BTreeSet<usize> {
    let batch = &case.batch.batch;
    let slots = batch.context_lens.iter().enumerate().flat_map(|(seq, &context_len)| {
        (0..context_len as usize).map(move |position| {
            let page = batch.block_table[seq * batch.max_blocks + position / batch.page_size] as usize;
            page * batch.page_size + position % batch.page_size
        })
    });
    slots.collect()
}

fn act_cache(device: &TestDevice, case: &Case, change: fn(f64) -> f64) -> Pair {
    let (dims, page_size) = (case.variant.dims.dims, case.batch.batch.page_size);
    let mut values = vec![f64::NAN; case.batch.slots() * dims];
    for slot in slots(case) {
        for (i, value) in values[slot * dims..][..dims].iter_mut().enumerate() {
            *value = change(case.keys.at(case.seed ^ 3, slot * dims + i));
        }
    }
    Pair::new(device, "cache", DType::Act, &[case.batch.pages, page_size, dims], &values)
}

fn fp8_cache(device: &TestDevice, case: &Case, change: fn(f64) -> f64) -> Pair {
    let page = IndexerPage { page_size: case.batch.batch.page_size, width: case.variant.dims.dims };
    let mut bytes = vec![0xff; case.batch.slots() * page.row_bytes()];
    for slot in slots(case) {
        let values: Vec<f32> = (0..page.width)
            .map(|i| change(case.keys.at(case.seed ^ 3, slot * page.width + i)) as f32)
            .collect();
        let scale = dsa80_reference::fp8::quantise(&values, &mut bytes[page.codes(slot)]);
        bytes[page.scale(slot)].copy_from_slice(&scale.to_le_bytes());
    }
    let shape = [case.batch.pages, page.page_size, page.row_bytes()];
    Pair::bytes(device, "cache", &shape, &bytes)
}

fn run(device: &TestDevice, case: Case) {
    let oracle = parity::oracle();
    let IndexerLogitsDims { heads, dims } = case.variant.dims;
    let scale = ((heads * dims) as f64).powf(-0.5);
    let (host_batch, batch) = parity::batch(device, &case.batch.batch);
    let visible: Vec<usize> = case.rows.clone().map(|t| case.batch.batch.visible(t)).collect();
    let columns = visible.iter().max().unwrap_or(&0) + case.spare;
    let shape = [case.rows.len(), columns];
    let seen = |logits: &[f64]| -> Vec<f64> {
        visible.iter().enumerate().flat_map(|(row, &n)| logits[row * columns..][..n].to_vec()).collect()
    };
    let expect = |inputs: &Inputs| {
        let mut out = oracle.alloc(DType::Float, &shape).unwrap();
        let Inputs { q, weights, cache } = inputs;
        let (q, weights, cache) = (&q.host, &weights.host, &cache.host);
        oracle.indexer_logits(&host_batch, case.rows.clone(), q, weights, cache, scale, &mut out).unwrap();
        seen(&oracle.read(&out).unwrap())
    };

    let inputs = Inputs::new(device, &case, |x| x);
    let found = parity::twice(device, || {
        let mut out: CudaTensor<TestDevice> = parity::poisoned(device, "logits", DType::Float, &shape);
        let Inputs { q, weights, cache } = &inputs;
        let (q, weights, cache) = (&q.device, &weights.device, &cache.device);
        indexer_logits(
            device,
            &case.variant.tile,
            &batch,
            case.rows.clone(),
            q,
            weights,
            cache,
            scale,
            &mut out,
        )
        .unwrap();
        parity::read_bytes(device, &out)
    });
    // The scores of the magnitudes: what the error bound beside the kernel is relative to.
    let magnitudes = expect(&Inputs::new(device, &case, f64::abs));
    let units = (2 * dims + heads + 8) as f64 * F32_UNIT;
    let bound = |i: usize| units * magnitudes[i] + f64::from(f32::MIN_POSITIVE);
    let found = seen(&parity::numbers(DType::Float, &found));
    // Few scores may cancel more.
    let relative_l2 = if found.len() > 1000 { 1e-6 } else { 1e-5 };
    parity::assert_close("logits", 1, &found, &expect(&inputs), relative_l2, bound);
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("indexer_logits", cases(select(VARIANTS), 160), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let glm = IndexerLogitsDims { heads: 32, dims: 128 };
    let tiles = select(IndexerLogitsTile::candidates(glm, &Limits::a100()));
    let variants = tiles.prop_map(move |tile| Variant { dims: glm, tile });
    parity::check_on_gpu("indexer_logits_at_size", cases(variants, 2000), run);
}

#[test]
fn more_sequences_than_a_warp_has_lanes() {
    let sequences: Vec<(usize, usize)> = (0..70).map(|i| (i * 5 % 67, 1 + i % 3)).collect();
    for (variant, fp8) in [(VARIANTS[0], true), (VARIANTS[2], false)] {
        parity::small_cases(|device| {
            let batch = BatchCase::of(4, &sequences);
            let rows = 1..batch.batch.num_tokens() - 1;
            let (q, weights, keys) = (Values::Normal, Values::Normal, Values::Normal);
            run(device, Case { batch, rows, spare: 3, variant, fp8, q, weights, keys, seed: 9 });
        });
    }
}

/// What is promised at most. Far pages repeat near ones, which spares the test their memory.
#[test]
fn the_longest_context_the_widest_batch_and_the_most_rows() {
    let glm = IndexerLogitsDims { heads: 32, dims: 128 };
    let served = Variant { dims: glm, tile: IndexerLogitsTile::safe(glm) };
    let wide: Vec<(usize, usize)> = (0..256).map(|i| (700 + i * 37 % 1301, 1 + i % 6)).collect();
    parity::large_cases(|device| {
        for (sequences, variant, fp8) in [
            (&[(1_048_574, 2)][..], served, true),
            (&[(1_048_570, 6)], served, false),
            (&wide, served, true),
            (&[(100, 8192)], VARIANTS[0], true),
        ] {
            let mut batch = BatchCase::of(64, sequences);
            batch.pages = batch.pages.min(2000);
            batch.batch.block_table.iter_mut().for_each(|page| *page %= batch.pages as i32);
            let rows = 0..batch.batch.num_tokens();
            let (q, weights, keys) = (Values::Normal, Values::Normal, Values::Normal);
            run(device, Case { batch, rows, spare: 1, variant, fp8, q, weights, keys, seed: 5 });
        }
    });
}

#[test]
fn planted_faults_are_seen() {
    const GENERAL: &str = "indexer_logits.cu";
    const DECODE: &str = "indexer_logits_decode.cu";
    const SHARED: &str = "indexer_logits.cuh";
    for (file, find, replace) in [
        // The last, incomplete block of keys is left out.
        (GENERAL, "* ceil_div(rows.keys(), BLOCK_KEYS);", "* (rows.keys() / BLOCK_KEYS);"),
        (DECODE, "(rows.keys() + GROUP_KEYS - 1) / GROUP_KEYS", "rows.keys() / GROUP_KEYS"),
        // The page before.
        (SHARED, "__ldg(pages + block)", "__ldg(pages + max(block - 1, 0))"),
        // A stage is overwritten while other warps still read it.
        (
            GENERAL,
            "cp_async_wait<TILE_STAGES - 2>();\n            __syncthreads();",
            "cp_async_wait<TILE_STAGES - 2>();",
        ),
        (DECODE, "__syncthreads();\n            copy_queries", "copy_queries"),
        // Keys are read before they have come.
        (
            DECODE,
            "cp_async_wait<TILE_STAGES - 1>();\n                RawKeys",
            "cp_async_wait<TILE_STAGES>();\n                RawKeys",
        ),
        // 8-bit keys without their scale.
        (GENERAL, "FP8 ? scale * __ldg(keys.scale(at)) : scale", "scale"),
        (DECODE, "FP8 ? scale * stages[stage].scales[lane] : scale", "scale"),
        // A row does not see itself; the first row that sees a block of keys is left out.
        (GENERAL, "if (key <= position)", "if (key < position)"),
        (DECODE, "if (key <= rows.position + query)", "if (key < rows.position + query)"),
        (GENERAL, "first_key - rows.position)", "first_key - rows.position + 1)"),
        (GENERAL, "position < warp_key", "position <= warp_key"),
        // Dims of queries and keys in different orders; heads that vote against.
        (DECODE, "permute_queries(shared.queries, end_query - first_query);", ""),
        (SHARED, "weight.x * relu(dot[0])", "weight.x * dot[0]"),
        // The rest of a tile of heads is what the memory held before.
        (SHARED, "words[i] = make_uint4(0, 0, 0, 0)", "words[i] = make_uint4(~0u, ~0u, ~0u, ~0u)"),
    ] {
        parity::catches(Fault { file, find, replace }, cases(select(VARIANTS), 160), run);
    }
}
