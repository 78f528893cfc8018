//! `expanded_mla`: attention of a long chunk of one sequence over keys and values expanded out of the latent rows, as HF computes it.
//!
//! In the absorbed form a head's query meets the 576 columns of a latent row, and its weights the 512 again: of every row that a token
//! selects, fetched for that token. Expanded, they are 256 and 256 columns, of rows that a block's tokens share; but all positions are
//! multiplied, also those that nobody selected. So it is less work for chunks whose contexts are a few times `k`, and whose tokens are
//! many enough to pay for the expansion, a plain product: [`Expansion`] says for which.

use dsa80_reference::{Batch, DType, DeviceTensor, Error, Result};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::expanded_mla_rows::{Rows, WORD};
use crate::linear::{LinearTiles, LinearWorkspace, linear};
use crate::sparse_mla_dims::selected;
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "expanded_mla";

/// Positions that are masked at a time at most: tiles are whole words of bits, and rows of bits whole tiles.
const MOST_KEYS: usize = 64;

/// Contexts that the bits of a token fit shared memory for.
const MAX_CONTEXT: usize = 1 << 16;

/// Columns of a head, and of a cache row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpandedMlaDims {
    /// Of a query and key without rotary embedding.
    pub nope: usize,
    /// With it.
    pub rope: usize,
    /// Of a value.
    pub v: usize,
    /// Of a latent row, without its rotary part.
    pub kv_lora_rank: usize,
}

impl ExpandedMlaDims {
    /// Of a query and key, filled up to whole steps of the tensor core.
    fn padded(self) -> usize {
        (self.nope + self.rope).next_multiple_of(16)
    }

    /// Of a head's key and value together, without the rotary part.
    fn expanded(self) -> usize {
        self.nope + self.v
    }
}

/// The constants of `expanded_mla`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpandedMlaTile {
    /// Warps of a block, 16 queries each.
    pub warps: usize,
    /// Positions of a tile.
    pub keys: usize,
}

impl ExpandedMlaTile {
    fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    fn queries(&self) -> usize {
        16 * self.warps
    }

    fn shared_bytes(&self, dims: ExpandedMlaDims) -> usize {
        2 * ((self.queries() + self.keys) * (dims.padded() + 8) + self.keys * (dims.v + 8))
    }

    fn entry(&self, dims: ExpandedMlaDims) -> ProgramEntry {
        let shared_bytes = self.shared_bytes(dims);
        ProgramEntry {
            program: Program::new(
                "expanded_mla.cu",
                [
                    ("NOPE", dims.nope),
                    ("ROPE", dims.rope),
                    ("V_DIM", dims.v),
                    ("TILE_WARPS", self.warps),
                    ("TILE_KEYS", self.keys),
                    ("TILE_SHARED_BYTES", shared_bytes),
                ],
            ),
            entry: KERNEL,
            threads: self.threads(),
            shared_bytes,
            variant: format!("{} + {} and {} columns", dims.nope, dims.rope, dims.v),
        }
    }
}

impl Tile for ExpandedMlaTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = ExpandedMlaDims;

    fn safe(_dims: Self::Dims) -> Self {
        Self { warps: 8, keys: 64 }
    }

    fn candidates(dims: Self::Dims, limits: &Limits) -> Vec<Self> {
        let tiles = [(8, 64), (8, 32), (4, 64), (4, 32)].map(|(warps, keys)| Self { warps, keys });
        tiles.into_iter().filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: Self::Dims, limits: &Limits) -> Result<()> {
        let ExpandedMlaDims { nope, rope, v, kv_lora_rank } = dims;
        require(self, (1..=8).contains(&self.warps), || "a block has 1 to 8 warps".into())?;
        require(self, matches!(self.keys, 32 | MOST_KEYS), || "a tile has 32 or 64 keys".into())?;
        require(self, [nope, rope, kv_lora_rank].iter().all(|n| *n > 0 && n.is_multiple_of(8)), || {
            format!(
                "{nope} + {rope} columns of a key or {kv_lora_rank} of a latent row are not whole vectors of 8"
            )
        })?;
        // A warp's sums are half a register a column.
        require(self, v > 0 && v.is_multiple_of(16) && v <= 256, || {
            format!("{v} columns of a value are not a multiple of 16 up to 256")
        })?;
        require_shared(self, self.shared_bytes(dims), limits)
    }
}

fn rows(dims: ExpandedMlaDims) -> Rows {
    Rows { rank: dims.kv_lora_rank, rope: dims.rope, words: MAX_CONTEXT / WORD }
}

/// Every variant of a tile, and what is launched before it.
pub fn programs(tile: &ExpandedMlaTile, dims: ExpandedMlaDims) -> Vec<ProgramEntry> {
    let [gather, bits] = rows(dims).entries();
    vec![tile.entry(dims), gather, bits]
}

