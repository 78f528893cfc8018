//! `layer_norm_rope` at the tokens of a decode step and of a prefill chunk.

use dsa80_cuda::layer_norm_rope::{self, LayerNormRopeDims, LayerNormRopeTile};
use dsa80_cuda::{Cost, CudaTensor, Gpu};
use dsa80_reference::cpu::CpuTensor;
use dsa80_reference::fp8::{IndexerPage, decode};
use dsa80_reference::{DType, Kernels, Result, RopeLayout};

use super::Case;
use super::rows::{self, RowKernel, Sample, Set};
use crate::inputs::{self, CacheType, PAGE_SIZE};
use crate::oracle::{self, oracle};

const DIMS: LayerNormRopeDims = LayerNormRopeDims { width: 128, rope: 64 };
const LAYOUT: RopeLayout = RopeLayout::Interleaved;
const EPS: f64 = 1e-6;

struct Keys {
    weight: CudaTensor<Gpu>,
    bias: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    rows::cases::<Keys>()
}

impl RowKernel for Keys {
    type Tile = LayerNormRopeTile;
    const DIMS: LayerNormRopeDims = DIMS;
    const WIDTH: usize = DIMS.width;
    const ROPE: usize = DIMS.rope;

    fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self {
            weight: inputs::normal(gpu, "weight", DType::Bf16, &[DIMS.width], 3, 1.0)?,
            bias: inputs::normal(gpu, "bias", DType::Bf16, &[DIMS.width], 4, 0.5)?,
        })
    }

    fn cache(gpu: &Gpu, kind: CacheType, pages: usize, seed: u64) -> Result<CudaTensor<Gpu>> {
        inputs::indexer_cache(gpu, kind, pages, DIMS.width, seed)
    }

    fn cost(tokens: usize, fp8: bool) -> Cost {
        layer_norm_rope::cost(tokens, DIMS, DType::Bf16, fp8)
    }

    fn launch(&self, gpu: &Gpu, tile: &LayerNormRopeTile, set: &mut Set) -> Result<()> {
        let Set { batch, x, cos_sin, cache } = set;
        let (weight, bias) = (&self.weight, &self.bias);
        layer_norm_rope::layer_norm_rope(gpu, tile, batch, x, weight, bias, EPS, LAYOUT, cos_sin, cache)
    }

    fn expect(&self, gpu: &Gpu, sample: &Sample, cache: &mut CpuTensor<f64>) -> Result<()> {
        let Sample { batch, x, cos_sin } = sample;
        let columns: Vec<usize> = (0..DIMS.width).collect();
        let weight = oracle::rows(gpu, &self.weight, &columns)?;
        let bias = oracle::rows(gpu, &self.bias, &columns)?;
        oracle().layer_norm_rope(batch, x, &weight, &bias, EPS, LAYOUT, cos_sin, cache)
    }

    fn fp8_row(cache: &[u8], slot: usize) -> Vec<f64> {
        let page = IndexerPage { page_size: PAGE_SIZE, width: DIMS.width };
        let scale: f32 = bytemuck::pod_read_unaligned(&cache[page.scale(slot)]);
        cache[page.codes(slot)].iter().map(|&code| f64::from(decode(code)) * f64::from(scale)).collect()
    }
}
