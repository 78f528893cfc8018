//! `sparse_mla`.

use dsa80_reference::fp8::{self, MLA_GROUP, MlaRow};
use dsa80_reference::sampling::uniform;
use dsa80_reference::wgpu::{ActType, Edit};
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{BatchCase, Batches, F32_UNIT, Values, assert_close};
use half::bf16;
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    /// `kv_lora_rank` and rotary columns.
    dims: (usize, usize),
    fp8: bool,
    heads: usize,
    k: usize,
    /// Of 8 places, how many are holes.
    holes: usize,
    /// Of queries and of cache rows.
    values: (Values, Values),
    scale: f64,
    /// Of a latent's columns each group of the 8-bit cache's is smaller than the one before by so many powers of two.
    falls: i32,
    /// How many times as large as all others few rows are; where it is very many, of 8-bit rows only what has scales.
    peaks: f64,
    seed: u64,
}

/// Of these dims, those that are multiplied by matrices where an adapter has them.
const BY_MATRICES: (usize, usize) = (512, 64);

/// Products of what is huge with what is not tiny leave the softmax without meaning.
const VALUES: &[(Values, Values)] = &[
    (Values::Normal, Values::Normal),
    (Values::Ties, Values::Ties),
    (Values::Outliers, Values::Negative),
    (Values::Normal, Values::Outliers),
    (Values::Zeros, Values::Normal),
];

