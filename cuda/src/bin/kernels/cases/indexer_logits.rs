//! `indexer_logits`: 32 heads of 128 columns against the keys of a context.

use dsa80_cuda::indexer_logits::{self, IndexerLogitsDims, IndexerLogitsTile};
use dsa80_cuda::{Cost, CudaBatch, CudaTensor, Gpu, Tile};
use dsa80_reference::{Batch, DType, Kernels, Result};

use super::{Case, Run, copies, short, typed};
use crate::inputs::{self, CacheType, Pages, Random};
use crate::oracle::{self, Accuracy, Memo, Sampled, oracle, spread};

const DIMS: IndexerLogitsDims = IndexerLogitsDims { heads: 32, dims: 128 };
const RELATIVE_L2: f64 = 1e-6;

#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Sequences with one new token, or one sequence with that many.
    tokens: usize,
    prefill: bool,
    context: usize,
    cache: CacheType,
}

struct Logits {
    shape: Shape,
    tile: IndexerLogitsTile,
    cache: CudaTensor<Gpu>,
    sets: Vec<Set>,
    expected: Memo<Expected>,
}

struct Set {
    batch: CudaBatch<Gpu>,
    q: CudaTensor<Gpu>,
    weights: CudaTensor<Gpu>,
    logits: CudaTensor<Gpu>,
}

pub(super) fn cases() -> Vec<Case> {
    let decode =
        [(1, 8192, 4.0), (1, 32768, 4.8), (1, 131_072, 8.0), (32, 32768, 45.0), (32, 131_072, 165.0)];
    let prefill = [(2048, 8192, 340.0), (2048, 32768, 1450.0)];
    let mut cases = Vec::new();
    for cache in [CacheType::Fp8, CacheType::Bf16] {
        for (prefill, shapes) in [(false, &decode[..]), (true, &prefill[..])] {
            for &(tokens, context, goal_us) in shapes {
                // The goals are those of 8-bit keys; a prefill chunk reads them from the L2 either way.
                let goal_us = (prefill || cache == CacheType::Fp8).then_some(goal_us);
                cases.push(case(Shape { tokens, prefill, context, cache }, goal_us));
            }
        }
    }
    cases
}

fn case(shape: Shape, goal_us: Option<f64>) -> Case {
    let Shape { tokens, prefill, context, cache } = shape;
    let what = if prefill {
        format!("prefill, {tokens} x {}", short(context))
    } else {
        format!("decode, B={tokens}, {}", short(context))
    };
    Case {
        kernel: IndexerLogitsTile::KERNEL,
        name: format!("{what}, {} keys", cache.words()),
        class: match (prefill, cache) {
            (false, CacheType::Bf16) => "decode_bf16",
            (false, CacheType::Fp8) => "decode_fp8",
            (true, CacheType::Bf16) => "prefill_bf16",
            (true, CacheType::Fp8) => "prefill_fp8",
        },
        goal_us,
        check: context <= 32768,
        make: Box::new(move |gpu, _| Ok(Box::new(Logits::new(gpu, shape)?))),
    }
}

fn cost(shape: Shape, batch: &Batch) -> Cost {
    indexer_logits::cost(batch, 0..batch.num_tokens(), DIMS, shape.cache == CacheType::Fp8)
}

impl Logits {
    fn new(gpu: &Gpu, shape: Shape) -> Result<Self> {
        let Shape { tokens, prefill, context, cache } = shape;
        let IndexerLogitsDims { heads, dims: width } = DIMS;
        let sequences =
            if prefill { vec![(context - tokens, tokens)] } else { vec![(context - 1, 1); tokens] };
        let needed = Pages::needed(&sequences);
        let mut random = Random::new(1);
        let first = Pages::new(needed, &mut random).batch(&sequences)?;
        let copies = copies(gpu, cost(shape, &first).bytes);
        let mut pages = Pages::new(needed * copies, &mut random);
        let sets = (0..copies as u64)
            .map(|seed| {
                Ok(Set {
                    batch: inputs::upload(gpu, &pages.batch(&sequences)?)?,
                    q: inputs::normal(gpu, "q", DType::Act, &[tokens, heads, width], 2 * seed, 1.0)?,
                    weights: inputs::normal(
                        gpu,
                        "weights",
                        DType::Float,
                        &[tokens, heads],
                        2 * seed + 1,
                        1.0,
                    )?,
                    logits: CudaTensor::alloc(gpu, "logits", DType::Float, &[tokens, context])?,
                })
            })
            .collect::<Result<_>>()?;
        let cache = inputs::indexer_cache(gpu, cache, needed * copies, width, 7)?;
        Ok(Self { shape, tile: IndexerLogitsTile::safe(DIMS), cache, sets, expected: Memo::default() })
    }
}

