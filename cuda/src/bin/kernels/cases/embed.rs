//! `embed` of tokens of a rank's shard.

use dsa80_cuda::embed::{self, EmbedDims, EmbedTile};
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Gpu};
use dsa80_reference::{DType, Kernels, Result};

use super::Case;
use super::plain::{self, Plain, sampled};
use crate::inputs::{self, Random};
use crate::oracle::{self, Accuracy, oracle};

const DIMS: EmbedDims = EmbedDims { width: 6144 };
const VOCAB: usize = 154_880 / 8;

struct Tokens {
    batch: CudaBatch<Gpu>,
    out: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<Tokens>([1, 32, 2048].map(|rows| (format!("T={rows}"), "any", rows, rows <= 32)))
}

impl Plain for Tokens {
    type Tile = EmbedTile;
    type Shape = usize;
    type Common = CudaTensor<Gpu>;

    fn common(gpu: &Gpu, _rows: usize) -> Result<CudaTensor<Gpu>> {
        inputs::normal(gpu, "table", DType::Bf16, &[VOCAB, DIMS.width], 1, 1.0)
    }

    fn new(gpu: &Gpu, _table: &CudaTensor<Gpu>, rows: usize, seed: u64) -> Result<Self> {
        let mut random = Random::new(seed);
        let mut batch = inputs::decode_of_one_context(rows, rows)?;
        batch.token_ids = (0..rows).map(|_| random.below(VOCAB) as i32).collect();
        let out = CudaTensor::alloc(gpu, "out", DType::Float, &[rows, DIMS.width])?;
        Ok(Self { batch: inputs::upload(gpu, &batch)?, out })
    }

    fn cost(rows: usize) -> Cost {
        embed::cost(rows, DIMS, DType::Bf16, DType::Float)
    }

    fn launch(&mut self, gpu: &Gpu, tile: &EmbedTile, table: &CudaTensor<Gpu>) -> Result<()> {
        embed::embed(gpu, tile, &self.batch, table, 0, &mut self.out)
    }

    fn poison(&self, gpu: &Gpu) -> Result<()> {
        gpu.fill(self.out.buffer(), 0xff)
    }

    /// The oracle's table has the sampled tokens' rows alone.
    fn check(&mut self, gpu: &Gpu, _tile: &EmbedTile, table: &CudaTensor<Gpu>) -> Result<Accuracy> {
        let whole = self.batch.host();
        let rows = sampled(whole.num_tokens());
        let tokens: Vec<usize> = rows.iter().map(|&t| whole.token_ids[t] as usize).collect();
        let table = oracle::rows(gpu, table, &tokens)?;
        let mut batch = inputs::decode_of_one_context(rows.len(), rows.len())?;
        batch.token_ids = (0..rows.len() as i32).collect();
        let mut expected = oracle().alloc(DType::Float, &[rows.len(), DIMS.width])?;
        oracle().embed(&oracle::upload(&batch)?, &table, 0, &mut expected)?;
        let found = oracle::row_numbers(gpu, &self.out, &rows)?;
        Ok(Accuracy::of(rows.len(), 0.0, &found, &oracle().read(&expected)?, |_| 0.0))
    }
}
