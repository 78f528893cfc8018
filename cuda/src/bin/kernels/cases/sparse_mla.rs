//! `sparse_mla`: 2048 selected rows of a context of 32K, at the heads of TP=8 and TP=1.

use dsa80_cuda::sparse_mla::{self, SparseMlaDims, SparseMlaTile, SparseMlaTiles, SparseMlaWorkspace};
use dsa80_cuda::sparse_mla_union::SparseMlaUnionTile;
use dsa80_cuda::sparse_mla_wide::SparseMlaWideTile;
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Device, Gpu, Tile, Tiles};
use dsa80_reference::cpu::Cpu;
use dsa80_reference::fp8::MlaRow;
use dsa80_reference::{Batch, DType, Kernels, Result};

use super::{Case, Run, copies, typed};
use crate::inputs::{self, CacheType, Pages, Random};
use crate::oracle::{self, Accuracy, Memo, half_ulp_bf16, oracle, spread};

const DIMS: SparseMlaDims = SparseMlaDims { kv_lora_rank: 512, rope: 64 };
const ROW: MlaRow = MlaRow { kv_lora_rank: 512, rope: 64 };
const CONTEXT: usize = 32768;
const K: usize = 2048;
/// GLM-5.2's: the root of 192 + 64.
const SCALE: f64 = 1.0 / 16.0;
const RELATIVE_L2: f64 = 2.5e-3;

/// Which rows the tokens of a chunk select.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Selection {
    /// Any of those they see.
    Uniform,
    /// Mostly those of the token before, as a trained indexer does.
    Drifting,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Sequences with one new token, or one sequence with that many.
    tokens: usize,
    prefill: bool,
    heads: usize,
    cache: CacheType,
    selection: Selection,
}

impl Shape {
    /// The kernel and the class whose tile the case is about: what does most of the work.
    fn subject(self) -> (&'static str, &'static str) {
        let Self { tokens, prefill, heads, cache, selection } = self;
        // Of 8-bit rows, groups of 8 heads that fill the device are many rows even in a decode step.
        let many = prefill || tokens * heads / 8 > 132;
        let class = if many { "prefill" } else { "decode" };
        match (cache, selection) {
            (CacheType::Bf16, _) if SparseMlaTiles::safe(DIMS).is_wide(tokens, heads) => {
                (SparseMlaWideTile::KERNEL, class_of(prefill))
            }
            (CacheType::Bf16, Selection::Drifting) => (SparseMlaUnionTile::KERNEL, "any"),
            _ => (SparseMlaTile::KERNEL, class),
        }
    }
}

fn class_of(prefill: bool) -> &'static str {
    if prefill { "prefill" } else { "decode" }
}

struct Attention {
    shape: Shape,
    tiles: SparseMlaTiles,
    workspace: SparseMlaWorkspace<Gpu>,
    cache: CudaTensor<Gpu>,
    sets: Vec<Set>,
    expected: Memo<Expected>,
}

struct Set {
    batch: CudaBatch<Gpu>,
    q: CudaTensor<Gpu>,
    topk_indices: CudaTensor<Gpu>,
    out: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let goals = [
        (8, &[(1, 7.0), (4, 8.5), (8, 11.0), (16, 16.0), (32, 27.0)][..]),
        (64, &[(1, 8.5), (8, 17.0), (32, 45.0)]),
    ];
    for cache in [CacheType::Bf16, CacheType::Fp8] {
        for (heads, goals) in goals {
            for &(tokens, goal_us) in goals {
                let selection = Selection::Uniform;
                // The goals are those of a bf16 cache.
                let goal_us = (cache == CacheType::Bf16).then_some(goal_us);
                cases.push(case(Shape { tokens, prefill: false, heads, cache, selection }, goal_us));
            }
        }
        for (heads, selection, goal_us) in [
            (8, Selection::Uniform, 820.0),
            (8, Selection::Drifting, 500.0),
            (64, Selection::Uniform, 1600.0),
        ] {
            let goal_us = (cache == CacheType::Bf16).then_some(goal_us);
            cases.push(case(Shape { tokens: 2048, prefill: true, heads, cache, selection }, goal_us));
        }
    }
    cases
}

