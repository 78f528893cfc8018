//! `linear_int4` at the projections of GLM-5.2 at TP=8, with the groups of its checkpoints.

use dsa80_cuda::linear_int4::{
    self, LinearInt4Tile, LinearInt4Tiles, LinearInt4WideTile, LinearInt4Workspace,
};
use dsa80_cuda::{Cost, CudaTensor, Device, Gpu, Int4Rows, Int4Shape, PackedInt4, Tile, Tiles};
use dsa80_reference::{DType, HostArray, HostInt4, Kernels, Result};

use super::{Case, Run, copies, typed};
use crate::inputs;
use crate::oracle::{self, Accuracy, Memo, half_ulp_bf16, oracle, spread};

const RELATIVE_L2: f64 = 2.5e-3;

/// Token rows and features that are compared.
const SAMPLED_TOKENS: usize = 8;
const SAMPLED_FEATURES: usize = 1024;

#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: usize,
    weight: Int4Shape,
}

/// The kernel and the class whose tile a step of so many tokens is launched with.
pub(super) fn tokens_class(tokens: usize) -> (&'static str, &'static str) {
    match tokens {
        0..=8 => (LinearInt4Tile::KERNEL, "tokens_8"),
        9..=16 => (LinearInt4Tile::KERNEL, "tokens_16"),
        17..=32 => (LinearInt4Tile::KERNEL, "tokens_32"),
        33..=256 => (LinearInt4WideTile::KERNEL, "medium"),
        _ => (LinearInt4WideTile::KERNEL, "many"),
    }
}

/// Makes `tile` that of the class.
pub(super) fn set_tile(tiles: &mut LinearInt4Tiles, tokens: usize, tile: &toml::Table) -> Result<()> {
    match tokens_class(tokens).1 {
        "tokens_8" => tiles.few_8 = typed(tile)?,
        "tokens_16" => tiles.few_16 = typed(tile)?,
        "tokens_32" => tiles.few_32 = typed(tile)?,
        "medium" => tiles.medium = typed(tile)?,
        _ => tiles.many = typed(tile)?,
    }
    Ok(())
}

struct Product {
    shape: Shape,
    tiles: LinearInt4Tiles,
    workspace: LinearInt4Workspace<Gpu>,
    sets: Vec<Set>,
    expected: Memo<Expected>,
}

struct Set {
    x: CudaTensor<Gpu>,
    weight: PackedInt4<Gpu>,
    out: CudaTensor<Gpu>,
}

/// The oracle's output for sampled rows and features, and the sums of the products' magnitudes.
struct Expected {
    out: Vec<f64>,
    magnitudes: Vec<f64>,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, in_features, out_features, goals) in [
        (
            "o_proj",
            2048,
            6144,
            &[(1, 4.0), (8, 4.5), (16, 0.0), (32, 6.5), (128, 0.0), (1024, 65.0), (8192, 0.0)][..],
        ),
        ("gate-up", 6144, 3072, &[(1, 5.0), (8, 0.0), (16, 0.0), (32, 7.5), (128, 0.0), (1024, 95.0)]),
        ("shared gate-up", 6144, 512, &[(1, 4.0), (32, 6.0), (128, 0.0)]),
    ] {
        for &(tokens, goal_us) in goals {
            // The goals are those of groups of 128.
            for (group_size, zero_points) in [(128, false), (32, true)] {
                let (rows, scales) = (Int4Rows::One, DType::Bf16);
                let weight = Int4Shape { rows, out_features, in_features, group_size, scales, zero_points };
                let goal_us = (group_size == 128 && goal_us > 0.0).then_some(goal_us);
                cases.push(case(what, Shape { tokens, weight }, goal_us));
            }
        }
    }
    cases
}

fn case(what: &str, shape: Shape, goal_us: Option<f64>) -> Case {
    let Shape { tokens, weight: Int4Shape { in_features, out_features, group_size, .. } } = shape;
    let (kernel, class) = tokens_class(tokens);
    Case {
        kernel,
        name: format!("{what} {in_features} -> {out_features}, M={tokens}, g{group_size}"),
        class,
        goal_us,
        check: tokens <= 128,
        make: Box::new(move |gpu, tiles| Ok(Box::new(Product::new(gpu, tiles, shape)?))),
    }
}

