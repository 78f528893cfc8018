//! Kernels at GLM-5.2's shapes, of one rank of eight unless a case says otherwise, on any backend.

use dsa80_reference::{
    Batch, DType, HostExpert, HostInt4, HostLinear, HostTensor, Kernels, Result, RopeLayout, RouterParams,
    SampleOutput, SampleRow, SamplingParams, SequenceSlice,
};
use half::bf16;

const PAGE: usize = 64;
const HIDDEN: usize = 6144;
const HEADS: usize = 8;
const NOPE: usize = 192;
const ROPE: usize = 64;
const VALUES: usize = 256;
const RANK: usize = 512;
const INDEX_HEADS: usize = 32;
const INDEX_WIDTH: usize = 128;
const TOP_K: usize = 2048;
const EXPERTS: usize = 256;
const INTERMEDIATE: usize = 256;
const VOCAB: usize = 154_880 / 8;
const EPS: f64 = 1e-5;

/// A call of a kernel that was made ready.
pub(crate) type Call<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// Sequences that have so many new tokens each, at the end of a context.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) seqs: usize,
    pub(crate) new: usize,
    pub(crate) context: usize,
}

/// A kernel and its shape.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Case {
    Embed { tokens: usize },
    RmsNorm { tokens: usize, residual: bool },
    RopeTable { tokens: usize },
    Rope { tokens: usize },
    LayerNormRope { tokens: usize },
    LatentRope { tokens: usize },
    Linear { tokens: usize, columns: usize, features: usize },
    LinearInt4 { tokens: usize, columns: usize, features: usize, group_size: usize },
    Swiglu { tokens: usize },
    SiluMul { tokens: usize },
    AbsorbQuery { tokens: usize },
    AbsorbOutput { tokens: usize },
    IndexerLogits { step: Step, fp8: bool },
    TopK { step: Step },
    SparseMla { step: Step, fp8: bool },
    Router { tokens: usize },
    Moe { tokens: usize, int4: bool },
    LmHead { tokens: usize },
    Sample { tokens: usize },
}

