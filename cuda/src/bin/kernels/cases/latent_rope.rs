//! `latent_rope` at the tokens of a decode step and of a prefill chunk.

use dsa80_cuda::latent_rope::{self, LatentRopeDims, LatentRopeTile};
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Gpu, Tile};
use dsa80_reference::fp8::{MLA_GROUP, MlaRow, decode};
use dsa80_reference::{DType, Kernels, Result};
use half::bf16;

use super::{Case, Run, compare_rows, copies, oracle_cache, sampled_slots, typed};
use crate::inputs::{self, CacheType, Pages, Random};
use crate::oracle::{self, Accuracy, oracle};

const DIMS: LatentRopeDims = LatentRopeDims { kv_lora_rank: 512, rope: 64 };
const ROW: MlaRow = MlaRow { kv_lora_rank: 512, rope: 64 };
const EPS: f64 = 1e-5;

struct Latents {
    tile: LatentRopeTile,
    tokens: usize,
    cache: CacheType,
    weight: CudaTensor<Gpu>,
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
            kernel: LatentRopeTile::KERNEL,
            name: format!("T={tokens}, {} cache", cache.words()),
            class: "any",
            goal_us: None,
            check: tokens <= 32,
            make: Box::new(move |gpu, _| Ok(Box::new(Latents::new(gpu, cache, tokens)?))),
        })
        .collect()
}

impl Latents {
    fn new(gpu: &Gpu, cache: CacheType, tokens: usize) -> Result<Self> {
        let LatentRopeDims { kv_lora_rank, rope } = DIMS;
        let mut random = Random::new(1);
        // One row each of many sequences, or the chunk of one.
        let sequences = if tokens <= 256 { vec![(63, 1); tokens] } else { vec![(0, tokens)] };
        let bytes = latent_rope::cost(tokens, DIMS, DType::Bf16, cache == CacheType::Fp8).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                let page_count = Pages::needed(&sequences);
                let batch = Pages::new(page_count, &mut random).batch(&sequences)?;
                let (x_shape, table) = ([tokens, kv_lora_rank + rope], [tokens, rope / 2, 2]);
                Ok(Set {
                    batch: inputs::upload(gpu, &batch)?,
                    x: inputs::normal(gpu, "x", DType::Act, &x_shape, 2 * seed, 1.5)?,
                    cos_sin: inputs::normal(gpu, "cos_sin", DType::Float, &table, 2 * seed + 1, 0.7)?,
                    cache: inputs::mla_cache(gpu, cache, page_count, ROW, seed)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            tile: LatentRopeTile::safe(DIMS),
            tokens,
            cache,
            weight: inputs::normal(gpu, "weight", DType::Bf16, &[kv_lora_rank], 3, 1.0)?,
            sets,
        })
    }
}

impl Run for Latents {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        latent_rope::cost(self.tokens, DIMS, DType::Bf16, self.cache == CacheType::Fp8)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { batch, x, cos_sin, cache } = &mut self.sets[copy];
        latent_rope::latent_rope(gpu, &self.tile, batch, x, &self.weight, EPS, cos_sin, cache)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.cache.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let set = &self.sets[copy];
        let (rows, slots) = sampled_slots(set.batch.host());
        let (batch, mut expected) = oracle_cache(rows.len(), &set.cache)?;
        oracle().latent_rope(
            &batch,
            &oracle::rows(gpu, &set.x, &rows)?,
            &oracle::rows(gpu, &self.weight, &(0..DIMS.kv_lora_rank).collect::<Vec<_>>())?,
            EPS,
            &oracle::rows(gpu, &set.cos_sin, &rows)?,
            &mut expected,
        )?;
        compare_rows(gpu, &set.cache, &slots, &expected, latent)
    }
}

/// An 8-bit row, as numbers.
fn latent(cache: &[u8], slot: usize) -> Vec<f64> {
    let row = &cache[slot * ROW.row_bytes()..][..ROW.row_bytes()];
    let scales: Vec<f32> = oracle::numbers(&row[ROW.scales()]);
    let codes = row[..ROW.kv_lora_rank].iter().enumerate();
    let latent = codes.map(|(i, &code)| f64::from(decode(code)) * f64::from(scales[i / MLA_GROUP]));
    let rotary: Vec<bf16> = oracle::numbers(&row[ROW.rotary()]);
    latent.chain(rotary.into_iter().map(f64::from)).collect()
}