impl Product {
    fn new(gpu: &Gpu, tiles: &Tiles, shape: Shape) -> Result<Self> {
        let Shape { tokens, weight } = shape;
        let bytes = linear_int4::cost(tokens, &weight, DType::Act).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                let (x, out) = ([tokens, weight.in_features], [tokens, weight.out_features]);
                Ok(Set {
                    x: inputs::normal(gpu, "x", DType::Act, &x, seed, 1.0)?,
                    weight: inputs::packed_int4(gpu, weight, 1, seed, 0.02)?,
                    out: CudaTensor::alloc(gpu, "out", DType::Act, &out)?,
                })
            })
            .collect::<Result<_>>()?;
        let tiles = tiles.linear_int4(gpu.limits());
        let workspace = LinearInt4Workspace::alloc(gpu, &tiles)?;
        Ok(Self { shape, tiles, workspace, sets, expected: Memo::default() })
    }

    fn features(&self) -> Vec<usize> {
        spread(SAMPLED_FEATURES, self.shape.weight.out_features)
    }

    fn ask_oracle(&self, gpu: &Gpu, copy: usize) -> Result<Expected> {
        let Shape { tokens, weight } = self.shape;
        let set = &self.sets[copy];
        let whole = weight.unpack(&set.weight.read(gpu, 0)?)?.swap_remove(0);
        let sampled = features_of(&whole, &self.features());
        let rows = spread(SAMPLED_TOKENS, tokens);
        let x = oracle::rows(gpu, &set.x, &rows)?;
        let mut out = oracle().alloc(DType::Float, &[rows.len(), sampled.out_features])?;
        oracle().linear_int4(&x, &oracle().upload_int4(sampled.clone())?, &mut out)?;
        let (x, dense, inner) = (oracle().read(&x)?, sampled.dequantise().to_f32(), weight.in_features);
        let magnitudes = x
            .chunks_exact(inner)
            .flat_map(|x| dense.chunks_exact(inner).map(move |w| (x, w)))
            .map(|(x, w)| x.iter().zip(w).map(|(x, w)| (x * f64::from(*w)).abs()).sum())
            .collect();
        Ok(Expected { out: oracle().read(&out)?, magnitudes })
    }
}

/// Some features of a weight, as a weight of their own.
pub(super) fn features_of(whole: &HostInt4, features: &[usize]) -> HostInt4 {
    let (words, groups) = (whole.words_per_row(), whole.groups());
    let scales = whole.scales.to_f32();
    let mut zero_points = whole.zero_points.as_ref().map(|_| vec![0; features.len().div_ceil(8) * groups]);
    for (i, &feature) in features.iter().enumerate() {
        for group in 0..groups {
            if let Some(zero_points) = &mut zero_points {
                zero_points[i / 8 * groups + group] |= whole.zero_point(feature, group) << (4 * (i % 8));
            }
        }
    }
    let row = |&feature: &usize| whole.weight_packed[feature * words..][..words].to_vec();
    let scale = |&feature: &usize| scales[feature * groups..][..groups].to_vec();
    HostInt4 {
        out_features: features.len(),
        weight_packed: features.iter().flat_map(row).collect(),
        scales: dsa80_reference::HostTensor::f32(
            [features.len(), groups],
            features.iter().flat_map(scale).collect(),
        ),
        zero_points: zero_points.map(HostArray::from),
        ..*whole
    }
}

impl Run for Product {
    fn set_tile(&mut self, gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        set_tile(&mut self.tiles, self.shape.tokens, tile)?;
        self.workspace = LinearInt4Workspace::alloc(gpu, &self.tiles)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        linear_int4::cost(self.shape.tokens, &self.shape.weight, DType::Act)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { x, weight, out } = &mut self.sets[copy];
        linear_int4::linear_int4(gpu, &self.tiles, &self.workspace, x, weight, out)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.out.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let expected = self.expected.get_or_make(copy, || self.ask_oracle(gpu, copy))?;
        let Expected { out, magnitudes } = expected.as_ref();
        let rows = spread(SAMPLED_TOKENS, self.shape.tokens);
        let all = oracle::row_numbers(gpu, &self.sets[copy].out, &rows)?;
        let features = self.features();
        let found: Vec<f64> = all
            .chunks_exact(self.shape.weight.out_features)
            .flat_map(|row| features.iter().map(|&feature| row[feature]))
            .collect();
        // The analysis beside the kernel: an addition for each input and its group, of 2^-23 each; then one rounding to bf16.
        let additions = (self.shape.weight.in_features * 2 + 64) as f64;
        let bound = |i: usize| {
            let error = additions * magnitudes[i] / (1 << 23) as f64;
            error + half_ulp_bf16(out[i].abs() + error)
        };
        Ok(Accuracy::of(rows.len(), RELATIVE_L2, &found, out, bound))
    }
}
