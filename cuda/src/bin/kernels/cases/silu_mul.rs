//! `silu_mul` of a dense layer and of a shared expert, a rank's share.

use dsa80_cuda::silu_mul::{self, SiluMulTile};
use dsa80_cuda::{Cost, CudaTensor, Gpu};
use dsa80_reference::{DType, DeviceTensor, Kernels, Result};

use super::Case;
use super::plain::{self, Plain, compare, sampled};
use crate::inputs;
use crate::oracle::{self, Accuracy, oracle};

struct SwiGlu {
    gate: CudaTensor<Gpu>,
    up: CudaTensor<Gpu>,
    out: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<SwiGlu>([1536, 256].into_iter().flat_map(|width| {
        [1, 32, 2048].map(|rows| (format!("T={rows}, {width} wide"), "any", [rows, width], rows <= 32))
    }))
}

impl Plain for SwiGlu {
    type Tile = SiluMulTile;
    type Shape = [usize; 2];
    type Common = ();

    fn common(_gpu: &Gpu, _shape: Self::Shape) -> Result<()> {
        Ok(())
    }

    fn new(gpu: &Gpu, (): &(), shape: Self::Shape, seed: u64) -> Result<Self> {
        Ok(Self {
            gate: inputs::normal(gpu, "gate", DType::Act, &shape, seed, 2.0)?,
            up: inputs::normal(gpu, "up", DType::Act, &shape, seed + 1, 1.0)?,
            out: CudaTensor::alloc(gpu, "out", DType::Act, &shape)?,
        })
    }

    fn cost([rows, width]: Self::Shape) -> Cost {
        silu_mul::cost(rows * width)
    }

    fn launch(&mut self, gpu: &Gpu, tile: &SiluMulTile, (): &()) -> Result<()> {
        silu_mul::silu_mul(gpu, tile, &self.gate, &self.up, &mut self.out)
    }

    fn poison(&self, gpu: &Gpu) -> Result<()> {
        gpu.fill(self.out.buffer(), 0xff)
    }

    fn check(&mut self, gpu: &Gpu, _tile: &SiluMulTile, (): &()) -> Result<Accuracy> {
        let rows = sampled(self.gate.shape()[0]);
        let (gate, up) = (oracle::rows(gpu, &self.gate, &rows)?, oracle::rows(gpu, &self.up, &rows)?);
        let mut expected = oracle().alloc(DType::Act, gate.shape())?;
        oracle().silu_mul(&gate, &up, &mut expected)?;
        let found = oracle::row_numbers(gpu, &self.out, &rows)?;
        Ok(compare(rows.len(), &found, &oracle().read(&expected)?, 0.0))
    }
}
