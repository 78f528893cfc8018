//! The paged caches of one rank.

use dsa80_reference::fp8::{IndexerPage, MlaRow};
use dsa80_reference::{DType, Kernels, Result};

use crate::config::{IndexerType, ModelConfig};
use crate::engine::StepLimits;

/// The last dimensions of the caches: elements of an `Act` row, bytes of an `Fp8` one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CacheWidths {
    pub(crate) mla: usize,
    pub(crate) indexer: usize,
}

impl CacheWidths {
    pub(crate) fn new(config: &ModelConfig, dtype: DType, page_size: usize) -> Self {
        let &ModelConfig { kv_lora_rank, qk_rope_head_dim: rope, index_head_dim: width, .. } = config;
        if dtype == DType::Fp8 {
            let indexer = IndexerPage { page_size, width }.row_bytes();
            Self { mla: MlaRow { kv_lora_rank, rope }.row_bytes(), indexer }
        } else {
            Self { mla: kv_lora_rank + rope, indexer: width }
        }
    }

    /// Elements, or bytes, of a token over all layers.
    pub(crate) fn per_token(self, config: &ModelConfig) -> usize {
        config.num_hidden_layers * self.mla + config.num_full_layers() * self.indexer
    }
}

/// One page table serves both: a slot holds a token's row in every layer.
pub(crate) struct Caches<K: Kernels> {
    /// Per layer `[pages, page_size, kv_lora_rank + qk_rope_head_dim]`, or rows of bytes.
    pub(crate) mla: Vec<K::Tensor>,
    /// Per layer `[pages, page_size, index_head_dim]`, or rows of bytes, for the full ones.
    pub(crate) indexer: Vec<Option<K::Tensor>>,
}

impl<K: Kernels> Caches<K> {
    pub(crate) fn alloc(
        kernels: &K,
        config: &ModelConfig,
        &StepLimits { num_pages, page_size, cache_dtype, .. }: &StepLimits,
    ) -> Result<Self> {
        let widths = CacheWidths::new(config, cache_dtype, page_size);
        let paged = |width: usize| kernels.alloc(cache_dtype, &[num_pages, page_size, width]);
        Ok(Self {
            mla: (0..config.num_hidden_layers).map(|_| paged(widths.mla)).collect::<Result<_>>()?,
            indexer: config
                .indexer_types
                .iter()
                .map(|kind| (*kind == IndexerType::Full).then(|| paged(widths.indexer)).transpose())
                .collect::<Result<_>>()?,
        })
    }
}
