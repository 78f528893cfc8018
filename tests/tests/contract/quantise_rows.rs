//! `latent_rope` and `layer_norm_rope` into caches of 8 bits.

use std::ops::Range;

use dsa80_reference::fp8::{self, IndexerPage, MLA_GROUP, MlaRow};
use dsa80_reference::wgpu::{Edit, Wgpu};
use dsa80_reference::{DType, Kernels, RopeLayout};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{BatchCase, Batches, Interval, Values, assert_same};
use half::bf16;
use proptest::prelude::*;
use proptest::sample::select;

use crate::rotary::turns;
use crate::{latent_rope, layer_norm_rope};

const EPS: f64 = 1e-6;

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    /// Columns that become codes, and rotary ones: behind them, or the first of them.
    dims: [usize; 2],
    values: Values,
    seed: u64,
}

fn cases(dims: &'static [[usize; 2]], values: &'static [Values]) -> impl Strategy<Value = Case> {
    let batches = Batches { page_sizes: &[4, 64], max_seqs: 4, max_computed: 24, max_chunk: 9 }.any();
    (batches, select(dims), Values::any_of(values), any::<u64>())
        .prop_map(|(batch, dims, values, seed)| Case { batch, dims, values, seed })
}

/// Columns, and where in the cache their codes and their scale lie.
type Group = (Range<usize>, Range<usize>, Range<usize>);

/// Fails unless codes and scales are the nearest to what `row`, a slot's, allows; what was looked at is ones again, as before the launch.
fn check_groups(row: &[Interval], found: &mut [u8], groups: Vec<Group>) {
    for (columns, codes, scale_at) in groups {
        let scale = f32::from_le_bytes(found[scale_at.clone()].try_into().unwrap());
        let zero = Interval { lo: 0.0, hi: 0.0 };
        let largest = row[columns.clone()]
            .iter()
            .fold(zero, |all, x| Interval { lo: all.lo.max(x.abs().lo), hi: all.hi.max(x.abs().hi) });
        let scales = largest.map(|largest| f64::from(fp8::scale(largest as f32)));
        assert!(scales.contains(f64::from(scale)), "scale {scale:e}, expected {scales:?}");
        for (column, place) in columns.zip(codes.clone()) {
            let value = f64::from(fp8::decode(found[place])) * f64::from(scale);
            // Half a step of three bits of fraction, of the value or of the smallest normal number.
            let half = 1.0001 * (row[column].magnitude() / 16.0).max(f64::from(scale) / 1024.0);
            assert!(
                row[column].widened(half).contains(value),
                "column {column}: {value:e}, expected {:?}",
                row[column]
            );
        }
        found[codes].fill(0xff);
        found[scale_at].fill(0xff);
    }
}

/// Of a batch, nothing but its rows was written.
fn assert_untouched(found: &[u8]) {
    let written = found.iter().position(|&byte| byte != 0xff);
    assert_eq!(written, None, "a byte that belongs to no row of this step was written");
}

struct Latents;

impl Contract for Latents {
    const NAME: &'static str = "contract_latent_rope_fp8";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        cases(&[[512, 64], [16, 8], [208, 64], [144, 16]], &Values::ORDINARY)
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let (&[rank, rope], seed, rows) = (&case.dims, case.seed, case.batch.batch.num_tokens());
        let width = rank + rope;
        let x = contract::numbers(kernels, DType::Act, &[rows, width], &case.values.take(seed, rows * width));
        let weights: Vec<f64> = Values::Normal.take(seed ^ 2, rank).iter().map(|w| 1.0 + 0.5 * w).collect();
        let weight = contract::weight(kernels, DType::F32, &[rank], &weights);
        let cos_sin = turns(kernels, rows, rope, seed);
        let batch = contract::batch(kernels, &case.batch.batch).1;
        let layout = MlaRow { kv_lora_rank: rank, rope };
        let row_bytes = layout.row_bytes();
        let shape = [case.batch.pages, case.batch.batch.page_size, row_bytes];
        let mut cache = contract::output(kernels, DType::Fp8, &shape).1;
        kernels.latent_rope(&batch, &x.1, &weight.1, EPS, &cos_sin.1, &mut cache).unwrap();

