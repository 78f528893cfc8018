//! `all_reduce` of eight ranks that share the GPU: its work, without the way between GPUs.

use std::time::Duration;

use dsa80_cuda::all_reduce::{self, AllReduceTile, Shots, all_reduce_in};
use dsa80_cuda::exchange::{Exchange, ExchangeDims, alloc_workspace};
use dsa80_cuda::{Cost, CudaTensor, Gpu, GpuBuffer};
use dsa80_reference::{DType, Result};
use half::bf16;

use super::Case;
use super::plain::{self, Plain, sampled};
use crate::inputs;
use crate::oracle::{self, Accuracy};

const RANKS: usize = 8;
const WIDTH: usize = 6144;

#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    shots: Shots,
}

struct Ranks {
    shape: Shape,
    seed: u64,
    data: Vec<CudaTensor<Gpu>>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<Ranks>([1, 32, 256, 2048].map(|tokens| {
        let shots = Shots::of(2 * WIDTH * tokens, RANKS);
        let class = if shots == Shots::One { "one_shot" } else { "two_shots" };
        (format!("T={tokens}, {RANKS} ranks of one GPU"), class, Shape { tokens, shots }, tokens <= 32)
    }))
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
        let dims = ExchangeDims::new(RANKS)?;
        let workspaces = (0..RANKS).map(|_| alloc_workspace(gpu, dims)).collect::<Result<_>>()?;
        Ok(Exchange { dims, workspaces, first_rank: 0, patience: Duration::from_secs(5) })
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
        let sum = |i: usize| {
            let sum = parts[1..].iter().fold(parts[0][i] as f32, |sum, part| sum + part[i] as f32);
            bf16::from_f32(sum).to_f64()
        };
        let expected: Vec<f64> = (0..parts[0].len()).map(sum).collect::<Vec<_>>().repeat(RANKS);
        let found = numbers(&self.data)?.concat();
        Ok(Accuracy::of(RANKS * rows.len(), 0.0, &found, &expected, |_| 0.0))
    }
}
