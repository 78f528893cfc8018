//! `rope_table`.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{BatchCase, F32_UNIT, assert_close};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone)]
struct Case {
    positions: Vec<i32>,
    pairs: usize,
    theta: f64,
}

struct RopeTable;

impl Contract for RopeTable {
    const NAME: &'static str = "contract_rope_table";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let position = prop_oneof![0..1 << 20, 0..64, Just(0), Just(1 << 20), Just(i32::MAX - 1)];
        let theta = select(&[1e4, 1e6, 8e6, 1.0, 2.5, 0.01][..]);
        (vec(position, 0..=9), select(&[32_usize, 4, 1, 67][..]), theta)
            .prop_map(|(positions, pairs, theta)| Case { positions, pairs, theta })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let Case { positions, pairs, theta } = case;
        let mut batch = BatchCase::of(16, &[(0, positions.len())]).batch;
        batch.positions = positions.clone();
        batch.context_lens = vec![i32::MAX];
        let batch = contract::batch(kernels, &batch);
        let mut cos_sin = contract::output(kernels, DType::Float, &[positions.len(), *pairs, 2]);
        kernels.oracle().rope_table(&batch.0, *theta, &mut cos_sin.0).unwrap();
        kernels.rope_table(&batch.1, *theta, &mut cos_sin.1).unwrap();
        let (found, expected) =
            (kernels.read(&cos_sin.1).unwrap(), kernels.oracle().read(&cos_sin.0).unwrap());
        // Three roundings of what is below 1, the polynomials' last terms, and an angle whose frequency is an f64.
        // Where a position turns faster than an f64 tells, the bound of each element is all there is.
        let far = positions.iter().any(|&position| position > 1 << 20);
        let relative = if far || *theta < 1.0 { f64::INFINITY } else { 2e-7 };
        assert_close("cos_sin", 2 * pairs, &found, &expected, relative, |i| {
            let (position, pair) = (f64::from(positions[i / 2 / pairs]), (i / 2 % pairs) as f64);
            let exponent = pair / *pairs as f64 * theta.ln();
            let angle = position * (-exponent).exp();
            4.0 * F32_UNIT + angle * (3.0 * pair + 2.0 * exponent.abs() + 8.0) * f64::EPSILON / 2.0
        });
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<RopeTable>();
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        ("+ upper_product(position, turn.y)", ""),
        ("case 2u: { turned = vec2(-cosine, -sine); }", ""),
        ("1.0 / 362880.0", "0.0"),
        ("let first = (a >> 16u) * (b & 0xffffu) +", "let first = (b & 0xffffu) +"),
    ] {
        contract::catches::<RopeTable>(Edit { shader: "rope_table", find, replace });
    }
}
