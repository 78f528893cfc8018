//! `sample`: the same tokens for the same random numbers, and log-probabilities.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels, SampleOutput, SampleRow, SamplingParams};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{F32_UNIT, Values, assert_close, assert_same};
use proptest::prelude::*;
use proptest::sample::select;

use crate::sample_rows::{Logits, Row, TIED, plain_row};

#[derive(Debug, Clone)]
struct Case {
    vocab: usize,
    rows: Vec<Row>,
    top: usize,
    seed: u64,
}

struct Outputs<T> {
    out: SampleOutput<T>,
}

impl<T> Outputs<T> {
    fn new(count: usize, top: usize, alloc: impl Fn(DType, &[usize]) -> T) -> Self {
        let out = SampleOutput {
            token_ids: alloc(DType::Index, &[count]),
            logprobs: alloc(DType::Float, &[count]),
            top_ids: alloc(DType::Index, &[count, top]),
            top_logprobs: alloc(DType::Float, &[count, top]),
        };
        Self { out }
    }
}

impl Case {
    fn logits(&self) -> Vec<f64> {
        let rows = self.rows.iter().zip(self.seed..);
        rows.flat_map(|(row, seed)| (0..self.vocab).map(move |id| row.logits.at(seed, id))).collect()
    }

    fn run<K: Kernels>(&self, kernels: &Backend<'_, K>) {
        let (count, vocab, top) = (self.rows.len(), self.vocab, self.top);
        let logits = contract::numbers(kernels, DType::Float, &[count, vocab], &self.logits());
        let rows: Vec<SampleRow<'_>> = self.rows.iter().map(Row::as_row).collect();
        let mut found =
            Outputs::new(count, top, |dtype, shape| contract::output(kernels, dtype, shape).1).out;
        kernels.sample(&logits.1, &rows, &mut found).unwrap();
        let found_ids = kernels.read_index(&found.token_ids).unwrap();

        let oracle = kernels.oracle();
        let mut expected = Outputs::new(count, top, |dtype, shape| oracle.alloc(dtype, shape).unwrap()).out;
        // A row whose cut rounding could move reports the token that was found for it.
        let values = oracle.read(&logits.0).unwrap();
        let rows: Vec<SampleRow<'_>> = (self.rows.iter().zip(values.chunks(vocab)).zip(&found_ids))
            .map(|((row, logits), &found)| {
                let forced = if row.is_clear(logits) { row.forced } else { u32::try_from(found).ok() };
                SampleRow { forced, ..row.as_row() }
            })
            .collect();
        oracle.sample(&logits.0, &rows, &mut expected).unwrap();
        assert_same("token_ids", 1, &found_ids, &oracle.read_index(&expected.token_ids).unwrap());
        let [top_ids, expected_ids] =
            [kernels.read_index(&found.top_ids).unwrap(), oracle.read_index(&expected.top_ids).unwrap()];
        assert_same("top_ids", top, &top_ids, &expected_ids);
        // A lane adds one after the other at most the logits of its part; an exponential is off by as many units as twice its argument.
        let additions = (vocab.div_ceil(32) + 8) as f64;
        let powers = 16.0 + 6.0 * (vocab as f64).ln();
        for (what, width, found, expected) in [
            ("logprobs", 1, &found.logprobs, &expected.logprobs),
            ("top_logprobs", top, &found.top_logprobs, &expected.top_logprobs),
        ] {
            let (found, expected) = (kernels.read(found).unwrap(), oracle.read(expected).unwrap());
            let bound = |i: usize| F32_UNIT * (powers + additions + 2.0 * expected[i].abs());
            assert_close(what, width, &found, &expected, f64::INFINITY, bound);
        }
    }
}

fn cases(rows: usize) -> impl Strategy<Value = Case> {
    let shape =
        (select(&[1_usize, 3, 64, 300, 1023, 2000][..]), select(&[0_usize, 1, 5, 20][..]), 0..1_u64 << 60);
    shape.prop_flat_map(move |(vocab, top, seed)| {
        prop::collection::vec(Row::any(vocab), 1..=rows).prop_map(move |rows| Case { vocab, rows, top, seed })
    })
}

