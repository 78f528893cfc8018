//! `all_reduce` of eight ranks that share the GPU: its work, without the way between GPUs.

use dsa80_cuda::all_reduce::{self, AllReduceTile, Shots, all_reduce_in};
use dsa80_cuda::exchange::Exchange;
use dsa80_cuda::{Cost, CudaTensor, Gpu, GpuBuffer};
use dsa80_reference::{DType, Result};

use super::Case;
use super::plain::{self, Plain, sampled};
use super::ranks::{self, RANKS, Shape, WIDTH};
use crate::inputs;
use crate::oracle::{self, Accuracy};

struct Ranks {
    shape: Shape,
    seed: u64,
    data: Vec<CudaTensor<Gpu>>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<Ranks>(ranks::shapes(Shots::of))
}

fn parts(gpu: &Gpu, tokens: usize, seed: u64) -> Result<Vec<CudaTensor<Gpu>>> {
    let part = |rank| inputs::normal(gpu, "data", DType::Act, &[tokens, WIDTH], seed + rank, 1.0);
    (0..RANKS as u64).map(part).collect()
}

impl Plain for Ranks {
    type Tile = AllReduceTile;
    type Shape = Shape;
    type Common = Exchange<GpuBuffer>;

    fn common(gpu: &Gpu, _shape: Shape) -> Result<Self::Common> {
        ranks::exchange(gpu)
    }

    fn new(gpu: &Gpu, _common: &Self::Common, shape: Shape, seed: u64) -> Result<Self> {
        Ok(Self { shape, seed, data: parts(gpu, shape.tokens, seed)? })
    }

    fn cost(shape: Shape) -> Cost {
        all_reduce::cost(shape.tokens * WIDTH, DType::Act, RANKS)
    }

    fn launch(&mut self, gpu: &Gpu, tile: &AllReduceTile, exchange: &Self::Common) -> Result<()> {
        all_reduce_in(self.shape.shots, gpu, tile, exchange, &self.data)
    }

    /// It is in place: `check` begins with new parts.
    fn poison(&self, _gpu: &Gpu) -> Result<()> {
        Ok(())
    }

    fn check(&mut self, gpu: &Gpu, tile: &AllReduceTile, exchange: &Self::Common) -> Result<Accuracy> {
        let rows = sampled(self.shape.tokens);
        self.data = parts(gpu, self.shape.tokens, self.seed)?;
        let numbers = |data: &[CudaTensor<Gpu>]| {
            data.iter().map(|x| oracle::row_numbers(gpu, x, &rows)).collect::<Result<Vec<_>>>()
        };
        let parts = numbers(&self.data)?;
        self.launch(gpu, tile, exchange)?;
        let expected = ranks::sums(&parts).repeat(RANKS);
        let found = numbers(&self.data)?.concat();
        Ok(Accuracy::of(RANKS * rows.len(), 0.0, &found, &expected, |_| 0.0))
    }
}
