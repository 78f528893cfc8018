//! `swiglu` of the dense and the shared MLP of GLM-5.2 at TP=8: INT4 with the groups of its checkpoints, and bf16.

use dsa80_cuda::linear::{self, LinearTiles, LinearTokens, LinearWorkspace};
use dsa80_cuda::linear_int4::{self, LinearInt4Tiles, LinearInt4Workspace, swiglu_int4};
use dsa80_cuda::swiglu::{SwiGluDense, swiglu};
use dsa80_cuda::{Cost, CudaTensor, Device, Gpu, Int4Rows, Int4Shape, PackedInt4, Tiles};
use dsa80_reference::{DType, HostTensor, Kernels, Result};

use super::linear_int4::{features_of, tokens_class};
use super::{Case, Run, copies};
use crate::inputs;
use crate::oracle::{self, Accuracy, Memo, half_ulp_bf16, oracle, spread};

const RELATIVE_L2: f64 = 2.5e-3;

/// Token rows and features that are compared.
const SAMPLED_TOKENS: usize = 8;
const SAMPLED_FEATURES: usize = 256;

/// Tokens, inputs, features of a projection.
type Shape = [usize; 3];

struct Product {
    shape: Shape,
    weights: Weights,
    /// Activations and results.
    rows: Vec<[CudaTensor<Gpu>; 2]>,
    expected: Memo<Expected>,
}

/// The weights of all sets, and what their kernel is launched with.
enum Weights {
    Int4(LinearInt4Tiles, LinearInt4Workspace<Gpu>, Vec<PackedInt4<Gpu>>),
    Dense(LinearTiles, LinearWorkspace<Gpu>, Vec<SwiGluDense<Gpu>>),
}

/// The oracle's results for sampled rows and features, and how far the kernel's may be from them before they are rounded.
struct Expected {
    out: Vec<f64>,
    errors: Vec<f64>,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, intermediate) in [("dense MLP", 1536), ("shared MLP", 256)] {
        for tokens in [1, 8, 32, 128, 1024] {
            let shape = [tokens, 6144, intermediate];
            let name = |format| format!("swiglu {what} 6144 -> 2 x {intermediate}, M={tokens}, {format}");
            let (kernel, class) = tokens_class(tokens);
            let made = |kernel, name, class, make| {
                let check = tokens <= 128;
                Case { kernel, name, class, goal_us: None, check, make }
            };
            let int4: super::Make =
                Box::new(move |gpu, tiles| Ok(Box::new(Product::new(gpu, shape, int4(gpu, tiles, shape)?)?)));
            cases.push(made(kernel, name("g128"), class, int4));
            let (kernel, class) = LinearTokens::of(tokens).class(SwiGluDense::<Gpu>::rows(intermediate));
            let dense: super::Make = Box::new(move |gpu, tiles| {
                Ok(Box::new(Product::new(gpu, shape, dense(gpu, tiles, shape)?)?))
            });
            cases.push(made(kernel, name("bf16"), class, dense));
        }
    }
    cases
}

fn packed([_, in_features, out_features]: Shape) -> Int4Shape {
    let (rows, scales) = (Int4Rows::GateUp, DType::Bf16);
    Int4Shape { rows, out_features, in_features, group_size: 128, scales, zero_points: false }
}

fn int4(gpu: &Gpu, tiles: &Tiles, shape: Shape) -> Result<Weights> {
    let sets = copies(gpu, linear_int4::cost(shape[0], &packed(shape), DType::Act).bytes) as u64;
    let sets = (0..sets).map(|seed| inputs::packed_int4(gpu, packed(shape), 1, seed, 0.02));
    let tiles = tiles.linear_int4(gpu.limits());
    Ok(Weights::Int4(tiles, LinearInt4Workspace::alloc(gpu, &tiles)?, sets.collect::<Result<_>>()?))
}

fn dense(gpu: &Gpu, tiles: &Tiles, shape: Shape) -> Result<Weights> {
    let [_, inputs, features] = shape;
    let sets = (0..copies(gpu, dense_cost(shape).bytes) as u64).map(|seed| {
        let rows = [SwiGluDense::<Gpu>::rows(features), inputs];
        let weight = inputs::normal(gpu, "weight", DType::Bf16, &rows, 2 * seed + 1, 0.02)?;
        SwiGluDense::of(weight, features)
    });
    let tiles = LinearTiles { gemm: false, ..tiles.linear(gpu.limits()) };
    Ok(Weights::Dense(tiles, LinearWorkspace::alloc(gpu, &tiles)?, sets.collect::<Result<_>>()?))
}

/// Two projections, of which one's outputs stay in registers.
fn dense_cost([tokens, inputs, features]: Shape) -> Cost {
    let both = linear::cost(tokens, inputs, 2 * features, DType::Bf16, DType::Act);
    Cost { bytes: both.bytes - (2 * tokens * features) as f64, ..both }
}

