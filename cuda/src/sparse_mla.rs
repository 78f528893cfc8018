//! `sparse_mla`: attention over the selected latent rows.
//!
//! Three ways lead to the same result. Eight heads fill the tensor core's columns in `sparse_mla_narrow`, for every cache and all dims. From
//! [`SparseMlaTiles::wide_heads`] heads on, unless the step is tiny, 64 query rows share their keys in [`sparse_mla_wide`]. And in long chunks with fewer heads,
//! neighbouring tokens that select much the same rows share those of [`sparse_mla_union`]; which tokens do is known on the device alone,
//! so both kernels are launched, and each leaves the other's tokens alone.

use dsa80_reference::{DType, DeviceTensor, Error, Result};

use crate::absorb::{AbsorbTile, OutputHeads, absorb_output};
use crate::absorb_merged::{self, absorb_merged};
use crate::batch::CudaBatch;
use crate::device::{Device, Limits};
pub use crate::sparse_mla_dims::SparseMlaDims;
use crate::sparse_mla_merge::{Partials, sparse_mla_merge};
use crate::sparse_mla_narrow::{Done, HEADS, Inputs, Shapes, sparse_mla_narrow};
pub use crate::sparse_mla_narrow::{SparseMlaTile, programs};
use crate::sparse_mla_union::{
    MAX_CACHE_ROWS, SparseMlaUnionTile, SparseMlaUnionWorkspace, sparse_mla_union,
};
use crate::sparse_mla_wide::{QUERIES, Selection, SparseMlaWideTile, sparse_mla_wide};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile};

/// The tiles of all ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseMlaTiles {
    /// For few tokens, whose rows are shared out among blocks.
    pub decode: SparseMlaTile,
    /// For many.
    pub prefill: SparseMlaTile,
    /// For many heads, few tokens.
    pub wide_decode: SparseMlaWideTile,
    /// For many heads, many tokens, and for tokens that share rows.
    pub wide_prefill: SparseMlaWideTile,
    /// Which rows they share.
    pub union: SparseMlaUnionTile,
    /// From this many heads on, 64 query rows share their keys,
    pub wide_heads: usize,
    /// if the step has this many query rows (tokens times heads): fewer leave most of the device to the splits of a few blocks.
    pub wide_queries: usize,
    /// From this many token rows a sequence on, tokens with fewer heads may share rows; 0 for never.
    pub union_tokens: usize,
    /// How many times the rows of one token the union of a group may have and still be worth masked products, in quarters.
    pub union_quarters: usize,
}

impl SparseMlaTiles {
    /// Tiles that fit any device.
    pub fn safe(dims: SparseMlaDims) -> Self {
        let wide = SparseMlaWideTile::safe(dims);
        Self {
            decode: SparseMlaTile::safe(dims),
            prefill: SparseMlaTile::safe(dims),
            wide_decode: wide,
            wide_prefill: wide,
            union: SparseMlaUnionTile::safe(()),
            wide_heads: 24,
            wide_queries: 256,
            union_tokens: 256,
            union_quarters: 12,
        }
    }

    /// Whether `heads` heads of `tokens` tokens share their keys in 64 query rows, if the cache is bf16.
    pub fn is_wide(&self, tokens: usize, heads: usize) -> bool {
        heads >= self.wide_heads && tokens * heads >= self.wide_queries
    }
}

/// What splits hand to who adds them up, and what tokens select together.
#[derive(Debug)]
pub struct SparseMlaWorkspace<D: Device> {
    partial_out: D::Buffer,
    partial_max: D::Buffer,
    partial_sum: D::Buffer,
    /// Heads of a token times splits.
    capacity: usize,
    union: Option<SparseMlaUnionWorkspace<D>>,
}

impl<D: Device> SparseMlaWorkspace<D> {
    /// For steps of up to `max_tokens` tokens with `heads` heads that select up to `max_k` rows each, with `tiles`:
    /// `4 * (kv_lora_rank + 2)` bytes for every head and split, of which a multiprocessor needs at most
    /// `max(32 * split_blocks, 64)`; and what the unions need, if there can be any.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(
        device: &D,
        tiles: &SparseMlaTiles,
        dims: SparseMlaDims,
        max_tokens: usize,
        heads: usize,
        max_k: usize,
    ) -> Result<Self> {
        let limits = device.limits();
        let narrow = tiles.decode.max_partials(limits).max(tiles.prefill.max_partials(limits));
        let wide = limits.multiprocessors as usize * QUERIES;
        let capacity = narrow.max(wide).max(heads);
        let union = (union_group(tiles, heads, max_tokens) > 1)
            .then(|| SparseMlaUnionWorkspace::alloc(device, max_tokens, max_k))
            .transpose()?;
        Ok(Self {
            partial_out: device.alloc("sparse_mla partial_out", 4 * capacity * dims.kv_lora_rank)?,
            partial_max: device.alloc("sparse_mla partial_max", 4 * capacity)?,
            partial_sum: device.alloc("sparse_mla partial_sum", 4 * capacity)?,
            capacity,
            union,
        })
    }

    /// Where `splits` blocks leave their results for `heads` heads of all tokens, if there are several.
    pub(crate) fn partials(&self, heads: usize, splits: usize) -> Result<Option<Partials<'_, D>>> {
        let elements = heads * splits;
        if splits == 1 {
            return Ok(None);
        }
        if elements > self.capacity {
            return Err(Error::Capacity { shape: vec![heads, splits], elements, capacity: self.capacity });
        }
        let (out, max, sum) = (&self.partial_out, &self.partial_max, &self.partial_sum);
        Ok(Some(Partials { splits, out, max, sum }))
    }
}

