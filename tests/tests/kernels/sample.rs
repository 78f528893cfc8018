//! `sample` against the oracle: the same tokens for the same random numbers, and log-probabilities.

use std::time::{Duration, Instant};

use dsa80_cuda::sample::{SampleTile, SampleWorkspace, sample};
use dsa80_cuda::{CudaTensor, Device, Limits, SamplePlan, Tile};
use dsa80_reference::{DType, Error, Kernels, SampleOutput, SampleRow, SamplingParams};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::sample_rows::{Logits, Row, TIED, plain_row};

/// Tiles so small that rows of some hundred logits reach every path: several parts and one, lists that are long enough and too short.
const TILES: &[SampleTile] = &[
    SampleTile { threads: 32, split: 2, fraction_bits: 6, listed: 16 },
    SampleTile { threads: 64, split: 1, fraction_bits: 1, listed: 64 },
];

#[derive(Debug, Clone)]
struct Case {
    tile: SampleTile,
    vocab: usize,
    rows: Vec<Row>,
    top: usize,
    seed: u64,
}

fn cases(tiles: &'static [SampleTile], vocabs: &'static [usize], rows: usize) -> impl Strategy<Value = Case> {
    let shape = (select(tiles), select(vocabs), select(vec![0, 1, 5, 20]), 0..1_u64 << 60);
    shape.prop_flat_map(move |(tile, vocab, top, seed)| {
        prop::collection::vec(Row::any(vocab), 1..=rows).prop_map(move |rows| Case {
            tile,
            vocab,
            rows,
            top,
            seed,
        })
    })
}

const VOCABS: &[usize] = &[1, 3, 64, 300, 1023, 2000];

/// Four bytes a token, `rows * (2 + 2 top)` of them.
fn launch(device: &TestDevice, case: &Case, logits: &Pair, before: &Pair) -> Vec<u8> {
    let (count, top) = (case.rows.len(), case.top);
    let workspace = SampleWorkspace::alloc(device, &case.tile, count, case.vocab, top).unwrap();
    let rows: Vec<SampleRow<'_>> = case.rows.iter().map(Row::as_row).collect();
    let sampled = |logits: &Pair| {
        let mut out = SampleOutput {
            token_ids: parity::poisoned(device, "token_ids", DType::Index, &[count]),
            logprobs: parity::poisoned(device, "logprobs", DType::Float, &[count]),
            top_ids: parity::poisoned(device, "top_ids", DType::Index, &[count, top]),
            top_logprobs: parity::poisoned(device, "top_logprobs", DType::Float, &[count, top]),
        };
        sample(device, &case.tile, &workspace, &logits.device, &rows, &mut out).unwrap();
        [&out.token_ids, &out.logprobs, &out.top_ids, &out.top_logprobs]
            .map(|tensor| parity::read_bytes(device, tensor))
            .concat()
    };
    // What another step leaves in the workspace is seen.
    sampled(before);
    parity::twice(device, || sampled(logits))
}

