//! `rope` of the queries of attention and of the indexer.

use dsa80_cuda::rope::{self, RopeDims, RopeTile};
use dsa80_cuda::{Cost, CudaTensor, Gpu};
use dsa80_reference::{DType, DeviceTensor, Kernels, Result, RopeLayout};

use super::Case;
use super::plain::{self, Plain, compare, sampled};
use crate::inputs;
use crate::oracle::{self, Accuracy, oracle};

const LAYOUT: RopeLayout = RopeLayout::Interleaved;
const QUERY: RopeDims = RopeDims { heads: 8, width: 256, offset: 192, rope: 64, layout: LAYOUT };
const INDEX_QUERY: RopeDims = RopeDims { heads: 32, width: 128, offset: 0, rope: 64, layout: LAYOUT };

struct Rotated {
    dims: RopeDims,
    x: CudaTensor<Gpu>,
    cos_sin: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<Rotated>([QUERY, INDEX_QUERY].into_iter().flat_map(|dims| {
        [1, 32, 2048].map(|rows| {
            let name = format!("T={rows}, {} heads of {}", dims.heads, dims.width);
            (name, "any", (rows, dims), rows <= 32)
        })
    }))
}

impl Plain for Rotated {
    type Tile = RopeTile;
    type Shape = (usize, RopeDims);
    type Common = ();

    fn common(_gpu: &Gpu, _shape: Self::Shape) -> Result<()> {
        Ok(())
    }

    fn new(gpu: &Gpu, (): &(), (rows, dims): Self::Shape, seed: u64) -> Result<Self> {
        // Turns of a length of less than one: a call after a call leaves values of an ordinary size.
        let table = [rows, dims.rope / 2, 2];
        Ok(Self {
            dims,
            x: inputs::normal(gpu, "x", DType::Act, &[rows, dims.heads, dims.width], seed, 1.5)?,
            cos_sin: inputs::normal(gpu, "cos_sin", DType::Float, &table, seed + 1, 0.2)?,
        })
    }

    fn cost((rows, dims): Self::Shape) -> Cost {
        rope::cost(rows, dims)
    }

    fn launch(&mut self, gpu: &Gpu, tile: &RopeTile, (): &()) -> Result<()> {
        rope::rope(gpu, tile, &mut self.x, self.dims.offset, LAYOUT, &self.cos_sin)
    }

    fn poison(&self, _gpu: &Gpu) -> Result<()> {
        Ok(())
    }

    fn check(&mut self, gpu: &Gpu, tile: &RopeTile, (): &()) -> Result<Accuracy> {
        // The calls before may have left next to nothing.
        self.x = inputs::normal(gpu, "x", DType::Act, self.x.shape(), 5, 1.5)?;
        let rows = sampled(self.x.shape()[0]);
        let (mut x, cos_sin) = (oracle::rows(gpu, &self.x, &rows)?, oracle::rows(gpu, &self.cos_sin, &rows)?);
        self.launch(gpu, tile, &())?;
        oracle().rope(&mut x, self.dims.offset, LAYOUT, &cos_sin)?;
        let found = oracle::row_numbers(gpu, &self.x, &rows)?;
        Ok(compare(rows.len(), &found, &oracle().read(&x)?, 1.0))
    }
}