/// Which steps are expanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expansion {
    /// Token rows at least.
    pub tokens: usize,
    /// Positions of the context for each of them at most: who is expanded must be read often enough.
    pub context_of_token: usize,
    /// Positions that a token sees, in the mean, for each one that it selects, at most.
    pub visible_of_selected: usize,
}

impl Default for Expansion {
    /// From steps of 512 to 2048 tokens of contexts of 4096 and 8192 with 8 heads (`LEVERS.md`): those that are expanded here were quicker so.
    fn default() -> Self {
        Self { tokens: 1280, context_of_token: 4, visible_of_selected: 4 }
    }
}

impl Expansion {
    /// Steps of `tokens` token rows or more, whatever their context is up to [`longest`](Self::longest): for measurements.
    pub fn starting_at(tokens: usize) -> Self {
        Self { tokens, context_of_token: usize::MAX, ..Self::default() }
    }

    /// Whether a step of this batch, whose tokens select up to `k` positions each, is less work.
    pub fn pays(&self, batch: &Batch, k: usize) -> bool {
        let (tokens, context) = (batch.num_tokens(), batch.max_context_len);
        batch.num_seqs() == 1
            && tokens >= self.tokens.max(1)
            && context <= self.context_of_token.saturating_mul(tokens)
            && context <= self.longest(tokens, k)
    }

    /// Token rows of the largest step that is expanded where they select up to `k` positions: a chunk that has nothing before it.
    pub fn most_tokens(&self, k: usize) -> usize {
        // What `longest` allows no more tokens than: T <= visible_of_selected k + T / 2.
        self.visible_of_selected.saturating_mul(k).saturating_mul(2).min(MAX_CONTEXT)
    }

    /// The longest context that is expanded for `tokens` token rows.
    pub fn longest(&self, tokens: usize, k: usize) -> usize {
        self.visible_of_selected.saturating_mul(k).saturating_add(tokens / 2).min(MAX_CONTEXT)
    }
}

/// What a chunk's context is expanded to.
#[derive(Debug)]
pub struct ExpandedMlaWorkspace<D: Device> {
    latent: CudaTensor<D>,
    rotary: CudaTensor<D>,
    expanded: CudaTensor<D>,
    bits: D::Buffer,
    tokens: usize,
    context: usize,
}

impl<D: Device> ExpandedMlaWorkspace<D> {
    /// For steps of up to `tokens` token rows of `heads` heads that select up to `k` positions, whose contexts are then no longer than
    /// `expansion` allows: `2 * (kv_lora_rank + rope + heads * (nope + v))` bytes for each of its positions, and an eighth of a byte for
    /// each of every token.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(
        device: &D,
        dims: ExpandedMlaDims,
        expansion: &Expansion,
        [tokens, heads, k]: [usize; 3],
    ) -> Result<Self> {
        let context = expansion.longest(tokens, k).next_multiple_of(MOST_KEYS);
        let act = |name, shape: &[usize]| CudaTensor::alloc(device, name, DType::Act, shape);
        Ok(Self {
            latent: act("expanded_mla latent", &[context, dims.kv_lora_rank])?,
            rotary: act("expanded_mla rotary", &[context, dims.rope])?,
            expanded: act("expanded_mla keys and values", &[context, heads * dims.expanded()])?,
            bits: device.alloc("expanded_mla bits", tokens * context / 8)?,
            tokens,
            context,
        })
    }
}

/// What is multiplied, and what is read and written beside it; `visible` positions a token in the mean.
pub fn cost(tokens: usize, heads: usize, visible: usize, k: usize, dims: ExpandedMlaDims) -> Cost {
    let columns = dims.nope + dims.rope + dims.v;
    Cost {
        bytes: (2 * tokens * heads * columns + 4 * tokens * k + 2 * visible * (dims.kv_lora_rank + dims.rope))
            as f64,
        flops: 2.0 * (tokens * heads) as f64 * (visible * columns) as f64,
    }
}

/// The tensors of a step, as [`expanded_mla`] is called with them.
#[derive(Debug)]
pub struct Step<'a, D: Device> {
    /// One sequence.
    pub batch: &'a CudaBatch<D>,
    /// `[T, H, nope + rope]`, rotated.
    pub q: &'a CudaTensor<D>,
    /// `[H, nope + v, kv_lora_rank]` dense.
    pub kv_b: &'a CudaTensor<D>,
    /// `[pages, page_size, kv_lora_rank + rope]`, bf16.
    pub cache: &'a CudaTensor<D>,
    /// `[T, k]`.
    pub topk_indices: &'a CudaTensor<D>,
}