        let read = |tensor| kernels.oracle().read(tensor).unwrap();
        let expected = latent_rope::intervals(
            &read(&x.0),
            &read(&weight.0),
            EPS,
            &read(&cos_sin.0),
            case.dims,
            kernels.act(),
        );
        let mut found = kernels.read_bytes(&cache).unwrap();
        for (row, &slot) in expected.chunks(width).zip(&case.batch.batch.slot_mapping) {
            let found = &mut found[slot as usize * row_bytes..][..row_bytes];
            let group = |g: usize| {
                let (columns, scale) = (g * MLA_GROUP..rank.min((g + 1) * MLA_GROUP), layout.scales().start);
                (columns.clone(), columns, scale + 4 * g..scale + 4 * g + 4)
            };
            check_groups(row, found, (0..layout.groups()).map(group).collect());
            for (interval, bytes) in row[rank..].iter().zip(found[layout.rotary()].chunks_exact(2)) {
                let value = bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64();
                let interval = interval.round_bf16();
                assert!(interval.contains(value), "rotary: {value:e}, expected {interval:?}");
            }
            assert!(found[layout.rotary().end..].iter().all(|&byte| byte == 0), "padding");
            found.fill(0xff);
        }
        assert_untouched(&found);
    }
}

struct Keys;

impl Contract for Keys {
    const NAME: &'static str = "contract_layer_norm_rope_fp8";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        const VALUES: &[Values] = &[Values::Normal, Values::Ties, Values::Negative, Values::Outliers];
        cases(&[[128, 64], [48, 8], [16, 16]], VALUES)
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let (&[width, rope], seed, rows) = (&case.dims, case.seed, case.batch.batch.num_tokens());
        let x = contract::numbers(kernels, DType::Act, &[rows, width], &case.values.take(seed, rows * width));
        let weights: Vec<f64> = Values::Normal.take(seed ^ 2, width).iter().map(|w| 1.0 + 0.5 * w).collect();
        let weight = contract::weight(kernels, DType::F32, &[width], &weights);
        let bias = contract::weight(kernels, DType::Bf16, &[width], &Values::Normal.take(seed ^ 3, width));
        let cos_sin = turns(kernels, rows, rope, seed);
        let batch = contract::batch(kernels, &case.batch.batch).1;
        let page = IndexerPage { page_size: case.batch.batch.page_size, width };
        let shape = [case.batch.pages, page.page_size, page.row_bytes()];
        let mut cache = contract::output(kernels, DType::Fp8, &shape).1;
        let layout = RopeLayout::Interleaved;
        kernels
            .layer_norm_rope(&batch, &x.1, &weight.1, &bias.1, EPS, layout, &cos_sin.1, &mut cache)
            .unwrap();

        let read = |tensor| kernels.oracle().read(tensor).unwrap();
        let parameters = [&*read(&weight.0), &*read(&bias.0)];
        let expected = layer_norm_rope::intervals(
            &read(&x.0),
            parameters,
            &read(&cos_sin.0),
            case.dims,
            layout,
            kernels.act(),
        );
        let mut found = kernels.read_bytes(&cache).unwrap();
        for (row, &slot) in expected.chunks(width).zip(&case.batch.batch.slot_mapping) {
            let slot = slot as usize;
            check_groups(row, &mut found, vec![(0..width, page.codes(slot), page.scale(slot))]);
        }
        assert_untouched(&found);
    }
}

#[test]
fn latents_agree_with_the_oracle() {
    contract::check::<Latents>();
}

#[test]
fn keys_agree_with_the_oracle() {
    contract::check::<Keys>();
}