/// Tokens that share rows in chunks of `tokens` token rows; 1 if none do.
fn union_group(tiles: &SparseMlaTiles, heads: usize, tokens: usize) -> usize {
    if tiles.union_tokens == 0 || tokens < tiles.union_tokens || heads >= tiles.wide_heads {
        return 1;
    }
    match heads {
        0..=8 => 8,
        9..=16 => 4,
        17..=32 => 2,
        _ => 1,
    }
}

/// The bytes of the selected rows, of the queries, places and output, and the operations of both products. Of a row that several tokens
/// select every selection counts: that they are the same is not known on the host.
pub fn cost(tokens: usize, heads: usize, k: usize, dims: SparseMlaDims, fp8: bool) -> Cost {
    let rows = (tokens * k) as f64;
    let queries_and_output = 2 * tokens * heads * (dims.width() + dims.kv_lora_rank);
    Cost {
        bytes: rows * (dims.row_bytes(fp8) + 4) as f64 + queries_and_output as f64,
        flops: rows * (2 * heads * (dims.width() + dims.kv_lora_rank)) as f64,
    }
}

/// The kernel of the contract's [`sparse_mla`](dsa80_reference::Kernels::sparse_mla). Any number of heads; multiples of 8 lose nothing.
///
/// # Errors
/// A shape, element type or tile that does not fit; a workspace that is too small; the device.
pub fn sparse_mla<D: Device>(
    device: &D,
    tiles: &SparseMlaTiles,
    workspace: &SparseMlaWorkspace<D>,
    batch: &CudaBatch<D>,
    q: &CudaTensor<D>,
    cache: &CudaTensor<D>,
    topk_indices: &CudaTensor<D>,
    scale: f64,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let inputs = Inputs { batch, q, cache, topk_indices, scale };
    let shapes = inputs.check(out)?;
    let partials = attend(device, tiles, workspace, &inputs, shapes, out)?;
    partials.map_or(Ok(()), |partials| sparse_mla_merge(device, &partials, shapes.dims, out))
}

/// The kernels of the contract's [`sparse_mla_output`](dsa80_reference::Kernels::sparse_mla_output): where a few splits are merged anyway,
/// by what multiplies.
///
/// # Errors
/// Those of [`sparse_mla`] and [`absorb_output`].
pub fn sparse_mla_output<D: Device>(
    device: &D,
    tiles: &SparseMlaTiles,
    absorb: &AbsorbTile,
    workspace: &SparseMlaWorkspace<D>,
    batch: &CudaBatch<D>,
    q: &CudaTensor<D>,
    cache: &CudaTensor<D>,
    topk_indices: &CudaTensor<D>,
    scale: f64,
    kv_b: &CudaTensor<D>,
    o_latent: &mut CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let inputs = Inputs { batch, q, cache, topk_indices, scale };
    let shapes = inputs.check(o_latent)?;
    let heads = OutputHeads::check(o_latent, kv_b, out)?;
    if let Some(partials) = attend(device, tiles, workspace, &inputs, shapes, o_latent)? {
        if absorb_merged::takes(&partials, heads, shapes.dims, kv_b, device.limits()) {
            return absorb_merged(device, &partials, heads, shapes.dims, kv_b, out);
        }
        sparse_mla_merge(device, &partials, shapes.dims, o_latent)?;
    }
    absorb_output(device, absorb, o_latent, kv_b, out)
}

/// The attention of inputs that fit the contract, in `out`, or the partial results that are still to be merged.
fn attend<'w, D: Device>(
    device: &D,
    tiles: &SparseMlaTiles,
    workspace: &'w SparseMlaWorkspace<D>,
    inputs: &Inputs<'_, D>,
    shapes: Shapes,
    out: &mut CudaTensor<D>,
) -> Result<Option<Partials<'w, D>>> {
    let Shapes { tokens, heads, dims, k, cache_rows } = shapes;
    let &Inputs { batch, q, cache, topk_indices, scale } = inputs;
    if tokens * heads == 0 {
        return Ok(None);
    }
    let shareable = cache.dtype() == DType::Act && dims.rope.is_multiple_of(16);
    if shareable && tiles.is_wide(tokens, heads) {
        let splits = wide_splits(tokens * heads.div_ceil(QUERIES), k, device.limits());
        let wide = if splits > 1 { &tiles.wide_decode } else { &tiles.wide_prefill };
        let partials = workspace.partials(tokens * heads, splits)?;
        let selection = Selection::Token(topk_indices);
        sparse_mla_wide(device, wide, batch, q, cache, selection, scale, partials.as_ref(), out)?;
        return Ok(partials);
    }
    let group = union_group(tiles, heads, tokens / batch.host().num_seqs().max(1));
    let may_share = shareable && group > 1 && (cache_rows as usize) < MAX_CACHE_ROWS;
    let done = workspace.union.as_ref().filter(|_| may_share).map(|union| Done {
        union,
        group,
        most: k * tiles.union_quarters / 4,
    });
    if let Some(Done { union, group, most }) = done {
        sparse_mla_union(device, &tiles.union, union, batch, topk_indices, group)?;
        let selection = Selection::Group { union, group, k, most };
        sparse_mla_wide(device, &tiles.wide_prefill, batch, q, cache, selection, scale, None, out)?;
    }
    let many = tokens * heads / HEADS > device.limits().multiprocessors as usize;
    let narrow = if many { &tiles.prefill } else { &tiles.decode };
    sparse_mla_narrow(device, narrow, workspace, inputs, shapes, done.as_ref(), out)
}

/// Blocks that share the `k` rows of one of `rows` token groups in the wide kernel, of which a multiprocessor holds one.
fn wide_splits(rows: usize, k: usize, limits: &Limits) -> usize {
    (limits.multiprocessors as usize / rows.max(1)).min(k.div_ceil(QUERIES)).max(1)
}