impl Case {
    fn width(&self) -> usize {
        self.dims.0 + self.dims.1
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

    /// The rows as numbers, of an 8-bit cache those that its bytes stand for, and those bytes; NaN where no sequence has a page.
    fn cache(&self) -> (Vec<Vec<f64>>, Vec<u8>) {
        let (slots, width, rank) = (self.batch.slots(), self.width(), self.dims.0);
        let layout = MlaRow { kv_lora_rank: rank, rope: self.dims.1 };
        let values = self.values.1.take(self.seed ^ 1, slots * width);
        let mut rows: Vec<Vec<f64>> = values.chunks(width).map(<[f64]>::to_vec).collect();
        for (slot, row) in rows.iter_mut().enumerate() {
            let peak = if slot % 32 == 5 { self.peaks } else { 1.0 };
            for (column, x) in row.iter_mut().enumerate() {
                let peak = if column >= rank && self.fp8 && self.peaks > 64.0 { 1.0 } else { peak };
                // Exact, and a bf16 as before.
                let falls = if column < rank { self.falls * (column / MLA_GROUP) as i32 } else { 0 };
                *x *= peak * 2.0_f64.powi(-falls);
            }
        }
        let mut bytes = Vec::new();
        for (slot, row) in rows.iter_mut().enumerate() {
            let mut out = vec![0; layout.row_bytes()];
            for group in 0..layout.groups() {
                let columns = group * MLA_GROUP..((group + 1) * MLA_GROUP).min(rank);
                let values: Vec<f32> = row[columns.clone()].iter().map(|&x| x as f32).collect();
                let scale = fp8::quantise(&values, &mut out[columns.clone()]);
                out[layout.scales()][4 * group..][..4].copy_from_slice(&scale.to_le_bytes());
                for column in columns.filter(|_| self.fp8) {
                    row[column] = f64::from(fp8::decode(out[column])) * f64::from(scale);
                }
            }
            for (x, bytes) in row[rank..].iter().zip(out[layout.rotary()].chunks_exact_mut(2)) {
                bytes.copy_from_slice(&bf16::from_f64(*x).to_le_bytes());
            }
            if !self.batch.used[slot / self.batch.batch.page_size] {
                row.fill(f64::NAN);
                out.fill(0x7f);
            }
            bytes.extend(out);
        }
        (rows, bytes)
    }

    /// How far an element may be from the oracle's: a score is off by what f32 sums of `width` products lose, its weight by the exponential
    /// of that and by its own rounding; some backends round weights to bf16, and what is relative to a maximum that
    /// may lag by 2^8 underflows below 2^-118; the result is rounded to bf16. In halves weights underflow below 2^-25, and rows lose what is
    /// below 2^-37 of the largest number of all; with 8-bit codes weights are times their scale, in units of the largest one of the group.
    fn bounds<K>(
        &self,
        kernels: &Backend<'_, K>,
        q: &[f64],
        rows: &[Vec<f64>],
        places: &[i32],
        expected: &[f64],
        halves: bool,
    ) -> Vec<f64> {
        let ((rank, _), width, batch) = (self.dims, self.width(), &self.batch.batch);
        let weights = if kernels.act() == ActType::Bf16 { (-8.0_f64).exp2() } else { 0.0 };
        let mut bounds = Vec::new();
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
                (self.scale * dot, lost + (self.scale * dot).abs() * 8.0 * F32_UNIT + 8.0 * F32_UNIT)
            };
            let scores: Vec<(f64, f64)> = selected.iter().map(score).collect();
            let most = scores.iter().fold(f64::NEG_INFINITY, |most, score| most.max(score.0));
            let lost = scores.iter().fold(0.0_f64, |lost, score| lost.max(score.1));
            let total: f64 = scores.iter().map(|score| (score.0 - most).exp()).sum();
            let relative = (2.0 * lost).exp_m1() + 2.0 * F32_UNIT * (self.k as f64 + 64.0) + weights;
            let numbers = selected.iter().flat_map(|row| row.iter());
            let largest_of_all = numbers.fold(0.0_f64, |largest, x| largest.max(x.abs()));
            let largest_of_groups: Vec<f64> = (0..rank.div_ceil(MLA_GROUP))
                .map(|group| {
                    let columns = group * MLA_GROUP..((group + 1) * MLA_GROUP).min(rank);
                    let numbers = selected.iter().flat_map(|row| &row[columns.clone()]);
                    numbers.fold(0.0_f64, |largest, x| largest.max(x.abs()))
                })
                .collect();
            for column in 0..rank {
                let (mut weighted, mut largest, mut sizes) = (0.0, 0.0_f64, 0.0);
                for (row, score) in selected.iter().zip(&scores) {
                    weighted += (score.0 - most).exp() / total * row[column].abs();
                    largest = largest.max(row[column].abs());
                    sizes += row[column].abs();
                }
                let out = expected[i * rank + column].abs();
                // However wrong the weights are, the output lies among the values.
                let below = if halves && self.dims == BY_MATRICES && self.fp8 {
                    selected.len() as f64 * largest_of_groups[column / MLA_GROUP] * (-25.0_f64).exp2()
                } else if halves && self.dims == BY_MATRICES {
                    sizes * (-25.0_f64).exp2() + largest_of_all * (-37.0_f64).exp2()
                } else {
                    sizes * (-118.0_f64).exp2()
                };
                let underflow = below + f64::from(f32::MIN_POSITIVE);
                let error = ((weighted + out) * relative).min(2.02 * largest) + underflow;
                bounds.push(error + kernels.half_ulp(out + error));
            }
        }
        bounds
    }

    /// Panics unless the backend does what the oracle does; in halves, as far as they go.
    fn judge<K: Kernels>(&self, kernels: &Backend<'_, K>, halves: bool) {
        let (step, (rank, rope)) = (&self.batch.batch, self.dims);
        let (tokens, pages) = (step.num_tokens(), self.batch.pages);
        let (host_batch, batch) = contract::batch(kernels, step);
        let q_shape = [tokens, self.heads, self.width()];
        let q_values = self.values.0.take(self.seed, q_shape.iter().product());
        let q = contract::numbers(kernels, DType::Act, &q_shape, &q_values);
        let (mut rows, bytes) = self.cache();
        let cache = if self.fp8 {
            let layout = MlaRow { kv_lora_rank: rank, rope };
            contract::bytes(kernels, &[pages, step.page_size, layout.row_bytes()], &bytes)
        } else {
            contract::numbers(kernels, DType::Act, &[pages, step.page_size, rank + rope], &rows.concat())
        };
        if !self.fp8 {
            rows =
                kernels.oracle().read(&cache.0).unwrap().chunks(rank + rope).map(<[f64]>::to_vec).collect();
        }
        let places = self.places();
        let topk_indices = contract::index(kernels, &[tokens, self.k], &places);
        let mut out = contract::output(kernels, DType::Act, &[tokens, self.heads, rank]);
        kernels
            .oracle()
            .sparse_mla(&host_batch, &q.0, &cache.0, &topk_indices.0, self.scale, &mut out.0)
            .unwrap();
        kernels.sparse_mla(&batch, &q.1, &cache.1, &topk_indices.1, self.scale, &mut out.1).unwrap();
        let (found, expected) = (kernels.read(&out.1).unwrap(), kernels.oracle().read(&out.0).unwrap());
        let q_values = kernels.oracle().read(&q.0).unwrap();
        let bounds = self.bounds(kernels, &q_values, &rows, &places, &expected, halves);
        assert_close("out", rank, &found, &expected, f64::INFINITY, |i| bounds[i]);
    }
}

