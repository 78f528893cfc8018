//! `latent_rope` at the tokens of a decode step and of a prefill chunk.

use dsa80_cuda::latent_rope::{self, LatentRopeDims, LatentRopeTile};
use dsa80_cuda::{Cost, CudaTensor, Gpu};
use dsa80_reference::cpu::CpuTensor;
use dsa80_reference::fp8::{MLA_GROUP, MlaRow, decode};
use dsa80_reference::{DType, Kernels, Result};
use half::bf16;

use super::Case;
use super::rows::{self, RowKernel, Sample, Set};
use crate::inputs::{self, CacheType};
use crate::oracle::{self, oracle};

const DIMS: LatentRopeDims = LatentRopeDims { kv_lora_rank: 512, rope: 64 };
const ROW: MlaRow = MlaRow { kv_lora_rank: 512, rope: 64 };
const EPS: f64 = 1e-5;

struct Latents {
    weight: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    rows::cases::<Latents>()
}

impl RowKernel for Latents {
    type Tile = LatentRopeTile;
    const DIMS: LatentRopeDims = DIMS;
    const WIDTH: usize = DIMS.kv_lora_rank + DIMS.rope;
    const ROPE: usize = DIMS.rope;

    fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self { weight: inputs::normal(gpu, "weight", DType::Bf16, &[DIMS.kv_lora_rank], 3, 1.0)? })
    }

    fn cache(gpu: &Gpu, kind: CacheType, pages: usize, seed: u64) -> Result<CudaTensor<Gpu>> {
        inputs::mla_cache(gpu, kind, pages, ROW, seed)
    }

    fn cost(tokens: usize, fp8: bool) -> Cost {
        latent_rope::cost(tokens, DIMS, DType::Bf16, fp8)
    }

    fn launch(&self, gpu: &Gpu, tile: &LatentRopeTile, set: &mut Set) -> Result<()> {
        let Set { batch, x, cos_sin, cache } = set;
        latent_rope::latent_rope(gpu, tile, batch, x, &self.weight, EPS, cos_sin, cache)
    }

    fn expect(&self, gpu: &Gpu, sample: &Sample, cache: &mut CpuTensor<f64>) -> Result<()> {
        let Sample { batch, x, cos_sin } = sample;
        let columns: Vec<usize> = (0..DIMS.kv_lora_rank).collect();
        let weight = oracle::rows(gpu, &self.weight, &columns)?;
        oracle().latent_rope(batch, x, &weight, EPS, cos_sin, cache)
    }

    fn fp8_row(cache: &[u8], slot: usize) -> Vec<f64> {
        let row = &cache[slot * ROW.row_bytes()..][..ROW.row_bytes()];
        let scales: Vec<f32> = oracle::numbers(&row[ROW.scales()]);
        let codes = row[..ROW.kv_lora_rank].iter().enumerate();
        let latent = codes.map(|(i, &code)| f64::from(decode(code)) * f64::from(scales[i / MLA_GROUP]));
        let rotary: Vec<bf16> = oracle::numbers(&row[ROW.rotary()]);
        latent.chain(rotary.into_iter().map(f64::from)).collect()
    }
}