impl Run for Logits {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        cost(self.shape, self.sets[0].batch.host())
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { batch, q, weights, logits } = &mut self.sets[copy];
        let rows = 0..batch.host().num_tokens();
        indexer_logits::indexer_logits(gpu, &self.tile, batch, rows, q, weights, &self.cache, scale(), logits)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|set| gpu.fill(set.logits.buffer(), 0xff))
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let expected = self.expected.get_or_make(copy, || self.ask_oracle(gpu, copy))?;
        let found = oracle::row_numbers(gpu, &self.sets[copy].logits, &expected.rows)?;
        let found: Vec<f64> = found
            .chunks_exact(self.shape.context)
            .zip(&expected.visible)
            .flat_map(|(row, &visible)| row[..visible].to_vec())
            .collect();
        let row_of: Vec<usize> = expected
            .visible
            .iter()
            .enumerate()
            .flat_map(|(row, &visible)| std::iter::repeat_n(row, visible))
            .collect();
        let bound = |i: usize| expected.bounds[row_of[i]];
        Ok(Accuracy::of(expected.rows.len(), RELATIVE_L2, &found, &expected.logits, bound))
    }
}

/// The oracle's scores of sampled rows, as far as they are visible.
struct Expected {
    rows: Vec<usize>,
    visible: Vec<usize>,
    /// What a score of each row may be off by.
    bounds: Vec<f64>,
    logits: Vec<f64>,
}

impl Logits {
    fn ask_oracle(&self, gpu: &Gpu, copy: usize) -> Result<Expected> {
        let set = &self.sets[copy];
        let batch = set.batch.host();
        // As many as the oracle scores in a fraction of a second; of a decode step each has a context of its own to be read back.
        let most = (1 << 18) / self.shape.context;
        let rows = spread(if self.shape.prefill { most } else { most.min(4) }, batch.num_tokens());
        let Sampled { batch, host, cache } = Sampled::new(gpu, batch, &rows, &self.cache)?;
        let (q, weights) = (oracle::rows(gpu, &set.q, &rows)?, oracle::rows(gpu, &set.weights, &rows)?);
        let columns = self.shape.context;
        let mut logits = oracle().alloc(DType::Float, &[rows.len(), columns])?;
        oracle().indexer_logits(&batch, 0..rows.len(), &q, &weights, &cache, scale(), &mut logits)?;
        let visible: Vec<usize> = (0..rows.len()).map(|row| host.visible(row)).collect();
        let logits = oracle().read(&logits)?;
        let logits =
            logits.chunks_exact(columns).zip(&visible).flat_map(|(row, &visible)| row[..visible].to_vec());
        Ok(Expected {
            bounds: bounds(&oracle().read(&q)?, &oracle().read(&weights)?),
            logits: logits.collect(),
            rows,
            visible,
        })
    }
}

fn scale() -> f64 {
    1.0 / ((DIMS.heads * DIMS.dims) as f64).sqrt()
}

/// What a row's logits may be off by: a rounding to f32 for every term, the terms no larger than their norms say.
fn bounds(q: &[f64], weights: &[f64]) -> Vec<f64> {
    // Keys of the benchmark are about normal: none is longer than twice the root of its columns, times the largest scale's two.
    let longest_key = 4.0 * (DIMS.dims as f64).sqrt();
    let roundings = (DIMS.heads + DIMS.dims) as f64 / f64::from(1 << 24);
    q.chunks_exact(DIMS.heads * DIMS.dims)
        .zip(weights.chunks_exact(DIMS.heads))
        .map(|(q, weights)| {
            let norms = q.chunks_exact(DIMS.dims).map(|q| q.iter().map(|x| x * x).sum::<f64>().sqrt());
            let terms: f64 = norms.zip(weights).map(|(norm, weight)| norm * weight.abs()).sum();
            roundings * longest_key * terms * scale()
        })
        .collect()
}