struct SparseMla;

impl Contract for SparseMla {
    const NAME: &'static str = "contract_sparse_mla";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let batches =
            Batches { page_sizes: &[1, 3, 16, 64], max_seqs: 3, max_computed: 200, max_chunk: 4 }.any();
        let holes = prop_oneof![2 => Just(0_usize), 2 => 1..8_usize, 1 => Just(8)];
        let dims = select(&[(64_usize, 16_usize), (48, 16), (144, 16), BY_MATRICES][..]);
        let shape = (
            select(&[8_usize, 16, 24][..]),
            prop_oneof![3 => 0..=60_usize, 3 => 60..=260_usize, 1 => 900..=1000_usize],
            holes,
        );
        let scale = select(&[0.1, 1.0][..]);
        let cache =
            (prop_oneof![Just((false, 0)), Just((true, 0)), Just((true, 12))], select(&[1.0, 64.0][..]));
        (batches, dims, cache, shape, select(VALUES), scale, any::<u64>()).prop_map(
            |(batch, dims, ((fp8, falls), peaks), (heads, k, holes), values, scale, seed)| Case {
                batch,
                dims,
                fp8,
                heads,
                k,
                // Many places are more splits than are merged at a time: rows are among all of them.
                holes: if k > 600 { 7 } else { holes },
                values,
                scale,
                falls,
                // Where all rows weigh the same, some are beyond what halves hold beside the others.
                peaks: if matches!(values.0, Values::Zeros) { 2.0_f64.powi(20) } else { peaks },
                seed,
            },
        )
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        case.judge(kernels, false);
    }

    fn run_in_halves<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        case.judge(kernels, true);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<SparseMla>();
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // Holes weigh as much as a row of zeros.
        ("select(0.0, exp(score - higher), there)", "exp(select(0.0, score, there) - higher)"),
        // What was added up before the highest score.
        ("sums[h] *= factors[h];", "sums[h] *= 1.0;"),
        ("total = total * factor + weight", "total = total + weight"),
        // The next block's rows for this one; the rows of a page in another order.
        ("turn ^= KEYS;", "turn ^= 0u;"),
        ("u32(position) % params.page_size,", "0u,"),
        // A group's scale for another; rotary columns that begin elsewhere.
        ("* SCALES + v / GROUP_VECTORS", "* SCALES"),
        ("* SCALES + word / 4u / GROUP_VECTORS", "* SCALES"),
        ("2u * LATENT_VECTORS + SCALES + 4u *", "2u * LATENT_VECTORS + 4u *"),
        // Half of the columns.
        ("values = vec4(values.xy, pair);", "values = values;"),
    ] {
        contract::catches::<SparseMla>(Edit { shader: "sparse_mla", find, replace });
    }
    for (find, replace) in [
        // Splits are added up as if they were relative to the same score; one is left out, or the last.
        ("exp(highest_of(start, i) - highest)", "1.0"),
        ("(first + second)", "second"),
        ("i < params.splits) *", "i + 1u < params.splits) *"),
        // The splits before the ninth.
        ("exp(highest - now) * sum", "sum"),
    ] {
        contract::catches::<SparseMla>(Edit { shader: "sparse_mla_merge", find, replace });
    }
    for (find, replace) in [
        // Sums that were relative to a lower score.
        ("factors[own_head] = factor;", "factors[own_head] = 1.0;"),
        ("total *= factor;", ""),
        ("select(0.0, exp(score - raised), there)", "exp(select(0.0, score, there) - raised)"),
        // A score far above the others.
        ("subgroupAny(score > reference + AHEAD)", "subgroupAny(reference == LOWEST)"),
        // The codes' scales.
        ("let own_scales = scales[own_key];", "let own_scales = scales[0];"),
        ("f16(scaled.w)", "f16(scaled.z)"),
        ("select(VECTORS, CODES + 1u, FP8)", "select(VECTORS, CODES, FP8)"),
        ("+ select(0u, HEADS, FP8 && v >= VECTORS)", ""),
        ("&weights[select(0u, 128u * lane.subgroup, FP8)]", "&weights[0u]"),
        // Rows where there are none.
        ("select(0xffff0000u, 0u, hole)", "0xffff0000u"),
        // A tile that is larger than those before: that it is, its rows, its scales, and what was added up.
        ("cut_off || !is_finite(dot_product)", "cut_off"),
        ("of_rows = most;", ""),
        ("larger = any(", "larger = false && any("),
        ("select(falls(of_rows, most),", "select(1.0,"),
        ("falls(before, own_scale(of_scales, lane)), FP8", "1.0, FP8"),
        // The tile after the next.
        (
            "position_at(t, first_row + 4u * KEYS + own_key)",
            "position_at(t, first_row + 3u * KEYS + own_key)",
        ),
    ] {
        contract::catches::<SparseMla>(Edit { shader: "sparse_mla_matrix", find, replace });
    }
    for (shader, find, replace) in [
        ("act_f32", "dot(a[3], b[3])", "dot(a[2], b[3])"),
        ("act_f32", "high.xy, high.zw", "high.xy, high.xy"),
        ("act_f32", "bf16_pair(words.w)", "bf16_pair(words.z)"),
        ("sparse_mla", "min(head, heads - 1u)", "0u"),
        ("sparse_mla", "cached(slot, ACT_WORDS * i + 1u)", "cached(slot, ACT_WORDS * i)"),
    ] {
        contract::catches_in_f32::<SparseMla>(Edit { shader, find, replace });
    }
}

