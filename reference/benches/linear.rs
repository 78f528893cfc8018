//! Multiply-adds a second of the oracle's matrix products, f32, at shapes of small models:
//! `cargo bench -p dsa80-reference --bench linear`. `RAYON_NUM_THREADS=1` gives one core's.

use divan::{Bencher, counter::ItemsCount};
use dsa80_reference::cpu::{Cpu, CpuTensor};
use dsa80_reference::{DType, HostInt4, HostTensor, Kernels};
use half::bf16;

/// Rows, output features, input features.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 256, 256), (1, 512, 512), (1, 2048, 512), (1, 8192, 2048), (8, 512, 512), (64, 512, 512)];

fn main() {
    divan::main();
}

fn tensors(cpu: &Cpu<f32>, rows: usize, out: usize, inner: usize) -> (CpuTensor<f32>, CpuTensor<f32>) {
    let mut x = cpu.alloc(DType::Act, &[rows, inner]).expect("memory");
    let values: Vec<f64> = (0..rows * inner).map(|i| (i as f64 * 0.37).sin()).collect();
    cpu.write(&values, &mut x).expect("the shapes agree");
    (x, cpu.alloc(DType::Act, &[rows, out]).expect("memory"))
}

#[divan::bench(args = SHAPES)]
fn bf16_weight(bencher: Bencher<'_, '_>, (rows, out_features, inner): (usize, usize, usize)) {
    let cpu = Cpu::new();
    let (x, mut out) = tensors(&cpu, rows, out_features, inner);
    let data = (0..out_features * inner).map(|i| bf16::from_f32((i as f32 * 0.11).cos())).collect();
    let weight = cpu.upload(HostTensor::bf16([out_features, inner], data)).expect("memory");
    bencher
        .counter(ItemsCount::new(rows * out_features * inner))
        .bench_local(|| cpu.linear(&x, &weight, &mut out).expect("the shapes agree"));
}

#[divan::bench(args = SHAPES)]
fn int4_weight(bencher: Bencher<'_, '_>, (rows, out_features, inner): (usize, usize, usize)) {
    let cpu = Cpu::new();
    let (x, mut out) = tensors(&cpu, rows, out_features, inner);
    let weight = HostInt4 {
        out_features,
        in_features: inner,
        group_size: 128,
        weight_packed: (0..out_features * inner / 8).map(|i| (i as u32).wrapping_mul(0x9E37_79B9)).collect(),
        scales: HostTensor::f32([out_features, inner / 128], vec![0.01; out_features * inner / 128]),
        zero_points: None,
    };
    let weight = cpu.upload_int4(weight).expect("memory");
    bencher
        .counter(ItemsCount::new(rows * out_features * inner))
        .bench_local(|| cpu.linear_int4(&x, &weight, &mut out).expect("the shapes agree"));
}