struct Sample;

impl Contract for Sample {
    const NAME: &'static str = "contract_sample";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        cases(5)
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        case.run(kernels);
    }
}

struct Tied;

impl Contract for Tied {
    const NAME: &'static str = "contract_sample_tied";
    type Case = Case;

    /// Rows whose cut lies among many tokens that are alike.
    fn cases() -> impl Strategy<Value = Case> {
        let filters = prop_oneof![
            4 => (Just(0u32), 0.0..1.0f32),
            1 => (Just(0u32), select(vec![0.0, 0.5, 0.999_999_9])),
            2 => (1..2000u32, Just(1.0f32)),
            2 => (1..2000u32, 0.0..1.0f32),
        ];
        let filters = prop::collection::vec((filters, select(TIED.to_vec())), 4);
        (cases(4), filters).prop_map(|(mut case, filters)| {
            for (row, ((top_k, top_p), logits)) in case.rows.iter_mut().zip(filters) {
                let temperature = row.params.temperature.clamp(0.5, 1e6);
                row.params = SamplingParams { top_k, top_p, temperature, ..row.params.clone() };
                (row.logits, row.forced) = (Logits::Tied(logits), None);
            }
            case
        })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        case.run(kernels);
    }
}

struct Draws;

impl Contract for Draws {
    const NAME: &'static str = "contract_sample_draws";
    type Case = Case;

