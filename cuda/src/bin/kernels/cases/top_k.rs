//! `top_k`: 2048 positions of rows of scores.

use dsa80_cuda::top_k::{self, TopKRows, TopKTile, TopKWorkspace};
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Device, Gpu, Tile};
use dsa80_reference::{DType, Kernels, Result};

use super::{Case, Run, copies, short, typed};
use crate::inputs;
use crate::oracle::{self, Accuracy, Memo, oracle, spread};

const K: usize = 2048;

struct Rows {
    tile: TopKTile,
    workspace: TopKWorkspace<Gpu>,
    batch: CudaBatch<Gpu>,
    sets: Vec<Set>,
    /// The oracle's positions.
    expected: Memo<Vec<f64>>,
}

struct Set {
    logits: CudaTensor<Gpu>,
    topk_indices: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    [
        (1, 8192, 5.0),
        (1, 32768, 7.0),
        (1, 131_072, 10.0),
        (32, 8192, 6.0),
        (32, 32768, 10.0),
        (32, 131_072, 20.0),
        (2048, 8192, 40.0),
        (2048, 32768, 120.0),
    ]
    .into_iter()
    .map(|(rows, columns, goal_us)| Case {
        kernel: TopKTile::KERNEL,
        name: format!("{K} of {rows} x {}", short(columns)),
        class: if rows < 100 { "few" } else { "many" },
        goal_us: Some(goal_us),
        check: rows <= 32,
        make: Box::new(move |gpu, _| Ok(Box::new(Rows::new(gpu, rows, columns)?))),
    })
    .collect()
}

impl Rows {
    fn new(gpu: &Gpu, rows: usize, columns: usize) -> Result<Self> {
        let batch = inputs::decode_of_one_context(rows, columns)?;
        let bytes = top_k::cost(&batch, 0..rows, K).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                Ok(Set {
                    logits: inputs::normal(gpu, "logits", DType::Float, &[rows, columns], seed, 1.0)?,
                    topk_indices: CudaTensor::alloc(gpu, "topk_indices", DType::Index, &[rows, K])?,
                })
            })
            .collect::<Result<_>>()?;
        let tile = TopKTile::safe(TopKRows::of(rows, gpu.limits()));
        let workspace = TopKWorkspace::alloc(gpu, &[tile])?;
        Ok(Self { tile, workspace, batch: inputs::upload(gpu, &batch)?, sets, expected: Memo::default() })
    }
}

impl Run for Rows {
    fn set_tile(&mut self, gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        self.workspace = TopKWorkspace::alloc(gpu, &[self.tile])?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        let batch = self.batch.host();
        top_k::cost(batch, 0..batch.num_tokens(), K)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { logits, topk_indices } = &mut self.sets[copy];
        let rows = 0..self.batch.host().num_tokens();
        top_k::top_k(gpu, &self.tile, &self.workspace, &self.batch, rows, logits, topk_indices)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.topk_indices.buffer(), 0xaa))
    }

    /// Exact, whatever the order.
    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let rows = spread(32, self.batch.host().num_tokens());
        let expected = self.expected.get_or_make(copy, || {
            let logits = oracle::rows(gpu, &self.sets[copy].logits, &rows)?;
            let columns = self.batch.host().max_context_len;
            let batch = oracle::upload(&inputs::decode_of_one_context(rows.len(), columns)?)?;
            let mut expected = oracle().alloc(DType::Index, &[rows.len(), K])?;
            oracle().top_k(&batch, 0..rows.len(), &logits, &mut expected)?;
            Ok(sorted_rows(oracle().read_index(&expected)?.into_iter().map(f64::from).collect()))
        })?;
        let found = sorted_rows(oracle::row_numbers(gpu, &self.sets[copy].topk_indices, &rows)?);
        Ok(Accuracy::of(rows.len(), 0.0, &found, &expected, |_| 0.5))
    }
}

fn sorted_rows(mut numbers: Vec<f64>) -> Vec<f64> {
    numbers.chunks_exact_mut(K).for_each(|row| row.sort_by(f64::total_cmp));
    numbers
}
