//! `indexer_logits`.

use std::ops::Range;

use dsa80_reference::fp8::{self, IndexerPage};
use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{BatchCase, Batches, F32_UNIT, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    /// The rows of the launch, in parts of 16 of the step's.
    rows: (usize, usize),
    /// Columns beyond the longest context.
    spare: usize,
    heads: usize,
    dims: usize,
    fp8: bool,
    /// Of queries, weights and keys.
    values: [Values; 3],
    seed: u64,
}

impl Case {
    fn rows(&self) -> Range<usize> {
        let tokens = self.batch.batch.num_tokens();
        let (a, b) = (self.rows.0 * tokens / 16, self.rows.1 * tokens / 16);
        a.min(b)..a.max(b)
    }

    /// The cache as numbers or bytes, with `change` applied to every number; NaN in pages that no sequence has.
    fn cache(&self, change: fn(f64) -> f64) -> (Vec<f64>, Vec<u8>) {
        let (dims, page_size) = (self.dims, self.batch.batch.page_size);
        let page = IndexerPage { page_size, width: dims };
        let mut numbers = vec![f64::NAN; self.batch.slots() * dims];
        let mut bytes = vec![0xff; self.batch.slots() * page.row_bytes()];
        for slot in (0..self.batch.slots()).filter(|slot| self.batch.used[slot / page_size]) {
            let row = &mut numbers[slot * dims..][..dims];
            for (i, value) in row.iter_mut().enumerate() {
                *value = change(self.values[2].at(self.seed ^ 3, slot * dims + i));
            }
            let values: Vec<f32> = row.iter().map(|&x| x as f32).collect();
            let scale = fp8::quantise(&values, &mut bytes[page.codes(slot)]);
            bytes[page.scale(slot)].copy_from_slice(&scale.to_le_bytes());
        }
        (numbers, bytes)
    }
}

struct IndexerLogits;

impl Contract for IndexerLogits {
    const NAME: &'static str = "contract_indexer_logits";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let batches =
            |page_sizes| Batches { page_sizes, max_seqs: 4, max_computed: 160, max_chunk: 24 }.any();
        let caches = prop_oneof![
            batches(&[1, 3, 16]).prop_map(|batch| (batch, false)),
            batches(&[4, 64]).prop_map(|batch| (batch, true)),
        ];
        let rows = prop_oneof![2 => Just((0, 16)), 1 => (0..=16_usize, 0..=16_usize)];
        let shape = select(&[(4_usize, 16_usize), (32, 128), (13, 48), (40, 128)][..]);
        let weights = select(&[Values::Normal, Values::Ties, Values::Negative, Values::Zeros][..]);
        let keys = select(&[Values::Normal, Values::Ties, Values::Negative, Values::Outliers][..]);
        let values = (Values::any_of(&Values::ORDINARY), weights, keys);
        (caches, rows, 0..5_usize, shape, values, any::<u64>()).prop_map(
            |((batch, fp8), rows, spare, (heads, dims), (q, weights, keys), seed)| Case {
                batch,
                rows,
                spare,
                heads,
                dims,
                fp8,
                values: [q, weights, keys],
                seed,
            },
        )
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { heads, dims, seed, .. } = case;
        let (rows, step) = (case.rows(), &case.batch.batch);
        let (tokens, scale) = (step.num_tokens(), ((heads * dims) as f64).powf(-0.5));
        let (host_batch, batch) = contract::batch(kernels, step);
        let visible: Vec<usize> = rows.clone().map(|t| step.visible(t)).collect();
        let columns = visible.iter().max().unwrap_or(&0) + case.spare;
        let shape = [rows.len(), columns];
        let seen = |logits: &[f64]| -> Vec<f64> {
            visible.iter().enumerate().flat_map(|(row, &n)| logits[row * columns..][..n].to_vec()).collect()
        };
        // On both sides what `change` makes of the numbers: the magnitudes are what the bound is relative to.
        let run = |change: fn(f64) -> f64| {
            let take = |i: usize, n| -> Vec<f64> {
                case.values[i].take(seed ^ (i as u64 + 1), n).into_iter().map(change).collect()
            };
            let q = contract::numbers(
                kernels,
                DType::Act,
                &[tokens, heads, dims],
                &take(0, tokens * heads * dims),
            );
            // Not bf16 numbers: the weights are floats.
            let weights: Vec<f64> = take(1, tokens * heads).iter().map(|w| w / 3.0).collect();
            let weights = contract::numbers(kernels, DType::Float, &[tokens, heads], &weights);
            let (numbers, bytes) = case.cache(change);
            let cache = if case.fp8 {
                contract::bytes(kernels, &[case.batch.pages, step.page_size, dims + 4], &bytes)
            } else {
                contract::numbers(kernels, DType::Act, &[case.batch.pages, step.page_size, dims], &numbers)
            };
            let mut out = contract::output(kernels, DType::Float, &shape);
            kernels
                .oracle()
                .indexer_logits(&host_batch, rows.clone(), &q.0, &weights.0, &cache.0, scale, &mut out.0)
                .unwrap();
            kernels
                .indexer_logits(&batch, rows.clone(), &q.1, &weights.1, &cache.1, scale, &mut out.1)
                .unwrap();
            (seen(&kernels.read(&out.1).unwrap()), seen(&kernels.oracle().read(&out.0).unwrap()))
        };
        let ((found, expected), (_, magnitudes)) = (run(|x| x), run(f64::abs));
        let units = (2 * dims + heads + 8) as f64 * F32_UNIT;
        let bound = |i: usize| units * magnitudes[i] + f64::from(f32::MIN_POSITIVE);
        // Few scores may cancel more.
        let relative_l2 = if found.len() > 1000 { 1e-6 } else { 1e-5 };
        assert_close("logits", 1, &found, &expected, relative_l2, bound);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<IndexerLogits>();
}

