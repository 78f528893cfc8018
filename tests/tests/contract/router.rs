//! `router`.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels, RouterParams};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{Values, assert_close, assert_same};
use proptest::prelude::*;
use proptest::sample::select;

/// Scores that are nearer than this, and not equal, may come in another order.
const CLOSE: f64 = 1e-5;

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    experts: usize,
    k: usize,
    params: RouterParams,
    bias: DType,
    values: Values,
    seed: u64,
}

struct Router;

/// Whether rounding may decide which of the first `count` is where.
fn undecided(values: &[f64], count: usize) -> bool {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted.windows(2).take(count).any(|pair| pair[0] != pair[1] && pair[0] - pair[1] < CLOSE)
}

impl Contract for Router {
    const NAME: &'static str = "contract_router";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        // Equal scores of experts; sums of two that are equal by chance alone are not told apart by rounding.
        let dims =
            select(&[(40, 1, 1, Values::Ties), (40, 1, 1, Values::Normal), (16, 4, 2, Values::Normal)][..]);
        let more = select(&[(132, 3, 2, Values::Negative), (66, 66, 11, Values::Ties)][..]);
        let bias = select(&[DType::Bf16, DType::F16, DType::F32][..]);
        (prop_oneof![dims, more], 0..=6_usize, 1..=8_usize, bias, any::<bool>(), any::<u64>()).prop_map(
            |((experts, n_group, topk_group, values), tokens, k, bias, norm_topk_prob, seed)| {
                let params = RouterParams { n_group, topk_group, norm_topk_prob, routed_scaling_factor: 2.5 };
                Case { tokens, experts, k, params, bias, values, seed }
            },
        )
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { tokens, experts, k, params, values, seed, .. } = case;
        let spread = if values == Values::Ties { 1.0 } else { 2.0 };
        let logits: Vec<f64> = values.take(seed, tokens * experts).iter().map(|x| x * spread).collect();
        let bias: Vec<f64> = values.take(seed ^ 1, experts).iter().map(|x| 0.3 * x).collect();
        let logits = contract::numbers(kernels, DType::Float, &[tokens, experts], &logits);
        let bias = contract::weight(kernels, case.bias, &[experts], &bias);
        let mut ids = contract::output(kernels, DType::Index, &[tokens, k]);
        let mut weights = contract::output(kernels, DType::Float, &[tokens, k]);
        let oracle = kernels.oracle();
        oracle.router(&logits.0, &bias.0, params, &mut ids.0, &mut weights.0).unwrap();
        kernels.router(&logits.1, &bias.1, params, &mut ids.1, &mut weights.1).unwrap();
        let (logits, bias) = (oracle.read(&logits.0).unwrap(), oracle.read(&bias.0).unwrap());
        let found = (kernels.read_index(&ids.1).unwrap(), kernels.read(&weights.1).unwrap());
        let expected = (oracle.read_index(&ids.0).unwrap(), oracle.read(&weights.0).unwrap());
        for (t, logits) in logits.chunks(experts).enumerate() {
            let choice: Vec<f64> =
                logits.iter().zip(&bias).map(|(x, b)| 1.0 / (1.0 + (-x).exp()) + b).collect();
            let two_best = |group: &[f64]| {
                let mut group = group.to_vec();
                group.sort_by(|a, b| b.total_cmp(a));
                group.iter().take(2).sum::<f64>()
            };
            let groups: Vec<f64> = choice.chunks(experts / params.n_group).map(two_best).collect();
            // The experts of all groups: that a dropped one may be among them makes a row undecided more often than need be.
            if undecided(&groups, params.topk_group) || undecided(&choice, experts) && values != Values::Ties
            {
                continue;
            }
            let row = t * k..(t + 1) * k;
            assert_same("topk_ids", k, &found.0[row.clone()], &expected.0[row.clone()]);
            let of_row = &expected.1[row.clone()];
            assert_close("topk_weights", k, &found.1[row], of_row, 4e-6, |i| 4e-6 * of_row[i].abs());
        }
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<Router>();
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        ("scores[other] == scores[e] && other < e", "scores[other] == scores[e] && other > e"),
        ("&& kept[other / size] == 1u", ""),
        ("better < params.topk_group", "better <= params.topk_group"),
        ("max(second, min(score, best))", "min(score, best)"),
        ("scale /= sum + 1e-20;", ""),
        ("chosen[better] = sigmoid(logits[t * EXPERTS + e]);", "chosen[better] = scores[e];"),
    ] {
        contract::catches::<Router>(Edit { shader: "router", find, replace });
    }
}