    /// Many draws, at temperatures that leave many tokens a chance: of some f32 cannot tell who is first.
    fn cases() -> impl Strategy<Value = Case> {
        (select(&[100_usize, 1500][..]), 0..1_u64 << 60).prop_map(|(vocab, seed)| {
            let rows = (0..100).map(|i| {
                let temperature = [0.3, 1.0, 4.0, 1e6][i % 4];
                let params =
                    SamplingParams { seed: seed ^ i as u64, temperature, ..SamplingParams::default() };
                Row { position: i as u32 * 7, ..plain_row(params, Logits::Of(Values::Normal, 3.0)) }
            });
            Case { vocab, rows: rows.collect(), top: 0, seed }
        })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        case.run(kernels);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<Sample>();
}

#[test]
fn agrees_with_the_oracle_where_most_are_alike() {
    contract::check::<Tied>();
}

#[test]
fn draws_are_the_oracles() {
    contract::check::<Draws>();
}

/// What a plan asks for is what the rows do that were uploaded last.
#[test]
fn a_plan_samples_what_was_uploaded_last() {
    contract::on_wgpu(|kernels| {
        let params: Vec<SamplingParams> =
            (0..3).map(|seed| SamplingParams { seed, top_k: 50, ..SamplingParams::default() }).collect();
        let rows: Vec<Row> =
            params.into_iter().map(|params| plain_row(params, Logits::Of(Values::Normal, 1.0))).collect();
        let case = Case { vocab: 300, rows, top: 0, seed: 4 };
        let logits = contract::numbers(kernels, DType::Float, &[3, 300], &case.logits()).1;
        let outputs = || Outputs::new(3, 0, |dtype, shape| contract::output(kernels, dtype, shape).1).out;
        let rows: Vec<SampleRow<'_>> = case.rows.iter().map(Row::as_row).collect();
        let others: Vec<SampleRow<'_>> = rows.iter().rev().copied().collect();
        let (mut alone, mut planned) = (outputs(), outputs());
        kernels.sample(&logits, &rows, &mut alone).unwrap();
        let mut plan = kernels.alloc_sample_plan(3, 300).unwrap();
        assert!(kernels.upload_sample_plan(&others, &mut plan).unwrap());
        assert!(kernels.upload_sample_plan(&rows, &mut plan).unwrap());
        kernels.sample_plan(&logits, &plan, &mut planned).unwrap();
        let [alone, planned] = [&alone, &planned].map(|out| kernels.read_index(&out.token_ids).unwrap());
        assert_eq!(alone, planned);
    });
}

#[test]
fn planted_faults_are_seen() {
    for (shader, find, replace) in [
        // The counter of the draw; nobody is close enough to the best.
        (
            "sample",
            "vec4(id / 4u, requests[request + POSITION]",
            "vec4(id / 4u, requests[request + POSITION] + 1u",
        ),
        ("sample", "noise_of(n) - down >= most - MARGIN", "noise_of(n) - down > most + MARGIN"),
        // A ban that does nothing, a penalty that multiplies what it should divide.
        ("sample_keys", "if edits[at + 2u] == BAN {", "if edits[at + 2u] == 7u {"),
        ("sample_keys", "if less(ZERO_KEY, key) {", "if less(key, ZERO_KEY) {"),
        // Ties go to the higher token; what is changed twice is changed once.
        ("sample", "return vec3(keys[start + id], ~id);", "return vec3(keys[start + id], id);"),
        ("sample_keys", "for (var j = i; j < params.count &&", "for (var j = i; j < i + 1u &&"),
        // Cuts: one token more, a share of one row's sum for another's.
        (
            "sample",
            "let top_k = vec2(0u, requests[request + TOP_K]);",
            "let top_k = vec2(0u, requests[request + TOP_K] + 1u);",
        ),
        ("sample", "var enough = upper_product(total,", "var enough = upper_product(vec2(0x2000u, 0u),"),
        // The best is reported again.
        ("sample", "if below(at, last) && below(next, at) {", "if below(next, at) {"),
    ] {
        contract::catches::<Sample>(Edit { shader, find, replace });
    }
    // The exact noise, the exact distance from the best.
    for (find, replace) in [
        ("for (var bit = 0u; bit < 58u; bit++)", "for (var bit = 0u; bit < 57u; bit++)"),
        ("min(7 - a.exponent, 64)", "min(8 - a.exponent, 64)"),
    ] {
        contract::catches::<Draws>(Edit { shader: "sample_wide", find, replace });
    }
}

#[test]
fn misfits_are_named() {
    contract::on_wgpu(|kernels| {
        let refuse = |params: SamplingParams, forced, shape: [usize; 2], ids: usize, top: [usize; 2]| {
            let row =
                SampleRow { params: &params, prompt: &[], output: &[], banned: &[], position: 0, forced };
            let tensor = |dtype, shape: &[usize]| kernels.alloc(dtype, shape).unwrap();
            let mut out = SampleOutput {
                token_ids: tensor(DType::Index, &[ids]),
                logprobs: tensor(DType::Float, &[ids]),
                top_ids: tensor(DType::Index, &top),
                top_logprobs: tensor(DType::Float, &top),
            };
            let logits = tensor(DType::Float, &shape);
            let outcome = kernels.sample(&logits, &vec![row; shape[0].min(3)], &mut out);
            outcome.map_or_else(|error| error.to_string(), |()| "fine".to_owned())
        };
        let expect = |message: String, word: &str| assert!(message.contains(word), "{message}");
        let default = SamplingParams::default;
        expect(refuse(default(), Some(8), [1, 8], 1, [1, 0]), "sample: `forced` is 8");
        let cold = SamplingParams { temperature: -1.0, ..default() };
        expect(refuse(cold, None, [1, 8], 1, [1, 0]), "`temperature`");
        expect(refuse(default(), None, [4, 8], 4, [4, 0]), "[3, V]");
        expect(refuse(default(), None, [1, 0], 1, [1, 0]), "V at least 1");
        expect(refuse(default(), None, [2, 8], 1, [2, 0]), "`token_ids`");
        expect(refuse(default(), None, [2, 8], 2, [1, 0]), "`top_ids`");
        assert_eq!(refuse(default(), None, [0, 8], 0, [0, 4]), "fine");
    });
}
