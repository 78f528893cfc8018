//! `moe_int4` at the routed experts of GLM-5.2 at TP=8 (and TP=1), every expert as likely, and with all tokens at the same experts.

use dsa80_cuda::moe_int4::{
    self, ExpertsInt4, MoeInt4Dims, MoeInt4Tile, MoeInt4Tiles, MoeInt4Workspace, MoeLoad,
};
use dsa80_cuda::moe_int4_pairs::MoeInt4PairsTile;
use dsa80_cuda::{Cost, CudaTensor, Device, Gpu, Tile, Tiles};
use dsa80_reference::cpu::Cpu;
use dsa80_reference::{DType, HostExpert, HostLinear, Kernels, Result};

use super::{Case, Run, copies, typed};
use crate::inputs::{self, Random};
use crate::oracle::{self, Accuracy, Memo, half_ulp_bf16, spread};

const HIDDEN: usize = 6144;
const EXPERTS: usize = 256;
const TOP_K: usize = 8;

/// Token rows that are compared.
const SAMPLED: usize = 2;

/// Tokens that take the way of few.
const FEW: usize = 4;

#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: usize,
    group_size: usize,
    intermediate: usize,
    /// All tokens choose the same experts.
    same: bool,
}

struct Step {
    shape: Shape,
    tiles: MoeInt4Tiles,
    experts: ExpertsInt4<Gpu>,
    workspace: MoeInt4Workspace<Gpu>,
    sets: Vec<Set>,
    expected: Memo<Vec<f64>>,
}

struct Set {
    x: CudaTensor<Gpu>,
    host_ids: Vec<i32>,
    ids: CudaTensor<Gpu>,
    weights: CudaTensor<Gpu>,
    shared: CudaTensor<Gpu>,
    out: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    let of = |tokens, group_size, goal_us: f64| {
        let goal_us = (goal_us > 0.0).then_some(goal_us);
        (Shape { tokens, group_size, intermediate: 256, same: false }, goal_us)
    };
    let same = |tokens| (Shape { same: true, ..of(tokens, 128, 0.0).0 }, None);
    let whole = |tokens| (Shape { intermediate: 2048, ..of(tokens, 128, 0.0).0 }, None);
    [
        of(1, 128, 9.0),
        of(4, 128, 0.0),
        of(8, 128, 42.0),
        of(1, 32, 9.5),
        of(8, 32, 45.0),
        whole(1),
        same(8),
        of(16, 128, 0.0),
        of(32, 128, 105.0),
        of(64, 128, 145.0),
        of(32, 32, 116.0),
        same(64),
        of(128, 128, 0.0),
        of(256, 128, 190.0),
        of(256, 32, 0.0),
        of(2048, 128, 620.0),
        of(2048, 32, 0.0),
        of(8192, 128, 0.0),
    ]
    .map(|(shape, goal_us)| case(shape, goal_us))
    .into()
}

fn case(shape: Shape, goal_us: Option<f64>) -> Case {
    let Shape { tokens, group_size, intermediate, same } = shape;
    let (kernel, class) = match MoeLoad::of(tokens.min(2048) * TOP_K, EXPERTS) {
        _ if tokens <= FEW => (MoeInt4PairsTile::KERNEL, "any"),
        MoeLoad::Few => (MoeInt4Tile::KERNEL, "few"),
        MoeLoad::Some => (MoeInt4Tile::KERNEL, "some"),
        MoeLoad::Many => (MoeInt4Tile::KERNEL, "many"),
    };
    let routing = if same { ", one choice" } else { "" };
    Case {
        kernel,
        name: format!("{EXPERTS} x {intermediate}, g{group_size}, M={tokens}{routing}"),
        class,
        goal_us,
        check: tokens <= 64 && intermediate == 256,
        make: Box::new(move |gpu, tiles| Ok(Box::new(Step::new(gpu, tiles, shape)?))),
    }
}

impl Shape {
    fn dims(self) -> MoeInt4Dims {
        let load = MoeLoad::of(self.tokens.min(2048) * TOP_K, EXPERTS);
        let zero_points = self.group_size == 32;
        MoeInt4Dims::new((HIDDEN, self.intermediate), self.group_size, DType::Bf16, zero_points, load)
    }

    fn choices(self, random: &mut Random) -> Vec<i32> {
        let mut ids = Vec::new();
        for _ in 0..self.tokens {
            match self.same && !ids.is_empty() {
                true => ids.extend_from_within(..TOP_K),
                false => {
                    let mut chosen = random.distinct(TOP_K, EXPERTS);
                    random.shuffle(&mut chosen);
                    ids.extend(chosen);
                }
            }
        }
        ids
    }
}