impl Product {
    fn new(gpu: &Gpu, shape: Shape, weights: Weights) -> Result<Self> {
        let [tokens, inputs, features] = shape;
        let count = match &weights {
            Weights::Int4(_, _, sets) => sets.len(),
            Weights::Dense(_, _, sets) => sets.len(),
        };
        let rows = (0..count as u64).map(|seed| {
            Ok([
                inputs::normal(gpu, "x", DType::Act, &[tokens, inputs], 2 * seed, 1.0)?,
                CudaTensor::alloc(gpu, "out", DType::Act, &[tokens, features])?,
            ])
        });
        Ok(Self { shape, weights, rows: rows.collect::<Result<_>>()?, expected: Memo::default() })
    }

    fn features(&self) -> Vec<usize> {
        spread(SAMPLED_FEATURES, self.shape[2])
    }

    /// The sampled features of both projections.
    fn sampled(&self, gpu: &Gpu, copy: usize) -> Result<[HostTensor; 2]> {
        let features = self.features();
        Ok(match &self.weights {
            Weights::Int4(_, _, sets) => {
                let both = packed(self.shape).unpack(&sets[copy].read(gpu, 0)?)?;
                [0, 1].map(|i: usize| features_of(&both[i], &features).dequantise())
            }
            Weights::Dense(_, _, sets) => {
                let mut both = Vec::new();
                for half in [0, 1] {
                    let rows: Vec<usize> =
                        features.iter().map(|&feature| SwiGluDense::<Gpu>::row(feature, half)).collect();
                    let weight = oracle::rows(gpu, sets[copy].weight(), &rows)?;
                    let values = oracle().read(&weight)?.into_iter().map(|value| value as f32).collect();
                    both.push(HostTensor::f32([features.len(), self.shape[1]], values));
                }
                let up = both.swap_remove(1);
                [both.swap_remove(0), up]
            }
        })
    }

    fn ask_oracle(&self, gpu: &Gpu, copy: usize) -> Result<Expected> {
        let inner = self.shape[1];
        let rows = spread(SAMPLED_TOKENS, self.shape[0]);
        let x = oracle::rows(gpu, &self.rows[copy][0], &rows)?;
        let x = oracle().read(&x)?;
        // A product and its group, of 2^-23 each, and what the tensor core and the sums of warps and splits add.
        let relative = (inner * 2 + 64) as f64 / (1 << 23) as f64;
        let [gates, ups] = self.sampled(gpu, copy)?.map(|weight| {
            let weight = weight.to_f32();
            let pairs = x.chunks_exact(inner).flat_map(|x| weight.chunks_exact(inner).map(move |w| (x, w)));
            let sums = pairs.map(|(x, w)| {
                let products = || x.iter().zip(w).map(|(x, w)| x * f64::from(*w));
                (products().sum::<f64>(), relative * products().map(f64::abs).sum::<f64>())
            });
            sums.collect::<Vec<_>>()
        });
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        for ((gate, gate_error), (up, up_error)) in gates.into_iter().zip(ups) {
            let silu = gate / (1.0 + (-gate).exp());
            // The slope of silu is 1.1 at most; then what the activation's own arithmetic adds.
            let own = (2.0 * gate.abs() + 12.0) * (silu * up).abs() / (1 << 24) as f64;
            out.push(silu * up);
            errors.push(1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error + own);
        }
        Ok(Expected { out, errors })
    }
}

impl Run for Product {
    fn set_tile(&mut self, gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        match &mut self.weights {
            Weights::Int4(tiles, workspace, _) => {
                super::linear_int4::set_tile(tiles, self.shape[0], tile)?;
                *workspace = LinearInt4Workspace::alloc(gpu, tiles)?;
            }
            Weights::Dense(tiles, workspace, _) => {
                let [tokens, _, features] = self.shape;
                super::linear::set_tile(tiles, tokens, SwiGluDense::<Gpu>::rows(features), tile)?;
                *workspace = LinearWorkspace::alloc(gpu, tiles)?;
            }
        }
        Ok(())
    }

    fn copies(&self) -> usize {
        self.rows.len()
    }

    fn cost(&self) -> Cost {
        match &self.weights {
            Weights::Int4(..) => linear_int4::cost(self.shape[0], &packed(self.shape), DType::Act),
            Weights::Dense(..) => dense_cost(self.shape),
        }
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let [x, out] = &mut self.rows[copy];
        match &self.weights {
            Weights::Int4(tiles, workspace, sets) => swiglu_int4(gpu, tiles, workspace, x, &sets[copy], out),
            Weights::Dense(tiles, workspace, sets) => swiglu(gpu, tiles, workspace, x, &sets[copy], out),
        }
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.rows.iter().try_for_each(|[_, out]| gpu.fill(out.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let expected = self.expected.get_or_make(copy, || self.ask_oracle(gpu, copy))?;
        let Expected { out, errors } = expected.as_ref();
        let rows = spread(SAMPLED_TOKENS, self.shape[0]);
        let all = oracle::row_numbers(gpu, &self.rows[copy][1], &rows)?;
        let features = self.features();
        let found: Vec<f64> = all
            .chunks_exact(self.shape[2])
            .flat_map(|row| features.iter().map(|&feature| row[feature]))
            .collect();
        let bound = |i: usize| errors[i] + half_ulp_bf16(out[i].abs() + errors[i]);
        Ok(Accuracy::of(rows.len(), RELATIVE_L2, &found, out, bound))
    }
}
