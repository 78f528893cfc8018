//! The workspaces of the kernels, and the launches that several methods share with theirs.

use dsa80_reference::Result;

use super::scratch::Grown;
use super::{Cuda, dim};
use crate::device::Device;
use crate::expanded_mla::ExpandedMlaWorkspace;
use crate::linear::{LinearTiles, LinearWorkspace};
use crate::linear_int4::{LinearInt4Tiles, LinearInt4Workspace};
use crate::moe::MoeWorkspace;
use crate::moe_int4::MoeInt4Workspace;
use crate::sample::SampleWorkspace;
use crate::sparse_mla::{SparseMlaDims, SparseMlaTiles, SparseMlaWorkspace};
use crate::tensor::CudaTensor;
use crate::top_k::TopKWorkspace;

/// The workspaces, by what their sizes depend on: nothing, or the sizes that the kernel's `Workspace::alloc` takes.
#[derive(Debug)]
pub(super) struct Scratch<D: Device> {
    pub(super) top_k: Grown<TopKWorkspace<D>, 0>,
    sparse_mla: Grown<SparseMlaWorkspace<D>, 4>,
    pub(super) expanded_mla: Grown<ExpandedMlaWorkspace<D>, 7>,
    linear: Grown<LinearWorkspace<D>, 0>,
    linear_int4: Grown<LinearInt4Workspace<D>, 0>,
    pub(super) moe_int4: Grown<MoeInt4Workspace<D>, 5>,
    pub(super) moe: Grown<MoeWorkspace<D>, 3>,
    pub(super) sample: Grown<SampleWorkspace<D>, 3>,
}

impl<D: Device> Default for Scratch<D> {
    fn default() -> Self {
        Self {
            top_k: Grown::default(),
            sparse_mla: Grown::default(),
            expanded_mla: Grown::default(),
            linear: Grown::default(),
            linear_int4: Grown::default(),
            moe_int4: Grown::default(),
            moe: Grown::default(),
            sample: Grown::default(),
        }
    }
}

impl<D: Device> Cuda<D> {
    /// Launches a dense product, whose workspace serves any size.
    pub(super) fn with_linear(
        &self,
        launch: impl FnOnce(&LinearTiles, &LinearWorkspace<D>) -> Result<()>,
    ) -> Result<()> {
        let tiles = self.chosen.linear();
        let alloc = |[]: [usize; 0]| LinearWorkspace::alloc(&self.device, &tiles);
        self.scratch.linear.with([], alloc, |workspace| launch(&tiles, workspace))
    }

    /// Launches attention of queries over selected rows.
    pub(super) fn with_sparse_mla(
        &self,
        q: &CudaTensor<D>,
        topk_indices: &CudaTensor<D>,
        kv_lora_rank: usize,
        launch: impl FnOnce(&SparseMlaTiles, &SparseMlaWorkspace<D>) -> Result<()>,
    ) -> Result<()> {
        let dims = SparseMlaDims { kv_lora_rank, rope: dim(q, 2).saturating_sub(kv_lora_rank) };
        let tiles = self.chosen.sparse_mla(dims);
        self.scratch.sparse_mla.with(
            [dim(q, 0), dim(q, 1), dim(topk_indices, 1), kv_lora_rank],
            |[tokens, heads, k, kv_lora_rank]| {
                let dims = SparseMlaDims { kv_lora_rank, ..dims };
                SparseMlaWorkspace::alloc(&self.device, &tiles, dims, tokens, heads, k)
            },
            |workspace| launch(&tiles, workspace),
        )
    }

    /// Launches a product with an INT4 weight, whose workspace serves any size.
    pub(super) fn with_linear_int4(
        &self,
        launch: impl FnOnce(&LinearInt4Tiles, &LinearInt4Workspace<D>) -> Result<()>,
    ) -> Result<()> {
        let tiles = self.chosen.linear_int4();
        let alloc = |[]: [usize; 0]| LinearInt4Workspace::alloc(&self.device, &tiles);
        self.scratch.linear_int4.with([], alloc, |workspace| launch(&tiles, workspace))
    }
}
