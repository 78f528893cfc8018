//! `all_reduce_norm` of eight ranks that share the GPU: its work, without the way between GPUs.

use std::time::Duration;

use dsa80_cuda::all_reduce::Shots;
use dsa80_cuda::all_reduce_norm::{self, AllReduceNormDims, AllReduceNormTile, NormParts, all_reduce_norm};
use dsa80_cuda::exchange::{Exchange, ExchangeDims, alloc_workspace};
use dsa80_cuda::{Cost, CudaTensor, Gpu, GpuBuffer};
use dsa80_reference::{DType, Kernels, Result};
use half::bf16;

use super::Case;
use super::plain::{self, Plain, sampled};
use crate::inputs;
use crate::oracle::{self, Accuracy, oracle};

const RANKS: usize = 8;
const WIDTH: usize = 6144;
const EPS: f64 = 1e-5;

#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    shots: Shots,
}

struct Ranks {
    shape: Shape,
    seed: u64,
    x: Vec<CudaTensor<Gpu>>,
    residual: Vec<CudaTensor<Gpu>>,
    weight: Vec<CudaTensor<Gpu>>,
    out: Vec<CudaTensor<Gpu>>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<Ranks>([1, 32, 256, 2048].map(|tokens| {
        let shots = Shots::of_norm(2 * WIDTH * tokens, RANKS);
        let class = if shots == Shots::One { "one_shot" } else { "two_shots" };
        (format!("T={tokens}, {RANKS} ranks of one GPU"), class, Shape { tokens, shots }, tokens <= 32)
    }))
}

/// Alike on every rank.
fn all(gpu: &Gpu, dtype: DType, shape: &[usize], seed: u64) -> Result<Vec<CudaTensor<Gpu>>> {
    (0..RANKS).map(|_| inputs::normal(gpu, "alike", dtype, shape, seed, 1.0)).collect()
}

impl Ranks {
    fn begin(gpu: &Gpu, shape: Shape, seed: u64) -> Result<Self> {
        let rows = [shape.tokens, WIDTH];
        let part = |rank| inputs::normal(gpu, "x", DType::Act, &rows, seed + rank, 1.0);
        Ok(Self {
            shape,
            seed,
            x: (0..RANKS as u64).map(part).collect::<Result<_>>()?,
            residual: all(gpu, DType::Float, &rows, seed + 8)?,
            weight: all(gpu, DType::Bf16, &rows[1..], seed + 9)?,
            out: all(gpu, DType::Act, &rows, seed + 10)?,
        })
    }
}

impl Plain for Ranks {
    type Tile = AllReduceNormTile;
    type Shape = Shape;
    type Common = Exchange<GpuBuffer>;

    fn common(gpu: &Gpu, _shape: Shape) -> Result<Self::Common> {
        let dims = ExchangeDims::new(RANKS)?;
        let workspaces = (0..RANKS).map(|_| alloc_workspace(gpu, dims)).collect::<Result<_>>()?;
        Ok(Exchange { dims, workspaces, first_rank: 0, patience: Duration::from_secs(5) })
    }

    fn new(gpu: &Gpu, _common: &Self::Common, shape: Shape, seed: u64) -> Result<Self> {
        Self::begin(gpu, shape, seed)
    }

    fn cost(Shape { tokens, shots }: Shape) -> Cost {
        all_reduce_norm::cost(tokens, AllReduceNormDims { width: WIDTH, shots }, RANKS)
    }

    fn launch(&mut self, gpu: &Gpu, tile: &AllReduceNormTile, exchange: &Self::Common) -> Result<()> {
        let parts = NormParts { x: &self.x, residual: &self.residual, weight: &self.weight, out: &self.out };
        all_reduce_norm(self.shape.shots, gpu, tile, exchange, &parts, EPS)
    }

    /// The residual is added to in place: `check` begins with a new one.
    fn poison(&self, gpu: &Gpu) -> Result<()> {
        self.out.iter().try_for_each(|out| gpu.fill(out.buffer(), 0xff))
    }

    fn check(&mut self, gpu: &Gpu, tile: &AllReduceNormTile, exchange: &Self::Common) -> Result<Accuracy> {
        *self = Self::begin(gpu, self.shape, self.seed)?;
        let rows = sampled(self.shape.tokens);
        let numbers = |tensor: &CudaTensor<Gpu>| oracle::row_numbers(gpu, tensor, &rows);
        let parts = self.x.iter().map(numbers).collect::<Result<Vec<_>>>()?;
        let sum = |i: usize| {
            let sum = parts[1..].iter().fold(parts[0][i] as f32, |sum, part| sum + part[i] as f32);
            bf16::from_f32(sum).to_f64()
        };
        let sums: Vec<f64> = (0..parts[0].len()).map(sum).collect();
        let shape = [rows.len(), WIDTH];
        let mut x = oracle().alloc(DType::Act, &shape)?;
        oracle().write(&sums, &mut x)?;
        let mut residual = oracle::rows(gpu, &self.residual[0], &rows)?;
        let weight = oracle::rows(gpu, &self.weight[0], &(0..WIDTH).collect::<Vec<_>>())?;
        let mut normed = oracle().alloc(DType::Act, &shape)?;
        oracle().rms_norm_residual(&x, &mut residual, &weight, EPS, &mut normed)?;
        self.launch(gpu, tile, exchange)?;
        let expected = oracle().read(&normed)?.repeat(RANKS);
        let found = self.out.iter().map(numbers).collect::<Result<Vec<_>>>()?.concat();
        Ok(plain::compare(RANKS * rows.len(), &found, &expected, 0.0))
    }
}