#[test]
fn nothing_selected_gives_zeros() {
    for dims in [(64, 16), BY_MATRICES] {
        for (k, holes) in [(60, 8), (200, 8), (0, 0)] {
            agrees_on_wgpu(dims, false, 8, k, holes);
        }
    }
}

/// Heads that are no whole group, selections that are no whole tile.
#[test]
fn odd_shapes_agree_in_wgsl() {
    for (dims, fp8) in [((64, 16), false), (BY_MATRICES, false), (BY_MATRICES, true)] {
        for (heads, k) in [(12, 37), (1, 1), (9, 70)] {
            agrees_on_wgpu(dims, fp8, heads, k, 1);
        }
    }
}

fn agrees_on_wgpu(dims: (usize, usize), fp8: bool, heads: usize, k: usize, holes: usize) {
    contract::on_wgpu(|kernels| {
        let values = (Values::Normal, Values::Normal);
        let batch = BatchCase::of(16, &[(70, 2)]);
        let (scale, falls, peaks, seed) = (0.3, 0, 1.0, 3);
        let case = Case { batch, dims, fp8, heads, k, holes, values, scale, falls, peaks, seed };
        case.judge(kernels, kernels.context().has_matrices());
    });
}

#[test]
fn misfits_are_named() {
    contract::on_wgpu(|kernels| {
        let (_, batch) = contract::batch(kernels, &BatchCase::of(3, &[(0, 2)]).batch);
        let tensor = |dtype, shape: &[usize]| kernels.alloc(dtype, shape).unwrap();
        let refused =
            |q: &[usize], cache: (DType, &[usize]), topk: &[usize], out: &[usize], words: [&str; 2]| {
                let (q, cache) = (tensor(DType::Act, q), tensor(cache.0, cache.1));
                let (topk, mut out) = (tensor(DType::Index, topk), tensor(DType::Act, out));
                let error =
                    kernels.sparse_mla(&batch, &q, &cache, &topk, 1.0, &mut out).unwrap_err().to_string();
                assert!(words.iter().all(|word| error.contains(word)), "{error}");
            };
        let (q, cache, topk, out) =
            (&[2, 8, 80][..], (DType::Act, &[4, 3, 80][..]), &[2, 5][..], &[2, 8, 64][..]);
        refused(&[3, 8, 80], cache, topk, out, ["`q`", "[2, H"]);
        refused(q, (DType::Act, &[4, 3, 72]), topk, out, ["`cache`", "[pages, 3, 80]"]);
        refused(q, (DType::Fp8, &[4, 3, 80]), topk, out, ["`cache`", "[pages, 3, 112]"]);
        refused(q, cache, &[1, 5], out, ["`topk_indices`", "[2, k]"]);
        refused(q, cache, topk, &[2, 8, 66], ["`out`", "multiple of 8"]);
        refused(q, cache, topk, &[2, 8, 96], ["`out`", "at most 80"]);
    });
}
