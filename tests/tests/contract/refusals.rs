//! What the WGSL kernels refuse, and how they say so.

use dsa80_reference::wgpu::{Edit, Wgpu, WgpuContext, WgpuOptions, WgpuTensor};
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::contract::{self, Backend};

fn expect(error: dsa80_reference::Error, parts: &[&str]) {
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text} lacks one of {parts:?}");
}

#[test]
fn an_adapter_that_is_not_there_is_an_error_with_a_next_step() {
    let options = WgpuOptions { adapter: Some("no such adapter".into()), ..WgpuOptions::default() };
    expect(WgpuContext::open(&options).unwrap_err(), &["wgpu: no usable adapter", "mesa-vulkan-drivers"]);
}

#[test]
fn a_shader_that_does_not_compile_names_kernel_and_shape() {
    contract::on_wgpu(|wgpu| {
        let edits = vec![Edit { shader: "silu_mul", find: "fn silu(", replace: "fn silo(" }];
        let context = WgpuContext::open(&WgpuOptions { edits, ..contract::same_adapter(wgpu) }).unwrap();
        let other = Wgpu::new(context);
        let tensor = || other.alloc(DType::Act, &[3, 8]).unwrap();
        let error = other.silu_mul(&tensor(), &tensor(), &mut tensor()).unwrap_err();
        expect(error, &["silu_mul (3 rows of 8)", "silu"]);
    });
}

#[test]
fn misfits_are_named() {
    contract::on_wgpu(|wgpu| {
        let tensor = |dtype, shape: &[usize]| wgpu.alloc(dtype, shape).unwrap();
        let act = |shape: &[usize]| tensor(DType::Act, shape);
        let weight = tensor(DType::Bf16, &[16]);
        let mut out = act(&[2, 16]);
        let norm = |x: &WgpuTensor, weight: &WgpuTensor, out: &mut WgpuTensor| {
            wgpu.rms_norm(x, weight, 1e-5, out).unwrap_err()
        };
        expect(norm(&act(&[2, 4, 4]), &weight, &mut out), &["rms_norm: `x`", "2 dimensions"]);
        expect(norm(&tensor(DType::Index, &[2, 16]), &weight, &mut out), &["`x` holds indices"]);
        expect(norm(&act(&[2, 16]), &act(&[16]), &mut out), &["`weight` holds activations"]);
        expect(
            norm(&act(&[2, 15]), &tensor(DType::Bf16, &[15]), &mut act(&[2, 15])),
            &["even last dimension"],
        );
        let linear = |x: &WgpuTensor, weight: &WgpuTensor, out: &mut WgpuTensor| {
            wgpu.linear(x, weight, out).unwrap_err()
        };
        let matrix = tensor(DType::F32, &[8, 16]);
        expect(linear(&act(&[2, 15]), &matrix, &mut act(&[2, 8])), &["linear: `x`", "[2, 16]"]);
        expect(linear(&act(&[2, 16]), &matrix, &mut act(&[2, 9])), &["`out`", "[2, 8]"]);
        expect(linear(&act(&[2, 16]), &matrix, &mut tensor(DType::Index, &[2, 8])), &["`out` holds indices"]);
        expect(wgpu.alloc(DType::Act, &[usize::MAX, 2]).unwrap_err(), &["wgpu: not enough memory", "lower"]);
        let mut small = act(&[2]);
        expect(wgpu.write(&[1.0], &mut small).unwrap_err(), &["write: `tensor`"]);
        expect(wgpu.read_index(&small).unwrap_err(), &["read_index: `tensor` holds activations"]);
    });
}

#[test]
fn a_cache_larger_than_a_binding_is_an_error_that_says_what_to_do() {
    let small = |wgpu: &Backend<'_, Wgpu>| {
        let (gate, up) =
            (wgpu.alloc(DType::Act, &[9, 800]).unwrap(), wgpu.alloc(DType::Act, &[9, 800]).unwrap());
        let error = wgpu.silu_mul(&gate, &up, &mut wgpu.alloc(DType::Act, &[9, 800]).unwrap()).unwrap_err();
        let most = format!("binds at most {}", 2048 * wgpu.act().bytes());
        expect(error, &["silu_mul (9 rows of 800)", &most, "lower the batch or cache size"]);
    };
    contract::with_small_bindings(2048, small);
}

/// Memory goes round, and launches keep their order with it.
#[test]
fn buffers_are_used_again_in_the_order_of_launches() {
    contract::on_wgpu(|wgpu| {
        let mut sum = wgpu.alloc(DType::Act, &[4, 64]).unwrap();
        for round in 1..=600 {
            let (mut gate, mut up) =
                (wgpu.alloc(DType::Act, &[4, 64]).unwrap(), wgpu.alloc(DType::Act, &[4, 64]).unwrap());
            wgpu.write(&[100.0; 256], &mut gate).unwrap();
            wgpu.write(&[f64::from(round % 7); 256], &mut up).unwrap();
            wgpu.silu_mul(&gate, &up, &mut sum).unwrap();
            if round % 100 == 0 {
                assert_eq!(wgpu.read(&sum).unwrap(), [100.0 * f64::from(round % 7); 256]);
            }
        }
    });
}