impl Step {
    fn new(gpu: &Gpu, tiles: &Tiles, shape: Shape) -> Result<Self> {
        let (tokens, dims) = (shape.tokens, shape.dims());
        let mut random = Random::new(tokens as u64);
        let gate_up = inputs::packed_int4(gpu, dims.gate_up, EXPERTS, 1, 0.003)?;
        let down = inputs::packed_int4(gpu, dims.down, EXPERTS, 2, 0.04)?;
        let active = active(&shape.choices(&mut random));
        let bytes = moe_int4::cost(tokens, TOP_K, active, &dims).bytes;
        let sets = (0..copies(gpu, bytes).min(32) as u64)
            .map(|seed| {
                let (rows, host_ids) = ([tokens, HIDDEN], shape.choices(&mut random));
                Ok(Set {
                    x: inputs::normal(gpu, "x", DType::Act, &rows, 3 * seed, 1.0)?,
                    ids: inputs::indices(gpu, "topk_ids", &[tokens, TOP_K], &host_ids)?,
                    host_ids,
                    weights: weights(gpu, tokens, &mut random)?,
                    shared: inputs::normal(gpu, "shared", DType::Act, &rows, 3 * seed + 2, 1.0)?,
                    out: CudaTensor::alloc(gpu, "out", DType::Act, &rows)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            shape,
            tiles: tiles.moe_int4(dims, gpu.limits()),
            experts: ExpertsInt4::new(gate_up, down)?,
            workspace: MoeInt4Workspace::alloc(gpu, tokens, TOP_K, HIDDEN, shape.intermediate, EXPERTS)?,
            sets,
            expected: Memo::default(),
        })
    }

    fn ask_oracle(&self, gpu: &Gpu, copy: usize) -> Result<Vec<f64>> {
        let set = &self.sets[copy];
        let rows = spread(SAMPLED, self.shape.tokens);
        let (x, shared) = (oracle::rows(gpu, &set.x, &rows)?, oracle::rows(gpu, &set.shared, &rows)?);
        let weights = oracle::rows(gpu, &set.weights, &rows)?;
        let chosen: Vec<i32> =
            rows.iter().flat_map(|&t| set.host_ids[t * TOP_K..][..TOP_K].to_vec()).collect();
        let mut known = chosen.clone();
        known.sort_unstable();
        known.dedup();
        let dims = self.shape.dims();
        let experts = known.iter().map(|&expert| {
            let gate_up = self.experts.gate_up().read(gpu, expert as usize)?;
            let down = self.experts.down().read(gpu, expert as usize)?;
            let mut gate_up = dims.gate_up.unpack(&gate_up)?;
            let up_proj = HostLinear::Int4(gate_up.swap_remove(1));
            let gate_proj = HostLinear::Int4(gate_up.swap_remove(0));
            let down_proj = HostLinear::Int4(dims.down.unpack(&down)?.swap_remove(0));
            Ok(HostExpert { gate_proj, up_proj, down_proj })
        });
        // Without the rounding points: what the kernel's roundings cost in all is what is measured.
        let exact = Cpu::<f64>::new();
        let experts = exact.upload_experts_int4(experts.collect::<Result<_>>()?)?;
        let places: Vec<i32> =
            chosen.iter().map(|expert| known.binary_search(expert).unwrap_or_default() as i32).collect();
        let mut ids = exact.alloc(DType::Index, &[rows.len(), TOP_K])?;
        exact.write_index(&places, &mut ids)?;
        let mut out = exact.alloc(DType::Act, &[rows.len(), HIDDEN])?;
        exact.moe_int4(&x, &ids, &weights, &experts, Some(&shared), &mut out)?;
        exact.read(&out)
    }
}

/// What the router gives: the same order of magnitude for every expert.
fn weights(gpu: &Gpu, tokens: usize, random: &mut Random) -> Result<CudaTensor<Gpu>> {
    let tensor = CudaTensor::alloc(gpu, "topk_weights", DType::Float, &[tokens, TOP_K])?;
    let values: Vec<f32> = (0..tensor.len()).map(|_| 0.2 + random.below(1000) as f32 * 3e-4).collect();
    gpu.write(tensor.buffer(), 0, bytemuck::cast_slice(&values))?;
    Ok(tensor)
}

/// Experts that somebody chose.
fn active(ids: &[i32]) -> usize {
    let mut chosen = [false; EXPERTS];
    ids.iter().for_each(|&expert| chosen[expert as usize] = true);
    chosen.iter().filter(|chosen| **chosen).count()
}

impl Run for Step {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        if self.shape.tokens <= FEW {
            self.tiles.pairs = typed(tile)?;
            return Ok(());
        }
        self.tiles.pairs.max_tokens = FEW;
        let place = match self.shape.dims().load {
            MoeLoad::Few => &mut self.tiles.few,
            MoeLoad::Some => &mut self.tiles.some,
            MoeLoad::Many => &mut self.tiles.many,
        };
        *place = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        let counts = self.sets.iter().map(|set| active(&set.host_ids));
        let mean = counts.sum::<usize>().div_ceil(self.sets.len().max(1));
        moe_int4::cost(self.shape.tokens, TOP_K, mean, &self.shape.dims())
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { x, ids, weights, shared, out, .. } = &mut self.sets[copy];
        let (tiles, workspace, experts) = (&self.tiles, &self.workspace, &self.experts);
        moe_int4::moe_int4(gpu, tiles, workspace, x, ids, weights, experts, Some(shared), out)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.out.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let rows = spread(SAMPLED, self.shape.tokens);
        let expected = self.expected.get_or_make(copy, || self.ask_oracle(gpu, copy))?;
        let found = oracle::row_numbers(gpu, &self.sets[copy].out, &rows)?;
        // The roundings of `silu * up` add up as noise does: their largest of some thousand elements is some deviations of 1.7e-3.
        let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        let bound = |i: usize| half_ulp_bf16(expected[i]) + largest / 128.0;
        Ok(Accuracy::of(rows.len(), 2.5e-3, &found, &expected, bound))
    }
}
