//! `top_k` against the oracle: the same positions, in the same order.

use std::ops::Range;

use dsa80_cuda::top_k::{Filtered, Held, TopKRows, TopKTile, TopKWorkspace, top_k};
use dsa80_cuda::{Device, Limits, Tile};
use dsa80_reference::{DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Batches, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

/// Tiles so small that rows of some hundred scores reach every path: held, filtered and split; too many survivors and too few; few and
/// many candidates for the last place; several windows.
const TILES: &[TopKTile] = &[
    TopKTile {
        held: Held { threads: 32, blocks: 1, vectors: 2, registers: true },
        filtered: Filtered { threads: 64, blocks: 1, vectors: 1, items: 2, samples: 1, window: 64, split: 4 },
        bins: 64,
        ranked: 4,
    },
    TopKTile {
        held: Held { threads: 64, blocks: 1, vectors: 3, registers: false },
        filtered: Filtered {
            threads: 32,
            blocks: 1,
            vectors: 2,
            items: 8,
            samples: 2,
            window: 256,
            split: 0,
        },
        bins: 128,
        ranked: 32,
    },
    TopKTile {
        held: Held { threads: 32, blocks: 1, vectors: 1, registers: false },
        filtered: Filtered {
            threads: 64,
            blocks: 1,
            vectors: 4,
            items: 16,
            samples: 1,
            window: 2048,
            split: 8,
        },
        bins: 64,
        ranked: 1,
    },
];

#[derive(Debug, Clone, Copy)]
enum Scores {
    Of(Values),
    /// This share of zeros, of both signs, and positive scores.
    Relu(f64),
    Ascending,
    Descending,
    Equal,
    /// NaN of both signs, infinities, numbers.
    Special,
    NoNumbers,
    /// The best lie side by side.
    Cluster,
    /// The first is far above the others.
    Sink,
    /// A range that is no number.
    Extremes,
}

impl Scores {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            4 => Values::any_of(&Values::ORDINARY).prop_map(Scores::Of),
            2 => (0.3..1.0).prop_map(Scores::Relu),
            3 => select(vec![
                Scores::Ascending,
                Scores::Descending,
                Scores::Equal,
                Scores::Special,
                Scores::NoNumbers,
                Scores::Cluster,
                Scores::Sink,
                Scores::Extremes,
            ]),
        ]
    }

    fn at(self, seed: u64, s: usize, columns: usize) -> f64 {
        let normal = || Values::Normal.at(seed, s);
        let choice = || Values::Ties.at(seed ^ 1, s);
        match self {
            Scores::Of(values) => values.at(seed, s),
            Scores::Relu(zeros) => {
                let below = (s as f64 * 0.618_033_988 + (seed % 97) as f64 * 0.01).fract() < zeros;
                if below { 0.0 * normal().signum() } else { normal().abs() }
            }
            Scores::Ascending => s as f64,
            Scores::Descending => -(s as f64),
            Scores::Equal => 3.25,
            Scores::Special => match choice() as i32 {
                -3 => f64::NAN,
                -2 => f64::INFINITY,
                -1 => f64::NEG_INFINITY,
                0 => -f64::NAN,
                _ => normal(),
            },
            Scores::NoNumbers => f64::NAN,
            Scores::Cluster => normal() + if (columns / 3..columns / 2).contains(&s) { 8.0 } else { 0.0 },
            Scores::Sink if s == 0 => 1e30,
            Scores::Extremes if s == 5 => 3e38,
            Scores::Extremes if s == columns / 2 => -3e38,
            Scores::Sink | Scores::Extremes => normal(),
        }
    }
}

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    /// The rows of the launch, in parts of 16 of the step's.
    rows: (usize, usize),
    k: usize,
    /// Columns beyond the longest context.
    spare: usize,
    scores: Scores,
    seed: u64,
    tile: TopKTile,
}

impl Case {
    fn rows(&self) -> Range<usize> {
        let tokens = self.batch.batch.num_tokens();
        let (a, b) = (self.rows.0 * tokens / 16, self.rows.1 * tokens / 16);
        a.min(b)..a.max(b)
    }
}

/// Contexts up to `context`, chunks of up to `chunk` rows, k around `ks`.
fn cases(
    tiles: &'static [TopKTile],
    context: usize,
    chunk: usize,
    ks: &'static [usize],
) -> impl Strategy<Value = Case> {
    let batches =
        Batches { page_sizes: &[1, 16], max_seqs: 3, max_computed: context, max_chunk: chunk }.any();
    let rows = prop_oneof![2 => Just((0, 16)), 1 => (0..=16_usize, 0..=16_usize)];
    (batches, rows, select(ks), 0..6_usize, Scores::any(), any::<u64>(), select(tiles)).prop_map(
        |(batch, rows, k, spare, scores, seed, tile)| Case { batch, rows, k, spare, scores, seed, tile },
    )
}