fn case(shape: Shape, goal_us: Option<f64>) -> Case {
    let Shape { tokens, prefill, heads, cache, selection } = shape;
    let what = match (prefill, selection) {
        (false, _) => format!("decode, {heads} heads, B={tokens}"),
        (true, Selection::Uniform) => format!("prefill, {heads} heads, {tokens} tokens, uniform"),
        (true, Selection::Drifting) => format!("prefill, {heads} heads, {tokens} tokens, drifting"),
    };
    let (kernel, class) = shape.subject();
    Case {
        kernel,
        name: format!("{what}, {} cache", cache.words()),
        class,
        goal_us,
        check: tokens <= 8,
        make: Box::new(move |gpu, tiles| Ok(Box::new(Attention::new(gpu, tiles, shape)?))),
    }
}

/// The rows that each token selects, `[T, K]`, ascending.
fn select(batch: &Batch, selection: Selection, random: &mut Random) -> Vec<i32> {
    let mut all = Vec::with_capacity(batch.num_tokens() * K);
    let mut last: Vec<i32> = Vec::new();
    for t in 0..batch.num_tokens() {
        let visible = batch.visible(t);
        last = match selection {
            Selection::Drifting if !last.is_empty() => drift(last, visible, random),
            _ => random.distinct(K, visible),
        };
        all.extend(&last);
    }
    all
}

/// 85 in 100 rows stay, and half of the new ones are among the last 4096.
fn drift(mut rows: Vec<i32>, visible: usize, random: &mut Random) -> Vec<i32> {
    const RECENT: usize = 4096;
    random.shuffle(&mut rows);
    rows.truncate(K * 85 / 100);
    let mut taken = vec![false; visible];
    rows.iter().for_each(|&row| taken[row as usize] = true);
    let half = rows.len() + (K - rows.len()) / 2;
    while rows.len() < K {
        let start = if rows.len() < half { visible.saturating_sub(RECENT) } else { 0 };
        let row = start + random.below(visible - start);
        if !std::mem::replace(&mut taken[row], true) {
            rows.push(row as i32);
        }
    }
    rows.sort_unstable();
    rows
}

impl Attention {
    fn new(gpu: &Gpu, tiles: &Tiles, shape: Shape) -> Result<Self> {
        let Shape { tokens, prefill, heads, cache, selection } = shape;
        let SparseMlaDims { kv_lora_rank, rope } = DIMS;
        let sequences =
            if prefill { vec![(CONTEXT - tokens, tokens)] } else { vec![(CONTEXT - 1, 1); tokens] };
        let needed = Pages::needed(&sequences);
        let copies = copies(gpu, touched_bytes(shape));
        let mut random = Random::new(1);
        let mut pages = Pages::new(needed * copies, &mut random);
        let sets = (0..copies as u64)
            .map(|seed| {
                let batch = pages.batch(&sequences)?;
                let indices = select(&batch, selection, &mut random);
                let q_shape = [tokens, heads, kv_lora_rank + rope];
                Ok(Set {
                    batch: inputs::upload(gpu, &batch)?,
                    q: inputs::normal(gpu, "q", DType::Act, &q_shape, seed, 0.7)?,
                    topk_indices: inputs::indices(gpu, "topk_indices", &[tokens, K], &indices)?,
                    out: CudaTensor::alloc(gpu, "out", DType::Act, &[tokens, heads, kv_lora_rank])?,
                })
            })
            .collect::<Result<_>>()?;
        let cache = inputs::mla_cache(gpu, cache, needed * copies, ROW, 7)?;
        let tiles = tiles.sparse_mla(DIMS, gpu.limits());
        let workspace = SparseMlaWorkspace::alloc(gpu, &tiles, DIMS, tokens, heads, K)?;
        Ok(Self { shape, tiles, workspace, cache, sets, expected: Memo::default() })
    }
}

/// Distinct bytes of a call: rows that are selected again come from the L2.
fn touched_bytes(shape: Shape) -> f64 {
    let Shape { tokens, prefill, heads, cache, .. } = shape;
    let row = if cache == CacheType::Fp8 { ROW.row_bytes() } else { 2 * (DIMS.kv_lora_rank + DIMS.rope) };
    let rows = if prefill { CONTEXT } else { tokens * K };
    let queries_and_out = 2 * tokens * heads * (2 * DIMS.kv_lora_rank + DIMS.rope);
    (rows * row + queries_and_out + 4 * tokens * K) as f64
}

