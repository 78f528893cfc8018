//! Inputs, made on the device where they are large.

use dsa80_cuda::{
    Arg, CudaBatch, CudaTensor, Device, Gpu, GpuBuffer, Int4Shape, Launch, PackedInt4, Program,
};
use dsa80_reference::fp8::{IndexerPage, MlaRow};
use dsa80_reference::{Batch, DType, Result, SequenceSlice};

/// Tokens of a page, as served.
pub(crate) const PAGE_SIZE: usize = 64;

/// What the caches of a case hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheType {
    Bf16,
    Fp8,
}

impl CacheType {
    pub(crate) fn words(self) -> &'static str {
        match self {
            CacheType::Bf16 => "bf16",
            CacheType::Fp8 => "8-bit",
        }
    }
}

/// A small generator of numbers (splitmix64), for what the host decides.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// `count` distinct numbers below `end`, ascending.
    pub(crate) fn distinct(&mut self, count: usize, end: usize) -> Vec<i32> {
        let mut chosen = vec![false; end];
        let mut left = count.min(end);
        while left > 0 {
            let place = self.below(end);
            left -= usize::from(!std::mem::replace(&mut chosen[place], true));
        }
        (0..end as i32).filter(|&place| chosen[place as usize]).collect()
    }
}

/// Pages of a cache, handed out in a random order.
#[derive(Debug)]
pub(crate) struct Pages(Vec<u32>);

impl Pages {
    pub(crate) fn new(count: usize, random: &mut Random) -> Self {
        let mut pages: Vec<u32> = (0..count as u32).collect();
        random.shuffle(&mut pages);
        Self(pages)
    }

    /// A batch of sequences, `(tokens in the caches, new tokens)` each, with pages that no other batch has.
    pub(crate) fn batch(&mut self, sequences: &[(usize, usize)]) -> Result<Batch> {
        let pages: Vec<Vec<u32>> = sequences
            .iter()
            .map(|&(computed, new)| {
                self.0.split_off(self.0.len().saturating_sub((computed + new).div_ceil(PAGE_SIZE)))
            })
            .collect();
        let tokens: Vec<Vec<u32>> = sequences.iter().map(|&(_, new)| vec![0; new]).collect();
        let slices: Vec<SequenceSlice<'_>> = sequences
            .iter()
            .zip(&tokens)
            .zip(&pages)
            .map(|((&(computed_len, _), token_ids), pages)| SequenceSlice { token_ids, computed_len, pages })
            .collect();
        Batch::new(PAGE_SIZE, &slices)
    }

    /// Pages that such a batch takes.
    pub(crate) fn needed(sequences: &[(usize, usize)]) -> usize {
        sequences.iter().map(|&(computed, new)| (computed + new).div_ceil(PAGE_SIZE)).sum()
    }
}

/// A decode step of `rows` sequences that share one context, for kernels that never follow the pages.
pub(crate) fn decode_of_one_context(rows: usize, context: usize) -> Result<Batch> {
    let pages: Vec<u32> = (0..context.div_ceil(PAGE_SIZE) as u32).collect();
    let sequence = SequenceSlice { token_ids: &[0], computed_len: context - 1, pages: &pages };
    Batch::new(PAGE_SIZE, &vec![sequence; rows])
}

/// The batch on the device.
pub(crate) fn upload(gpu: &Gpu, batch: &Batch) -> Result<CudaBatch<Gpu>> {
    let mut device = CudaBatch::alloc(gpu, batch.num_tokens(), batch.num_seqs(), batch.max_blocks)?;
    device.upload(gpu, batch)?;
    Ok(device)
}

/// About normal values of this deviation, in bf16 (`Act`) or f32 (`Float`).
pub(crate) fn normal(
    gpu: &Gpu,
    name: &str,
    dtype: DType,
    shape: &[usize],
    seed: u64,
    deviation: f32,
) -> Result<CudaTensor<Gpu>> {
    let tensor = CudaTensor::alloc(gpu, name, dtype, shape)?;
    let entry = match dtype {
        DType::Float | DType::F32 => "fill_f32",
        _ => "fill_bf16",
    };
    let count = Arg::I64(tensor.len() as i64);
    fill(gpu, entry, &[Arg::Buffer(tensor.buffer()), count, Arg::I32(seed as i32), Arg::F32(deviation)])?;
    Ok(tensor)
}

/// An `Index` tensor.
pub(crate) fn indices(gpu: &Gpu, name: &str, shape: &[usize], values: &[i32]) -> Result<CudaTensor<Gpu>> {
    let tensor = CudaTensor::alloc(gpu, name, DType::Index, shape)?;
    gpu.write(tensor.buffer(), 0, bytemuck::cast_slice(values))?;
    Ok(tensor)
}