const KS: &[usize] = &[1, 2, 5, 30, 64, 100, 300, 900];

fn run(device: &TestDevice, case: Case) {
    let (rows, step) = (case.rows(), &case.batch.batch);
    let (host_batch, batch) = parity::batch(device, step);
    let columns = rows.clone().map(|t| step.visible(t)).max().unwrap_or(0) + case.spare;
    let scores: Vec<f64> = (0..rows.len())
        .flat_map(|row| (0..columns).map(move |s| (row, s)))
        .map(|(row, s)| case.scores.at(case.seed.wrapping_add(row as u64), s, columns))
        .collect();
    let logits = Pair::new(device, "logits", DType::Float, &[rows.len(), columns], &scores);
    let mut expected = Pair::poisoned(device, "topk_indices", DType::Index, &[step.num_tokens(), case.k]);
    parity::oracle().top_k(&host_batch, rows.clone(), &logits.host, &mut expected.host).unwrap();
    let expected = parity::oracle().read_index(&expected.host).unwrap();

    let workspace = TopKWorkspace::alloc(device, &[case.tile]).unwrap();
    let found = parity::twice(device, || {
        let mut out = parity::poisoned(device, "topk_indices", DType::Index, &[step.num_tokens(), case.k]);
        let untouched = vec![-7; out.len()];
        device.write(out.buffer(), 0, bytemuck::cast_slice(&untouched)).unwrap();
        top_k(device, &case.tile, &workspace, &batch, rows.clone(), &logits.device, &mut out).unwrap();
        parity::read_bytes(device, &out)
    });
    let found = parity::integers(&found);
    let (before, after) = (rows.start * case.k, rows.end * case.k);
    parity::assert_same("topk_indices", case.k, &found[before..after], &expected[before..after]);
    assert!(
        found[..before].iter().chain(&found[after..]).all(|&s| s == -7),
        "rows of another chunk were written"
    );
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("top_k", cases(TILES, 1500, 6, KS), run);
}

#[test]
fn agrees_with_the_oracle_on_long_rows() {
    parity::check_on_gpu("top_k_at_size", cases(TILES, 140_000, 4, &[1, 500, 2048, 5000]), run);
    let tiles: Vec<TopKTile> = [TopKRows::Few, TopKRows::Many]
        .into_iter()
        .flat_map(|rows| TopKTile::candidates(rows, &Limits::a100()))
        .collect();
    parity::check_on_gpu(
        "top_k_with_every_tile",
        cases(tiles.leak(), 140_000, 4, &[1, 500, 2048, 5000]),
        run,
    );
}

/// GLM-5.2's k with the tiles that ship: the paths are those of long rows on a GPU.
#[test]
fn agrees_with_the_oracle_at_glm_shapes() {
    parity::small_cases(|device| {
        for (rows, scores) in [
            (TopKRows::Few, Scores::Of(Values::Normal)),
            (TopKRows::Many, Scores::Sink),
            (TopKRows::Few, Scores::Relu(0.9)),
        ] {
            for context in [2047, 2600, 8190, 17_000] {
                let batch = BatchCase::of(64, &[(context, 2)]);
                let tile = TopKTile::safe(rows);
                run(device, Case { batch, rows: (0, 16), k: 2048, spare: 3, scores, seed: 5, tile });
            }
        }
    });
}

#[test]
fn a_row_of_a_million() {
    parity::large_cases(|device| {
        for (rows, scores) in
            [(TopKRows::Few, Scores::Of(Values::Normal)), (TopKRows::Many, Scores::Relu(0.5))]
        {
            let batch = BatchCase::of(64, &[(1_048_574, 2)]);
            let tile = TopKTile::safe(rows);
            run(device, Case { batch, rows: (0, 16), k: 2048, spare: 0, scores, seed: 6, tile });
        }
    });
}

/// A row of three windows, each of which has more words than the block has threads.
fn large_windows() -> Case {
    let filtered = Filtered { window: 2048, ..TILES[1].filtered };
    Case {
        batch: BatchCase::of(16, &[(4500, 1)]),
        rows: (0, 16),
        k: 100,
        spare: 1,
        scores: Scores::Of(Values::Normal),
        seed: 7,
        tile: TopKTile { filtered, ..TILES[1] },
    }
}

#[test]
fn windows_may_have_more_words_than_threads() {
    parity::small_cases(|device| run(device, large_windows()));
    let barrier = "        __syncthreads();\n    }\n}\n\n// Selects among what passed the pivots";
    let fault = Fault {
        file: "top_k_filtered.cu",
        find: barrier,
        replace: &barrier["        __syncthreads();\n".len()..],
    };
    parity::catches(fault, Just(large_windows()), run);
}

