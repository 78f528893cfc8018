//! What the kernels that make a cache row of each token share: their cases, from the tokens of a decode step to those of a prefill chunk.

use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Gpu, Tile};
use dsa80_reference::cpu::{CpuBatch, CpuTensor};
use dsa80_reference::{Batch, DType, DeviceTensor, Kernels, Result, SequenceSlice};

use super::{Case, Run, copies, typed};
use crate::inputs::{self, CacheType, PAGE_SIZE, Pages, Random};
use crate::oracle::{self, Accuracy, half_ulp_bf16, oracle, spread};

/// Such a kernel, with its weights.
pub(super) trait RowKernel: Sized + 'static {
    type Tile: Tile;
    const DIMS: <Self::Tile as Tile>::Dims;
    /// Columns of a token's row.
    const WIDTH: usize;
    /// Columns that rotate.
    const ROPE: usize;

    fn new(gpu: &Gpu) -> Result<Self>;

    fn cache(gpu: &Gpu, kind: CacheType, pages: usize, seed: u64) -> Result<CudaTensor<Gpu>>;

    fn cost(tokens: usize, fp8: bool) -> Cost;

    fn launch(&self, gpu: &Gpu, tile: &Self::Tile, set: &mut Set) -> Result<()>;

    /// The rows that the oracle makes of `sample`.
    fn expect(&self, gpu: &Gpu, sample: &Sample, cache: &mut CpuTensor<f64>) -> Result<()>;

    /// An 8-bit row, as numbers.
    fn fp8_row(cache: &[u8], slot: usize) -> Vec<f64>;
}

pub(super) struct Set {
    pub(super) batch: CudaBatch<Gpu>,
    pub(super) x: CudaTensor<Gpu>,
    pub(super) cos_sin: CudaTensor<Gpu>,
    pub(super) cache: CudaTensor<Gpu>,
}

/// Tokens of a set, for the oracle.
pub(super) struct Sample {
    pub(super) batch: CpuBatch,
    pub(super) x: CpuTensor<f64>,
    pub(super) cos_sin: CpuTensor<f64>,
}

struct Rows<K: RowKernel> {
    kernel: K,
    tile: K::Tile,
    tokens: usize,
    cache: CacheType,
    sets: Vec<Set>,
}

pub(super) fn cases<K: RowKernel>() -> Vec<Case> {
    let shapes = [CacheType::Bf16, CacheType::Fp8].map(|cache| [1, 32, 2048].map(|tokens| (cache, tokens)));
    shapes
        .into_iter()
        .flatten()
        .map(|(cache, tokens)| Case {
            kernel: K::Tile::KERNEL,
            name: format!("T={tokens}, {} cache", cache.words()),
            class: "any",
            goal_us: None,
            check: tokens <= 32,
            make: Box::new(move |gpu, _| Ok(Box::new(Rows::<K>::new(gpu, cache, tokens)?))),
        })
        .collect()
}

impl<K: RowKernel> Rows<K> {
    fn new(gpu: &Gpu, cache: CacheType, tokens: usize) -> Result<Self> {
        let mut random = Random::new(1);
        // One row each of many sequences, or the chunk of one.
        let sequences = if tokens <= 256 { vec![(63, 1); tokens] } else { vec![(0, tokens)] };
        let bytes = K::cost(tokens, cache == CacheType::Fp8).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                let page_count = Pages::needed(&sequences);
                let batch = Pages::new(page_count, &mut random).batch(&sequences)?;
                let (x_shape, table) = ([tokens, K::WIDTH], [tokens, K::ROPE / 2, 2]);
                Ok(Set {
                    batch: inputs::upload(gpu, &batch)?,
                    x: inputs::normal(gpu, "x", DType::Act, &x_shape, 2 * seed, 1.5)?,
                    cos_sin: inputs::normal(gpu, "cos_sin", DType::Float, &table, 2 * seed + 1, 0.7)?,
                    cache: K::cache(gpu, cache, page_count, seed)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { kernel: K::new(gpu)?, tile: K::Tile::safe(K::DIMS), tokens, cache, sets })
    }
}

impl<K: RowKernel> Run for Rows<K> {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        K::cost(self.tokens, self.cache == CacheType::Fp8)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        self.kernel.launch(gpu, &self.tile, &mut self.sets[copy])
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.cache.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let set = &self.sets[copy];
        let (rows, slots) = sampled_slots(set.batch.host());
        let (batch, mut expected) = oracle_cache(rows.len(), &set.cache)?;
        let (x, cos_sin) = (oracle::rows(gpu, &set.x, &rows)?, oracle::rows(gpu, &set.cos_sin, &rows)?);
        self.kernel.expect(gpu, &Sample { batch, x, cos_sin }, &mut expected)?;
        compare_rows(gpu, &set.cache, &slots, &expected, K::fp8_row)
    }
}

