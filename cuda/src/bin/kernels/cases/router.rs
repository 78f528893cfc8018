//! `router`: 8 of 256 experts.

use dsa80_cuda::router::{self, RouterTile};
use dsa80_cuda::{Cost, CudaTensor, Gpu};
use dsa80_reference::{DType, DeviceTensor, HostData, HostTensor, Kernels, Result, RouterParams};

use super::Case;
use super::plain::{self, Plain, sampled};
use crate::inputs;
use crate::oracle::{self, Accuracy, oracle};

const EXPERTS: usize = 256;
const K: usize = 8;
const PARAMS: RouterParams =
    RouterParams { n_group: 1, topk_group: 1, norm_topk_prob: true, routed_scaling_factor: 2.5 };

struct Tokens {
    logits: CudaTensor<Gpu>,
    topk_ids: CudaTensor<Gpu>,
    topk_weights: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<Tokens>(
        [1, 32, 2048].map(|tokens| (format!("{K} of {EXPERTS}, T={tokens}"), "any", tokens, tokens <= 32)),
    )
}

impl Plain for Tokens {
    type Tile = RouterTile;
    type Shape = usize;
    /// The bias.
    type Common = CudaTensor<Gpu>;

    fn common(gpu: &Gpu, _tokens: usize) -> Result<CudaTensor<Gpu>> {
        inputs::normal(gpu, "bias", DType::F32, &[EXPERTS], 7, 0.1)
    }

    fn new(gpu: &Gpu, _bias: &CudaTensor<Gpu>, tokens: usize, seed: u64) -> Result<Self> {
        Ok(Self {
            logits: inputs::normal(gpu, "logits", DType::Float, &[tokens, EXPERTS], seed, 1.0)?,
            topk_ids: CudaTensor::alloc(gpu, "topk_ids", DType::Index, &[tokens, K])?,
            topk_weights: CudaTensor::alloc(gpu, "topk_weights", DType::Float, &[tokens, K])?,
        })
    }

    fn cost(tokens: usize) -> Cost {
        router::cost(tokens, EXPERTS, K, DType::F32)
    }

    fn launch(&mut self, gpu: &Gpu, tile: &RouterTile, bias: &CudaTensor<Gpu>) -> Result<()> {
        let Self { logits, topk_ids, topk_weights } = self;
        router::router(gpu, tile, logits, bias, PARAMS, topk_ids, topk_weights)
    }

    fn poison(&self, gpu: &Gpu) -> Result<()> {
        gpu.fill(self.topk_ids.buffer(), 0xaa)?;
        gpu.fill(self.topk_weights.buffer(), 0xff)
    }

    /// The chosen's scores place by place, whoever they are where rounding makes two alike; weights likewise.
    fn check(&mut self, gpu: &Gpu, _tile: &RouterTile, bias: &CudaTensor<Gpu>) -> Result<Accuracy> {
        let rows = sampled(self.logits.shape()[0]);
        let logits = oracle::rows(gpu, &self.logits, &rows)?;
        let bias = oracle::row_numbers(gpu, bias, &(0..EXPERTS).collect::<Vec<_>>())?;
        let data = HostData::F32(bias.iter().map(|&x| x as f32).collect());
        let host_bias = oracle().upload(HostTensor { shape: vec![EXPERTS], data })?;
        let mut ids = oracle().alloc(DType::Index, &[rows.len(), K])?;
        let mut weights = oracle().alloc(DType::Float, &[rows.len(), K])?;
        oracle().router(&logits, &host_bias, PARAMS, &mut ids, &mut weights)?;
        let logits = oracle().read(&logits)?;
        let choices = |ids: Vec<f64>| -> Vec<f64> {
            let choice = |(i, id): (usize, f64)| {
                let expert = (id as usize).min(EXPERTS - 1);
                1.0 / (1.0 + (-logits[i / K * EXPERTS + expert]).exp()) + bias[expert]
            };
            ids.into_iter().enumerate().map(choice).collect()
        };
        let found = choices(oracle::row_numbers(gpu, &self.topk_ids, &rows)?);
        let expected = choices(oracle().read_index(&ids)?.into_iter().map(f64::from).collect());
        let chosen = Accuracy::of(rows.len(), 1e-6, &found, &expected, |_| 1e-6);
        let found = oracle::row_numbers(gpu, &self.topk_weights, &rows)?;
        let expected = oracle().read(&weights)?;
        Ok(chosen.and(Accuracy::of(rows.len(), 1e-6, &found, &expected, |i| 3e-6 * expected[i])))
    }
}
