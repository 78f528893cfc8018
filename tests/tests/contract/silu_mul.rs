//! `silu_mul`.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{F32_UNIT, Interval, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    width: usize,
    values: Values,
    seed: u64,
}

struct SiluMul;

impl Contract for SiluMul {
    const NAME: &'static str = "contract_silu_mul";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let values = Values::any_of(&Values::ORDINARY);
        (0..=9_usize, select(&[1_usize, 6, 35, 528][..]), values, any::<u64>())
            .prop_map(|(rows, width, values, seed)| Case { rows, width, values, seed })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { rows, width, values, seed } = case;
        let shape = [rows, width];
        let numbers = |seed| contract::numbers(kernels, DType::Act, &shape, &values.take(seed, rows * width));
        let (gate, up) = (numbers(seed), numbers(seed ^ 1));
        let mut out = contract::output(kernels, DType::Act, &shape);
        let oracle = kernels.oracle();
        oracle.silu_mul(&gate.0, &up.0, &mut out.0).unwrap();
        kernels.silu_mul(&gate.1, &up.1, &mut out.1).unwrap();
        let gates = oracle.read(&gate.0).unwrap();
        let ups = oracle.read(&up.0).unwrap();
        let (found, expected) = (kernels.read(&out.1).unwrap(), oracle.read(&out.0).unwrap());
        assert_close(
            "out",
            width.max(1),
            &found,
            &expected,
            kernels.relative_l2(values, &expected, 2.5e-3),
            |i| {
                let exact = gates[i] / (1.0 + (-gates[i]).exp()) * ups[i];
                // WGSL's exp is off by 3 + 2 |x| units in the last place, of which a large x feels the rest alone; where exp overflows
                // there is nothing left. What is subnormal may be zero.
                let error = F32_UNIT * (14.0 + 4.0 * gates[i].abs().min(90.0)) * exact.abs();
                let underflow = 1e-36 * ups[i].abs() + f64::from(f32::MIN_POSITIVE);
                Interval::around(exact, error + underflow).stored(kernels.act()).farthest(expected[i])
            },
        );
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<SiluMul>();
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in
        [("x / (1.0 + exp(-x))", "x / (1.0 + exp(x))"), ("word >= params.words", "word + 1u >= params.words")]
    {
        contract::catches::<SiluMul>(Edit { shader: "silu_mul", find, replace });
    }
}
