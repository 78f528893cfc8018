//! What the kernels of `sparse_mla` share: the model's dims, and the shapes of the tensors that have them.

use dsa80_reference::fp8::MlaRow;
use dsa80_reference::{DType, Result};

use crate::device::Device;
use crate::tensor::CudaTensor;
use crate::tile::{Tile, require};

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseMlaDims {
    /// Columns of the latent part, which are also the values.
    pub kv_lora_rank: usize,
    /// Columns of the rotary key part.
    pub rope: usize,
}

impl SparseMlaDims {
    pub(crate) fn width(self) -> usize {
        self.kv_lora_rank + self.rope
    }

    pub(crate) fn row(self) -> MlaRow {
        MlaRow { kv_lora_rank: self.kv_lora_rank, rope: self.rope }
    }

    pub(crate) fn row_bytes(self, fp8: bool) -> usize {
        if fp8 { self.row().row_bytes() } else { 2 * self.width() }
    }

    /// Fails unless they are whole steps of the tensor core (or end in a part of one, of `columns`), as many as the registers of a warp hold.
    pub(crate) fn require<T: Tile>(self, tile: &T, columns: usize) -> Result<()> {
        let Self { kv_lora_rank: rank, rope } = self;
        require(tile, rank > 0 && rank.is_multiple_of(16) && rank <= 512, || {
            format!("a latent of {rank} columns is not a multiple of 16 up to 512")
        })?;
        require(tile, rope > 0 && rope.is_multiple_of(columns) && rope <= 64, || {
            format!("{rope} rotary columns are not a multiple of {columns} up to 64")
        })
    }
}

/// The heads and columns of the queries.
pub(crate) fn queries<D: Device>(
    kernel: &'static str,
    q: &CudaTensor<D>,
    tokens: usize,
) -> Result<(usize, usize)> {
    let [q_tokens, heads, width] = q.dims(kernel, "q")?;
    q.expect_dtype(kernel, "q", &[DType::Act], "activations")?;
    q.expect(kernel, "q", q_tokens == tokens, || format!("[{tokens}, H, kv_lora_rank + rope]"))?;
    Ok((heads, width))
}

/// The dims of an output for queries of `width` columns.
pub(crate) fn output<D: Device>(
    kernel: &'static str,
    out: &CudaTensor<D>,
    tokens: usize,
    heads: usize,
    width: usize,
) -> Result<SparseMlaDims> {
    let [out_tokens, out_heads, rank] = out.dims(kernel, "out")?;
    out.expect_dtype(kernel, "out", &[DType::Act], "activations")?;
    out.expect(kernel, "out", (out_tokens, out_heads) == (tokens, heads) && rank <= width, || {
        format!("[{tokens}, {heads}, kv_lora_rank] with kv_lora_rank at most {width}")
    })?;
    Ok(SparseMlaDims { kv_lora_rank: rank, rope: width - rank })
}

/// How many positions each token selects.
pub(crate) fn selected<D: Device>(
    kernel: &'static str,
    topk_indices: &CudaTensor<D>,
    tokens: usize,
) -> Result<usize> {
    let [index_tokens, k] = topk_indices.dims(kernel, "topk_indices")?;
    topk_indices.expect_dtype(kernel, "topk_indices", &[DType::Index], "indices")?;
    topk_indices.expect(kernel, "topk_indices", index_tokens == tokens, || format!("[{tokens}, k]"))?;
    Ok(k)
}