impl Case {
    /// The contract's name.
    pub(crate) fn kernel(&self) -> &'static str {
        match self {
            Self::Embed { .. } => "embed",
            Self::RmsNorm { residual: false, .. } => "rms_norm",
            Self::RmsNorm { residual: true, .. } => "rms_norm_residual",
            Self::RopeTable { .. } => "rope_table",
            Self::Rope { .. } => "rope",
            Self::LayerNormRope { .. } => "layer_norm_rope",
            Self::LatentRope { .. } => "latent_rope",
            Self::Linear { .. } => "linear",
            Self::LinearInt4 { .. } => "linear_int4",
            Self::Swiglu { .. } => "swiglu",
            Self::SiluMul { .. } => "silu_mul",
            Self::AbsorbQuery { .. } => "absorb_query",
            Self::AbsorbOutput { .. } => "absorb_output",
            Self::IndexerLogits { .. } => "indexer_logits",
            Self::TopK { .. } => "top_k",
            Self::SparseMla { .. } => "sparse_mla",
            Self::Router { .. } => "router",
            Self::Moe { int4: true, .. } => "moe_int4",
            Self::Moe { int4: false, .. } => "moe",
            Self::LmHead { .. } => "lm_head",
            Self::Sample { .. } => "sample",
        }
    }

    /// The shape in words.
    pub(crate) fn shape(&self) -> String {
        let cache = |fp8| if fp8 { "8 bits" } else { "bf16" };
        match *self {
            Self::Linear { tokens, columns, features } => format!("T={tokens}, {columns} to {features}"),
            Self::LinearInt4 { tokens, columns, features, group_size } => {
                format!("T={tokens}, {columns} to {features}, g{group_size}")
            }
            Self::IndexerLogits { step: Step { seqs, new, context }, fp8 } => {
                format!("{seqs} x {new} of {context}, {}", cache(fp8))
            }
            Self::TopK { step: Step { seqs, new, context } } => format!("{seqs} x {new} of {context}"),
            Self::SparseMla { step: Step { seqs, new, .. }, fp8 } => {
                format!("{seqs} x {new}, 2048 of 8192, {}", cache(fp8))
            }
            Self::Embed { tokens }
            | Self::RmsNorm { tokens, .. }
            | Self::RopeTable { tokens }
            | Self::Rope { tokens }
            | Self::LayerNormRope { tokens }
            | Self::LatentRope { tokens }
            | Self::Swiglu { tokens }
            | Self::SiluMul { tokens }
            | Self::AbsorbQuery { tokens }
            | Self::AbsorbOutput { tokens }
            | Self::Router { tokens }
            | Self::Moe { tokens, .. }
            | Self::LmHead { tokens }
            | Self::Sample { tokens } => format!("T={tokens}"),
        }
    }

    /// What a call reads and writes at least, every byte once.
    pub(crate) fn bytes(&self) -> f64 {
        let bytes = match *self {
            Self::Embed { tokens } => tokens * HIDDEN * 4,
            Self::RmsNorm { tokens, residual } => tokens * HIDDEN * if residual { 12 } else { 4 },
            Self::RopeTable { tokens } => tokens * ROPE * 4,
            Self::Rope { tokens } => tokens * HEADS * ROPE * 4,
            Self::LayerNormRope { tokens } => tokens * INDEX_WIDTH * 4,
            Self::LatentRope { tokens } => tokens * (RANK + ROPE) * 4,
            Self::Linear { tokens, columns, features } => {
                2 * (columns * features + tokens * (columns + features))
            }
            Self::LinearInt4 { tokens, columns, features, group_size } => {
                features * (columns / 2 + columns / group_size * 5 / 2) + 2 * tokens * (columns + features)
            }
            Self::Swiglu { tokens } => 2 * (2 * HIDDEN * INTERMEDIATE + tokens * (HIDDEN + INTERMEDIATE)),
            Self::SiluMul { tokens } => tokens * HIDDEN * 6,
            Self::AbsorbQuery { tokens } => 2 * HEADS * (NOPE * RANK + tokens * (NOPE + RANK + 2 * ROPE)),
            Self::AbsorbOutput { tokens } => 2 * HEADS * (VALUES * RANK + tokens * (VALUES + RANK)),
            Self::IndexerLogits { step, fp8 } => {
                let tokens = step.seqs * step.new;
                let row = if fp8 { INDEX_WIDTH + 4 } else { 2 * INDEX_WIDTH };
                step.seqs * step.context * row + tokens * (INDEX_HEADS * INDEX_WIDTH * 2 + 4 * step.seen())
            }
            Self::TopK { step } => 4 * step.seqs * step.new * (step.seen() + TOP_K),
            Self::SparseMla { step, fp8 } => {
                let row = if fp8 { RANK + 16 + 2 * ROPE } else { 2 * (RANK + ROPE) };
                step.seqs * step.new * (TOP_K * (row + 4) + HEADS * 2 * (2 * RANK + ROPE))
            }
            Self::Router { tokens } => tokens * (EXPERTS * 4 + 8 * 8),
            Self::Moe { tokens, int4 } => {
                let weights = (tokens * 8).min(EXPERTS) * 3 * HIDDEN * INTERMEDIATE;
                (if int4 { weights * 33 / 64 } else { 2 * weights }) + 4 * tokens * HIDDEN
            }
            Self::LmHead { tokens } => 2 * VOCAB * HIDDEN + tokens * (2 * HIDDEN + 4 * VOCAB),
            Self::Sample { tokens } => 4 * tokens * VOCAB,
        };
        bytes as f64
    }

    /// Multiplications of a call, about: what the oracle's time goes by.
    pub(crate) fn multiplications(&self) -> f64 {
        let count = match *self {
            Self::Linear { tokens, columns, features }
            | Self::LinearInt4 { tokens, columns, features, .. } => tokens * columns * features,
            Self::Swiglu { tokens } => 2 * tokens * HIDDEN * INTERMEDIATE,
            Self::AbsorbQuery { tokens } => tokens * HEADS * NOPE * RANK,
            Self::AbsorbOutput { tokens } => tokens * HEADS * VALUES * RANK,
            Self::IndexerLogits { step, .. } => {
                step.seqs * step.new * step.seen() * INDEX_HEADS * INDEX_WIDTH
            }
            Self::SparseMla { step, .. } => step.seqs * step.new * TOP_K * HEADS * (2 * RANK + ROPE),
            Self::Moe { tokens, .. } => 8 * tokens * 3 * HIDDEN * INTERMEDIATE,
            Self::LmHead { tokens } => tokens * HIDDEN * VOCAB,
            _ => 0,
        };
        count as f64 + self.bytes()
    }

    /// Makes a call ready on `kernels`; `copies` of what it reads most take turns.
    pub(crate) fn ready<'a, K: Kernels>(&self, kernels: &'a K, copies: usize) -> Result<Call<'a>> {
        let of = Maker { kernels };
        let mut turn = 0;
        let mut next = move || {
            turn = (turn + 1) % copies;
            turn
        };
        Ok(match *self {
            Self::Embed { tokens } => {
                let table = of.weight([VOCAB, HIDDEN])?;
                let batch =
                    of.batch(Step { seqs: 1, new: tokens, context: tokens }, tokens.div_ceil(PAGE))?;
                let mut out = of.act(&[tokens, HIDDEN])?;
                Box::new(move || kernels.embed(&batch, &table, 0, &mut out))
            }
            Self::RmsNorm { tokens, residual } => {
                let (x, weight) = (of.act(&[tokens, HIDDEN])?, of.weight([HIDDEN])?);
                let (mut sums, mut out) = (of.floats(&[tokens, HIDDEN])?, of.act(&[tokens, HIDDEN])?);
                Box::new(move || match residual {
                    true => kernels.rms_norm_residual(&x, &mut sums, &weight, EPS, &mut out),
                    false => kernels.rms_norm(&x, &weight, EPS, &mut out),
                })
            }
            Self::RopeTable { tokens } => {
                let batch =
                    of.batch(Step { seqs: 1, new: tokens, context: tokens }, tokens.div_ceil(PAGE))?;
                let mut turns = of.floats(&[tokens, ROPE / 2, 2])?;
                Box::new(move || kernels.rope_table(&batch, 1e6, &mut turns))
            }
            Self::Rope { tokens } => {
                let turns = of.floats(&[tokens, ROPE / 2, 2])?;
                let mut x = of.act(&[tokens, HEADS, NOPE + ROPE])?;
                Box::new(move || kernels.rope(&mut x, NOPE, RopeLayout::Interleaved, &turns))
            }
            Self::LayerNormRope { tokens } => {
                let pages = tokens.div_ceil(PAGE);
                let batch = of.batch(Step { seqs: 1, new: tokens, context: tokens }, pages)?;
                let (x, turns) = (of.act(&[tokens, INDEX_WIDTH])?, of.floats(&[tokens, ROPE / 2, 2])?);
                let (weight, bias) = (of.weight([INDEX_WIDTH])?, of.weight([INDEX_WIDTH])?);
                let mut cache = of.act(&[pages, PAGE, INDEX_WIDTH])?;
                let layout = RopeLayout::Interleaved;
                Box::new(move || {
                    kernels.layer_norm_rope(&batch, &x, &weight, &bias, EPS, layout, &turns, &mut cache)
                })
            }
            Self::LatentRope { tokens } => {
                let pages = tokens.div_ceil(PAGE);
                let batch = of.batch(Step { seqs: 1, new: tokens, context: tokens }, pages)?;
                let (x, turns) = (of.act(&[tokens, RANK + ROPE])?, of.floats(&[tokens, ROPE / 2, 2])?);
                let (weight, mut cache) = (of.weight([RANK])?, of.act(&[pages, PAGE, RANK + ROPE])?);
                Box::new(move || kernels.latent_rope(&batch, &x, &weight, EPS, &turns, &mut cache))
            }
            Self::Linear { tokens, columns, features } => {
                let weights = of.copies(copies, || of.weight([features, columns]))?;
                let (x, mut out) = (of.act(&[tokens, columns])?, of.act(&[tokens, features])?);
                Box::new(move || kernels.linear(&x, &weights[next()], &mut out))
            }
            Self::LinearInt4 { tokens, columns, features, group_size } => {
                let weight = int4(features, columns, group_size);
                let weights = of.copies(copies, || kernels.upload_int4(weight.clone()))?;
                let (x, mut out) = (of.act(&[tokens, columns])?, of.act(&[tokens, features])?);
                Box::new(move || kernels.linear_int4(&x, &weights[next()], &mut out))
            }
            Self::Swiglu { tokens } => {
                let weight = || HostLinear::Dense(numbers([INTERMEDIATE, HIDDEN]));
                let weights = of.copies(copies, || kernels.upload_swiglu(weight(), weight()))?;
                let (x, mut out) = (of.act(&[tokens, HIDDEN])?, of.act(&[tokens, INTERMEDIATE])?);
                Box::new(move || kernels.swiglu(&x, &weights[next()], &mut out))
            }
            Self::SiluMul { tokens } => {
                let (gate, up) = (of.act(&[tokens, HIDDEN])?, of.act(&[tokens, HIDDEN])?);
                let mut out = of.act(&[tokens, HIDDEN])?;
                Box::new(move || kernels.silu_mul(&gate, &up, &mut out))
            }
            Self::AbsorbQuery { tokens } => {
                let (q, kv_b) =
                    (of.act(&[tokens, HEADS, NOPE + ROPE])?, of.weight([HEADS, NOPE + VALUES, RANK])?);
                let turns = of.floats(&[tokens, ROPE / 2, 2])?;
                let mut out = of.act(&[tokens, HEADS, RANK + ROPE])?;
                Box::new(move || kernels.absorb_query(&q, &kv_b, &turns, &mut out))
            }
            Self::AbsorbOutput { tokens } => {
                let (o, kv_b) = (of.act(&[tokens, HEADS, RANK])?, of.weight([HEADS, NOPE + VALUES, RANK])?);
                let mut out = of.act(&[tokens, HEADS, VALUES])?;
                Box::new(move || kernels.absorb_output(&o, &kv_b, &mut out))
            }
            Self::IndexerLogits { step, fp8 } => {
                let (pages, tokens) = (step.pages(), step.seqs * step.new);
                let batch = of.batch(step, pages)?;
                let cache = of.cache(fp8, pages, INDEX_WIDTH, INDEX_WIDTH + 4)?;
                let (q, weights) =
                    (of.act(&[tokens, INDEX_HEADS, INDEX_WIDTH])?, of.floats(&[tokens, INDEX_HEADS])?);
                let mut logits = kernels.alloc(DType::Float, &[tokens, step.context])?;
                Box::new(move || {
                    kernels.indexer_logits(&batch, 0..tokens, &q, &weights, &cache, 0.01, &mut logits)
                })
            }
            Self::TopK { step } => {
                let tokens = step.seqs * step.new;
                let batch = of.batch(step, step.pages())?;
                let logits = of.floats(&[tokens, step.context])?;
                let mut topk_indices = kernels.alloc(DType::Index, &[tokens, TOP_K])?;
                Box::new(move || kernels.top_k(&batch, 0..tokens, &logits, &mut topk_indices))
            }
            Self::SparseMla { step, fp8 } => {
                let (pages, tokens) = (step.pages(), step.seqs * step.new);
                let batch = of.batch(step, pages)?;
                let cache = of.cache(fp8, pages, RANK + ROPE, RANK + 16 + 2 * ROPE)?;
                let q = of.act(&[tokens, HEADS, RANK + ROPE])?;
                let mut topk_indices = kernels.alloc(DType::Index, &[tokens, TOP_K])?;
                let seen = step.context - step.new;
                // Distinct positions of each token, as far apart as there is room.
                let positions =
                    (0..tokens).flat_map(|t| (0..TOP_K).map(move |i| (i * seen / TOP_K + t % 3) as i32));
                kernels.write_index(&positions.collect::<Vec<_>>(), &mut topk_indices)?;
                let mut out = of.act(&[tokens, HEADS, RANK])?;
                Box::new(move || kernels.sparse_mla(&batch, &q, &cache, &topk_indices, 0.05, &mut out))
            }
            Self::Router { tokens } => {
                let (logits, bias) = (of.floats(&[tokens, EXPERTS])?, of.weight([EXPERTS])?);
                let mut ids = kernels.alloc(DType::Index, &[tokens, 8])?;
                let mut weights = kernels.alloc(DType::Float, &[tokens, 8])?;
                let params = RouterParams {
                    n_group: 1,
                    topk_group: 1,
                    norm_topk_prob: true,
                    routed_scaling_factor: 2.5,
                };
                Box::new(move || kernels.router(&logits, &bias, params, &mut ids, &mut weights))
            }
            Self::Moe { tokens, int4: packed } => {
                let weight = |out: usize, inner: usize| match packed {
                    true => HostLinear::Int4(int4(out, inner, 128)),
                    false => HostLinear::Dense(numbers([out, inner])),
                };
                let [up, down] = [weight(INTERMEDIATE, HIDDEN), weight(HIDDEN, INTERMEDIATE)];
                let expert = HostExpert { gate_proj: up.clone(), up_proj: up, down_proj: down };
                let x = of.act(&[tokens, HIDDEN])?;
                let mut ids = kernels.alloc(DType::Index, &[tokens, 8])?;
                let chosen: Vec<i32> = (0..tokens * 8).map(|i| (i * 11 % EXPERTS) as i32).collect();
                kernels.write_index(&chosen, &mut ids)?;
                let weights = of.floats(&[tokens, 8])?;
                let mut out = of.act(&[tokens, HIDDEN])?;
                if packed {
                    let experts = kernels.upload_experts_int4(vec![expert; EXPERTS])?;
                    Box::new(move || kernels.moe_int4(&x, &ids, &weights, &experts, None, &mut out))
                } else {
                    let experts = kernels.upload_experts(vec![expert; EXPERTS])?;
                    Box::new(move || kernels.moe(&x, &ids, &weights, &experts, None, &mut out))
                }
            }
            Self::LmHead { tokens } => {
                let (x, weight) = (of.act(&[tokens, HIDDEN])?, of.weight([VOCAB, HIDDEN])?);
                let mut rows = kernels.alloc(DType::Index, &[tokens])?;
                kernels.write_index(&(0..tokens as i32).collect::<Vec<_>>(), &mut rows)?;
                let mut logits = kernels.alloc(DType::Float, &[tokens, VOCAB])?;
                Box::new(move || kernels.lm_head(&x, &rows, &weight, &mut logits))
            }
            Self::Sample { tokens } => {
                let logits = of.floats(&[tokens, VOCAB])?;
                let column = |dtype| kernels.alloc(dtype, &[tokens]);
                let none = |dtype| kernels.alloc(dtype, &[tokens, 0]);
                let mut out = SampleOutput {
                    token_ids: column(DType::Index)?,
                    logprobs: column(DType::Float)?,
                    top_ids: none(DType::Index)?,
                    top_logprobs: none(DType::Float)?,
                };
                let params = SamplingParams { top_k: 50, top_p: 0.95, ..SamplingParams::default() };
                Box::new(move || {
                    let row = SampleRow {
                        params: &params,
                        prompt: &[],
                        output: &[],
                        banned: &[],
                        position: 7,
                        forced: None,
                    };
                    kernels.sample(&logits, &vec![row; tokens], &mut out)
                })
            }
        })
    }
}

