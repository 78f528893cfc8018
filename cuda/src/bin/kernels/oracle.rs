//! The judge of a case: the oracle in f64, on rows sampled from the very buffers that were timed.

use std::collections::HashMap;

use dsa80_cuda::{CudaTensor, Device, Gpu};
use dsa80_reference::cpu::{Cpu, CpuBatch, CpuTensor};
use dsa80_reference::{Batch, DType, DeviceTensor, HostData, HostTensor, Kernels, Result, SequenceSlice};
use half::bf16;
use serde::{Deserialize, Serialize};

use crate::inputs::PAGE_SIZE;

/// How far a result is from the oracle's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Accuracy {
    /// Rows that were compared.
    pub(crate) rows: usize,
    pub(crate) relative_l2: f64,
    /// What it may be.
    pub(crate) relative_l2_limit: f64,
    /// The largest error of an element as a share of its bound.
    pub(crate) worst: f64,
}

impl Accuracy {
    pub(crate) fn ok(&self) -> bool {
        self.rows > 0 && self.relative_l2 <= self.relative_l2_limit && self.worst <= 1.0
    }

    /// Compares; `bound(i)` is what element `i` may be off by. What is not finite must be equal.
    pub(crate) fn of(
        rows: usize,
        relative_l2_limit: f64,
        found: &[f64],
        expected: &[f64],
        bound: impl Fn(usize) -> f64,
    ) -> Self {
        let (mut error, mut norm, mut worst) = (0.0, 0.0, 0.0_f64);
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            if found.is_finite() && expected.is_finite() {
                let distance = (found - expected).abs();
                error += distance * distance;
                norm += expected * expected;
                worst = worst.max(if distance == 0.0 { 0.0 } else { distance / bound(i) });
            } else if found != expected && !(found.is_nan() && expected.is_nan()) {
                worst = f64::INFINITY;
            }
        }
        let relative_l2 = if error == 0.0 { 0.0 } else { (error / norm).sqrt() };
        let worst = if found.len() == expected.len() { worst } else { f64::INFINITY };
        Self { rows, relative_l2, relative_l2_limit, worst }
    }

    /// Both, over the rows of both.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            relative_l2: self.relative_l2.max(other.relative_l2),
            relative_l2_limit: self.relative_l2_limit,
            worst: self.worst.max(other.worst),
        }
    }
}

/// The oracle, rounding where the contract says so.
pub(crate) fn oracle() -> Cpu<f64> {
    Cpu::rounding_to_bf16()
}

/// What rounding to bf16 adds to an error at `value`: half the spacing.
pub(crate) fn half_ulp_bf16(value: f64) -> f64 {
    let exponent = value.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor();
    (exponent - 8.0).exp2()
}

/// `count` of `0..end`, spread over it, the first and the last among them.
pub(crate) fn spread(count: usize, end: usize) -> Vec<usize> {
    let count = count.min(end);
    (0..count).map(|i| if count == 1 { end - 1 } else { i * (end - 1) / (count - 1) }).collect()
}

/// The bytes of rows `rows` of a tensor, a row being all that one index of the first dimension selects.
pub(crate) fn row_bytes(gpu: &Gpu, tensor: &CudaTensor<Gpu>, rows: &[usize]) -> Result<Vec<u8>> {
    let bytes = tensor.shape()[1..].iter().product::<usize>() * element_bytes(tensor.dtype());
    let mut out = vec![0; bytes * rows.len()];
    for (&row, out) in rows.iter().zip(out.chunks_exact_mut(bytes.max(1))) {
        gpu.read(tensor.buffer(), row * bytes, out)?;
    }
    Ok(out)
}

/// Those rows as numbers.
pub(crate) fn row_numbers(gpu: &Gpu, tensor: &CudaTensor<Gpu>, rows: &[usize]) -> Result<Vec<f64>> {
    let bytes = row_bytes(gpu, tensor, rows)?;
    Ok(match tensor.dtype() {
        DType::Float | DType::F32 => numbers::<f32>(&bytes).into_iter().map(f64::from).collect(),
        DType::Index => numbers::<i32>(&bytes).into_iter().map(f64::from).collect(),
        _ => numbers::<bf16>(&bytes).into_iter().map(f64::from).collect(),
    })
}

