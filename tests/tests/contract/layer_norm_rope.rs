//! `layer_norm_rope` into a cache of activations.

use dsa80_reference::wgpu::{ActType, Edit};
use dsa80_reference::{DType, Kernels, RopeLayout};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{BatchCase, Batches, F32_UNIT, Interval, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::latent_rope::assert_written;
use crate::rotary::{rotate, turns};

const EPS: f64 = 1e-6;

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    /// Columns and rotary ones.
    dims: [usize; 2],
    layout: RopeLayout,
    weight: DType,
    bias: DType,
    values: Values,
    seed: u64,
}

/// What rows that the kernel writes may be.
pub(crate) fn intervals(
    x: &[f64],
    [weight, bias]: [&[f64]; 2],
    turns: &[f64],
    [width, rope]: [usize; 2],
    layout: RopeLayout,
    act: ActType,
) -> Vec<Interval> {
    let additions = (width as f64).min(64.0) + 10.0;
    let mut out = Vec::new();
    for (x, turns) in x.chunks(width).zip(turns.chunks(rope)) {
        let mean = x.iter().sum::<f64>() / width as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let deviation = (variance + EPS).sqrt();
        let mean_error = (additions + 4.0) * F32_UNIT * x.iter().map(|x| x.abs()).sum::<f64>() / width as f64;
        let deviation_error = (additions + 7.0) * F32_UNIT / 2.0
            + mean_error.powi(2) / (2.0 * (variance + EPS))
            + 12.0 * F32_UNIT;
        let mut row: Vec<Interval> = (0..width)
            .map(|c| {
                let centred = x[c] - mean;
                let normed = weight[c] * centred / deviation;
                let error = weight[c].abs() * (mean_error + F32_UNIT * centred.abs()) / deviation
                    + normed.abs() * (deviation_error + 3.0 * F32_UNIT)
                    + F32_UNIT * (normed + bias[c]).abs();
                Interval::around(normed + bias[c], 1.01 * error).stored(act)
            })
            .collect();
        rotate(&mut row[..rope], layout, turns, act);
        out.extend(row);
    }
    out
}

struct LayerNormRope;

impl Contract for LayerNormRope {
    const NAME: &'static str = "contract_layer_norm_rope";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let batches = Batches { page_sizes: &[4, 16], max_seqs: 3, max_computed: 20, max_chunk: 9 }.any();
        let types =
            select(&[(DType::Bf16, DType::F32), (DType::F32, DType::F16), (DType::F16, DType::Bf16)][..]);
        let layout = select(&[RopeLayout::Interleaved, RopeLayout::Half][..]);
        let values = Values::any_of(&[Values::Normal, Values::Ties, Values::Negative, Values::Outliers]);
        (batches, select(&[[128_usize, 64], [48, 8], [16, 16]][..]), layout, types, values, any::<u64>())
            .prop_map(|(batch, dims, layout, (weight, bias), values, seed)| Case {
                batch,
                dims,
                layout,
                weight,
                bias,
                values,
                seed,
            })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { dims: [width, rope], layout, seed, .. } = case;
        let rows = case.batch.batch.num_tokens();
        let normals = |seed, scale: f64, offset: f64| -> Vec<f64> {
            Values::Normal.take(seed, width).iter().map(|x| offset + scale * x).collect()
        };
        let x = contract::numbers(kernels, DType::Act, &[rows, width], &case.values.take(seed, rows * width));
        let weight = contract::weight(kernels, case.weight, &[width], &normals(seed ^ 1, 0.5, 1.0));
        let bias = contract::weight(kernels, case.bias, &[width], &normals(seed ^ 2, 0.3, 0.0));
        let cos_sin = turns(kernels, rows, rope, seed);
        let batch = contract::batch(kernels, &case.batch.batch);
        let shape = [case.batch.pages, case.batch.batch.page_size, width];
        let before = Values::Normal.take(seed ^ 5, shape.iter().product());
        let mut cache = contract::numbers(kernels, DType::Act, &shape, &before);
        let oracle = kernels.oracle();
        oracle
            .layer_norm_rope(&batch.0, &x.0, &weight.0, &bias.0, EPS, layout, &cos_sin.0, &mut cache.0)
            .unwrap();
        kernels
            .layer_norm_rope(&batch.1, &x.1, &weight.1, &bias.1, EPS, layout, &cos_sin.1, &mut cache.1)
            .unwrap();
        let read = |tensor| oracle.read(tensor).unwrap();
        let parameters = [&*read(&weight.0), &*read(&bias.0)];
        let intervals =
            intervals(&read(&x.0), parameters, &read(&cos_sin.0), case.dims, layout, kernels.act());
        let found = kernels.read(&cache.1).unwrap();
        assert_written(kernels, &case.batch, case.values, width, &found, &read(&cache.0), &intervals);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<LayerNormRope>();
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        ("let off = act_pair(x[start + word]) - mean;", "let off = act_pair(x[start + word]);"),
        ("round_act(scaled", "(scaled"),
        ("column % (DIM / 2u), HALF", "column / 2u, HALF"),
        ("cache[slot *", "cache[t *"),
    ] {
        contract::catches::<LayerNormRope>(Edit { shader: "layer_norm_rope", find, replace });
    }
    let edit = Edit { shader: "act_f32", find: "return x;", replace: "return bf16_of(bf16_bits(x), 0u);" };
    contract::catches_in_f32::<LayerNormRope>(edit);
}
