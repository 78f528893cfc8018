//! `qkv_norm_rope` in a layer with an indexer, at the tokens of a decode step and of a prefill chunk.

use dsa80_cuda::latent_rope::LatentRopeDims;
use dsa80_cuda::qkv_norm_rope::{self, QkvNormRopeDims, QkvNormRopeTile};
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Gpu, Tile};
use dsa80_reference::fp8::MlaRow;
use dsa80_reference::{DType, IndexKeys, Kernels, Result, RopeLayout};

use super::rows::{compare_rows, oracle_cache, sampled_slots};
use super::{Case, Run, copies, typed};
use crate::inputs::{self, CacheType, Pages, Random};
use crate::oracle::{self, Accuracy, half_ulp_bf16, oracle};

const LATENT: LatentRopeDims = LatentRopeDims { kv_lora_rank: 512, rope: 64 };
const KEY: usize = 128;
const DIMS: QkvNormRopeDims = QkvNormRopeDims { q_lora_rank: 2048, latent: LATENT, key: Some(KEY) };
const LAYOUT: RopeLayout = RopeLayout::Interleaved;
const EPS: f64 = 1e-5;
const KEY_EPS: f64 = 1e-6;

struct Rows {
    tile: QkvNormRopeTile,
    tokens: usize,
    q_weight: CudaTensor<Gpu>,
    kv_weight: CudaTensor<Gpu>,
    key_weight: CudaTensor<Gpu>,
    key_bias: CudaTensor<Gpu>,
    sets: Vec<Set>,
}

struct Set {
    batch: CudaBatch<Gpu>,
    q_a: CudaTensor<Gpu>,
    kv_a: CudaTensor<Gpu>,
    x: CudaTensor<Gpu>,
    cos_sin: CudaTensor<Gpu>,
    q_latent: CudaTensor<Gpu>,
    cache: CudaTensor<Gpu>,
    key_cache: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    [1, 8, 32, 2048]
        .into_iter()
        .map(|tokens| Case {
            kernel: QkvNormRopeTile::KERNEL,
            name: format!("T={tokens}, bf16 caches"),
            class: "any",
            goal_us: None,
            check: tokens <= 32,
            make: Box::new(move |gpu, _| Ok(Box::new(Rows::new(gpu, tokens)?))),
        })
        .collect()
}

impl Rows {
    fn new(gpu: &Gpu, tokens: usize) -> Result<Self> {
        let mut random = Random::new(1);
        // One row each of many sequences, or the chunk of one.
        let sequences = if tokens <= 256 { vec![(63, 1); tokens] } else { vec![(0, tokens)] };
        let row = MlaRow { kv_lora_rank: LATENT.kv_lora_rank, rope: LATENT.rope };
        let bytes = qkv_norm_rope::cost(tokens, DIMS, DType::Bf16, false).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                let pages = Pages::needed(&sequences);
                let batch = Pages::new(pages, &mut random).batch(&sequences)?;
                let act = |name, columns, seed| {
                    inputs::normal(gpu, name, DType::Act, &[tokens, columns], seed, 1.5)
                };
                let table = [tokens, LATENT.rope / 2, 2];
                Ok(Set {
                    batch: inputs::upload(gpu, &batch)?,
                    q_a: act("q_a", DIMS.q_lora_rank, 4 * seed)?,
                    kv_a: act("kv_a", LATENT.kv_lora_rank + LATENT.rope, 4 * seed + 1)?,
                    x: act("x", KEY, 4 * seed + 2)?,
                    cos_sin: inputs::normal(gpu, "cos_sin", DType::Float, &table, 4 * seed + 3, 0.7)?,
                    q_latent: CudaTensor::alloc(gpu, "q_latent", DType::Act, &[tokens, DIMS.q_lora_rank])?,
                    cache: inputs::mla_cache(gpu, CacheType::Bf16, pages, row, seed)?,
                    key_cache: inputs::indexer_cache(gpu, CacheType::Bf16, pages, KEY, seed)?,
                })
            })
            .collect::<Result<_>>()?;
        let weight = |name, columns, seed| inputs::normal(gpu, name, DType::Bf16, &[columns], seed, 1.0);
        Ok(Self {
            tile: QkvNormRopeTile::safe(DIMS),
            tokens,
            q_weight: weight("q_weight", DIMS.q_lora_rank, 3)?,
            kv_weight: weight("kv_weight", LATENT.kv_lora_rank, 4)?,
            key_weight: weight("key_weight", KEY, 5)?,
            key_bias: weight("key_bias", KEY, 6)?,
            sets,
        })
    }
}

impl Run for Rows {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        qkv_norm_rope::cost(self.tokens, DIMS, DType::Bf16, false)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Self { tile, q_weight, kv_weight, key_weight, key_bias, sets, .. } = self;
        let Set { batch, q_a, kv_a, x, cos_sin, q_latent, cache, key_cache } = &mut sets[copy];
        let keys = IndexKeys {
            x,
            weight: key_weight,
            bias: key_bias,
            eps: KEY_EPS,
            layout: LAYOUT,
            cache: key_cache,
        };
        let keys = Some(keys);
        qkv_norm_rope::qkv_norm_rope(
            gpu, tile, batch, q_a, q_weight, q_latent, kv_a, kv_weight, cache, EPS, cos_sin, keys,
        )
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|Set { q_latent, cache, key_cache, .. }| {
            [q_latent, cache, key_cache].into_iter().try_for_each(|out| gpu.fill(out.buffer(), 0xff))
        })
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let set = &self.sets[copy];
        let (rows, slots) = sampled_slots(set.batch.host());
        let (batch, mut cache) = oracle_cache(rows.len(), &set.cache)?;
        let (_, mut key_cache) = oracle_cache(rows.len(), &set.key_cache)?;
        let of_rows = |tensor| oracle::rows(gpu, tensor, &rows);
        let whole = |tensor: &CudaTensor<Gpu>, columns: usize| {
            oracle::rows(gpu, tensor, &(0..columns).collect::<Vec<_>>())
        };
        let mut q_latent = oracle().alloc(DType::Act, &[rows.len(), DIMS.q_lora_rank])?;
        let (x, cos_sin) = (of_rows(&set.x)?, of_rows(&set.cos_sin)?);
        let (weight, bias) = (whole(&self.key_weight, KEY)?, whole(&self.key_bias, KEY)?);
        let keys = IndexKeys {
            x: &x,
            weight: &weight,
            bias: &bias,
            eps: KEY_EPS,
            layout: LAYOUT,
            cache: &mut key_cache,
        };
        oracle().qkv_norm_rope(
            &batch,
            &of_rows(&set.q_a)?,
            &whole(&self.q_weight, DIMS.q_lora_rank)?,
            &mut q_latent,
            &of_rows(&set.kv_a)?,
            &whole(&self.kv_weight, LATENT.kv_lora_rank)?,
            &mut cache,
            EPS,
            &cos_sin,
            Some(keys),
        )?;
        let (found, expected) = (oracle::row_numbers(gpu, &set.q_latent, &rows)?, oracle().read(&q_latent)?);
        let query = Accuracy::of(rows.len(), 2.5e-3, &found, &expected, |i| 3.0 * half_ulp_bf16(expected[i]));
        // Neither cache is in 8 bits.
        let none = |_: &[u8], _| Vec::new();
        let latents = compare_rows(gpu, &set.cache, &slots, &cache, none)?;
        Ok(query.and(latents).and(compare_rows(gpu, &set.key_cache, &slots, &key_cache, none)?))
    }
}