/// Cache rows that a kernel wrote to `slots`, against those that the oracle wrote to `0..slots.len()`; `fp8_row` reads an 8-bit one.
pub(super) fn compare_rows(
    gpu: &Gpu,
    found: &CudaTensor<Gpu>,
    slots: &[usize],
    expected: &CpuTensor<f64>,
    fp8_row: fn(&[u8], usize) -> Vec<f64>,
) -> Result<Accuracy> {
    let pages: Vec<usize> = (0..found.shape()[0]).collect();
    let width = found.shape()[2];
    let both = slots.iter().enumerate();
    let (found, expected, is_fp8): (Vec<f64>, Vec<f64>, bool) = if found.dtype() == DType::Fp8 {
        let (found, expected) = (oracle::row_bytes(gpu, found, &pages)?, oracle().read_bytes(expected)?);
        let rows = both.flat_map(|(i, &slot)| fp8_row(&found, slot).into_iter().zip(fp8_row(&expected, i)));
        let (found, expected) = rows.unzip();
        (found, expected, true)
    } else {
        let (found, expected) = (oracle::row_numbers(gpu, found, &pages)?, oracle().read(expected)?);
        let row = |cache: &[f64], slot: usize| cache[slot * width..][..width].to_vec();
        let rows = both.flat_map(|(i, &slot)| row(&found, slot).into_iter().zip(row(&expected, i)));
        let (found, expected) = rows.unzip();
        (found, expected, false)
    };
    // A rounding that flips is one step: in bf16 of what two of them added up to, in e4m3 a seventh of the value or the smallest step.
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    let bound = |i: usize| match is_fp8 {
        false => 6.0 * half_ulp_bf16(expected[i]) + largest / 512.0,
        true => expected[i].abs() / 7.0 + largest / 224.0,
    };
    let limit = if is_fp8 { 4e-2 } else { 2.5e-3 };
    Ok(Accuracy::of(slots.len(), limit, &found, &expected, bound))
}

/// The one sequence of `tokens` new tokens in slots `0..tokens`, and an oracle's cache for it like `cache`.
pub(super) fn oracle_cache(tokens: usize, cache: &CudaTensor<Gpu>) -> Result<(CpuBatch, CpuTensor<f64>)> {
    let pages: Vec<u32> = (0..tokens.div_ceil(PAGE_SIZE) as u32).collect();
    let token_ids = vec![0; tokens];
    let batch =
        Batch::new(PAGE_SIZE, &[SequenceSlice { token_ids: &token_ids, computed_len: 0, pages: &pages }])?;
    let mut shape = cache.shape().to_vec();
    shape[0] = pages.len();
    Ok((oracle::upload(&batch)?, oracle().alloc(cache.dtype(), &shape)?))
}

/// Tokens of a batch to compare, and the slots of their cache rows.
pub(super) fn sampled_slots(batch: &Batch) -> (Vec<usize>, Vec<usize>) {
    let rows = spread(256, batch.num_tokens());
    let slots = rows.iter().map(|&t| batch.slot_mapping[t] as usize).collect();
    (rows, slots)
}