impl Step {
    /// Positions that a token sees, of all of them in the middle.
    fn seen(&self) -> usize {
        self.context - self.new / 2
    }

    fn pages(&self) -> usize {
        self.seqs * self.context.div_ceil(PAGE)
    }
}

/// Numbers that repeat: what a kernel takes of them is the same as of others.
fn number(i: usize) -> f64 {
    ((i * 7919) % 1009) as f64 / 1009.0 - 0.5
}

fn numbers<const N: usize>(shape: [usize; N]) -> HostTensor {
    HostTensor::bf16(
        shape,
        (0..shape.iter().product()).map(|i| bf16::from_f64(number(i))).collect::<Vec<_>>(),
    )
}

fn int4(out_features: usize, in_features: usize, group_size: usize) -> HostInt4 {
    let groups = in_features / group_size;
    let word = |i: usize| (i as u32).wrapping_mul(2_654_435_761);
    let words = |count: usize| (0..count).map(word).collect::<Vec<u32>>().into();
    HostInt4 {
        out_features,
        in_features,
        group_size,
        weight_packed: words(out_features * in_features / 8),
        scales: numbers([out_features, groups]),
        zero_points: Some(words(out_features.div_ceil(8) * groups)),
    }
}

/// Makes what kernels read.
struct Maker<'a, K> {
    kernels: &'a K,
}