#[test]
fn planted_faults_are_seen() {
    for (file, find, replace) in [
        // Ties go to the higher position.
        (
            "top_k_row.cuh",
            "above | (equal & (position <= last.position))",
            "above | (equal & (position >= last.position))",
        ),
        // The row ends one early: held, filtered.
        ("top_k.cu", "positions[first_row + blockIdx.x] + 1", "positions[first_row + blockIdx.x]"),
        ("top_k_filtered.cu", "positions[first_row + row_index] + 1", "positions[first_row + row_index]"),
        // The last elements of a row that is not whole vectors.
        ("top_k_row.cuh", "position(vector) + j < limit ?", "position(vector) + 3 < limit ?"),
        // A missing barrier: some threads read the bin before it is found.
        (
            "top_k_select.cuh",
            "            above += counts[i];\n        }\n    }\n    __syncthreads();",
            "            above += counts[i];\n        }\n    }",
        ),
        // Survivors that found no place are not missed.
        (
            "top_k_filtered.cu",
            "survivors >= k && survivors <= capacity && write_best",
            "survivors >= k && write_best",
        ),
        ("top_k_filtered.cu", "__all_sync(ALL_LANES, survivors <= capacity) && ", ""),
        // Parts of a row with different pivots.
        ("top_k_filtered.cu", "if (to_key(last.value) < highest_pivot) return false;", ""),
        // The next launch finds the arrivals of this one.
        ("top_k_filtered.cu", "if (threadIdx.x == 0) arrivals[row_index] = 0;", ""),
        // Equal scores in a row that is selected from memory.
        (
            "top_k_select.cuh",
            "keys.contains(key_of(value, position)) ? ~position : 0",
            "keys.contains(key_of(value, position)) ? position : 0",
        ),
        // The second window of a row.
        (
            "top_k_filtered.cu",
            "written += __reduce_add_sync(ALL_LANES, lane() < WARPS ?",
            "written = __reduce_add_sync(ALL_LANES, lane() < WARPS ?",
        ),
        // The second vector of a thread.
        ("top_k.cu", "written += __reduce_add_sync(ALL_LANES, sum);", ""),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(&TILES[..1], 1500, 6, KS), run);
    }
}

#[test]
fn short_rows_need_no_logits_and_misfits_are_named() {
    parity::small_cases(|device| {
        let step = BatchCase::of(4, &[(0, 4), (4, 1)]).batch;
        let (_, batch) = parity::batch(device, &step);
        let tile = TILES[0];
        let workspace = TopKWorkspace::alloc(device, &[tile]).unwrap();
        let launch =
            |tile: &TopKTile, logits: (DType, &[usize]), out: (DType, &[usize]), rows: Range<usize>| {
                let logits = parity::poisoned(device, "logits", logits.0, logits.1);
                let mut out = parity::poisoned(device, "topk_indices", out.0, out.1);
                top_k(device, tile, &workspace, &batch, rows, &logits, &mut out)
                    .map(|()| parity::read_bytes(device, &out))
            };
        let (float, index) = (DType::Float, DType::Index);
        let found = launch(&tile, (float, &[0, 0]), (index, &[5, 5]), 0..5).unwrap();
        let found: &[i32] = bytemuck::cast_slice(&found);
        assert_eq!(found[..10], [0, -1, -1, -1, -1, 0, 1, -1, -1, -1]);
        assert_eq!(found[20..], [0, 1, 2, 3, 4]);

        let refused = |result: dsa80_reference::Result<Vec<u8>>, words: &[&str]| {
            let error = result.unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        refused(launch(&tile, (float, &[0, 0]), (index, &[5, 4]), 0..5), &["`logits`", "[5, at least 5]"]);
        refused(
            launch(&tile, (DType::Act, &[5, 8]), (index, &[5, 4]), 0..5),
            &["`logits` holds activations"],
        );
        refused(launch(&tile, (float, &[5, 8]), (index, &[4, 4]), 0..5), &["`topk_indices`", "[5, k]"]);
        refused(launch(&tile, (float, &[5, 8]), (float, &[5, 4]), 0..5), &["`topk_indices` holds floats"]);
        refused(launch(&tile, (float, &[5, 8]), (index, &[5, 4]), 3..6), &["`rows` is 3..6"]);
        let wide = TopKTile { held: Held { vectors: 17, ..tile.held }, ..tile };
        refused(launch(&wide, (float, &[5, 8]), (index, &[5, 4]), 0..5), &["1 to 16 vectors"]);
        let bins = TopKTile { bins: 96, ..tile };
        refused(launch(&bins, (float, &[5, 8]), (index, &[5, 4]), 0..5), &["96 bins"]);
        let large = TopKTile {
            held: Held { threads: 1024, blocks: 1, vectors: 16, registers: false },
            bins: 1024,
            ..tile
        };
        refused(launch(&large, (float, &[5, 8]), (index, &[5, 4]), 0..5), &["bytes of shared memory"]);
    });
}
