//! The paged caches of one rank.

use dsa80_reference::{DType, Kernels, Result};

use crate::config::{IndexerType, ModelConfig};

/// One page table serves both: a slot holds a token's row in every layer.
pub(crate) struct Caches<K: Kernels> {
    /// Per layer `[pages, page_size, kv_lora_rank + qk_rope_head_dim]`.
    pub(crate) mla: Vec<K::Tensor>,
    /// Per layer `[pages, page_size, index_head_dim]`, for the full ones.
    pub(crate) indexer: Vec<Option<K::Tensor>>,
}

impl<K: Kernels> Caches<K> {
    pub(crate) fn alloc(
        kernels: &K,
        config: &ModelConfig,
        num_pages: usize,
        page_size: usize,
    ) -> Result<Self> {
        let paged = |width: usize| kernels.alloc(DType::Act, &[num_pages, page_size, width]);
        Ok(Self {
            mla: (0..config.num_hidden_layers)
                .map(|_| paged(config.kv_lora_rank + config.qk_rope_head_dim))
                .collect::<Result<_>>()?,
            indexer: config
                .indexer_types
                .iter()
                .map(|kind| (*kind == IndexerType::Full).then(|| paged(config.index_head_dim)).transpose())
                .collect::<Result<_>>()?,
        })
    }
}
