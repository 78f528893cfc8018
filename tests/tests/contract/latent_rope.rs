//! `latent_rope` into a cache of activations.

use dsa80_reference::wgpu::{ActType, Edit};
use dsa80_reference::{DType, Kernels, RopeLayout};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{BatchCase, Batches, F32_UNIT, Interval, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

use crate::rotary::{RELATIVE_L2, rotate, turns};

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    /// Latent columns and rotary ones.
    dims: [usize; 2],
    weight: DType,
    values: Values,
    seed: u64,
}

/// What rows that the kernel writes may be.
pub(crate) fn intervals(
    x: &[f64],
    weight: &[f64],
    eps: f64,
    turns: &[f64],
    dims: [usize; 2],
    act: ActType,
) -> Vec<Interval> {
    let [rank, rope] = dims;
    let error = ((rank as f64).min(64.0) + 17.0) * F32_UNIT / 2.0 + 12.0 * F32_UNIT;
    let mut out = Vec::new();
    for (x, turns) in x.chunks(rank + rope).zip(turns.chunks(rope)) {
        let mean = x[..rank].iter().map(|x| x * x).sum::<f64>() / rank as f64;
        let reciprocal = 1.0 / (mean + eps).sqrt();
        out.extend(x[..rank].iter().zip(weight).map(|(x, weight)| {
            let normed = weight * x * reciprocal;
            Interval::around(normed, 1.01 * error * normed.abs()).stored(act)
        }));
        let mut key: Vec<Interval> = x[rank..].iter().map(|&x| Interval::around(x, 0.0)).collect();
        rotate(&mut key, RopeLayout::Interleaved, turns, act);
        out.extend(key);
    }
    out
}

/// Compares a cache, all of which was the same before: rows of the batch's slots, and no others, are new.
pub(crate) fn assert_written<K>(
    kernels: &Backend<'_, K>,
    batch: &BatchCase,
    values: Values,
    width: usize,
    found: &[f64],
    expected: &[f64],
    intervals: &[Interval],
) {
    let mut of_slot = vec![None; batch.slots()];
    for (t, &slot) in batch.batch.slot_mapping.iter().enumerate() {
        of_slot[slot as usize] = Some(t);
    }
    assert_close("cache", width, found, expected, kernels.relative_l2(values, expected, RELATIVE_L2), |i| {
        match of_slot[i / width] {
            None => 0.0,
            Some(t) => intervals[t * width + i % width].farthest(expected[i]),
        }
    });
}

struct LatentRope;

impl Contract for LatentRope {
    const NAME: &'static str = "contract_latent_rope";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let batches = Batches { page_sizes: &[4, 16], max_seqs: 3, max_computed: 20, max_chunk: 9 }.any();
        let weight = select(&[DType::Bf16, DType::F16, DType::F32][..]);
        let dims = select(&[[64_usize, 8], [208, 64], [16, 16]][..]);
        (batches, dims, weight, Values::any_of(&Values::ORDINARY), any::<u64>())
            .prop_map(|(batch, dims, weight, values, seed)| Case { batch, dims, weight, values, seed })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let (&[rank, rope], seed, eps) = (&case.dims, case.seed, 1e-6);
        let (width, rows) = (rank + rope, case.batch.batch.num_tokens());
        let x = contract::numbers(kernels, DType::Act, &[rows, width], &case.values.take(seed, rows * width));
        let weights: Vec<f64> = Values::Normal.take(seed ^ 2, rank).iter().map(|w| 1.0 + 0.5 * w).collect();
        let weight = contract::weight(kernels, case.weight, &[rank], &weights);
        let cos_sin = turns(kernels, rows, rope, seed);
        let batch = contract::batch(kernels, &case.batch.batch);
        let shape = [case.batch.pages, case.batch.batch.page_size, width];
        let before = Values::Normal.take(seed ^ 5, shape.iter().product());
        let mut cache = contract::numbers(kernels, DType::Act, &shape, &before);
        let oracle = kernels.oracle();
        oracle.latent_rope(&batch.0, &x.0, &weight.0, eps, &cos_sin.0, &mut cache.0).unwrap();
        kernels.latent_rope(&batch.1, &x.1, &weight.1, eps, &cos_sin.1, &mut cache.1).unwrap();
        let read = |tensor| oracle.read(tensor).unwrap();
        let intervals =
            intervals(&read(&x.0), &read(&weight.0), eps, &read(&cos_sin.0), case.dims, kernels.act());
        let found = kernels.read(&cache.1).unwrap();
        assert_written(kernels, &case.batch, case.values, width, &found, &read(&cache.0), &intervals);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<LatentRope>();
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        ("word < params.rank / 2u {\n            pair", "word + 1u < params.rank / 2u {\n            pair"),
        ("pair.x * turn.x - pair.y", "pair.x * turn.x + pair.y"),
        ("let out = slot * words;", "let out = t * words;"),
        ("f32(params.rank)", "f32(params.rank + params.rope)"),
    ] {
        contract::catches::<LatentRope>(Edit { shader: "latent_rope", find, replace });
    }
}