/// So many blocks of keys that workgroups have several.
#[test]
fn long_contexts_agree_too() {
    contract::on_wgpu(|kernels| {
        let sequences: Vec<_> = (0..32).map(|i| (4160 + 7 * i, 1)).collect();
        for fp8 in [false, true] {
            let case = Case {
                batch: BatchCase::of(64, &sequences),
                rows: (0, 16),
                spare: 0,
                heads: 2,
                dims: 128,
                fp8,
                values: [Values::Normal, Values::Normal, Values::Ties],
                seed: 5,
            };
            IndexerLogits::run(kernels, &case);
        }
    });
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The last key, the last, incomplete block of keys.
        ("first_key + lane <= position", "first_key + lane < position"),
        ("if position <= last {", "if position < last {"),
        // The last row of a sequence is not the one that sees most of a block.
        ("last = params.first_row + next;", "last = t;"),
        // Another sequence's keys.
        ("if seq != loaded {", "if loaded == HOLE {"),
        // 8-bit keys without their scale.
        ("scale *= bitcast<f32>", "scale += 0.0 * bitcast<f32>"),
        // Heads that vote against; the second of a lane's heads; heads beyond the first thirty-two.
        ("weight.x * relu(dots[j].x)", "weight.x * dots[j].x"),
        (
            "weight.y = weights[of_row + first_head + head + 1u]",
            "weight.y = weights[of_row + first_head + head]",
        ),
        ("let h = first_head + i / ROW_VECTORS", "let h = i / ROW_VECTORS"),
        // The page before.
        ("position / params.page_size];", "(max(position, 1u) - 1u) / params.page_size];"),
    ] {
        contract::catches::<IndexerLogits>(Edit { shader: "indexer_logits", find, replace });
    }
    for (find, replace) in [
        ("scale *= CODE * key_scale(slot);", "scale *= CODE + 0.0 * key_scale(slot);"),
        ("+ own % params.page_size * params.row_words;", "+ own % params.page_size;"),
        (
            "key_scales[lane.index] *= power(2u * TARGET - exponent);",
            "key_scales[lane.index] *= power(2u * TARGET - exponent - 1u);",
        ),
        ("sum += unit * of_heads;", "sum = unit * of_heads;"),
        ("let head = i + own_half;", "let head = i;"),
        // A quarter of the columns for another, and a half of the keys.
        ("put_quarter(own.c, own.c_too,", "put_quarter(own.b, own.c_too,"),
        ("put_key(at + 32u * KEY_STRIDE + 2u * v, second, factor);", ""),
        ("keys[at + 4u * v + 3u] = four_codes(first.w);", ""),
        // A token's queries for the next one's.
        ("ahead = load_queries(next, next_head, lane);", "ahead = load_queries(t, next_head, lane);"),
    ] {
        contract::catches::<IndexerLogits>(Edit { shader: "indexer_logits_matrix", find, replace });
    }
    for (shader, find, replace) in
        [("act_f32", "vec2(first, last)", "vec2(first, first)"), ("indexer_logits", "word + 1u)", "word)")]
    {
        contract::catches_in_f32::<IndexerLogits>(Edit { shader, find, replace });
    }
}

#[test]
fn misfits_are_named() {
    contract::on_wgpu(|kernels| {
        let (_, batch) = contract::batch(kernels, &BatchCase::of(8, &[(4, 2)]).batch);
        let tensor = |dtype, shape: &[usize]| kernels.alloc(dtype, shape).unwrap();
        let (q, weights) = (tensor(DType::Act, &[2, 2, 4]), tensor(DType::Float, &[2, 2]));
        let refused = |rows, cache: (DType, &[usize]), scale, columns, words: [&str; 2]| {
            let (cache, mut logits) = (tensor(cache.0, cache.1), tensor(DType::Float, &[2, columns]));
            let outcome = kernels.indexer_logits(&batch, rows, &q, &weights, &cache, scale, &mut logits);
            let error = outcome.unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        let cache = (DType::Act, &[9, 8, 4][..]);
        refused(0..2, cache, 1.0, 5, ["`logits`", "[2, at least 6]"]);
        refused(1..3, cache, 1.0, 6, ["`rows` is 1..3", "0..2"]);
        refused(0..2, cache, -1.0, 6, ["`scale` is -1", "positive"]);
        refused(0..2, (DType::Act, &[9, 4, 4]), 1.0, 6, ["`cache`", "[pages, 8, 4]"]);
        refused(0..2, (DType::Fp8, &[9, 8, 4]), 1.0, 6, ["`cache`", "[pages, 8, 8]"]);
        let wide = tensor(DType::Act, &[2, 2, 4096]);
        let cache = tensor(DType::Act, &[9, 8, 4096]);
        let mut logits = tensor(DType::Float, &[2, 6]);
        let outcome = kernels.indexer_logits(&batch, 0..2, &wide, &weights, &cache, 1.0, &mut logits);
        assert!(outcome.unwrap_err().to_string().contains("a workgroup's"));
    });
}
