//! `linear_split` at the projections of GLM-5.2 that share their activations.

use dsa80_cuda::linear::{self, LinearTiles, LinearTokens, LinearWorkspace};
use dsa80_cuda::linear_split::linear_split;
use dsa80_cuda::{Cost, CudaTensor, Device, Gpu, Tiles};
use dsa80_reference::{DType, Kernels, Result};

use super::{Case, Run, copies};
use crate::inputs;
use crate::oracle::{self, Accuracy, Memo, half_ulp_bf16, oracle, spread};

/// Rows and features that are compared.
const SAMPLED_ROWS: usize = 16;
const SAMPLED_FEATURES: usize = 512;

struct Product {
    tiles: LinearTiles,
    workspace: LinearWorkspace<Gpu>,
    tokens: usize,
    columns: usize,
    /// Of the first projection and the second.
    features: [usize; 2],
    sets: Vec<Set>,
    /// The oracle's sums, and the sums of magnitudes.
    expected: Memo<[Vec<f64>; 2]>,
}

struct Set {
    x: CudaTensor<Gpu>,
    weight: CudaTensor<Gpu>,
    out: [CudaTensor<Gpu>; 2],
}

pub(super) fn cases() -> Vec<Case> {
    [1, 8, 32, 128, 1024].map(|tokens| case(tokens, 6144, [2048, 576])).into()
}

fn case(tokens: usize, columns: usize, features: [usize; 2]) -> Case {
    let [first, second] = features;
    let (kernel, class) = LinearTokens::of(tokens).class(first + second);
    Case {
        kernel,
        name: format!("split q_a, kv_a {columns} -> {first} + {second}, T={tokens}"),
        class,
        goal_us: None,
        check: tokens <= 128,
        make: Box::new(move |gpu, tiles| Ok(Box::new(Product::new(gpu, tiles, tokens, columns, features)?))),
    }
}

impl Product {
    fn new(gpu: &Gpu, tiles: &Tiles, tokens: usize, columns: usize, features: [usize; 2]) -> Result<Self> {
        let all = features[0] + features[1];
        let bytes = linear::cost(tokens, columns, all, DType::Bf16, DType::Act).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                let [first, second] = features;
                let (x, weight) = ([tokens, columns], [all, columns]);
                Ok(Set {
                    x: inputs::normal(gpu, "x", DType::Act, &x, 2 * seed, 1.0)?,
                    weight: inputs::normal(gpu, "weight", DType::Bf16, &weight, 2 * seed + 1, 0.02)?,
                    out: [
                        CudaTensor::alloc(gpu, "first", DType::Act, &[tokens, first])?,
                        CudaTensor::alloc(gpu, "second", DType::Act, &[tokens, second])?,
                    ],
                })
            })
            .collect::<Result<_>>()?;
        let tiles = LinearTiles { gemm: false, ..tiles.linear(gpu.limits()) };
        let workspace = LinearWorkspace::alloc(gpu, &tiles)?;
        Ok(Self { tiles, workspace, tokens, columns, features, sets, expected: Memo::default() })
    }
}

impl Run for Product {
    fn set_tile(&mut self, gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        super::linear::set_tile(&mut self.tiles, self.tokens, self.features.iter().sum(), tile)?;
        self.workspace = LinearWorkspace::alloc(gpu, &self.tiles)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        let all = self.features[0] + self.features[1];
        linear::cost(self.tokens, self.columns, all, DType::Bf16, DType::Act)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Product { tiles, workspace, sets, .. } = self;
        let Set { x, weight, out: [first, second] } = &mut sets[copy];
        linear_split(gpu, tiles, workspace, x, weight, &mut [first, second])
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        let mut all = self.sets.iter().flat_map(|set| &set.out);
        all.try_for_each(|out| gpu.fill(out.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let &Product { tokens, columns, features: [first, second], .. } = self;
        let set = &self.sets[copy];
        let (rows, sampled) = (spread(SAMPLED_ROWS, tokens), spread(SAMPLED_FEATURES, first + second));
        let expected = self.expected.get_or_make(copy, || {
            let (x, weight) = (oracle::rows(gpu, &set.x, &rows)?, oracle::rows(gpu, &set.weight, &sampled)?);
            let mut expected = oracle().alloc(DType::Float, &[rows.len(), sampled.len()])?;
            oracle().linear(&x, &weight, &mut expected)?;
            let (x, weight) = (oracle().read(&x)?, oracle().read(&weight)?);
            let magnitudes = x.chunks(columns).flat_map(|x| {
                weight.chunks(columns).map(move |w| w.iter().zip(x).map(|(w, x)| (w * x).abs()).sum::<f64>())
            });
            Ok([oracle().read(&expected)?, magnitudes.collect()])
        })?;
        let [a, b] = [&set.out[0], &set.out[1]].map(|out| oracle::row_numbers(gpu, out, &rows));
        let (a, b) = (a?, b?);
        let found: Vec<f64> = (0..rows.len())
            .flat_map(|row| sampled.iter().map(move |&feature| (row, feature)))
            .map(|(row, feature)| match feature.checked_sub(first) {
                None => a[row * first + feature],
                Some(feature) => b[row * second + feature],
            })
            .collect();
        let [expected, magnitudes] = &*expected;
        // A tensor core adds 16 products to a sum, each of the 17 cut off below 2^-23 of the largest.
        let error = |i: usize| (columns * 17 / 16 + 64) as f64 * 2.0_f64.powi(-23) * magnitudes[i];
        let bound = |i: usize| error(i) + half_ulp_bf16(expected[i].abs() + error(i));
        Ok(Accuracy::of(rows.len(), 2.5e-3, &found, expected, bound))
    }
}