impl Run for Attention {
    fn set_tile(&mut self, gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        match self.shape.subject() {
            (SparseMlaWideTile::KERNEL, "decode") => self.tiles.wide_decode = typed(tile)?,
            (SparseMlaWideTile::KERNEL, _) => self.tiles.wide_prefill = typed(tile)?,
            (SparseMlaUnionTile::KERNEL, _) => self.tiles.union = typed(tile)?,
            (_, "decode") => self.tiles.decode = typed(tile)?,
            _ => self.tiles.prefill = typed(tile)?,
        }
        let Shape { tokens, heads, .. } = self.shape;
        self.workspace = SparseMlaWorkspace::alloc(gpu, &self.tiles, DIMS, tokens, heads, K)?;
        Ok(())
    }

    fn cost(&self) -> Cost {
        let Shape { tokens, heads, cache, .. } = self.shape;
        sparse_mla::cost(tokens, heads, K, DIMS, cache == CacheType::Fp8)
    }

    fn distinct_bytes(&self) -> f64 {
        touched_bytes(self.shape)
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { batch, q, topk_indices, out } = &mut self.sets[copy];
        let (tiles, workspace) = (&self.tiles, &self.workspace);
        sparse_mla::sparse_mla(gpu, tiles, workspace, batch, q, &self.cache, topk_indices, SCALE, out)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.out.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let expected = self.expected.get_or_make(copy, || self.ask_oracle(gpu, copy))?;
        let Expected { rows, out } = expected.as_ref();
        let found = oracle::row_numbers(gpu, &self.sets[copy].out, rows)?;
        // Weights (with a row's scale, if it has one) are rounded to bf16 before the second product: each is off by 2^-8 of itself at most,
        // independently of the others. By Hoeffding's bound one element in 10^9 is off by more than 6.5 times 2^-8 of the root of the sum
        // of its products' squares, which for values of mean 0 is the size of the head's elements. Then the element itself is rounded.
        let rank = DIMS.kv_lora_rank;
        let sizes: Vec<f64> = out
            .chunks_exact(rank)
            .map(|head| (head.iter().map(|x| x * x).sum::<f64>() / rank as f64).sqrt())
            .collect();
        let bound = |i: usize| {
            let error = sizes[i / rank] * 6.5 / 256.0;
            error + half_ulp_bf16(out[i].abs() + error)
        };
        Ok(Accuracy::of(rows.len(), RELATIVE_L2, &found, out, bound))
    }
}

/// The oracle's output for sampled rows.
struct Expected {
    rows: Vec<usize>,
    out: Vec<f64>,
}

impl Attention {
    fn ask_oracle(&self, gpu: &Gpu, copy: usize) -> Result<Expected> {
        let set = &self.sets[copy];
        let rows = spread(8, set.batch.host().num_tokens());
        let (q, indices) = (oracle::rows(gpu, &set.q, &rows)?, oracle::rows(gpu, &set.topk_indices, &rows)?);
        let selected: Vec<Vec<i32>> =
            oracle().read_index(&indices)?.chunks_exact(K).map(<[i32]>::to_vec).collect();
        let (batch, cache) = oracle::selected(gpu, set.batch.host(), &rows, &selected, &self.cache)?;
        let mut out = oracle().alloc(DType::Act, &[rows.len(), self.shape.heads, DIMS.kv_lora_rank])?;
        // Not rounded: the bound allows for one rounding of the output, the kernel's.
        Cpu::<f64>::new().sparse_mla(&batch, &q, &cache, &indices, SCALE, &mut out)?;
        Ok(Expected { rows, out: oracle().read(&out)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drifting_token_keeps_most_rows() {
        let mut random = Random::new(3);
        let first = random.distinct(K, 30_000);
        let second = drift(first.clone(), 30_001, &mut random);
        assert_eq!(second.len(), K);
        assert!(second.windows(2).all(|pair| pair[0] < pair[1]));
        let kept = second.iter().filter(|row| first.binary_search(row).is_ok()).count();
        assert!((K * 85 / 100..K * 88 / 100).contains(&kept), "{kept} of {K}");
        let recent = second.iter().filter(|&&row| row >= 30_001 - 4096).count();
        assert!(recent > K / 8, "{recent}");
    }
}