/// Those rows as a tensor of the oracle.
pub(crate) fn rows(gpu: &Gpu, tensor: &CudaTensor<Gpu>, rows: &[usize]) -> Result<CpuTensor<f64>> {
    let mut shape = tensor.shape().to_vec();
    shape[0] = rows.len();
    if tensor.dtype() == DType::Bf16 {
        let data = HostData::Bf16(numbers(&row_bytes(gpu, tensor, rows)?));
        return oracle().upload(HostTensor { shape, data });
    }
    let mut host = oracle().alloc(tensor.dtype(), &shape)?;
    match tensor.dtype() {
        DType::Fp8 => oracle().write_bytes(&row_bytes(gpu, tensor, rows)?, &mut host)?,
        DType::Index => {
            let bytes = row_bytes(gpu, tensor, rows)?;
            oracle().write_index(&numbers(&bytes), &mut host)?;
        }
        _ => oracle().write(&row_numbers(gpu, tensor, rows)?, &mut host)?,
    }
    Ok(host)
}

/// Token rows of a batch, each a sequence of its own, with only the pages of the cache that they see.
pub(crate) struct Sampled {
    pub(crate) batch: CpuBatch,
    pub(crate) host: Batch,
    pub(crate) cache: CpuTensor<f64>,
}

impl Sampled {
    pub(crate) fn new(gpu: &Gpu, whole: &Batch, sampled: &[usize], cache: &CudaTensor<Gpu>) -> Result<Self> {
        let mut renumbered: HashMap<i32, u32> = HashMap::new();
        let mut used = Vec::new();
        let mut page_lists = Vec::new();
        for &t in sampled {
            let start = whole.seq_ids[t] as usize * whole.max_blocks;
            let pages = &whole.block_table[start..][..whole.visible(t).div_ceil(PAGE_SIZE)];
            let list: Vec<u32> = pages
                .iter()
                .map(|&page| {
                    *renumbered.entry(page).or_insert_with(|| {
                        used.push(page as usize);
                        used.len() as u32 - 1
                    })
                })
                .collect();
            page_lists.push(list);
        }
        let sequences: Vec<SequenceSlice<'_>> = sampled
            .iter()
            .zip(&page_lists)
            .map(|(&t, pages)| SequenceSlice { token_ids: &[0], computed_len: whole.visible(t) - 1, pages })
            .collect();
        let host = Batch::new(PAGE_SIZE, &sequences)?;
        Ok(Self { batch: upload(&host)?, host, cache: rows(gpu, cache, &used)? })
    }
}

/// The batch, as the oracle has it.
pub(crate) fn upload(batch: &Batch) -> Result<CpuBatch> {
    let mut host = oracle().alloc_batch(batch.num_tokens(), batch.num_seqs(), batch.max_blocks)?;
    oracle().upload_batch(batch, &mut host)?;
    Ok(host)
}

/// Bytes as what they are.
pub(crate) fn numbers<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

fn element_bytes(dtype: DType) -> usize {
    match dtype {
        DType::Fp8 => 1,
        DType::Act | DType::Bf16 | DType::F16 => 2,
        DType::Float | DType::Index | DType::F32 => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_measures_count() {
        let accuracy = Accuracy::of(1, 0.2, &[3.0, 4.5], &[3.0, 4.0], |_| 1.0);
        assert_eq!((accuracy.relative_l2, accuracy.worst, accuracy.ok()), (0.1, 0.5, true));
        assert!(!Accuracy::of(1, 0.05, &[3.0, 4.5], &[3.0, 4.0], |_| 1.0).ok());
        assert!(!Accuracy::of(1, 0.2, &[3.0, 4.5], &[3.0, 4.0], |_| 0.4).ok());
        assert!(!Accuracy::of(1, 0.2, &[f64::NAN], &[1.0], |_| 1.0).ok());
        assert!(!Accuracy::of(1, 0.2, &[1.0, 1.0], &[1.0], |_| 1.0).ok());
        assert!(!Accuracy::of(0, 0.2, &[], &[], |_| 1.0).ok());
    }

    #[test]
    fn samples_reach_both_ends() {
        assert_eq!(spread(3, 2048), [0, 1023, 2047]);
        assert_eq!(spread(1, 9), [8]);
        assert_eq!(spread(9, 2), [0, 1]);
        assert_eq!(spread(4, 0), [0_usize; 0]);
    }
}