/// Keys that are their bias: what is quantised is known to the bit, ties and all, and so are the bytes.
#[test]
fn codes_and_scales_are_the_oracles() {
    contract::on_wgpu(|kernels| {
        let (rows, width, layout) = (64, 128, RopeLayout::Half);
        let case = BatchCase::of(4, &[(0, rows)]);
        let batch = contract::batch(kernels, &case.batch);
        let x = contract::numbers(kernels, DType::Act, &[rows, width], &Values::Normal.take(1, rows * width));
        let zeros = contract::weight(kernels, DType::F32, &[width], &vec![0.0; width]);
        // A turn by nothing.
        let cos_sin = contract::numbers(kernels, DType::Float, &[rows, 1, 2], &[1.0, 0.0].repeat(rows));
        // Middles between codes, under a scale of one.
        let middles = (0..0x7e).map(|code| f64::from(fp8::decode(code) + fp8::decode(code + 1)) / 2.0);
        let middles: Vec<f64> = middles.chain([448.0, -448.0]).collect();
        for values in Values::ORDINARY.map(|values| values.take(3, width)).into_iter().chain([middles]) {
            let bias = contract::weight(kernels, DType::Bf16, &[width], &values);
            let shape = [case.pages, 4, width + 4];
            let mut cache = contract::bytes(kernels, &shape, &vec![0xff; shape.iter().product()]);
            kernels
                .oracle()
                .layer_norm_rope(&batch.0, &x.0, &zeros.0, &bias.0, EPS, layout, &cos_sin.0, &mut cache.0)
                .unwrap();
            kernels
                .layer_norm_rope(&batch.1, &x.1, &zeros.1, &bias.1, EPS, layout, &cos_sin.1, &mut cache.1)
                .unwrap();
            let expected = kernels.oracle().read_bytes(&cache.0).unwrap();
            assert_same("cache", width + 4, &kernels.read_bytes(&cache.1).unwrap(), &expected);
        }
    });
}

/// What both caches hold after a step whose rows partly have no slot, as numbers and in 8 bits.
fn written(kernels: &Backend<'_, Wgpu>) -> Vec<Vec<u8>> {
    let mut case = BatchCase::of(4, &[(3, 25), (0, 30)]);
    for (t, slot) in [(0, -1), (2, (case.pages * 4) as i64), (4, i64::MAX), (6, i64::MIN)] {
        case.batch.slot_mapping[t] = slot;
    }
    let (rows, rank, rope) = (case.batch.num_tokens(), 48, 16);
    let batch = contract::batch(kernels, &case.batch).1;
    let act = |seed, width: usize| {
        contract::numbers(kernels, DType::Act, &[rows, width], &Values::Normal.take(seed, rows * width)).1
    };
    let (latent, key) = (act(1, rank + rope), act(2, rank));
    let weight = contract::weight(kernels, DType::F32, &[rank], &vec![1.0; rank]).1;
    let cos_sin = turns(kernels, rows, rope, 3).1;
    let mut all = Vec::new();
    for fp8 in [false, true] {
        let mla = MlaRow { kv_lora_rank: rank, rope }.row_bytes();
        let cache = |act: usize, bytes: usize| {
            let (dtype, row) = if fp8 { (DType::Fp8, bytes) } else { (DType::Act, act) };
            contract::output(kernels, dtype, &[case.pages, 4, row]).1
        };
        let (mut latents, mut keys) = (cache(rank + rope, mla), cache(rank, rank + 4));
        kernels.latent_rope(&batch, &latent, &weight, EPS, &cos_sin, &mut latents).unwrap();
        let layout = RopeLayout::Half;
        kernels.layer_norm_rope(&batch, &key, &weight, &weight, EPS, layout, &cos_sin, &mut keys).unwrap();
        all.extend([&latents, &keys].map(|cache| {
            if fp8 {
                return kernels.read_bytes(cache).unwrap();
            }
            let bits = |x: f64| if x.is_nan() { [0xff; 2] } else { bf16::from_f64(x).to_le_bytes() };
            kernels.read(cache).unwrap().into_iter().flat_map(bits).collect()
        }));
    }
    all
}

