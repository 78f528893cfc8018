//! `absorb_query` and `absorb_output` at the heads of a rank of eight.

use dsa80_cuda::absorb::{self, AbsorbTile, AbsorbTokens};
use dsa80_cuda::{Cost, CudaTensor, Device, Gpu, Tile};
use dsa80_reference::cpu::CpuTensor;
use dsa80_reference::{DType, Kernels, Result};

use super::{Case, Run, copies, typed};
use crate::inputs;
use crate::oracle::{self, Accuracy, half_ulp_bf16, oracle, spread};

const HEADS: usize = 8;
const NOPE: usize = 192;
const ROPE: usize = 64;
const V: usize = 256;
const RANK: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Query,
    Output,
}

impl Which {
    /// Columns of a head before, and after.
    fn widths(self) -> (usize, usize) {
        match self {
            Which::Query => (NOPE + ROPE, RANK + ROPE),
            Which::Output => (RANK, V),
        }
    }

    fn cost(self, tokens: usize) -> Cost {
        match self {
            Which::Query => absorb::cost(tokens, HEADS, NOPE, RANK, ROPE, DType::Bf16),
            Which::Output => absorb::cost(tokens, HEADS, RANK, V, 0, DType::Bf16),
        }
    }
}

struct Heads {
    which: Which,
    tile: AbsorbTile,
    tokens: usize,
    sets: Vec<Set>,
}

struct Set {
    x: CudaTensor<Gpu>,
    kv_b: CudaTensor<Gpu>,
    cos_sin: CudaTensor<Gpu>,
    out: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    [Which::Query, Which::Output]
        .into_iter()
        .flat_map(|which| [1, 32, 2048].map(|tokens| (which, tokens)))
        .map(|(which, tokens)| Case {
            kernel: AbsorbTile::KERNEL,
            name: format!(
                "{} of {HEADS} heads, T={tokens}",
                if which == Which::Query { "query" } else { "output" }
            ),
            class: if AbsorbTokens::of(tokens) == AbsorbTokens::Few { "few" } else { "many" },
            goal_us: None,
            check: tokens <= 32,
            make: Box::new(move |gpu, tiles| {
                let tile = tiles.absorb(gpu.limits());
                Ok(Box::new(Heads::new(gpu, which, tile, tokens)?))
            }),
        })
        .collect()
}

impl Heads {
    fn new(gpu: &Gpu, which: Which, tile: AbsorbTile, tokens: usize) -> Result<Self> {
        let (width, out_width) = which.widths();
        let sets = (0..copies(gpu, which.cost(tokens).bytes) as u64)
            .map(|seed| {
                let (x, kv_b) = ([tokens, HEADS, width], [HEADS, NOPE + V, RANK]);
                let table = [tokens, ROPE / 2, 2];
                Ok(Set {
                    x: inputs::normal(gpu, "x", DType::Act, &x, 3 * seed, 1.0)?,
                    kv_b: inputs::normal(gpu, "kv_b", DType::Bf16, &kv_b, 3 * seed + 1, 0.05)?,
                    cos_sin: inputs::normal(gpu, "cos_sin", DType::Float, &table, 3 * seed + 2, 0.7)?,
                    out: CudaTensor::alloc(gpu, "out", DType::Act, &[tokens, HEADS, out_width])?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { which, tile, tokens, sets })
    }
}

impl Run for Heads {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        self.which.cost(self.tokens)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { x, kv_b, cos_sin, out } = &mut self.sets[copy];
        match self.which {
            Which::Query => absorb::absorb_query(gpu, &self.tile, x, kv_b, cos_sin, out),
            Which::Output => absorb::absorb_output(gpu, &self.tile, x, kv_b, out),
        }
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.out.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let set = &self.sets[copy];
        let rows = spread(32, self.tokens);
        let heads: Vec<usize> = (0..HEADS).collect();
        let (x, kv_b) = (oracle::rows(gpu, &set.x, &rows)?, oracle::rows(gpu, &set.kv_b, &heads)?);
        let cos_sin = oracle::rows(gpu, &set.cos_sin, &rows)?;
        let mut expected: CpuTensor<f64> =
            oracle().alloc(DType::Act, &[rows.len(), HEADS, self.which.widths().1])?;
        match self.which {
            Which::Query => oracle().absorb_query(&x, &kv_b, &cos_sin, &mut expected)?,
            Which::Output => oracle().absorb_output(&x, &kv_b, &mut expected)?,
        }
        let (found, expected) = (oracle::row_numbers(gpu, &set.out, &rows)?, oracle().read(&expected)?);
        // A sum on either side of a rounding boundary; the sums themselves are nearer by far.
        let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        let bound = |i: usize| 2.0 * half_ulp_bf16(expected[i]) + largest * 1e-4;
        Ok(Accuracy::of(rows.len(), 2.5e-3, &found, &expected, bound))
    }
}
