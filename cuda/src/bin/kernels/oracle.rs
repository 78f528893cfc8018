//! The judge of a case: the oracle in f64, on rows sampled from the very buffers that were timed.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

use dsa80_cuda::{CudaTensor, Device};
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

    /// Whether the whole is near enough and elements alone are farther off than their bounds.
    pub(crate) fn only_elements_exceed(&self) -> bool {
        !self.ok() && self.relative_l2 <= self.relative_l2_limit && self.worst.is_finite()
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
                let share = if distance == 0.0 { 0.0 } else { distance / bound(i) };
                // A bound that is no number allows nothing.
                worst = worst.max(if share.is_nan() { f64::INFINITY } else { share });
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
pub(crate) fn row_bytes<D: Device>(device: &D, tensor: &CudaTensor<D>, rows: &[usize]) -> Result<Vec<u8>> {
    let bytes = tensor.shape()[1..].iter().product::<usize>() * element_bytes(tensor.dtype());
    let mut out = vec![0; bytes * rows.len()];
    for (&row, out) in rows.iter().zip(out.chunks_exact_mut(bytes.max(1))) {
        device.read(tensor.buffer(), row * bytes, out)?;
    }
    Ok(out)
}

/// Those rows as numbers.
pub(crate) fn row_numbers<D: Device>(device: &D, tensor: &CudaTensor<D>, rows: &[usize]) -> Result<Vec<f64>> {
    let bytes = row_bytes(device, tensor, rows)?;
    Ok(match tensor.dtype() {
        DType::Float | DType::F32 => numbers::<f32>(&bytes).into_iter().map(f64::from).collect(),
        DType::Index => numbers::<i32>(&bytes).into_iter().map(f64::from).collect(),
        _ => numbers::<bf16>(&bytes).into_iter().map(f64::from).collect(),
    })
}

/// Those rows as a tensor of the oracle.
pub(crate) fn rows<D: Device>(device: &D, tensor: &CudaTensor<D>, rows: &[usize]) -> Result<CpuTensor<f64>> {
    let mut shape = tensor.shape().to_vec();
    shape[0] = rows.len();
    if tensor.dtype() == DType::Bf16 {
        let data = HostData::Bf16(numbers::<bf16>(&row_bytes(device, tensor, rows)?).into());
        return oracle().upload(HostTensor { shape, data });
    }
    let mut host = oracle().alloc(tensor.dtype(), &shape)?;
    match tensor.dtype() {
        DType::Fp8 => oracle().write_bytes(&row_bytes(device, tensor, rows)?, &mut host)?,
        DType::Index => {
            let bytes = row_bytes(device, tensor, rows)?;
            oracle().write_index(&numbers(&bytes), &mut host)?;
        }
        _ => oracle().write(&row_numbers(device, tensor, rows)?, &mut host)?,
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
    pub(crate) fn new<D: Device>(
        device: &D,
        whole: &Batch,
        sampled: &[usize],
        cache: &CudaTensor<D>,
    ) -> Result<Self> {
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
        Ok(Self { batch: upload(&host)?, host, cache: rows(device, cache, &used)? })
    }
}

/// Token rows of a batch, each a sequence of its own, with only the cache rows that they select, on pages of one row.
pub(crate) fn selected<D: Device>(
    device: &D,
    whole: &Batch,
    sampled: &[usize],
    indices: &[Vec<i32>],
    cache: &CudaTensor<D>,
) -> Result<(CpuBatch, CpuTensor<f64>)> {
    let row_size = cache.shape()[2] * element_bytes(cache.dtype());
    let mut pages: HashMap<usize, Vec<u8>> = HashMap::new();
    // What nobody selects lies on page 0.
    let mut bytes = vec![0; row_size];
    let mut page_lists = Vec::new();
    for (&t, indices) in sampled.iter().zip(indices) {
        let mut list = vec![0_u32; whole.visible(t)];
        for position in indices.iter().filter_map(|&position| usize::try_from(position).ok()) {
            let slot = whole.slot(t, position);
            let page = match pages.entry(slot / PAGE_SIZE) {
                Entry::Occupied(page) => page.into_mut(),
                Entry::Vacant(place) => place.insert(row_bytes(device, cache, &[slot / PAGE_SIZE])?),
            };
            list[position] = (bytes.len() / row_size) as u32;
            bytes.extend(&page[slot % PAGE_SIZE * row_size..][..row_size]);
        }
        page_lists.push(list);
    }
    let sequences: Vec<SequenceSlice<'_>> = page_lists
        .iter()
        .map(|pages| SequenceSlice { token_ids: &[0], computed_len: pages.len() - 1, pages })
        .collect();
    let mut host = oracle().alloc(cache.dtype(), &[bytes.len() / row_size, 1, cache.shape()[2]])?;
    match cache.dtype() {
        DType::Fp8 => oracle().write_bytes(&bytes, &mut host)?,
        _ => {
            let values: Vec<f64> = numbers::<bf16>(&bytes).into_iter().map(f64::from).collect();
            oracle().write(&values, &mut host)?;
        }
    }
    Ok((upload(&Batch::new(1, &sequences)?)?, host))
}

/// What the oracle gave for a set of inputs, which stay the same from tile to tile.
#[derive(Debug)]
pub(crate) struct Memo<T>(RefCell<HashMap<usize, Rc<T>>>);

impl<T> Default for Memo<T> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<T> Memo<T> {
    pub(crate) fn get_or_make(&self, copy: usize, make: impl FnOnce() -> Result<T>) -> Result<Rc<T>> {
        if let Some(known) = self.0.borrow().get(&copy) {
            return Ok(known.clone());
        }
        let made = Rc::new(make()?);
        self.0.borrow_mut().insert(copy, made.clone());
        Ok(made)
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
    use std::sync::{Arc, Mutex};

    use dsa80_cuda::{Launch, Limits};
    use dsa80_reference::Error;
    use dsa80_reference::fp8::MlaRow;

    use super::*;
    use crate::inputs::{Pages, Random};

    /// Memory alone.
    struct Memory(Limits);

    impl Device for Memory {
        type Buffer = Arc<Mutex<Vec<u8>>>;
        type Graph = ();

        fn limits(&self) -> &Limits {
            &self.0
        }

        fn alloc(&self, _name: &str, bytes: usize) -> Result<Self::Buffer> {
            Ok(Arc::new(Mutex::new(vec![0; bytes])))
        }

        fn write(&self, buffer: &Self::Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
            buffer.lock().unwrap()[offset..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn read(&self, buffer: &Self::Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
            bytes.copy_from_slice(&buffer.lock().unwrap()[offset..][..bytes.len()]);
            Ok(())
        }

        fn launch(&self, _launch: &Launch<'_, Self::Buffer>) -> Result<()> {
            Err(Error::Backend { backend: "memory", message: "launches nothing".into() })
        }

        fn capture(&self, mut launches: impl FnMut() -> Result<()>) -> Result<()> {
            launches()
        }

        fn replay(&self, (): &()) -> Result<()> {
            Ok(())
        }
    }

    /// A tensor of small numbers, on the device and for the oracle.
    fn pair(
        device: &Memory,
        dtype: DType,
        shape: &[usize],
        random: &mut Random,
    ) -> (CudaTensor<Memory>, CpuTensor<f64>) {
        let tensor = CudaTensor::alloc(device, "x", dtype, shape).unwrap();
        let mut number = || random.below(257) as f32 / 64.0 - 2.0;
        let bytes: Vec<u8> = match dtype {
            DType::Act => (0..tensor.len()).flat_map(|_| bf16::from_f32(number()).to_le_bytes()).collect(),
            DType::Float => (0..tensor.len()).flat_map(|_| number().to_le_bytes()).collect(),
            // Codes below 2, and where scales or bf16 lie the same bytes: small normal numbers.
            _ => (0..tensor.len()).map(|_| 0x38 + random.below(8) as u8).collect(),
        };
        device.write(tensor.buffer(), 0, &bytes).unwrap();
        let all: Vec<usize> = (0..shape[0]).collect();
        let host = rows(device, &tensor, &all).unwrap();
        (tensor, host)
    }

    #[test]
    fn sampled_rows_see_what_they_see_in_the_whole() {
        let device = Memory(Limits::a100());
        let mut random = Random::new(5);
        let sequences = [(70, 2), (0, 130), (200, 1)];
        let whole = Pages::new(12, &mut random).batch(&sequences).unwrap();
        let tokens = whole.num_tokens();
        let sampled = [0, 1, 2, 100, tokens - 1];
        let (q_on_device, q) = pair(&device, DType::Act, &[tokens, 2, 16], &mut random);
        let (weights_on_device, weights) = pair(&device, DType::Float, &[tokens, 2], &mut random);
        for (dtype, width) in [(DType::Act, 16), (DType::Fp8, 20)] {
            let (cache_on_device, cache) = pair(&device, dtype, &[12, PAGE_SIZE, width], &mut random);
            let logits = |batch: &CpuBatch, rows: usize, q, weights, cache| {
                let mut logits = oracle().alloc(DType::Float, &[rows, 201]).unwrap();
                oracle().indexer_logits(batch, 0..rows, q, weights, cache, 0.25, &mut logits).unwrap();
                oracle().read(&logits).unwrap()
            };
            let all = logits(&upload(&whole).unwrap(), tokens, &q, &weights, &cache);
            let part = Sampled::new(&device, &whole, &sampled, &cache_on_device).unwrap();
            let q = rows(&device, &q_on_device, &sampled).unwrap();
            let weights = rows(&device, &weights_on_device, &sampled).unwrap();
            let found = logits(&part.batch, sampled.len(), &q, &weights, &part.cache);
            for (i, &t) in sampled.iter().enumerate() {
                let visible = whole.visible(t);
                assert_eq!(part.host.visible(i), visible);
                assert_eq!(found[201 * i..][..visible], all[201 * t..][..visible], "token {t}");
            }
        }
    }

    #[test]
    fn selected_rows_attend_to_the_same() {
        const K: usize = 24;
        let device = Memory(Limits::a100());
        let mut random = Random::new(6);
        let whole = Pages::new(12, &mut random).batch(&[(70, 2), (0, 130), (200, 1)]).unwrap();
        let tokens = whole.num_tokens();
        let sampled = [0, 1, 30, 100, tokens - 1];
        let (q_on_device, q) = pair(&device, DType::Act, &[tokens, 2, 48], &mut random);
        let indices: Vec<Vec<i32>> = (0..tokens)
            .map(|t| {
                let mut row = random.distinct(K, whole.visible(t));
                row.resize(K, -1);
                row
            })
            .collect();
        let row = MlaRow { kv_lora_rank: 32, rope: 16 };
        for (dtype, width) in [(DType::Act, 48), (DType::Fp8, row.row_bytes())] {
            let (cache_on_device, cache) = pair(&device, dtype, &[12, PAGE_SIZE, width], &mut random);
            let attend = |batch: &CpuBatch, q, cache, indices: &[Vec<i32>]| {
                let mut table = oracle().alloc(DType::Index, &[indices.len(), K]).unwrap();
                oracle().write_index(&indices.concat(), &mut table).unwrap();
                let mut out = oracle().alloc(DType::Act, &[indices.len(), 2, 32]).unwrap();
                oracle().sparse_mla(batch, q, cache, &table, 0.2, &mut out).unwrap();
                oracle().read(&out).unwrap()
            };
            let all = attend(&upload(&whole).unwrap(), &q, &cache, &indices);
            let of_sampled: Vec<Vec<i32>> = sampled.iter().map(|&t| indices[t].clone()).collect();
            let (batch, cache) = selected(&device, &whole, &sampled, &of_sampled, &cache_on_device).unwrap();
            let q = rows(&device, &q_on_device, &sampled).unwrap();
            let found = attend(&batch, &q, &cache, &of_sampled);
            for (i, &t) in sampled.iter().enumerate() {
                assert_eq!(found[64 * i..][..64], all[64 * t..][..64], "token {t}");
            }
        }
    }

    #[test]
    fn both_measures_count() {
        let accuracy = Accuracy::of(1, 0.2, &[3.0, 4.5], &[3.0, 4.0], |_| 1.0);
        assert_eq!((accuracy.relative_l2, accuracy.worst, accuracy.ok()), (0.1, 0.5, true));
        assert!(!Accuracy::of(1, 0.05, &[3.0, 4.5], &[3.0, 4.0], |_| 1.0).ok());
        assert!(!Accuracy::of(1, 0.2, &[3.0, 4.5], &[3.0, 4.0], |_| 0.4).ok());
        assert!(!Accuracy::of(1, 0.2, &[f64::NAN], &[1.0], |_| 1.0).ok());
        assert!(!Accuracy::of(1, 0.2, &[1.0, 1.0], &[1.0], |_| 1.0).ok());
        assert!(!Accuracy::of(0, 0.2, &[], &[], |_| 1.0).ok());
        assert!(!Accuracy::of(1, 1.0, &[1.0], &[1.5], |_| f64::NAN).ok());
    }

    #[test]
    fn samples_reach_both_ends() {
        assert_eq!(spread(3, 2048), [0, 1023, 2047]);
        assert_eq!(spread(1, 9), [8]);
        assert_eq!(spread(9, 2), [0, 1]);
        assert_eq!(spread(4, 0), [0_usize; 0]);
    }
}