fn run(device: &TestDevice, case: Case) {
    let (count, vocab, top) = (case.rows.len(), case.vocab, case.top);
    let logits = |seed: u64| {
        let rows = case.rows.iter().zip(seed..);
        let values = rows.flat_map(|(row, seed)| (0..vocab).map(move |id| row.logits.at(seed, id)));
        Pair::new(device, "logits", DType::Float, &[count, vocab], &values.collect::<Vec<_>>())
    };
    let (before, logits) = (logits(case.seed ^ 0xff00), logits(case.seed));
    let found = launch(device, &case, &logits, &before);
    let (ids, rest) = found.split_at(4 * count);
    let (logprobs, rest) = rest.split_at(4 * count);
    let (top_ids, top_logprobs) = rest.split_at(4 * count * top);

    let oracle = parity::oracle();
    let host = |dtype, shape: &[usize]| oracle.alloc(dtype, shape).unwrap();
    let mut expected = SampleOutput {
        token_ids: host(DType::Index, &[count]),
        logprobs: host(DType::Float, &[count]),
        top_ids: host(DType::Index, &[count, top]),
        top_logprobs: host(DType::Float, &[count, top]),
    };
    // A row whose cut rounding could move reports the token that was found for it.
    let values = oracle.read(&logits.host).unwrap();
    let found_ids = parity::integers(ids);
    let rows: Vec<SampleRow<'_>> = (case.rows.iter().zip(values.chunks(vocab)).zip(&found_ids))
        .map(|((row, logits), &found)| {
            let forced = if row.is_clear(logits) { row.forced } else { u32::try_from(found).ok() };
            SampleRow { forced, ..row.as_row() }
        })
        .collect();
    oracle.sample(&logits.host, &rows, &mut expected).unwrap();
    parity::assert_same("token_ids", 1, &found_ids, &oracle.read_index(&expected.token_ids).unwrap());
    parity::assert_same(
        "top_ids",
        top,
        &parity::integers(top_ids),
        &oracle.read_index(&expected.top_ids).unwrap(),
    );
    // The error analysis beside the kernel: a thread adds at most the logits of its part.
    let additions = (vocab.div_ceil(case.tile.threads) + 4) as f64;
    let powers = 4.0 + 3.0 * (vocab as f64).ln();
    for (what, width, found, expected) in [
        ("logprobs", 1, logprobs, &expected.logprobs),
        ("top_logprobs", top, top_logprobs, &expected.top_logprobs),
    ] {
        let (found, expected) = (parity::numbers(DType::Float, found), oracle.read(expected).unwrap());
        let bound = |i: usize| F32_UNIT * (powers + additions + expected[i].abs());
        // Of a token that is all but certain the logarithm is next to nothing, and what it is relative to as well.
        parity::assert_close(what, width, &found, &expected, f64::INFINITY, bound);
    }
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("sample", cases(TILES, VOCABS, 5), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let tiles = SampleTile::candidates((), &Limits::a100());
    parity::check_on_gpu("sample_at_size", cases(tiles.leak(), &[151_553, 154_880], 2), run);
}

/// Rows whose cut lies among so many tokens that are alike that it is searched.
fn tied(tiles: &'static [SampleTile], vocabs: &'static [usize], rows: usize) -> impl Strategy<Value = Case> {
    let filters = prop_oneof![
        4 => (Just(0u32), 0.0..1.0f32),
        1 => (Just(0u32), select(vec![0.0, 0.5, 0.999_999_9])),
        2 => (1..2000u32, Just(1.0f32)),
        2 => (1..2000u32, 0.0..1.0f32),
    ];
    let filters = prop::collection::vec((filters, select(TIED.to_vec())), rows);
    (cases(tiles, vocabs, rows), filters).prop_map(|(mut case, filters)| {
        for (row, ((top_k, top_p), logits)) in case.rows.iter_mut().zip(filters) {
            let temperature = row.params.temperature.clamp(0.5, 1e6);
            row.params = SamplingParams { top_k, top_p, temperature, ..row.params.clone() };
            (row.logits, row.forced) = (Logits::Tied(logits), None);
        }
        case
    })
}

#[test]
fn agrees_with_the_oracle_where_most_are_alike() {
    parity::check("sample_tied", tied(TILES, &[300, 1023, 2000], 5), run);
}

#[test]
fn agrees_with_the_oracle_where_most_are_alike_at_size() {
    let tiles = SampleTile::candidates((), &Limits::a100());
    parity::check_on_gpu("sample_tied_at_size", tied(tiles.leak(), &[154_880], 3), run);
}

/// However alike they are, tokens are told apart in rounds whose number has a bound: a search that takes one after the other, or one
/// block to look at all of them, takes a hundred times as long as this allows.
#[test]
fn ties_do_not_take_long() {
    parity::large_cases(|device| {
        let (vocab, tile) = (154_880, SampleTile::safe(()));
        let workspace = SampleWorkspace::alloc(device, &tile, 1, vocab, 0).unwrap();
        let index = |shape: &[usize]| parity::poisoned(device, "ids", DType::Index, shape);
        let float = |shape: &[usize]| parity::poisoned(device, "logprobs", DType::Float, shape);
        let mut out = SampleOutput {
            token_ids: index(&[1]),
            logprobs: float(&[1]),
            top_ids: index(&[1, 0]),
            top_logprobs: float(&[1, 0]),
        };
        for tied in TIED {
            let values: Vec<f64> = (0..vocab).map(|id| tied.at(3, id)).collect();
            let logits = Pair::new(device, "logits", DType::Float, &[1, vocab], &values).device;
            let params = SamplingParams { top_p: 0.9, ..SamplingParams::default() };
            let row = plain_row(params, Logits::Tied(tied));
            let times = (0..8).map(|_| {
                let start = Instant::now();
                sample(device, &tile, &workspace, &logits, &[row.as_row()], &mut out).unwrap();
                parity::read_bytes(device, &out.token_ids);
                start.elapsed()
            });
            // With the upload, and what the host takes to launch and to wait.
            let best = times.min().unwrap();
            assert!(best < Duration::from_millis(2), "{tied:?}: {best:?}");
        }
    });
}

/// A captured launch does what the rows ask for that were uploaded last, as the launch of these rows alone does it.
fn replay(device: &TestDevice, case: Case) {
    let (count, vocab) = (case.rows.len(), case.vocab);
    let values = case.rows.iter().zip(case.seed..);
    let values = values.flat_map(|(row, seed)| (0..vocab).map(move |id| row.logits.at(seed, id)));
    let logits = Pair::new(device, "logits", DType::Float, &[count, vocab], &values.collect::<Vec<_>>());
    let outputs = || SampleOutput {
        token_ids: parity::poisoned(device, "token_ids", DType::Index, &[count]),
        logprobs: parity::poisoned(device, "logprobs", DType::Float, &[count]),
        top_ids: parity::poisoned(device, "top_ids", DType::Index, &[count, 0]),
        top_logprobs: parity::poisoned(device, "top_logprobs", DType::Float, &[count, 0]),
    };
    let bytes = |out: &SampleOutput<CudaTensor<TestDevice>>| {
        [&out.token_ids, &out.logprobs].map(|tensor| parity::read_bytes(device, tensor)).concat()
    };
    let rows: Vec<SampleRow<'_>> = case.rows.iter().map(Row::as_row).collect();
    let others: Vec<SampleRow<'_>> = rows.iter().rev().copied().collect();

    let mut expected = outputs();
    let workspace = SampleWorkspace::alloc(device, &case.tile, count, vocab, 0).unwrap();
    sample(device, &case.tile, &workspace, &logits.device, &rows, &mut expected).unwrap();

    let mut found = outputs();
    let mut plan = SamplePlan::alloc(device, case.tile, count, vocab).unwrap();
    let error = plan.launch(device, &logits.device, &mut found).unwrap_err().to_string();
    assert!(error.contains("uploaded before"), "{error}");
    assert!(plan.upload(device, &others).unwrap());
    plan.launch(device, &logits.device, &mut found).unwrap();
    let graph = device.capture(|| plan.launch(device, &logits.device, &mut found)).unwrap();
    assert!(plan.upload(device, &rows).unwrap());
    device.replay(&graph).unwrap();
    parity::assert_same("a replay", 4, &bytes(&found), &bytes(&expected));
}

#[test]
fn a_captured_launch_asks_for_what_was_uploaded_last() {
    parity::check("sample_plan", cases(&TILES[..1], &[3, 300, 2000], 5), replay);
}

#[test]
fn what_does_not_fit_a_plan_leaves_it_alone() {
    parity::small_cases(|device| {
        let tile = TILES[0];
        let vocab = 8;
        // A ban of every token in each of a thousand rows is more than `4 vocab + 4096` changes.
        let params = SamplingParams::default();
        let banned: Vec<u32> = (0..vocab as u32).collect();
        let row = SampleRow {
            params: &params,
            prompt: &[],
            output: &[],
            banned: &banned,
            position: 0,
            forced: None,
        };
        let mut plan = SamplePlan::alloc(device, tile, 1000, vocab).unwrap();
        assert!(plan.upload(device, &[row; 2]).unwrap());
        assert!(!plan.upload(device, &[row; 1000]).unwrap());
        assert!(matches!(plan.upload(device, &[row; 1001]), Err(Error::Capacity { .. })));
        let refused = SamplingParams { temperature: -1.0, ..SamplingParams::default() };
        assert!(plan.upload(device, &[SampleRow { params: &refused, ..row }]).is_err());
        // As it was: two rows.
        let logits = Pair::new(device, "logits", DType::Float, &[3, vocab], &[0.0; 24]);
        let mut out = SampleOutput {
            token_ids: parity::poisoned(device, "token_ids", DType::Index, &[3]),
            logprobs: parity::poisoned(device, "logprobs", DType::Float, &[3]),
            top_ids: parity::poisoned(device, "top_ids", DType::Index, &[3, 0]),
            top_logprobs: parity::poisoned(device, "top_logprobs", DType::Float, &[3, 0]),
        };
        let error = plan.launch(device, &logits.device, &mut out).unwrap_err().to_string();
        assert!(error.contains("expected [2, 8]"), "{error}");
    });
}

#[derive(Debug, Clone, Copy)]
enum Only {
    Greedy,
    /// Greedy, and many of the best are equal.
    Tied,
    Drawn,
    Filtered,
    /// Cut among tokens that are nearly or wholly alike.
    Flat,
    /// So many of them that they are searched.
    Searched,
}

/// Rows of one kind, so that a fault costs no more programs than it needs.
fn only(kind: Only) -> impl Strategy<Value = Case> {
    let tied = tied(&TILES[..1], &[1023], 2);
    (cases(&TILES[..1], &[64, 300, 1023], 3), tied).prop_map(move |(mut case, tied)| {
        if matches!(kind, Only::Searched) {
            return tied;
        }
        for row in &mut case.rows {
            let params = &mut row.params;
            let plain = SamplingParams { top_k: 0, top_p: 1.0, min_p: 0.0, ..params.clone() };
            match kind {
                Only::Greedy => *params = SamplingParams { temperature: 0.0, ..plain },
                Only::Tied => {
                    *params =
                        SamplingParams { temperature: 0.0, seed: params.seed, ..SamplingParams::default() };
                    // Something is edited, so that parts are compared by their edited best.
                    (row.banned, row.forced) = (vec![1], None);
                    row.logits = Logits::Of(Values::Ties, 1.0);
                }
                Only::Drawn => *params = SamplingParams { temperature: params.temperature.max(0.5), ..plain },
                Only::Filtered | Only::Searched => params.temperature = params.temperature.max(0.5),
                Only::Flat => {
                    let flat = SamplingParams { temperature: 1e6, ..plain };
                    *params = if params.seed.is_multiple_of(2) {
                        SamplingParams { top_k: 17 + (params.seed % 32) as u32, ..flat }
                    } else {
                        SamplingParams { top_p: 0.05 + 0.2 * (params.seed % 64) as f32 / 64.0, ..flat }
                    };
                    let values = if row.position.is_multiple_of(3) { Values::Ties } else { Values::Normal };
                    (row.banned, row.logits) = (Vec::new(), Logits::Of(values, 1.0));
                }
            }
        }
        case
    })
}

#[test]
fn planted_faults_are_seen() {
    use Only::{Drawn, Filtered, Flat, Greedy, Searched, Tied};
    for (kind, file, find, replace) in [
        // The counter of the random draw is off by one.
        (Drawn, "sample.cuh", "philox(group, request.position,", "philox(group, request.position + 1,"),
        // A penalty is applied twice.
        (
            Greedy,
            "sample.cuh",
            "x = x > 0.0 ? x / repetition :",
            "x = x > 0.0 ? x / repetition / repetition :",
        ),
        // An edited token counts with its raw logit as well.
        (Greedy, "sample.cuh", "valid & ~(block.marks[place / 32] >> place % 32)", "valid"),
        // Ties go to the higher token.
        (
            Tied,
            "sample.cuh",
            "__reduce_min_sync(ALL_LANES, best ? own.id : NOBODY)",
            "__reduce_max_sync(ALL_LANES, best ? own.id : 0)",
        ),
        // What the last part drew is dropped.
        (
            Drawn,
            "sample.cu",
            "if (mine.drawn_id == NOBODY) continue;",
            "if (mine.drawn_id == NOBODY || p + 1 == num_parts) continue;",
        ),
        // A missing barrier: marks are used while they are made.
        (
            Greedy,
            "sample.cuh",
            "            __syncthreads();\n#pragma unroll 1\n            for (uint32_t vector",
            "#pragma unroll 1\n            for (uint32_t vector",
        ),
        // The next launch finds what this one counted.
        (Filtered, "sample_pick.cu", "if (threadIdx.x == 0) lengths[index] = 0;", ""),
        // Cuts: a token too few, a sum without what stands above, a bin too many.
        (
            Flat,
            "sample_filter.cu",
            "k - shared.kth_above, 0.0, shares",
            "k - shared.kth_above - 1, 0.0, shares",
        ),
        (Flat, "sample_filter.cu", "in_bin, shared.enough_mass_above, enough)", "in_bin, 0.0, enough)"),
        (
            Flat,
            "sample_pick.cu",
            "static_cast<uint32_t>(bin < draw_below)",
            "static_cast<uint32_t>(bin <= draw_below)",
        ),
        // A search: what lies above a range is wanted of it again, blocks do not wait for each other, a round begins with what another
        // left, its runs lose what they end with, the next launch finds what this one counted.
        (Searched, "sample_pick.cu", "wanted -= min(wanted, shared.above);", ""),
        (Searched, "sample_pick.cu", "while (load_acquire_system(arrivals) < arrived) {}", ""),
        (Searched, "sample_pick.cu", "if (team.part == 0) counts[next + i] = 0, masses[next + i] = 0;", ""),
        (Searched, "sample_pick.cu", "        run.end(tell);\n", ""),
        (Searched, "sample_pick.cu", "row_counts[i] = 0, row_masses[i] = 0;", "row_counts[i] = 0;"),
        // Of equal tokens the higher ones stay.
        (
            Searched,
            "sample_pick.cu",
            "depth == other.depth && id <= other.id",
            "depth == other.depth && id >= other.id",
        ),
    ] {
        parity::catches(Fault { file, find, replace }, only(kind), run);
    }
}

/// A workspace holds the edits of four vocabularies: more rows with long prompts are sampled one after the other.
#[test]
fn edits_that_do_not_fit_together_are_split() {
    parity::small_cases(|device| {
        let vocab = 2000;
        let params = SamplingParams { repetition_penalty: 1.3, temperature: 0.7, ..Default::default() };
        let rows = (0..9).map(|seed| {
            let params = SamplingParams { seed, top_k: 5 * (seed % 3) as u32, ..params.clone() };
            let prompt = (0..vocab as u32).filter(|id| id % 11 != seed as u32).collect();
            Row { prompt, ..plain_row(params, Logits::Of(Values::Normal, 1.0)) }
        });
        run(device, Case { tile: TILES[0], vocab, rows: rows.collect(), top: 1, seed: 3 });
    });
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let tile = TILES[0];
        let workspace = SampleWorkspace::alloc(device, &tile, 2, 8, 4).unwrap();
        let refuse = |params: SamplingParams, forced, shape: [usize; 2], ids: usize, top: [usize; 2]| {
            let row =
                SampleRow { params: &params, prompt: &[], output: &[], banned: &[], position: 0, forced };
            let logits = tensor(DType::Float, &shape);
            let mut out = SampleOutput {
                token_ids: tensor(DType::Index, &[ids]),
                logprobs: tensor(DType::Float, &[ids]),
                top_ids: tensor(DType::Index, &top),
                top_logprobs: tensor(DType::Float, &top),
            };
            let outcome = sample(device, &tile, &workspace, &logits, &vec![row; shape[0].min(3)], &mut out);
            outcome.map_or_else(|error| error.to_string(), |()| "fine".to_owned())
        };
        let default = SamplingParams::default;
        let expect = |message: String, words: &[&str]| {
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        };
        expect(refuse(default(), Some(8), [1, 8], 1, [1, 0]), &["sample: `forced` is 8", "below 8"]);
        let refuse_params = |params| refuse(params, None, [1, 8], 1, [1, 0]);
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            expect(refuse_params(SamplingParams { temperature, ..default() }), &["`temperature`"]);
        }
        expect(refuse_params(SamplingParams { top_p: 1.5, ..default() }), &["`top_p`"]);
        expect(refuse_params(SamplingParams { min_p: f32::NAN, ..default() }), &["`min_p`"]);
        expect(
            refuse_params(SamplingParams { repetition_penalty: 0.0, ..default() }),
            &["`repetition_penalty`"],
        );
        expect(
            refuse_params(SamplingParams { presence_penalty: f32::NAN, ..default() }),
            &["`presence_penalty`"],
        );
        let infinite = SamplingParams { logit_bias: vec![(1, f32::INFINITY)], ..default() };
        expect(refuse_params(infinite), &["`logit_bias`", "token 1"]);
        expect(refuse(default(), None, [4, 8], 4, [4, 0]), &["`logits`", "[3, V]"]);
        expect(refuse(default(), None, [1, 0], 1, [1, 0]), &["`logits`", "V at least 1"]);
        expect(refuse(default(), None, [2, 8], 1, [2, 0]), &["`token_ids`", "[2]"]);
        expect(refuse(default(), None, [2, 8], 2, [1, 0]), &["`top_ids`", "[2, 0]"]);
        expect(refuse(default(), None, [1, 8], 1, [1, 33]), &["`top_ids`", "at most 32"]);
        expect(refuse(default(), None, [1, 8], 1, [1, 5]), &["[1, 5]", "allocated"]);
        expect(refuse(default(), None, [3, 8], 3, [3, 1]), &["[3, 1]", "allocated"]);
        expect(refuse(default(), None, [1, 9], 1, [1, 0]), &["allocated"]);
        assert_eq!(refuse(default(), None, [0, 8], 0, [0, 4]), "fine");
    });
}
