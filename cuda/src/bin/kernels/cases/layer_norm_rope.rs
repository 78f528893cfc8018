//! `layer_norm_rope` at the tokens of a decode step and of a prefill chunk.

use dsa80_cuda::layer_norm_rope::{self, LayerNormRopeDims, LayerNormRopeTile};
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Gpu, Tile};
use dsa80_reference::fp8::{IndexerPage, decode};
use dsa80_reference::{DType, Kernels, Result, RopeLayout};

use super::{Case, Run, compare_rows, copies, oracle_cache, sampled_slots, typed};
use crate::inputs::{self, CacheType, PAGE_SIZE, Pages, Random};
use crate::oracle::{self, Accuracy, oracle};

const DIMS: LayerNormRopeDims = LayerNormRopeDims { width: 128, rope: 64 };
const EPS: f64 = 1e-6;

struct Keys {
    tile: LayerNormRopeTile,
    tokens: usize,
    cache: CacheType,
    weight: CudaTensor<Gpu>,
    bias: CudaTensor<Gpu>,
    sets: Vec<Set>,
}

struct Set {
    batch: CudaBatch<Gpu>,
    x: CudaTensor<Gpu>,
    cos_sin: CudaTensor<Gpu>,
    cache: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    let shapes = [CacheType::Bf16, CacheType::Fp8].map(|cache| [1, 32, 2048].map(|tokens| (cache, tokens)));
    shapes
        .into_iter()
        .flatten()
        .map(|(cache, tokens)| Case {
            kernel: LayerNormRopeTile::KERNEL,
            name: format!("T={tokens}, {} cache", cache.words()),
            class: "any",
            goal_us: None,
            check: tokens <= 32,
            make: Box::new(move |gpu, _| Ok(Box::new(Keys::new(gpu, cache, tokens)?))),
        })
        .collect()
}

impl Keys {
    fn new(gpu: &Gpu, cache: CacheType, tokens: usize) -> Result<Self> {
        let LayerNormRopeDims { width, rope } = DIMS;
        let mut random = Random::new(1);
        // One row each of many sequences, or the chunk of one.
        let sequences = if tokens <= 256 { vec![(63, 1); tokens] } else { vec![(0, tokens)] };
        let bytes = layer_norm_rope::cost(tokens, DIMS, DType::Bf16, cache == CacheType::Fp8).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                let page_count = Pages::needed(&sequences);
                let batch = Pages::new(page_count, &mut random).batch(&sequences)?;
                Ok(Set {
                    batch: inputs::upload(gpu, &batch)?,
                    x: inputs::normal(gpu, "x", DType::Act, &[tokens, width], 2 * seed, 1.5)?,
                    cos_sin: inputs::normal(
                        gpu,
                        "cos_sin",
                        DType::Float,
                        &[tokens, rope / 2, 2],
                        2 * seed + 1,
                        0.7,
                    )?,
                    cache: inputs::indexer_cache(gpu, cache, page_count, width, seed)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            tile: LayerNormRopeTile::safe(DIMS),
            tokens,
            cache,
            weight: inputs::normal(gpu, "weight", DType::Bf16, &[width], 3, 1.0)?,
            bias: inputs::normal(gpu, "bias", DType::Bf16, &[width], 4, 0.5)?,
            sets,
        })
    }
}

impl Run for Keys {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        layer_norm_rope::cost(self.tokens, DIMS, DType::Bf16, self.cache == CacheType::Fp8)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { batch, x, cos_sin, cache } = &mut self.sets[copy];
        let layout = RopeLayout::Interleaved;
        let (weight, bias) = (&self.weight, &self.bias);
        layer_norm_rope::layer_norm_rope(gpu, &self.tile, batch, x, weight, bias, EPS, layout, cos_sin, cache)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.cache.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let set = &self.sets[copy];
        let (rows, slots) = sampled_slots(set.batch.host());
        let (batch, mut expected) = oracle_cache(rows.len(), &set.cache)?;
        let columns: Vec<usize> = (0..DIMS.width).collect();
        oracle().layer_norm_rope(
            &batch,
            &oracle::rows(gpu, &set.x, &rows)?,
            &oracle::rows(gpu, &self.weight, &columns)?,
            &oracle::rows(gpu, &self.bias, &columns)?,
            EPS,
            RopeLayout::Interleaved,
            &oracle::rows(gpu, &set.cos_sin, &rows)?,
            &mut expected,
        )?;
        compare_rows(gpu, &set.cache, &slots, &expected, key)
    }
}

/// An 8-bit key, as numbers.
fn key(cache: &[u8], slot: usize) -> Vec<f64> {
    let page = IndexerPage { page_size: PAGE_SIZE, width: DIMS.width };
    let scale: f32 = bytemuck::pod_read_unaligned(&cache[page.scale(slot)]);
    cache[page.codes(slot)].iter().map(|&code| f64::from(decode(code)) * f64::from(scale)).collect()
}
