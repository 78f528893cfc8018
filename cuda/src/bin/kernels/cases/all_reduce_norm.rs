//! `all_reduce_norm` of eight ranks that share the GPU: its work, without the way between GPUs.

use dsa80_cuda::all_reduce::Shots;
use dsa80_cuda::all_reduce_norm::{self, AllReduceNormDims, AllReduceNormTile, NormParts, all_reduce_norm};
use dsa80_cuda::exchange::Exchange;
use dsa80_cuda::{Cost, CudaTensor, Gpu, GpuBuffer};
use dsa80_reference::{DType, Kernels, Result};

use super::Case;
use super::plain::{self, Plain, sampled};
use super::ranks::{self, RANKS, Shape, WIDTH};
use crate::inputs;
use crate::oracle::{self, Accuracy, oracle};

const EPS: f64 = 1e-5;

struct Ranks {
    shape: Shape,
    seed: u64,
    x: Vec<CudaTensor<Gpu>>,
    residual: Vec<CudaTensor<Gpu>>,
    weight: Vec<CudaTensor<Gpu>>,
    out: Vec<CudaTensor<Gpu>>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<Ranks>(ranks::shapes(Shots::of_norm))
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
        ranks::exchange(gpu)
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
        let sums = ranks::sums(&parts);
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