#[test]
fn a_cache_of_several_bindings_is_written_like_one_of_one() {
    contract::on_wgpu(|kernels| {
        let whole = written(kernels);
        for (cache, row) in whole.iter().zip([128, 96, 96, 52]) {
            // Four of 55 tokens have no slot.
            let rows = cache.chunks(row).filter(|row| row.iter().any(|&byte| byte != 0xff)).count();
            assert!((51..=51 + 16).contains(&rows), "{rows} rows");
        }
        contract::with_small_bindings(4096, |small| {
            if small.context().name() == kernels.context().name() {
                assert_eq!(written(small), whole);
            }
        });
    });
}

#[test]
fn planted_faults_are_seen() {
    for (shader, find, replace) in [
        // What pads a row; the next group's scale; columns that begin elsewhere.
        ("quantise_rows", "        cache[i] = word;", "        if word != 0u { cache[i] = word; }"),
        ("quantise_rows", "2u * i / group_pairs * group_pairs", "0u"),
        ("quantise_rows", "rows[start + pairs + i - rotary]", "rows[start + i - rotary]"),
        // Codes are cut off, twice.
        ("fp8", "let up = (quotient & 1u) == 1u", "let up = false && (quotient & 1u) == 1u"),
        ("fp8", "u32(round(magnitude", "u32(floor(magnitude"),
        ("quantise_rows", "let slot = u32(mapped) - params.first_slot", "let slot = t"),
    ] {
        contract::catches::<Latents>(Edit { shader, find, replace });
    }
    for (find, replace) in [
        (
            "scales = page + params.page_size * code_words +",
            "scales = page + params.page_size * code_words + 0u *",
        ),
        (
            "out = page + slot % params.page_size * code_words",
            "out = page + (slot ^ 1u) % params.page_size * code_words",
        ),
    ] {
        contract::catches::<Keys>(Edit { shader: "quantise_rows", find, replace });
    }
    let edit =
        Edit { shader: "act_f32", find: "pack_bf16(pair.x, pair.y)", replace: "pack_bf16(pair.x, pair.x)" };
    contract::catches_in_f32::<Latents>(edit);
}

#[test]
fn misfits_are_named() {
    contract::on_wgpu(|kernels| {
        let batch = contract::batch(kernels, &BatchCase::of(3, &[(0, 2)]).batch).1;
        let tensor = |dtype, shape: &[usize]| kernels.alloc(dtype, shape).unwrap();
        let refused = |x: [usize; 2], rank: usize, cache: (DType, [usize; 3]), words: [&str; 2]| {
            let weight = contract::weight(kernels, DType::F32, &[rank], &vec![1.0; rank]).1;
            let cos_sin = tensor(DType::Float, &[2, 4, 2]);
            let (x, mut cache) = (tensor(DType::Act, &x), tensor(cache.0, &cache.1));
            let outcome = kernels.latent_rope(&batch, &x, &weight, EPS, &cos_sin, &mut cache);
            let error = outcome.unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        refused([2, 24], 16, (DType::Fp8, [4, 3, 24]), ["`cache`", "[pages, 3, 48]"]);
        refused([2, 24], 16, (DType::Act, [4, 2, 24]), ["`cache`", "[pages, 3, 24]"]);
        refused([2, 24], 16, (DType::Index, [4, 3, 24]), ["`cache` holds indices", "activations"]);
        refused([2, 26], 18, (DType::Fp8, [4, 3, 48]), ["`kv_lora_rank` is 18", "multiple of 4"]);
        let mut cache = tensor(DType::Fp8, &[4, 3, 20]);
        let weight = contract::weight(kernels, DType::F32, &[16], &[1.0; 16]).1;
        let (x, cos_sin) = (tensor(DType::Act, &[2, 16]), tensor(DType::Float, &[2, 4, 2]));
        let layout = RopeLayout::Half;
        let outcome =
            kernels.layer_norm_rope(&batch, &x, &weight, &weight, EPS, layout, &cos_sin, &mut cache);
        assert!(outcome.unwrap_err().to_string().contains("`page_size` is 3"));
    });
}