/// An indexer cache of about normal keys.
pub(crate) fn indexer_cache(
    gpu: &Gpu,
    kind: CacheType,
    pages: usize,
    width: usize,
    seed: u64,
) -> Result<CudaTensor<Gpu>> {
    let page = IndexerPage { page_size: PAGE_SIZE, width };
    let scales = page.scale(0).start;
    match kind {
        CacheType::Bf16 => normal(gpu, "indexer cache", DType::Act, &[pages, PAGE_SIZE, width], seed, 1.0),
        CacheType::Fp8 => {
            let shape = [pages, PAGE_SIZE, page.row_bytes()];
            fp8(
                gpu,
                "indexer cache",
                &shape,
                seed,
                page.row_bytes() * PAGE_SIZE,
                [scales, 4 * PAGE_SIZE],
                [0, 0],
            )
        }
    }
}

/// An MLA cache of about normal rows.
pub(crate) fn mla_cache(
    gpu: &Gpu,
    kind: CacheType,
    pages: usize,
    row: MlaRow,
    seed: u64,
) -> Result<CudaTensor<Gpu>> {
    match kind {
        CacheType::Bf16 => {
            let shape = [pages, PAGE_SIZE, row.kv_lora_rank + row.rope];
            normal(gpu, "MLA cache", DType::Act, &shape, seed, 1.0)
        }
        CacheType::Fp8 => {
            let shape = [pages, PAGE_SIZE, row.row_bytes()];
            let (scales, rotary) = (row.scales(), row.rotary());
            let [scales, rotary] = [[scales.start, scales.len()], [rotary.start, rotary.len()]];
            fp8(gpu, "MLA cache", &shape, seed, row.row_bytes(), scales, rotary)
        }
    }
}

/// `count` packed weights of random nibbles and zero points, with bf16 scales about 0 of this deviation.
pub(crate) fn packed_int4(
    gpu: &Gpu,
    shape: Int4Shape,
    count: usize,
    seed: u64,
    deviation: f32,
) -> Result<PackedInt4<Gpu>> {
    let packed = PackedInt4::alloc(gpu, "weight", shape, count)?;
    let words = |buffer, bytes: usize, seed: u64| {
        let count = Arg::I64((bytes / size_of::<u32>()) as i64);
        fill(gpu, "fill_words", &[Arg::Buffer(buffer), count, Arg::I32(seed as i32)])
    };
    words(packed.weight(), count * shape.weight_bytes(), 3 * seed)?;
    if let Some(zeros) = packed.zeros() {
        words(zeros, count * shape.zeros_bytes(), 3 * seed + 1)?;
    }
    let scales = Arg::I64((count * shape.scales_bytes() / size_of::<u16>()) as i64);
    let (seed, deviation) = (Arg::I32(3 * seed as i32 + 2), Arg::F32(deviation));
    fill(gpu, "fill_bf16", &[Arg::Buffer(packed.scales()), scales, seed, deviation])?;
    Ok(packed)
}

fn fp8(
    gpu: &Gpu,
    name: &str,
    shape: &[usize],
    seed: u64,
    period: usize,
    floats: [usize; 2],
    halves: [usize; 2],
) -> Result<CudaTensor<Gpu>> {
    let tensor = CudaTensor::alloc(gpu, name, DType::Fp8, shape)?;
    let count = Arg::I64(tensor.len() as i64);
    let [period, f32_at, f32_bytes, bf16_at, bf16_bytes] =
        [period, floats[0], floats[1], halves[0], halves[1]].map(|number| Arg::I32(number as i32));
    let seed = Arg::I32(seed as i32);
    let buffer = Arg::Buffer(tensor.buffer());
    fill(gpu, "fill_fp8", &[buffer, count, seed, period, f32_at, f32_bytes, bf16_at, bf16_bytes])?;
    Ok(tensor)
}

fn fill(gpu: &Gpu, entry: &'static str, args: &[Arg<'_, GpuBuffer>]) -> Result<()> {
    gpu.launch(&Launch {
        program: &Program { source: "bench_fill.cu", defines: Vec::new() },
        entry,
        grid: [8 * gpu.limits().multiprocessors, 1, 1],
        threads: 256,
        shared_bytes: 0,
        shape: "inputs".into(),
        args,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_numbers_are_distinct_and_ascending() {
        let mut random = Random::new(7);
        for (count, end) in [(0, 5), (5, 5), (9, 5), (2048, 32768), (2048, 2049)] {
            let numbers = random.distinct(count, end);
            assert_eq!(numbers.len(), count.min(end));
            assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(numbers.iter().all(|&number| (0..end as i32).contains(&number)));
        }
    }

    #[test]
    fn batches_share_no_pages() {
        let sequences = [(100, 1), (0, 64), (63, 2)];
        let needed = Pages::needed(&sequences);
        assert_eq!(needed, 2 + 1 + 2);
        let mut pages = Pages::new(2 * needed, &mut Random::new(1));
        let mut used: Vec<i32> = [(); 2]
            .iter()
            .flat_map(|()| pages.batch(&sequences).unwrap().block_table)
            .filter(|&page| page >= 0)
            .collect();
        used.sort_unstable();
        assert_eq!(used, (0..10).collect::<Vec<i32>>());
    }
}
