//! `expanded_mla`: a chunk of 4096 tokens, the first and the second of a sequence, at the heads of TP=8. The expansion is part of it.

use dsa80_cuda::expanded_mla::{
    self, ExpandedMlaDims, ExpandedMlaTile, ExpandedMlaWorkspace, Expansion, Step, expanded_mla,
};
use dsa80_cuda::linear::{LinearTiles, LinearWorkspace};
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Device, Gpu, Tile, Tiles};
use dsa80_reference::cpu::Cpu;
use dsa80_reference::fp8::MlaRow;
use dsa80_reference::{DType, Kernels, Result};

use super::{Case, Run, copies, typed};
use crate::inputs::{self, CacheType, Pages, Random};
use crate::oracle::{self, Accuracy, Memo, half_ulp_bf16, oracle, spread};

const DIMS: ExpandedMlaDims = ExpandedMlaDims { nope: 192, rope: 64, v: 256, kv_lora_rank: 512 };
const HEADS: usize = 8;
const TOKENS: usize = 4096;
const K: usize = 2048;
/// GLM-5.2's: the root of 192 + 64.
const SCALE: f64 = 1.0 / 16.0;
/// Keys and values are rounded beside weights and result.
const RELATIVE_L2: f64 = 4e-3;

struct Attention {
    computed: usize,
    tile: ExpandedMlaTile,
    linear: (LinearTiles, LinearWorkspace<Gpu>),
    workspace: ExpandedMlaWorkspace<Gpu>,
    kv_b: CudaTensor<Gpu>,
    sets: Vec<Set>,
    expected: Memo<Expected>,
}

struct Set {
    batch: CudaBatch<Gpu>,
    q: CudaTensor<Gpu>,
    cache: CudaTensor<Gpu>,
    topk_indices: CudaTensor<Gpu>,
    out: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    [0, 4096]
        .into_iter()
        .map(|computed| Case {
            kernel: ExpandedMlaTile::KERNEL,
            name: format!("{HEADS} heads, {TOKENS} tokens after {computed}, uniform"),
            class: "any",
            goal_us: None,
            check: false,
            make: Box::new(move |gpu, tiles| Ok(Box::new(Attention::new(gpu, tiles, computed)?))),
        })
        .collect()
}

impl Attention {
    fn new(gpu: &Gpu, tiles: &Tiles, computed: usize) -> Result<Self> {
        let ExpandedMlaDims { nope, rope, v, kv_lora_rank } = DIMS;
        let row = MlaRow { kv_lora_rank, rope };
        let sequences = [(computed, TOKENS)];
        let mut random = Random::new(1);
        let sets = (0..copies(gpu, cost(computed).bytes) as u64)
            .map(|seed| {
                let batch = Pages::new(Pages::needed(&sequences), &mut random).batch(&sequences)?;
                let selected: Vec<i32> = (0..TOKENS)
                    .flat_map(|t| {
                        let mut rows = random.distinct(K, batch.visible(t));
                        rows.resize(K, -1);
                        rows
                    })
                    .collect();
                Ok(Set {
                    batch: inputs::upload(gpu, &batch)?,
                    q: inputs::normal(gpu, "q", DType::Act, &[TOKENS, HEADS, nope + rope], seed, 0.7)?,
                    cache: inputs::mla_cache(gpu, CacheType::Bf16, Pages::needed(&sequences), row, seed)?,
                    topk_indices: inputs::indices(gpu, "topk_indices", &[TOKENS, K], &selected)?,
                    out: CudaTensor::alloc(gpu, "out", DType::Act, &[TOKENS, HEADS, v])?,
                })
            })
            .collect::<Result<_>>()?;
        let linear = tiles.linear(gpu.limits());
        Ok(Self {
            computed,
            tile: tiles.tile("any", DIMS, gpu.limits()),
            linear: (linear, LinearWorkspace::alloc(gpu, &linear)?),
            workspace: ExpandedMlaWorkspace::alloc(gpu, DIMS, &Expansion::default(), [TOKENS, HEADS, K])?,
            // Keys and values are then of the size of the rows' columns.
            kv_b: inputs::normal(gpu, "kv_b", DType::Bf16, &[HEADS, nope + v, kv_lora_rank], 9, 0.044)?,
            sets,
            expected: Memo::default(),
        })
    }

    fn ask_oracle(&self, gpu: &Gpu, copy: usize) -> Result<Expected> {
        let set = &self.sets[copy];
        let rows = spread(8, TOKENS);
        let (mut q, indices) =
            (oracle::rows(gpu, &set.q, &rows)?, oracle::rows(gpu, &set.topk_indices, &rows)?);
        let heads: Vec<usize> = (0..HEADS).collect();
        let kv_b = oracle::rows(gpu, &self.kv_b, &heads)?;
        let selected: Vec<Vec<i32>> =
            oracle().read_index(&indices)?.chunks_exact(K).map(<[i32]>::to_vec).collect();
        let (batch, cache) = oracle::selected(gpu, set.batch.host(), &rows, &selected, &set.cache)?;
        // Not rounded, in the absorbed form; queries are taken as rotated already.
        let exact = Cpu::<f64>::new();
        let mut no_turn = exact.alloc(DType::Float, &[rows.len(), DIMS.rope / 2, 2])?;
        exact.write(&[1.0, 0.0].repeat(rows.len() * DIMS.rope / 2), &mut no_turn)?;
        let mut out = exact.alloc(DType::Act, &[rows.len(), HEADS, DIMS.v])?;
        exact.expanded_mla(&batch, &mut q, &kv_b, &no_turn, &cache, &indices, SCALE, &mut out)?;
        Ok(Expected { rows, out: exact.read(&out)? })
    }
}

fn cost(computed: usize) -> Cost {
    expanded_mla::cost(TOKENS, HEADS, computed + TOKENS / 2, K, DIMS)
}

/// The oracle's output for sampled rows.
struct Expected {
    rows: Vec<usize>,
    out: Vec<f64>,
}

impl Run for Attention {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn cost(&self) -> Cost {
        cost(self.computed)
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { batch, q, cache, topk_indices, out } = &mut self.sets[copy];
        let step = Step { batch, q, kv_b: &self.kv_b, cache, topk_indices };
        let linear = (&self.linear.0, &self.linear.1);
        expanded_mla(gpu, &self.tile, linear, &self.workspace, &step, SCALE, out)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.out.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let expected = self.expected.get_or_make(copy, || self.ask_oracle(gpu, copy))?;
        let Expected { rows, out } = expected.as_ref();
        let found = oracle::row_numbers(gpu, &self.sets[copy].out, rows)?;
        // As of `sparse_mla`, with a value's rounding beside its weight's: each is off by 2^-8 of itself at most, independently of the others.
        let sizes: Vec<f64> = out
            .chunks_exact(DIMS.v)
            .map(|head| (head.iter().map(|x| x * x).sum::<f64>() / DIMS.v as f64).sqrt())
            .collect();
        let bound = |i: usize| {
            let error = sizes[i / DIMS.v] * 2.0 * 6.5 / 256.0;
            error + half_ulp_bf16(out[i].abs() + error)
        };
        Ok(Accuracy::of(rows.len(), RELATIVE_L2, &found, out, bound))
    }
}
