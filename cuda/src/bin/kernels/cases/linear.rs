//! `linear` at the projections of GLM-5.2 that stay dense, and `lm_head`.

use dsa80_cuda::linear::{self, LinearTiles, LinearTokens, LinearWorkspace};
use dsa80_cuda::{Cost, CudaTensor, Device, Gpu, Tiles, lm_head};
use dsa80_reference::{DType, Kernels, Result};

use super::{Case, LIBRARY, Run, copies, typed};
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
    features: usize,
    out: DType,
    sets: Vec<Set>,
    /// The oracle's sums, and the sums of magnitudes.
    expected: Memo<[Vec<f64>; 2]>,
}

struct Set {
    x: CudaTensor<Gpu>,
    /// The rows that `lm_head` takes: all of them.
    rows: Option<CudaTensor<Gpu>>,
    weight: CudaTensor<Gpu>,
    out: CudaTensor<Gpu>,
}

/// Sets the tile that takes that many tokens and features.
pub(super) fn set_tile(
    tiles: &mut LinearTiles,
    tokens: usize,
    features: usize,
    tile: &toml::Table,
) -> Result<()> {
    match LinearTokens::of(tokens) {
        class @ (LinearTokens::UpTo8 | LinearTokens::UpTo32) => *tiles.few(class, features) = typed(tile)?,
        LinearTokens::Middle => tiles.middle = typed(tile)?,
        LinearTokens::Many => tiles.many = typed(tile)?,
    }
    Ok(())
}

/// The kernel of a case: `lm_head` has those of `linear`, and its tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Linear,
    /// `linear`, by NVIDIA's library.
    Library,
    LmHead,
}

/// A case of `tokens` rows, from `columns` to `features`.
pub(super) fn case(
    what: &'static str,
    [tokens, columns, features]: [usize; 3],
    goal_us: Option<f64>,
    kernel: Which,
) -> Case {
    let (tiles_of, class) = LinearTokens::of(tokens).class(features);
    Case {
        kernel: if kernel == Which::Library { LIBRARY } else { tiles_of },
        name: format!("{what} {columns} -> {features}, T={tokens}"),
        class,
        goal_us,
        check: tokens <= 128,
        make: Box::new(move |gpu, tiles| {
            Ok(Box::new(Product::new(gpu, tiles, [tokens, columns, features], kernel)?))
        }),
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, columns, features, [one, few, many]) in [
        ("q_a|kv_a", 6144, 2624, [9.3, 10.5, 43.8]),
        ("q_b", 2048, 2048, [4.0, 4.5, 13.5]),
        ("o_proj", 2048, 6144, [7.5, 8.5, 35.7]),
    ] {
        for (tokens, goal_us) in [(1, Some(one)), (8, None), (32, Some(few)), (128, None), (1024, None)] {
            cases.push(case(what, [tokens, columns, features], goal_us, Which::Linear));
        }
        for (tokens, goal_us) in [(128, None), (1024, Some(many))] {
            cases.push(case(what, [tokens, columns, features], goal_us, Which::Library));
        }
    }
    for tokens in [1, 8, 32] {
        cases.push(case("gate", [tokens, 6144, 256], None, Which::Linear));
    }
    for kernel in [Which::Linear, Which::Library] {
        cases.push(case("q_a|kv_a", [8192, 6144, 2624], None, kernel));
    }
    cases
}

impl Product {
    fn new(gpu: &Gpu, tiles: &Tiles, shape: [usize; 3], kernel: Which) -> Result<Self> {
        let [tokens, columns, features] = shape;
        let out = if kernel == Which::LmHead { DType::Float } else { DType::Act };
        let all: Vec<i32> = (0..tokens as i32).collect();
        let bytes = linear::cost(tokens, columns, features, DType::Bf16, out).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                Ok(Set {
                    x: inputs::normal(gpu, "x", DType::Act, &[tokens, columns], 2 * seed, 1.0)?,
                    rows: match kernel {
                        Which::Linear | Which::Library => None,
                        Which::LmHead => Some(inputs::indices(gpu, "rows", &[tokens], &all)?),
                    },
                    weight: inputs::normal(
                        gpu,
                        "weight",
                        DType::Bf16,
                        &[features, columns],
                        2 * seed + 1,
                        0.02,
                    )?,
                    out: CudaTensor::alloc(gpu, "out", out, &[tokens, features])?,
                })
            })
            .collect::<Result<_>>()?;
        let tiles = LinearTiles { gemm: kernel == Which::Library, ..tiles.linear(gpu.limits()) };
        let workspace = LinearWorkspace::alloc(gpu, &tiles)?;
        Ok(Self { tiles, workspace, tokens, columns, features, out, sets, expected: Memo::default() })
    }
}

impl Run for Product {
    fn set_tile(&mut self, gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        if self.tiles.gemm {
            return Ok(());
        }
        set_tile(&mut self.tiles, self.tokens, self.features, tile)?;
        self.workspace = LinearWorkspace::alloc(gpu, &self.tiles)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        let &Product { tokens, columns, features, out, .. } = self;
        linear::cost(tokens, columns, features, DType::Bf16, out)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Product { tiles, workspace, sets, .. } = self;
        let Set { x, rows, weight, out } = &mut sets[copy];
        match rows {
            None => linear::linear(gpu, tiles, workspace, x, weight, out),
            Some(rows) => lm_head::lm_head(gpu, tiles, workspace, x, rows, weight, out),
        }
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.out.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let &Product { tokens, columns, features, out, .. } = self;
        let set = &self.sets[copy];
        let (rows, sampled) = (spread(SAMPLED_ROWS, tokens), spread(SAMPLED_FEATURES, features));
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
        let all = oracle::row_numbers(gpu, &set.out, &rows)?;
        let found: Vec<f64> =
            all.chunks(features).flat_map(|row| sampled.iter().map(|&feature| row[feature])).collect();
        let [expected, magnitudes] = &*expected;
        // A tensor core adds 16 products to a sum, each of the 17 cut off below 2^-23 of the largest.
        let error = |i: usize| (columns * 17 / 16 + 64) as f64 * 2.0_f64.powi(-23) * magnitudes[i];
        let bound = |i: usize| match out {
            DType::Act => error(i) + half_ulp_bf16(expected[i].abs() + error(i)),
            _ => error(i),
        };
        let limit = if out == DType::Act { 2.5e-3 } else { 2e-5 };
        Ok(Accuracy::of(rows.len(), limit, &found, expected, bound))
    }
}
