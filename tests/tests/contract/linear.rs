//! `linear` and `linear_split`.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::Values;
use dsa80_tests::parity::contract::{self, Backend, Contract};
use proptest::prelude::*;
use proptest::sample::select;

use crate::products::{Stored, assert_products};

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    columns: usize,
    /// Of one output, or of several.
    features: Vec<usize>,
    weight: DType,
    floats: bool,
    values: Values,
    seed: u64,
}

struct Linear;

impl Contract for Linear {
    const NAME: &'static str = "contract_linear";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let tokens = select(&[0_usize, 1, 1, 1, 2, 5, 8, 11, 16, 17, 40, 70][..]);
        let columns = select(&[8_usize, 36, 90, 264, 800][..]);
        let features = select(vec![vec![2], vec![70], vec![64, 6], vec![12, 50, 8]]);
        let weight = select(&[DType::Bf16, DType::F16, DType::F32][..]);
        let values = Values::any_of(&[Values::Normal, Values::Ties, Values::Negative, Values::Zeros]);
        (tokens, columns, features, weight, any::<bool>(), values, any::<u64>()).prop_map(
            |(tokens, columns, features, weight, floats, values, seed)| Case {
                tokens,
                columns,
                features,
                weight,
                floats,
                values,
                seed,
            },
        )
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { tokens, columns, seed, .. } = case;
        let all: usize = case.features.iter().sum();
        let x = contract::numbers(
            kernels,
            DType::Act,
            &[tokens, columns],
            &case.values.take(seed, tokens * columns),
        );
        let weights = Values::Normal.take(seed ^ 1, (all + 3) * columns).into_iter().enumerate();
        let weights: Vec<f64> = weights.map(|(i, w)| w * (1.0 + (i % 89) as f64 / 887.0)).collect();
        // Rows beyond the last are not read.
        let rows = if case.features.len() > 1 { all + 3 } else { all };
        let weight = contract::weight(kernels, case.weight, &[rows, columns], &weights[..rows * columns]);
        let dtype = |i: usize| if (i == 0) == case.floats { DType::Float } else { DType::Act };
        let mut outs: Vec<_> = case
            .features
            .iter()
            .enumerate()
            .map(|(i, &features)| contract::output(kernels, dtype(i), &[tokens, features]))
            .collect();
        let oracle = kernels.oracle();
        if let [(host, device)] = &mut outs[..] {
            oracle.linear(&x.0, &weight.0, host).unwrap();
            kernels.linear(&x.1, &weight.1, device).unwrap();
        } else {
            let (mut hosts, mut devices): (Vec<_>, Vec<_>) =
                outs.iter_mut().map(|(host, device)| (host, device)).unzip();
            oracle.linear_split(&x.0, &weight.0, &mut hosts).unwrap();
            kernels.linear_split(&x.1, &weight.1, &mut devices).unwrap();
        }
        let (x, weight) = (oracle.read(&x.0).unwrap(), oracle.read(&weight.0).unwrap());
        let mut first = 0;
        for (i, ((host, device), &features)) in outs.iter().zip(&case.features).enumerate() {
            let (found, expected) = (kernels.read(device).unwrap(), oracle.read(host).unwrap());
            let dims = [columns, features];
            let stored = Stored::of(kernels, dtype(i));
            assert_products("out", &found, &expected, &x, &weight[first * columns..], dims, stored);
            first += features;
        }
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<Linear>();
}

#[test]
fn a_weight_of_several_bindings_is_whole() {
    for (tokens, features) in [(3, vec![70]), (40, vec![64, 6, 30])] {
        let case = Case {
            tokens,
            columns: 90,
            features,
            weight: DType::Bf16,
            floats: false,
            values: Values::Normal,
            seed: 11,
        };
        // Rows of 180 bytes start where a binding may at every 64th: three bindings.
        contract::with_small_bindings(64 * 90 + 100, |wgpu| Linear::run(wgpu, &case));
    }
}

#[test]
fn planted_faults_are_seen() {
    for (shader, find, replace) in [
        ("product", "for (var half = LANES / 2u;", "for (var half = LANES / 4u;"),
        ("product", "weight_tile[at + 1u] = w.high;", "weight_tile[at + 1u] = w.low;"),
        ("product", "column += 32u", "column += 64u"),
        ("product", "dot(v, w[3])", "dot(v, w[2])"),
        ("product", "vec2(parts[at], parts[at + LANES])", "vec2(parts[at], parts[at])"),
        ("prelude", "f16_pair(words.w)", "f16_pair(words.z)"),
        ("weights_dense", "weight[start / 4u + 1u]", "weight[start / 4u]"),
        ("weights_dense", "j < min(left, 8u)", "j < min(left, 7u)"),
        ("weights_dense", "weight[2u * i + 1u]", "weight[2u * i]"),
        ("weights_dense", "product_of(d, v)", "product_of(c, v)"),
        ("weights_dense", "chunk < vectors", "chunk + 1u < vectors"),
    ] {
        contract::catches::<Linear>(Edit { shader, find, replace });
    }
    let edit =
        Edit { shader: "act_f32", find: "vec4(eight[2], eight[3])", replace: "vec4(eight[3], eight[2])" };
    contract::catches_in_f32::<Linear>(edit);
}
