//! `linear_int4`.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::Values;
use dsa80_tests::parity::contract::{self, Backend, Contract};
use proptest::prelude::*;
use proptest::sample::select;

use crate::int4_weights::{Format, int4};
use crate::products::{Stored, assert_products};

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    columns: usize,
    features: usize,
    format: Format,
    floats: bool,
    seed: u64,
}

struct LinearInt4;

impl Contract for LinearInt4 {
    const NAME: &'static str = "contract_linear_int4";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let tokens = select(&[0_usize, 1, 1, 1, 4, 8, 13, 17, 40][..]);
        let dims = [
            (64_usize, 32_usize),
            (256, 32),
            (256, 128),
            (1056, 32),
            (4128, 32),
            (8192, 128),
            (200, 200),
            (96, 96),
        ];
        let scales = select(&[DType::Bf16, DType::F16, DType::F32][..]);
        (
            tokens,
            select(dims.to_vec()),
            select(&[2_usize, 70, 24][..]),
            scales,
            any::<bool>(),
            any::<bool>(),
            any::<u64>(),
        )
            .prop_map(
                |(tokens, (columns, group_size), features, scales, zero_points, floats, seed)| Case {
                    // Long rows are for the kernel of one token, which goes over them in rounds.
                    tokens: if columns > 4000 { tokens.min(1) } else { tokens },
                    columns,
                    features,
                    format: Format { scales, group_size, zero_points },
                    floats,
                    seed,
                },
            )
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { tokens, columns, features, format, floats, seed } = case;
        let x = contract::numbers(
            kernels,
            DType::Act,
            &[tokens, columns],
            &Values::Normal.take(seed, tokens * columns),
        );
        let host = int4(features, columns, format, seed);
        let oracle = kernels.oracle();
        let weight = (oracle.upload_int4(host.clone()).unwrap(), kernels.upload_int4(host.clone()).unwrap());
        let dtype = if floats { DType::Float } else { DType::Act };
        let mut out = contract::output(kernels, dtype, &[tokens, features]);
        oracle.linear_int4(&x.0, &weight.0, &mut out.0).unwrap();
        kernels.linear_int4(&x.1, &weight.1, &mut out.1).unwrap();
        let dense: Vec<f64> = host.dequantise().to_f32().iter().map(|&w| f64::from(w)).collect();
        let (found, expected) = (kernels.read(&out.1).unwrap(), oracle.read(&out.0).unwrap());
        let x = oracle.read(&x.0).unwrap();
        assert_products(
            "out",
            &found,
            &expected,
            &x,
            &dense,
            [columns, features],
            Stored::of(kernels, dtype),
        );
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<LinearInt4>();
}

/// Columns that are no whole words, groups that are no whole chunks, several bindings: what the CUDA kernels need not take.
#[test]
fn odd_shapes_agree_in_wgsl() {
    for (columns, group_size, tokens) in [(35, 12, 2), (35, 35, 20), (100, 20, 3), (90, 7, 33)] {
        for zero_points in [false, true] {
            let format = Format { scales: DType::F16, group_size, zero_points };
            let case = Case { tokens, columns, features: 110, format, floats: false, seed: 3 };
            contract::on_wgpu(|wgpu| LinearInt4::run(wgpu, &case));
            contract::with_small_bindings(if tokens > 16 { 8192 } else { 2560 }, |wgpu| {
                LinearInt4::run(wgpu, &case)
            });
        }
    }
}

/// Bindings of ten rows of bf16, of which windows have eight: rows that are worked on together have their zero points in one word.
#[test]
fn zero_points_of_windows_agree_in_wgsl() {
    let format = Format { scales: DType::Bf16, group_size: 32, zero_points: true };
    let case = Case { tokens: 1, columns: 64, features: 30, format, floats: false, seed: 5 };
    contract::with_small_bindings(5 * 32, |wgpu| LinearInt4::run(wgpu, &case));
}

#[test]
fn planted_faults_are_seen() {
    for (shader, find, replace) in [
        ("weights_int4", "vec4(16u, 20u, 24u, 28u)", "vec4(16u, 20u, 24u, 24u)"),
        ("weights_int4", "row & 7u", "row & 3u"),
        ("weights_int4", "return vec2(scale, 8.0);", "return vec2(scale, 7.0);"),
        ("weights_int4", "8u * chunk / params.group_size", "chunk / params.group_size"),
        ("weights_int4", "PLACES = vec4(1.0, 16.0, 256.0,", "PLACES = vec4(1.0, 16.0, 255.0,"),
        ("weights_int4", "quad / GROUP_QUADS", "quad / (2u * GROUP_QUADS)"),
        ("weights_int4", "products(words.w, zero, v[3], four)", "products(words.w, zero, v[2], four)"),
        ("weights_int4", "4u * (rows.x & 7u)", "0u"),
        ("weights_int4", "zeros.z, PLACES / 256.0", "zeros.z, PLACES / 16.0"),
        ("weights_int4", "16u * (group & 1u)", "16u * 0u"),
        ("weights_int4", "first < quads", "first + 1u < quads"),
        ("weights_int4", "second < quads", "second + 1u < quads"),
        ("weights_int4", "sum.zw);", "sum.xy);"),
        ("prelude", "(4u * j)) & 0xfu", "(4u * j)) & 0x7u"),
    ] {
        contract::catches::<LinearInt4>(Edit { shader, find, replace });
    }
}
