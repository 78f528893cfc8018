//! `swiglu`, of dense, packed and mixed projections.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, HostLinear, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{F32_UNIT, Interval, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

use crate::int4_weights::{Format, int4};
use crate::products::{Stored, of};

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    columns: usize,
    intermediate: usize,
    /// Whether the gate and the up projection are packed.
    packed: [bool; 2],
    seed: u64,
}

struct SwiGlu;

impl Contract for SwiGlu {
    const NAME: &'static str = "contract_swiglu";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let packed = select(&[[false, false], [true, true], [true, false]][..]);
        (
            select(&[0_usize, 1, 7, 20][..]),
            select(&[64_usize, 128][..]),
            select(&[8_usize, 40][..]),
            packed,
            any::<u64>(),
        )
            .prop_map(|(tokens, columns, intermediate, packed, seed)| Case {
                tokens,
                columns,
                intermediate,
                packed,
                seed,
            })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { tokens, columns, intermediate, packed, seed } = case;
        let x = contract::numbers(
            kernels,
            DType::Act,
            &[tokens, columns],
            &Values::Normal.take(seed, tokens * columns),
        );
        let projection = |packed: bool, seed: u64| {
            if packed {
                let format =
                    Format { scales: DType::Bf16, group_size: 32, zero_points: seed.is_multiple_of(2) };
                return HostLinear::Int4(int4(intermediate, columns, format, seed));
            }
            let weights = Values::Normal.take(seed, intermediate * columns);
            let weights: Vec<f64> = weights.iter().map(|w| 0.1 * w).collect();
            HostLinear::Dense(contract::host_weight(DType::Bf16, &[intermediate, columns], &weights))
        };
        let (gate, up) = (projection(packed[0], seed ^ 1), projection(packed[1], seed ^ 2));
        let oracle = kernels.oracle();
        let host = oracle.upload_swiglu(gate.clone(), up.clone()).unwrap();
        let device = kernels.upload_swiglu(gate.clone(), up.clone()).unwrap();
        let mut out = contract::output(kernels, DType::Act, &[tokens, intermediate]);
        oracle.swiglu(&x.0, &host, &mut out.0).unwrap();
        kernels.swiglu(&x.1, &device, &mut out.1).unwrap();
        let (found, expected) = (kernels.read(&out.1).unwrap(), oracle.read(&out.0).unwrap());
        let x = oracle.read(&x.0).unwrap();
        let [gate, up] = [gate, up].map(|weight| weight.dense().to_f32());
        assert_close(
            "out",
            intermediate,
            &found,
            &expected,
            kernels.relative_l2(Values::Normal, &expected, 4e-3),
            |i| {
                let x = &x[i / intermediate * columns..][..columns];
                let may = |weight: &[f32]| {
                    let row = &weight[i % intermediate * columns..][..columns];
                    of(x.iter().copied().zip(row.iter().map(|&w| f64::from(w))), Stored::Floats)
                };
                let (gate, up) = (may(&gate), may(&up));
                let silu = |x: f64| x / (1.0 + (-x).exp());
                // It rises but for a little below zero, where its slope is at most a tenth.
                let (middle, half) = (0.5 * (gate.lo + gate.hi), 0.5 * (gate.hi - gate.lo));
                let error =
                    1.1 * half + F32_UNIT * (14.0 + 4.0 * middle.abs().min(90.0)) * silu(middle).abs();
                let silus = Interval::around(silu(middle), error);
                let ends = [silus.lo * up.lo, silus.lo * up.hi, silus.hi * up.lo, silus.hi * up.hi];
                let lo = ends.into_iter().fold(f64::INFINITY, f64::min);
                let hi = ends.into_iter().fold(f64::NEG_INFINITY, f64::max);
                Interval { lo, hi }
                    .widened(F32_UNIT * lo.abs().max(hi.abs()) + 1e-37)
                    .stored(kernels.act())
                    .farthest(expected[i])
            },
        );
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<SwiGlu>();
}

#[test]
fn planted_faults_are_seen() {
    let find = "bitcast<f32>(up[2u * word + 1u])";
    contract::catches::<SwiGlu>(Edit { shader: "silu_mul", find, replace: "bitcast<f32>(up[2u * word])" });
}
