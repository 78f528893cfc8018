//! `top_k`: the same positions, in the same order.

use std::ops::Range;

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{BatchCase, Batches, Values, assert_same};
use proptest::prelude::*;
use proptest::sample::select;

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
}

impl Scores {
    fn at(self, seed: u64, s: usize) -> f64 {
        let (normal, choice) = (Values::Normal.at(seed, s), Values::Ties.at(seed ^ 1, s));
        match self {
            Scores::Of(values) => values.at(seed, s),
            Scores::Relu(zeros) if (s as f64 * 0.618_033_988).fract() < zeros => 0.0 * normal.signum(),
            Scores::Relu(_) => normal.abs(),
            Scores::Ascending => s as f64,
            Scores::Descending => -(s as f64),
            Scores::Equal => 3.25,
            Scores::Special => match choice as i32 {
                -3 => f64::NAN,
                -2 => f64::INFINITY,
                -1 => f64::NEG_INFINITY,
                0 => -f64::NAN,
                _ => normal,
            },
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
}

impl Case {
    fn rows(&self) -> Range<usize> {
        let tokens = self.batch.batch.num_tokens();
        let (a, b) = (self.rows.0 * tokens / 16, self.rows.1 * tokens / 16);
        a.min(b)..a.max(b)
    }
}

struct TopK;

impl Contract for TopK {
    const NAME: &'static str = "contract_top_k";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let batches = Batches { page_sizes: &[1, 16], max_seqs: 3, max_computed: 2600, max_chunk: 5 }.any();
        let rows = prop_oneof![2 => Just((0, 16)), 1 => (0..=16_usize, 0..=16_usize)];
        let scores = prop_oneof![
            4 => Values::any_of(&Values::ORDINARY).prop_map(Scores::Of),
            2 => (0.3..1.0).prop_map(Scores::Relu),
            3 => select(&[Scores::Ascending, Scores::Descending, Scores::Equal, Scores::Special][..]),
        ];
        let k = select(&[1_usize, 2, 5, 64, 300, 2048][..]);
        (batches, rows, k, 0..6_usize, scores, any::<u64>())
            .prop_map(|(batch, rows, k, spare, scores, seed)| Case { batch, rows, k, spare, scores, seed })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let (rows, step) = (case.rows(), &case.batch.batch);
        let (host_batch, batch) = contract::batch(kernels, step);
        let columns = rows.clone().map(|t| step.visible(t)).max().unwrap_or(0) + case.spare;
        let scores: Vec<f64> = (0..rows.len())
            .flat_map(|row| (0..columns).map(move |s| case.scores.at(case.seed.wrapping_add(row as u64), s)))
            .collect();
        let logits = contract::numbers(kernels, DType::Float, &[rows.len(), columns], &scores);
        let shape = [step.num_tokens(), case.k];
        let untouched = vec![-7; shape[0] * shape[1]];
        let mut out = contract::index(kernels, &shape, &untouched);
        kernels.oracle().top_k(&host_batch, rows.clone(), &logits.0, &mut out.0).unwrap();
        kernels.top_k(&batch, rows, &logits.1, &mut out.1).unwrap();
        let (found, expected) =
            (kernels.read_index(&out.1).unwrap(), kernels.oracle().read_index(&out.0).unwrap());
        assert_same("topk_indices", case.k, &found, &expected);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<TopK>();
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // Ties go to the higher position.
        ("rank == found && equal < left", "rank == found && equal >= left"),
        ("bits == 0x80000000u", "false"),
        ("(bits & 0x7fffffffu) > 0x7f800000u", "false"),
        // The row ends one early.
        ("positions[params.first_row + row] + 1u", "positions[params.first_row + row]"),
        // A round of the last pass begins with what none has found.
        ("above_before += all % 0x10000u", "above_before = all % 0x10000u"),
    ] {
        contract::catches::<TopK>(Edit { shader: "top_k", find, replace });
    }
}

#[test]
fn short_rows_need_no_logits_and_misfits_are_named() {
    contract::on_wgpu(|kernels| {
        let (_, batch) = contract::batch(kernels, &BatchCase::of(4, &[(0, 4), (4, 1)]).batch);
        let run = |logits: (DType, [usize; 2]), out: (DType, [usize; 2]), rows: Range<usize>| {
            let logits = kernels.alloc(logits.0, &logits.1).unwrap();
            let mut out = kernels.alloc(out.0, &out.1).unwrap();
            kernels.top_k(&batch, rows, &logits, &mut out).map(|()| kernels.read_index(&out).unwrap())
        };
        let (float, index) = (DType::Float, DType::Index);
        let found = run((float, [0, 0]), (index, [5, 5]), 0..5).unwrap();
        assert_eq!(found[..10], [0, -1, -1, -1, -1, 0, 1, -1, -1, -1]);
        assert_eq!(found[20..], [0, 1, 2, 3, 4]);
        for (logits, out, rows, words) in [
            ((float, [0, 0]), (index, [5, 4]), 0..5, ["`logits`", "[5, at least 5]"]),
            ((DType::Act, [5, 8]), (index, [5, 4]), 0..5, ["`logits`", "holds activations"]),
            ((float, [5, 8]), (index, [4, 4]), 0..5, ["`topk_indices`", "[5, k]"]),
            ((float, [5, 8]), (float, [5, 4]), 0..5, ["`topk_indices`", "holds floats"]),
            ((float, [5, 8]), (index, [5, 4]), 3..6, ["`rows` is 3..6", "0..5"]),
        ] {
            let error = run(logits, out, rows).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    });
}
