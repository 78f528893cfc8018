//! `rms_norm` and `rms_norm_residual`.

use dsa80_reference::wgpu::{ActType, Edit};
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{F32_UNIT, Interval, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

/// Rounding to bf16 flips where the oracle's value is close to a boundary: rarely, and by one step.
const RELATIVE_L2: f64 = 2.5e-3;

#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    width: usize,
    weight: DType,
    x: Rows,
    values: Values,
    eps: f64,
    seed: u64,
}

/// What is normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rows {
    Acts,
    Floats,
    Residual,
}

/// What the norms of `x` may be. WGSL promises 2.5 units in the last place of a division and, of a square root, what `1 / inverseSqrt` has;
/// the sum is one of squares, whatever its order.
fn intervals(case: &Case, x: &[f64], weight: &[f64], act: ActType) -> Vec<Interval> {
    let additions = (case.width as f64).min(64.0) + 10.0;
    let error = (additions + 7.0) * F32_UNIT / 2.0 + 12.0 * F32_UNIT;
    let mut out = Vec::new();
    for x in x.chunks(case.width) {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / case.width as f64;
        let reciprocal = 1.0 / (mean + case.eps).sqrt();
        out.extend(x.iter().zip(weight).map(|(x, weight)| {
            let normed = weight * x * reciprocal;
            Interval::around(normed, 1.01 * error * normed.abs()).stored(act)
        }));
    }
    out
}

struct RmsNorm;

impl Contract for RmsNorm {
    const NAME: &'static str = "contract_rms_norm";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let shape = (0..=9_usize, select(&[2_usize, 36, 264, 2184][..]));
        let weight = select(&[DType::Bf16, DType::F16, DType::F32][..]);
        let x = select(&[Rows::Acts, Rows::Floats, Rows::Residual][..]);
        let values = Values::any_of(&Values::ORDINARY);
        (shape, weight, x, values, select(&[1e-5, 1e-6, 0.25][..]), any::<u64>()).prop_map(
            |((rows, width), weight, x, values, eps, seed)| Case {
                rows,
                width,
                weight,
                x,
                values,
                eps,
                seed,
            },
        )
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { rows, width, eps, seed, .. } = case;
        let shape = [rows, width];
        let numbers = |dtype, seed| {
            // Not bf16 numbers, where floats are wanted.
            let by = if dtype == DType::Float { 1.0 / 3.0 } else { 1.0 };
            let values: Vec<f64> = case.values.take(seed, rows * width).iter().map(|x| x * by).collect();
            contract::numbers(kernels, dtype, &shape, &values)
        };
        let x = numbers(if case.x == Rows::Floats { DType::Float } else { DType::Act }, seed);
        let weights: Vec<f64> = Values::Normal.take(seed ^ 2, width).iter().map(|w| 1.0 + 0.5 * w).collect();
        let weight = contract::weight(kernels, case.weight, &[width], &weights);
        let mut out = contract::output(kernels, DType::Act, &shape);
        let oracle = kernels.oracle();
        let mut normed = oracle.read(&x.0).unwrap();
        if case.x == Rows::Residual {
            let mut residual = numbers(DType::Float, seed ^ 1);
            oracle.rms_norm_residual(&x.0, &mut residual.0, &weight.0, eps, &mut out.0).unwrap();
            kernels.rms_norm_residual(&x.1, &mut residual.1, &weight.1, eps, &mut out.1).unwrap();
            normed = oracle.read(&residual.0).unwrap();
            let bound = |i: usize| F32_UNIT * normed[i].abs() + f64::from(f32::MIN_POSITIVE);
            assert_close("residual", width, &kernels.read(&residual.1).unwrap(), &normed, F32_UNIT, bound);
        } else {
            oracle.rms_norm(&x.0, &weight.0, eps, &mut out.0).unwrap();
            kernels.rms_norm(&x.1, &weight.1, eps, &mut out.1).unwrap();
        }
        let (found, expected) = (kernels.read(&out.1).unwrap(), oracle.read(&out.0).unwrap());
        let intervals = intervals(case, &normed, &oracle.read(&weight.0).unwrap(), kernels.act());
        assert_close(
            "out",
            width,
            &found,
            &expected,
            kernels.relative_l2(case.values, &expected, RELATIVE_L2),
            |i| intervals[i].bound(expected[i]),
        );
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<RmsNorm>();
}

#[test]
fn planted_faults_are_seen() {
    for (shader, find, replace) in [
        ("rms_norm", "weight_at(column + 1u) * values.y", "weight_at(column + 1u) * values.x"),
        ("rms_norm", "+ params.eps)", ") + params.eps"),
        (
            "rms_norm",
            "values.low, residual[2u * v + 1u] + values.high",
            "values.low, residual[2u * v + 1u] - values.high",
        ),
        (
            "rms_norm",
            "let v = lane.index + k * WORKGROUP;\n        if v < vectors {\n            let values",
            "let v = lane.index + k * WORKGROUP;\n        if v < min(vectors, WORKGROUP) {\n            let values",
        ),
        ("rms_norm", "w.high * (kept[k].high * scale)", "w.low * (kept[k].high * scale)"),
        (
            "reduce",
            "i < lane.subgroups; i++) {\n        sum +=",
            "i + 1u < lane.subgroups; i++) {\n        sum +=",
        ),
    ] {
        contract::catches::<RmsNorm>(Edit { shader, find, replace });
    }
    let edit = Edit {
        shader: "act_f32",
        find: "ActPair {\n    return pair;",
        replace: "ActPair {\n    return bf16_pair(pack_bf16(pair.x, pair.y));",
    };
    contract::catches_in_f32::<RmsNorm>(edit);
}