impl<K: Kernels> Maker<'_, K> {
    fn weight<const N: usize>(&self, shape: [usize; N]) -> Result<K::Tensor> {
        self.kernels.upload(numbers(shape))
    }

    fn act(&self, shape: &[usize]) -> Result<K::Tensor> {
        self.filled(DType::Act, shape)
    }

    fn floats(&self, shape: &[usize]) -> Result<K::Tensor> {
        self.filled(DType::Float, shape)
    }

    fn filled(&self, dtype: DType, shape: &[usize]) -> Result<K::Tensor> {
        let mut tensor = self.kernels.alloc(dtype, shape)?;
        let values: Vec<f64> = (0..shape.iter().product()).map(number).collect();
        self.kernels.write(&values, &mut tensor)?;
        Ok(tensor)
    }

    fn copies<T>(&self, copies: usize, make: impl Fn() -> Result<T>) -> Result<Vec<T>> {
        (0..copies).map(|_| make()).collect()
    }

    fn cache(&self, fp8: bool, pages: usize, act: usize, bytes: usize) -> Result<K::Tensor> {
        if !fp8 {
            return self.act(&[pages, PAGE, act]);
        }
        let mut cache = self.kernels.alloc(DType::Fp8, &[pages, PAGE, bytes])?;
        self.kernels.write_bytes(&vec![0x30; pages * PAGE * bytes], &mut cache)?;
        Ok(cache)
    }

    /// Pages of a sequence lie far from each other.
    fn batch(&self, step: Step, pages: usize) -> Result<K::Batch> {
        let Step { seqs, new, context } = step;
        let blocks = context.div_ceil(PAGE);
        let page = |i: usize| (if pages.is_multiple_of(977) { i } else { i * 977 % pages }) as u32;
        let tables: Vec<Vec<u32>> =
            (0..seqs).map(|s| (0..blocks).map(|b| page(s * blocks + b)).collect()).collect();
        let token_ids = vec![0; new];
        let slices: Vec<_> = tables
            .iter()
            .map(|pages| SequenceSlice { token_ids: &token_ids, computed_len: context - new, pages })
            .collect();
        let mut batch = self.kernels.alloc_batch(seqs * new, seqs, blocks)?;
        self.kernels.upload_batch(&Batch::new(PAGE, &slices)?, &mut batch)?;
        Ok(batch)
    }
}
