//! `rms_norm` of hidden states and of the query's latent.

use dsa80_cuda::rms_norm::{self, RmsNormDims, RmsNormTile};
use dsa80_cuda::{Cost, CudaTensor, Gpu};
use dsa80_reference::{DType, DeviceTensor, Kernels, Result};

use super::Case;
use super::plain::{self, Plain, compare, sampled};
use crate::inputs;
use crate::oracle::{self, Accuracy, oracle};

const EPS: f64 = 1e-5;

#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    width: usize,
    residual: bool,
}

struct Norm {
    x: CudaTensor<Gpu>,
    residual: Option<CudaTensor<Gpu>>,
    weight: CudaTensor<Gpu>,
    out: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    let shapes = [(6144, false), (6144, true), (2048, false)];
    plain::cases::<Norm>(shapes.into_iter().flat_map(|(width, residual)| {
        [1, 32, 2048].map(|rows| {
            let class = if rows <= 32 { "few" } else { "many" };
            let name = format!("T={rows}, {width} wide{}", if residual { ", residual" } else { "" });
            (name, class, Shape { rows, width, residual }, rows <= 32)
        })
    }))
}

impl Plain for Norm {
    type Tile = RmsNormTile;
    type Shape = Shape;
    type Common = ();

    fn common(_gpu: &Gpu, _shape: Shape) -> Result<()> {
        Ok(())
    }

    fn new(gpu: &Gpu, (): &(), Shape { rows, width, residual }: Shape, seed: u64) -> Result<Self> {
        let shape = [rows, width];
        let normal = |name, dtype, seed| inputs::normal(gpu, name, dtype, &shape, seed, 1.5);
        Ok(Self {
            x: normal("x", DType::Act, seed)?,
            residual: residual.then(|| normal("residual", DType::Float, seed + 1)).transpose()?,
            weight: inputs::normal(gpu, "weight", DType::Bf16, &[width], seed + 2, 1.0)?,
            out: CudaTensor::alloc(gpu, "out", DType::Act, &shape)?,
        })
    }

    fn cost(Shape { rows, width, residual }: Shape) -> Cost {
        rms_norm::cost(rows, RmsNormDims { width }, DType::Bf16, residual)
    }

    fn launch(&mut self, gpu: &Gpu, tile: &RmsNormTile, (): &()) -> Result<()> {
        let Self { x, residual, weight, out } = self;
        match residual {
            None => rms_norm::rms_norm(gpu, tile, x, weight, EPS, out),
            Some(residual) => rms_norm::rms_norm_residual(gpu, tile, x, residual, weight, EPS, out),
        }
    }

    fn poison(&self, gpu: &Gpu) -> Result<()> {
        gpu.fill(self.out.buffer(), 0xff)
    }

    fn check(&mut self, gpu: &Gpu, tile: &RmsNormTile, (): &()) -> Result<Accuracy> {
        let rows = sampled(self.x.shape()[0]);
        let columns: Vec<usize> = (0..self.weight.len()).collect();
        let weight = oracle::rows(gpu, &self.weight, &columns)?;
        let x = oracle::rows(gpu, &self.x, &rows)?;
        let mut expected = oracle().alloc(DType::Act, x.shape())?;
        let mut accuracy = None;
        if let Some(residual) = &self.residual {
            let mut residual = oracle::rows(gpu, residual, &rows)?;
            self.launch(gpu, tile, &())?;
            oracle().rms_norm_residual(&x, &mut residual, &weight, EPS, &mut expected)?;
            let found = self.residual.as_ref().map(|residual| oracle::row_numbers(gpu, residual, &rows));
            let found = found.transpose()?.unwrap_or_default();
            let expected = oracle().read(&residual)?;
            let unit = 1.0 / f64::from(1 << 24);
            let bound = |i: usize| unit * expected[i].abs();
            accuracy = Some(Accuracy::of(rows.len(), unit, &found, &expected, bound));
        } else {
            oracle().rms_norm(&x, &weight, EPS, &mut expected)?;
        }
        let found = oracle::row_numbers(gpu, &self.out, &rows)?;
        let norm = compare(rows.len(), &found, &oracle().read(&expected)?, 0.0);
        Ok(accuracy.map_or(norm, |residual| norm.and(residual)))
    }
}
