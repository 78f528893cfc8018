//! `rope_table` of decode steps and of a prefill chunk.

use dsa80_cuda::rope_table::{self, RopeTableTile};
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Gpu};
use dsa80_reference::{DType, Kernels, Result};

use super::Case;
use super::plain::{self, Plain, sampled};
use crate::inputs;
use crate::oracle::{self, Accuracy, oracle};

const DIM: usize = 64;
const THETA: f64 = 8e6;
/// Tokens in the caches of every sequence.
const CONTEXT: usize = 131_072;

struct Table {
    batch: CudaBatch<Gpu>,
    cos_sin: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    plain::cases::<Table>([1, 32, 2048].map(|rows| (format!("T={rows}"), "any", rows, rows <= 32)))
}

impl Plain for Table {
    type Tile = RopeTableTile;
    type Shape = usize;
    type Common = ();

    fn common(_gpu: &Gpu, _rows: usize) -> Result<()> {
        Ok(())
    }

    fn new(gpu: &Gpu, (): &(), rows: usize, _seed: u64) -> Result<Self> {
        // Tokens at the end of one long context.
        let mut batch = inputs::decode_of_one_context(rows, CONTEXT)?;
        batch.positions = (0..rows).map(|t| (CONTEXT - 1 - t) as i32).collect();
        Ok(Self {
            batch: inputs::upload(gpu, &batch)?,
            cos_sin: CudaTensor::alloc(gpu, "cos_sin", DType::Float, &[rows, DIM / 2, 2])?,
        })
    }

    fn cost(rows: usize) -> Cost {
        rope_table::cost(rows, DIM)
    }

    fn launch(&mut self, gpu: &Gpu, tile: &RopeTableTile, (): &()) -> Result<()> {
        rope_table::rope_table(gpu, tile, &self.batch, THETA, &mut self.cos_sin)
    }

    fn poison(&self, gpu: &Gpu) -> Result<()> {
        gpu.fill(self.cos_sin.buffer(), 0xff)
    }

    fn check(&mut self, gpu: &Gpu, _tile: &RopeTableTile, (): &()) -> Result<Accuracy> {
        let whole = self.batch.host();
        let rows = sampled(whole.num_tokens());
        let mut batch = inputs::decode_of_one_context(rows.len(), CONTEXT)?;
        batch.positions = rows.iter().map(|&t| whole.positions[t]).collect();
        let mut expected = oracle().alloc(DType::Float, &[rows.len(), DIM / 2, 2])?;
        oracle().rope_table(&oracle::upload(&batch)?, THETA, &mut expected)?;
        let (found, expected) = (oracle::row_numbers(gpu, &self.cos_sin, &rows)?, oracle().read(&expected)?);
        Ok(Accuracy::of(rows.len(), 1e-7, &found, &expected, |_| 1e-7))
    }
}