impl<D: Device> Step<'_, D> {
    /// The dims and the heads, the shapes of all but the output checked.
    ///
    /// # Errors
    /// A tensor does not fit the contract; a batch of other than one sequence; a cache in 8 bits.
    pub fn dims(&self) -> Result<(ExpandedMlaDims, usize)> {
        let host = self.batch.host();
        let tokens = host.num_tokens();
        let [q_tokens, heads, width] = self.q.dims(KERNEL, "q")?;
        let [kv_heads, kv_rows, rank] = self.kv_b.dims(KERNEL, "kv_b")?;
        let [_, page_size, cache_width] = self.cache.dims(KERNEL, "cache")?;
        self.q.expect_dtype(KERNEL, "q", &[DType::Act], "activations")?;
        self.kv_b.expect_dtype(KERNEL, "kv_b", &crate::rows::WEIGHTS, "dense weights")?;
        self.cache.expect_dtype(KERNEL, "cache", &[DType::Act], "bf16 rows")?;
        self.q.expect(KERNEL, "q", q_tokens == tokens, || format!("[{tokens}, H, nope + rope]"))?;
        self.cache.expect(KERNEL, "cache", page_size == host.page_size && cache_width >= rank, || {
            format!("[pages, {}, {rank} + rope]", host.page_size)
        })?;
        let rope = cache_width - rank;
        self.kv_b.expect(
            KERNEL,
            "kv_b",
            kv_heads == heads && width >= rope && kv_rows >= width - rope,
            || format!("[{heads}, {width} - {rope} + v, kv_lora_rank]"),
        )?;
        selected(KERNEL, self.topk_indices, tokens)?;
        if host.num_seqs() != 1 {
            let (expected, found) = ("one sequence".to_owned(), host.num_seqs().to_string());
            return Err(Error::Value { kernel: KERNEL, name: "batch", expected, found });
        }
        let nope = width - rope;
        Ok((ExpandedMlaDims { nope, rope, v: kv_rows - nope, kv_lora_rank: rank }, heads))
    }
}

/// The kernel of the contract's [`expanded_mla`](dsa80_reference::Kernels::expanded_mla), for queries that are rotated already. All rows
/// of the sequence's context are read, also those that no token selects: they must be numbers.
///
/// # Errors
/// Those of [`Step::dims`]; a tile that does not fit; a workspace that is too small; the device.
pub fn expanded_mla<D: Device>(
    device: &D,
    tile: &ExpandedMlaTile,
    (tiles, linear_workspace): (&LinearTiles, &LinearWorkspace<D>),
    workspace: &ExpandedMlaWorkspace<D>,
    step: &Step<'_, D>,
    scale: f64,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let (dims, heads) = step.dims()?;
    let host = step.batch.host();
    let (tokens, context) = (host.num_tokens(), host.max_context_len);
    out.expect_dtype(KERNEL, "out", &[DType::Act], "activations")?;
    out.expect(KERNEL, "out", out.shape() == [tokens, heads, dims.v], || {
        format!("[{tokens}, {heads}, {}]", dims.v)
    })?;
    tile.validate(dims, device.limits())?;
    if tokens > workspace.tokens || context > workspace.context {
        return Err(Error::Capacity {
            shape: vec![tokens, context],
            elements: tokens * context,
            capacity: workspace.tokens * workspace.context,
        });
    }
    if tokens == 0 || heads == 0 {
        return Ok(());
    }
    let k = selected(KERNEL, step.topk_indices, tokens)?;
    let words = context.next_multiple_of(MOST_KEYS) / WORD;
    let bits = &workspace.bits;
    let shaped = |tensor: &CudaTensor<D>, shape: [usize; 2]| {
        let mut tensor = tensor.alias();
        tensor.set_shape(&shape).map(|()| tensor)
    };
    let columns = heads * dims.expanded();
    let latent = shaped(&workspace.latent, [context, dims.kv_lora_rank])?;
    let rotary = shaped(&workspace.rotary, [context, dims.rope])?;
    let mut expanded = shaped(&workspace.expanded, [context, columns])?;
    let weight = shaped(step.kv_b, [columns, dims.kv_lora_rank])?;

    rows(dims).gather(device, step.batch, step.cache, &latent, rotary.buffer())?;
    rows(dims).bits(device, step.topk_indices, [tokens, k, words], bits)?;
    linear(device, tiles, linear_workspace, &latent, &weight, &mut expanded)?;
    let entry = tile.entry(dims);
    device.launch(&Launch {
        program: &entry.program,
        entry: entry.entry,
        grid: [heads as u32, tokens.div_ceil(tile.queries()) as u32, 1],
        threads: entry.threads,
        shared_bytes: entry.shared_bytes,
        shape: format!("{tokens} tokens x {heads} heads, context {context}"),
        args: &[
            Arg::Buffer(step.q.buffer()),
            Arg::Buffer(expanded.buffer()),
            Arg::Buffer(rotary.buffer()),
            Arg::Buffer(bits),
            Arg::Buffer(out.buffer()),
            Arg::I32(tokens as i32),
            Arg::I32(heads as i32),
            Arg::I32(context as i32),
            Arg::I32((context - tokens) as i32),
            Arg::I32(words as i32),
            Arg::F32((scale * std::f64::consts::LOG2_E) as f32),
        ],
    })
}
