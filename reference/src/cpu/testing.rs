//! Inputs for the unit tests of the kernels.

use super::{Cpu, CpuTensor, Real};
use crate::batch::{Batch, SequenceSlice};
use crate::error::Result;
use crate::host_array::HostArray;
use crate::kernels::Kernels;
use crate::sampling::uniform;
use crate::tensor::{DType, HostInt4, HostTensor};

/// `n` numbers in (-1, 1), each exact in f32, the same for the same seed.
pub(crate) fn randoms(seed: u64, n: usize) -> Vec<f64> {
    (0..n).map(|i| f64::from(uniform(seed, 0, i as u32) * 2.0 - 1.0)).collect()
}

/// A tensor of the given values.
pub(crate) fn tensor<F: Real>(dtype: DType, shape: &[usize], values: &[f64]) -> CpuTensor<F> {
    let cpu = Cpu::new();
    let mut tensor = CpuTensor::alloc(dtype, shape).unwrap();
    cpu.write(values, &mut tensor).unwrap();
    tensor
}

/// An `Index` tensor of the given values.
pub(crate) fn index<F: Real>(shape: &[usize], values: &[i32]) -> CpuTensor<F> {
    let mut tensor = CpuTensor::alloc(DType::Index, shape).unwrap();
    Cpu::<F>::new().write_index(values, &mut tensor).unwrap();
    tensor
}

/// A poisoned tensor, as a kernel finds its output.
pub(crate) fn poisoned<F: Real>(dtype: DType, shape: &[usize]) -> CpuTensor<F> {
    CpuTensor::alloc(dtype, shape).unwrap()
}

/// A random bf16 weight and its exact values.
pub(crate) fn bf16_weight<F: Real>(seed: u64, shape: &[usize]) -> (CpuTensor<F>, Vec<f64>) {
    let data: Vec<_> = randoms(seed, shape.iter().product()).into_iter().map(half::bf16::from_f64).collect();
    let values = data.iter().map(|x| x.to_f64()).collect();
    (Cpu::new().upload(HostTensor::bf16(shape, data)).unwrap(), values)
}

pub(crate) fn read<F: Real>(tensor: &CpuTensor<F>) -> Vec<f64> {
    Cpu::new().read(tensor).unwrap()
}

pub(crate) fn read_index<F: Real>(tensor: &CpuTensor<F>) -> Vec<i32> {
    Cpu::<F>::new().read_index(tensor).unwrap()
}

/// A batch of sequences given as (tokens computed, new tokens), its pages drawn without order from
/// `0..pages`.
pub(crate) fn batch(page_size: usize, pages: usize, sequences: &[(usize, usize)], seed: u64) -> Batch {
    let mut free: Vec<u32> = (0..pages as u32).collect();
    free.sort_by(|&a, &b| uniform(seed, 1, a).total_cmp(&uniform(seed, 1, b)));
    let owned: Vec<(Vec<u32>, Vec<u32>)> = sequences
        .iter()
        .map(|&(computed, new)| {
            let needed = (computed + new).div_ceil(page_size);
            ((0..new as u32).collect(), free.drain(..needed).collect())
        })
        .collect();
    let slices: Vec<_> = sequences
        .iter()
        .zip(&owned)
        .map(|(&(computed_len, _), (token_ids, pages))| SequenceSlice { token_ids, computed_len, pages })
        .collect();
    Batch::new(page_size, &slices).unwrap()
}

/// A paged cache `[pages, page_size, width]` that holds `rows[seq]` (`[context, width]`) where `batch` says,
/// NaN elsewhere.
pub(crate) fn paged_cache<F: Real>(
    batch: &Batch,
    pages: usize,
    width: usize,
    rows: &[Vec<f64>],
) -> CpuTensor<F> {
    let mut values = vec![f64::NAN; pages * batch.page_size * width];
    for (seq, rows) in rows.iter().enumerate() {
        for (position, row) in rows.chunks_exact(width).enumerate() {
            let page = batch.block_table[seq * batch.max_blocks + position / batch.page_size] as usize;
            let slot = page * batch.page_size + position % batch.page_size;
            values[slot * width..][..width].copy_from_slice(row);
        }
    }
    tensor(DType::Act, &[pages, batch.page_size, width], &values)
}

/// The message of an error that must be there.
pub(crate) fn message(result: Result<()>) -> String {
    result.unwrap_err().to_string()
}

/// `body` on a pool of one thread and on one of four.
pub(crate) fn on_one_and_four_threads<R: Send>(body: impl Fn() -> R + Sync) -> [R; 2] {
    [1, 4].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&body))
}

#[track_caller]
pub(crate) fn assert_close(actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= tolerance * (1.0 + e.abs()), "element {i}: {a} but expected {e}");
    }
}

/// An INT4 weight of random nibbles, scales near 0.1 and, if asked for, random zero points. Unused nibbles
/// are set.
pub(crate) fn int4(out: usize, inner: usize, group_size: usize, asymmetric: bool, seed: u64) -> HostInt4 {
    let words = |n: usize, seed| -> HostArray<u32> {
        randoms(seed, n)
            .iter()
            .map(|x| ((x + 1.0) * f64::from(u32::MAX / 2)) as u32)
            .map(|x| x.wrapping_mul(0x9E37_79B9))
            .collect()
    };
    let groups = inner.div_ceil(group_size);
    // Few bits, as in a checkpoint: the products with nibbles are exact in f32, and `dequantise` loses
    // nothing.
    let scales =
        randoms(seed + 1, out * groups).iter().map(|x| (100.0 + 50.0 * x).round() as f32 / 1024.0).collect();
    HostInt4 {
        out_features: out,
        in_features: inner,
        group_size,
        weight_packed: words(out * inner.div_ceil(8), seed + 2),
        scales: HostTensor::f32([out, groups], scales),
        zero_points: asymmetric.then(|| words(out.div_ceil(8) * groups, seed + 3)),
    }
}
