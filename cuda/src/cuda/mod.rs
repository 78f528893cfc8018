//! The CUDA backend: every kernel of the contract by its launcher, with the tiles that are pinned for the device.
//!
//! This file holds the backend and hands each method to its launcher; `memory.rs` moves tensors, `chosen.rs` chooses tiles, `scratch.rs`
//! and `workspaces.rs` keep what launches share.

mod chosen;
mod group;
mod memory;
mod scratch;
mod workspaces;

use std::ops::Range;
use std::sync::Arc;

use dsa80_reference::buffers::HostMemory;
use dsa80_reference::{
    Batch, DType, DeviceTensor, Error, HostExpert, HostInt4, HostLinear, HostTensor, IndexKeys, Kernels,
    RandomLinear, RandomTensor, RecordedKernel, Result, RopeLayout, RouterParams, SampleOutput, SampleRow,
};

use self::chosen::Chosen;
pub use self::group::{Between, GpuOfRank, RankOnGpu};
pub(crate) use self::memory::{alloc, upload};
use self::workspaces::Scratch;
use crate::absorb::{absorb_output, absorb_query};
use crate::batch::CudaBatch;
use crate::device::Device;
use crate::embed::embed;
use crate::expanded_mla::{self, ExpandedMlaDims, ExpandedMlaWorkspace, Expansion, expanded_mla};
use crate::gpu::Gpu;
use crate::indexer_logits::indexer_logits;
use crate::int4::PackedInt4;
use crate::latent_rope::{LatentRopeDims, latent_rope};
use crate::layer_norm_rope::layer_norm_rope;
use crate::linear::linear;
use crate::linear_and_router::linear_and_router;
use crate::linear_int4::{linear_int4, swiglu_int4};
use crate::linear_split::linear_split;
use crate::lm_head::lm_head;
use crate::moe::{Experts, MoeWorkspace, moe};
use crate::moe_int4::{MoeInt4Dims, MoeInt4Workspace, MoeLoad, moe_int4};
use crate::moe_int4_experts::ExpertsInt4;
use crate::probe::CudaDevice;
use crate::qkv_norm_rope::{QkvNormRopeDims, qkv_norm_rope};
use crate::random_fill::random;
use crate::rms_norm::{rms_norm, rms_norm_residual};
use crate::rope::rope;
use crate::rope_table::rope_table;
use crate::router::router;
use crate::sample::{SampleWorkspace, sample};
use crate::sample_plan::SamplePlan;
use crate::silu_mul::silu_mul;
use crate::sources::Sources;
use crate::sparse_mla::{sparse_mla, sparse_mla_output};
use crate::swiglu::{SwiGlu, swiglu, swiglu_and_linear};
use crate::tensor::CudaTensor;
use crate::tiles::Tiles;
use crate::top_k::{TopKWorkspace, top_k};

/// The CUDA backend on a [`Device`]: a GPU, or the emulator of the tests, by the same code.
///
/// Workspaces belong to the backend and grow to the largest launch so far: the first step of a size allocates, later ones do not, and
/// a step that is captured in a graph must not be the first of its size. How large they are stands at each kernel's workspace.
#[derive(Debug)]
pub struct Cuda<D: Device = Gpu> {
    device: D,
    chosen: Chosen,
    expansion: Expansion,
    scratch: Scratch<D>,
}

/// What a GPU must be: the kernels are written for sm_80.
const OLDEST: (i32, i32) = (8, 0);

impl Cuda {
    /// The first GPU that the kernels run on, with the tiles that are pinned for it.
    ///
    /// # Errors
    /// There is no driver, no GPU, none that is new enough, or no run-time compiler, each with what to do about it.
    pub fn open() -> Result<Self> {
        let gpu = Gpu::open(usable()?[0].ordinal, Sources::Embedded)?;
        let tiles = Tiles::for_gpu(&gpu.limits().name, None)?;
        Ok(Self::new(gpu, tiles))
    }
}

/// The GPUs that the kernels run on: at least one.
fn usable() -> Result<Vec<CudaDevice>> {
    let devices = crate::probe::devices().map_err(|error| refuse(error.to_string()))?;
    let (usable, older): (Vec<_>, Vec<_>) =
        devices.into_iter().partition(|device| device.compute_capability >= OLDEST);
    if !usable.is_empty() {
        return Ok(usable);
    }
    let found: Vec<String> = older
        .iter()
        .map(|CudaDevice { name, compute_capability: (major, minor), .. }| {
            format!("{name} (sm_{major}{minor})")
        })
        .collect();
    Err(refuse(if found.is_empty() {
        "the driver lists no GPU (CUDA_VISIBLE_DEVICES may hide it)".into()
    } else {
        format!("no GPU is new enough, an A100 (sm_80) at least; there is {}", found.join(", "))
    }))
}

impl<D: Device> Cuda<D> {
    /// The backend on `device`, with `tiles` where they run and safe ones elsewhere.
    pub fn new(device: D, tiles: Tiles) -> Self {
        let chosen = Chosen::new(tiles, device.limits().clone());
        let expansion = Expansion::default();
        Self { device, chosen, expansion, scratch: Scratch::default() }
    }

    /// The same backend, that expands other steps than by default.
    #[must_use]
    pub fn with_expansion(self, expansion: Expansion) -> Self {
        Self { expansion, ..self }
    }

    /// What it runs on.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, without the backend.
    pub fn into_device(self) -> D {
        self.device
    }
}

/// A dimension of a tensor that has it; the launchers refuse one that has not.
fn dim<D: Device>(tensor: &CudaTensor<D>, index: usize) -> usize {
    tensor.shape().get(index).copied().unwrap_or(0)
}

fn refuse(message: String) -> Error {
    Error::Backend { backend: "cuda", message }
}

impl<D: Device> Kernels for Cuda<D> {
    type Tensor = CudaTensor<D>;
    type Int4 = PackedInt4<D>;
    type SwiGlu = SwiGlu<D>;
    type ExpertsInt4 = ExpertsInt4<D>;
    type Experts = Experts<D>;
    type Batch = CudaBatch<D>;
    type Graph = D::Graph;
    type SamplePlan = SamplePlan<D>;

    fn alloc(&self, dtype: DType, shape: &[usize]) -> Result<CudaTensor<D>> {
        memory::alloc(&self.device, dtype, shape)
    }

    fn host_memory(&self) -> Option<Arc<dyn HostMemory>> {
        self.device.host_memory()
    }

    fn upload(&self, tensor: HostTensor) -> Result<CudaTensor<D>> {
        memory::upload(&self.device, &tensor)
    }

    fn upload_int4(&self, weight: HostInt4) -> Result<PackedInt4<D>> {
        PackedInt4::upload(&self.device, &self.chosen.repack_int4(), &weight)
    }

    fn random(&self, tensors: &[RandomTensor]) -> Result<CudaTensor<D>> {
        random(&self.device, tensors)
    }

    fn random_int4(&self, weight: &RandomLinear) -> Result<PackedInt4<D>> {
        PackedInt4::random(&self.device, &self.chosen.repack_int4(), &[weight])
    }

    fn upload_swiglu(&self, gate_proj: HostLinear, up_proj: HostLinear) -> Result<SwiGlu<D>> {
        SwiGlu::upload(&self.device, &self.chosen.repack_int4(), gate_proj, up_proj)
    }

    fn upload_experts_int4(&self, experts: Vec<HostExpert>) -> Result<ExpertsInt4<D>> {
        ExpertsInt4::upload(&self.device, &self.chosen.repack_int4(), experts)
    }

    fn upload_experts(&self, experts: Vec<HostExpert>) -> Result<Experts<D>> {
        Experts::upload(&self.device, experts)
    }

    fn alloc_batch(&self, max_tokens: usize, max_seqs: usize, max_blocks: usize) -> Result<CudaBatch<D>> {
        CudaBatch::alloc(&self.device, max_tokens, max_seqs, max_blocks)
    }

    fn upload_batch(&self, batch: &Batch, device: &mut CudaBatch<D>) -> Result<()> {
        device.upload(&self.device, batch)
    }

    fn write(&self, values: &[f64], tensor: &mut CudaTensor<D>) -> Result<()> {
        memory::write(&self.device, values, tensor)
    }

    fn write_index(&self, values: &[i32], tensor: &mut CudaTensor<D>) -> Result<()> {
        memory::write_index(&self.device, values, tensor)
    }

    fn write_bytes(&self, values: &[u8], tensor: &mut CudaTensor<D>) -> Result<()> {
        memory::write_bytes(&self.device, values, tensor)
    }

    fn read(&self, tensor: &CudaTensor<D>) -> Result<Vec<f64>> {
        memory::read(&self.device, tensor)
    }

    fn read_index(&self, tensor: &CudaTensor<D>) -> Result<Vec<i32>> {
        memory::read_index(&self.device, tensor)
    }

    fn read_bytes(&self, tensor: &CudaTensor<D>) -> Result<Vec<u8>> {
        memory::read_bytes(&self.device, tensor)
    }

    /// The first run compiles, and grows workspaces: neither can be captured.
    fn record(&self, mut launches: impl FnMut() -> Result<()>) -> Result<Option<D::Graph>> {
        launches()?;
        self.device.capture(launches).map(Some)
    }

    fn replay(&self, graph: &D::Graph) -> Result<()> {
        self.device.replay(graph)
    }

    fn record_kernels(&self, launches: impl FnMut() -> Result<()>) -> Result<Vec<RecordedKernel<D::Graph>>> {
        self.device.capture_kernels(launches)
    }

    fn time_replays(&self, graph: &D::Graph, times: usize) -> Result<Vec<f64>> {
        self.device.time_replays(graph, times)
    }

    fn alloc_sample_plan(&self, max_rows: usize, vocab_size: usize) -> Result<SamplePlan<D>> {
        SamplePlan::alloc(&self.device, self.chosen.sample(), max_rows, vocab_size)
    }

    fn upload_sample_plan(&self, rows: &[SampleRow<'_>], plan: &mut SamplePlan<D>) -> Result<bool> {
        plan.upload(&self.device, rows)
    }

    fn embed(
        &self,
        batch: &CudaBatch<D>,
        table: &CudaTensor<D>,
        vocab_start: usize,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        embed(&self.device, &self.chosen.embed(dim(table, 1)), batch, table, vocab_start, out)
    }

    fn rms_norm(
        &self,
        x: &CudaTensor<D>,
        weight: &CudaTensor<D>,
        eps: f64,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        let tile = self.chosen.rms_norm(dim(x, 0), dim(x, 1));
        rms_norm(&self.device, &tile, x, weight, eps, out)
    }

    fn rms_norm_residual(
        &self,
        x: &CudaTensor<D>,
        residual: &mut CudaTensor<D>,
        weight: &CudaTensor<D>,
        eps: f64,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        let tile = self.chosen.rms_norm(dim(x, 0), dim(x, 1));
        rms_norm_residual(&self.device, &tile, x, residual, weight, eps, out)
    }

    fn rope_table(&self, batch: &CudaBatch<D>, theta: f64, cos_sin: &mut CudaTensor<D>) -> Result<()> {
        rope_table(&self.device, &self.chosen.rope_table(), batch, theta, cos_sin)
    }

    fn rope(
        &self,
        x: &mut CudaTensor<D>,
        offset: usize,
        layout: RopeLayout,
        cos_sin: &CudaTensor<D>,
    ) -> Result<()> {
        let tile = self.chosen.rope([dim(x, 1), dim(x, 2)], offset, 2 * dim(cos_sin, 1), layout);
        rope(&self.device, &tile, x, offset, layout, cos_sin)
    }

    fn layer_norm_rope(
        &self,
        batch: &CudaBatch<D>,
        x: &CudaTensor<D>,
        weight: &CudaTensor<D>,
        bias: &CudaTensor<D>,
        eps: f64,
        layout: RopeLayout,
        cos_sin: &CudaTensor<D>,
        cache: &mut CudaTensor<D>,
    ) -> Result<()> {
        let tile = self.chosen.layer_norm_rope(dim(x, 1), 2 * dim(cos_sin, 1));
        layer_norm_rope(&self.device, &tile, batch, x, weight, bias, eps, layout, cos_sin, cache)
    }

    fn latent_rope(
        &self,
        batch: &CudaBatch<D>,
        x: &CudaTensor<D>,
        weight: &CudaTensor<D>,
        eps: f64,
        cos_sin: &CudaTensor<D>,
        cache: &mut CudaTensor<D>,
    ) -> Result<()> {
        let tile = self.chosen.latent_rope(dim(weight, 0), 2 * dim(cos_sin, 1));
        latent_rope(&self.device, &tile, batch, x, weight, eps, cos_sin, cache)
    }

    fn qkv_norm_rope(
        &self,
        batch: &CudaBatch<D>,
        q_a: &CudaTensor<D>,
        q_weight: &CudaTensor<D>,
        q_latent: &mut CudaTensor<D>,
        kv_a: &CudaTensor<D>,
        kv_weight: &CudaTensor<D>,
        cache: &mut CudaTensor<D>,
        eps: f64,
        cos_sin: &CudaTensor<D>,
        keys: Option<IndexKeys<'_, CudaTensor<D>>>,
    ) -> Result<()> {
        let latent = LatentRopeDims { kv_lora_rank: dim(kv_weight, 0), rope: 2 * dim(cos_sin, 1) };
        let key = keys.as_ref().map(|keys| dim(keys.x, 1));
        let tile = self.chosen.qkv_norm_rope(QkvNormRopeDims { q_lora_rank: dim(q_a, 1), latent, key });
        let device = &self.device;
        qkv_norm_rope(
            device, &tile, batch, q_a, q_weight, q_latent, kv_a, kv_weight, cache, eps, cos_sin, keys,
        )
    }

    fn linear(&self, x: &CudaTensor<D>, weight: &CudaTensor<D>, out: &mut CudaTensor<D>) -> Result<()> {
        self.with_linear(|tiles, workspace| linear(&self.device, tiles, workspace, x, weight, out))
    }

    fn linear_split(
        &self,
        x: &CudaTensor<D>,
        weight: &CudaTensor<D>,
        outs: &mut [&mut CudaTensor<D>],
    ) -> Result<()> {
        self.with_linear(|tiles, workspace| linear_split(&self.device, tiles, workspace, x, weight, outs))
    }

    fn linear_int4(&self, x: &CudaTensor<D>, weight: &PackedInt4<D>, out: &mut CudaTensor<D>) -> Result<()> {
        self.with_linear_int4(|tiles, workspace| linear_int4(&self.device, tiles, workspace, x, weight, out))
    }

    fn absorb_query(
        &self,
        q: &CudaTensor<D>,
        kv_b: &CudaTensor<D>,
        cos_sin: &CudaTensor<D>,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        absorb_query(&self.device, &self.chosen.absorb(), q, kv_b, cos_sin, out)
    }

    fn absorb_output(&self, o: &CudaTensor<D>, kv_b: &CudaTensor<D>, out: &mut CudaTensor<D>) -> Result<()> {
        absorb_output(&self.device, &self.chosen.absorb(), o, kv_b, out)
    }

    fn indexer_logits(
        &self,
        batch: &CudaBatch<D>,
        rows: Range<usize>,
        q: &CudaTensor<D>,
        weights: &CudaTensor<D>,
        cache: &CudaTensor<D>,
        scale: f64,
        logits: &mut CudaTensor<D>,
    ) -> Result<()> {
        let tile = self.chosen.indexer_logits(dim(q, 1), dim(q, 2), cache.dtype() == DType::Fp8);
        indexer_logits(&self.device, &tile, batch, rows, q, weights, cache, scale, logits)
    }

    fn top_k(
        &self,
        batch: &CudaBatch<D>,
        rows: Range<usize>,
        logits: &CudaTensor<D>,
        topk_indices: &mut CudaTensor<D>,
    ) -> Result<()> {
        let (tile, all) = self.chosen.top_k(rows.len());
        self.scratch.top_k.with(
            [],
            |[]| TopKWorkspace::alloc(&self.device, &all),
            |workspace| top_k(&self.device, &tile, workspace, batch, rows, logits, topk_indices),
        )
    }

    fn sparse_mla(
        &self,
        batch: &CudaBatch<D>,
        q: &CudaTensor<D>,
        cache: &CudaTensor<D>,
        topk_indices: &CudaTensor<D>,
        scale: f64,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        self.with_sparse_mla(q, topk_indices, dim(out, 2), |tiles, workspace| {
            sparse_mla(&self.device, tiles, workspace, batch, q, cache, topk_indices, scale, out)
        })
    }

    fn sparse_mla_output(
        &self,
        batch: &CudaBatch<D>,
        q: &CudaTensor<D>,
        cache: &CudaTensor<D>,
        topk_indices: &CudaTensor<D>,
        scale: f64,
        kv_b: &CudaTensor<D>,
        o_latent: &mut CudaTensor<D>,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        let (device, absorb) = (&self.device, &self.chosen.absorb());
        self.with_sparse_mla(q, topk_indices, dim(o_latent, 2), |tiles, workspace| {
            sparse_mla_output(
                device,
                tiles,
                absorb,
                workspace,
                batch,
                q,
                cache,
                topk_indices,
                scale,
                kv_b,
                o_latent,
                out,
            )
        })
    }

    fn expands(
        &self,
        batch: &CudaBatch<D>,
        q: &CudaTensor<D>,
        kv_b: &CudaTensor<D>,
        cache: &CudaTensor<D>,
        topk_indices: &CudaTensor<D>,
    ) -> bool {
        let step = expanded_mla::Step { batch, q, kv_b, cache, topk_indices };
        self.expansion.pays(batch.host(), dim(topk_indices, 1))
            && kv_b.dtype() == DType::Bf16
            && step.dims().is_ok_and(|(dims, _)| self.chosen.expanded_mla_fits(dims))
    }

    fn expanded_mla(
        &self,
        batch: &CudaBatch<D>,
        q: &mut CudaTensor<D>,
        kv_b: &CudaTensor<D>,
        cos_sin: &CudaTensor<D>,
        cache: &CudaTensor<D>,
        topk_indices: &CudaTensor<D>,
        scale: f64,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        let (dims, heads) = expanded_mla::Step { batch, q, kv_b, cache, topk_indices }.dims()?;
        self.rope(q, dims.nope, RopeLayout::Interleaved, cos_sin)?;
        let step = expanded_mla::Step { batch, q, kv_b, cache, topk_indices };
        let tile = self.chosen.expanded_mla(dims);
        let ExpandedMlaDims { nope, rope, v, kv_lora_rank } = dims;
        self.with_linear(|tiles, linear| {
            self.scratch.expanded_mla.with(
                [dim(q, 0), heads, dim(topk_indices, 1), nope, rope, v, kv_lora_rank],
                |[tokens, heads, k, nope, rope, v, kv_lora_rank]| {
                    let dims = ExpandedMlaDims { nope, rope, v, kv_lora_rank };
                    ExpandedMlaWorkspace::alloc(&self.device, dims, &self.expansion, [tokens, heads, k])
                },
                |workspace| expanded_mla(&self.device, &tile, (tiles, linear), workspace, &step, scale, out),
            )
        })
    }

    fn router(
        &self,
        logits: &CudaTensor<D>,
        bias: &CudaTensor<D>,
        params: RouterParams,
        topk_ids: &mut CudaTensor<D>,
        topk_weights: &mut CudaTensor<D>,
    ) -> Result<()> {
        let tile = self.chosen.router(dim(logits, 1), params.n_group);
        router(&self.device, &tile, logits, bias, params, topk_ids, topk_weights)
    }

    fn moe_int4(
        &self,
        x: &CudaTensor<D>,
        topk_ids: &CudaTensor<D>,
        topk_weights: &CudaTensor<D>,
        experts: &ExpertsInt4<D>,
        shared: Option<&CudaTensor<D>>,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        let dims = MoeInt4Dims {
            gate_up: *experts.gate_up.shape(),
            down: *experts.down.shape(),
            load: MoeLoad::Few,
        };
        let tiles = self.chosen.moe_int4(dims);
        self.scratch.moe_int4.with(
            [dim(x, 0), dim(topk_ids, 1), experts.hidden(), experts.moe_intermediate(), experts.count()],
            |[tokens, top_k, hidden, moe_intermediate, experts]| {
                MoeInt4Workspace::alloc(&self.device, tokens, top_k, hidden, moe_intermediate, experts)
            },
            |workspace| {
                moe_int4(&self.device, &tiles, workspace, x, topk_ids, topk_weights, experts, shared, out)
            },
        )
    }

    fn moe(
        &self,
        x: &CudaTensor<D>,
        topk_ids: &CudaTensor<D>,
        topk_weights: &CudaTensor<D>,
        experts: &Experts<D>,
        shared: Option<&CudaTensor<D>>,
        out: &mut CudaTensor<D>,
    ) -> Result<()> {
        self.scratch.moe.with(
            [dim(x, 0), dim(topk_ids, 1), experts.moe_intermediate()],
            |[tokens, top_k, moe_intermediate]| {
                MoeWorkspace::alloc(&self.device, tokens, top_k, moe_intermediate)
            },
            |workspace| moe(&self.device, workspace, x, topk_ids, topk_weights, experts, shared, out),
        )
    }

    fn swiglu(&self, x: &CudaTensor<D>, weights: &SwiGlu<D>, out: &mut CudaTensor<D>) -> Result<()> {
        match weights {
            SwiGlu::Int4(weight) => self.with_linear_int4(|tiles, workspace| {
                swiglu_int4(&self.device, tiles, workspace, x, weight, out)
            }),
            SwiGlu::Dense(weight) => {
                self.with_linear(|tiles, workspace| swiglu(&self.device, tiles, workspace, x, weight, out))
            }
        }
    }

    fn swiglu_and_linear(
        &self,
        x: &CudaTensor<D>,
        weights: &SwiGlu<D>,
        out: &mut CudaTensor<D>,
        weight: &CudaTensor<D>,
        weight_out: &mut CudaTensor<D>,
    ) -> Result<()> {
        match weights {
            SwiGlu::Int4(_) => {
                self.swiglu(x, weights, out)?;
                self.linear(x, weight, weight_out)
            }
            SwiGlu::Dense(weights) => self.with_linear(|tiles, workspace| {
                swiglu_and_linear(&self.device, tiles, workspace, x, weights, out, weight, weight_out)
            }),
        }
    }

    fn linear_and_router(
        &self,
        x: &CudaTensor<D>,
        weight: &CudaTensor<D>,
        out: &mut CudaTensor<D>,
        logits: &CudaTensor<D>,
        bias: &CudaTensor<D>,
        params: RouterParams,
        topk_ids: &mut CudaTensor<D>,
        topk_weights: &mut CudaTensor<D>,
    ) -> Result<()> {
        let tile = self.chosen.router(dim(logits, 1), params.n_group);
        self.with_linear(|tiles, workspace| {
            let linear = (tiles, workspace);
            linear_and_router(
                &self.device,
                linear,
                &tile,
                x,
                weight,
                out,
                logits,
                bias,
                params,
                topk_ids,
                topk_weights,
            )
        })
    }

    fn silu_mul(&self, gate: &CudaTensor<D>, up: &CudaTensor<D>, out: &mut CudaTensor<D>) -> Result<()> {
        silu_mul(&self.device, &self.chosen.silu_mul(), gate, up, out)
    }

    fn lm_head(
        &self,
        x: &CudaTensor<D>,
        rows: &CudaTensor<D>,
        weight: &CudaTensor<D>,
        logits: &mut CudaTensor<D>,
    ) -> Result<()> {
        self.with_linear(|tiles, workspace| lm_head(&self.device, tiles, workspace, x, rows, weight, logits))
    }

    fn sample(
        &self,
        logits: &CudaTensor<D>,
        rows: &[SampleRow<'_>],
        out: &mut SampleOutput<CudaTensor<D>>,
    ) -> Result<()> {
        let tile = self.chosen.sample();
        self.scratch.sample.with(
            [rows.len(), dim(logits, 1), dim(&out.top_ids, 1)],
            |[rows, vocab, top]| SampleWorkspace::alloc(&self.device, &tile, rows, vocab, top),
            |workspace| sample(&self.device, &tile, workspace, logits, rows, out),
        )
    }

    fn sample_plan(
        &self,
        logits: &CudaTensor<D>,
        plan: &SamplePlan<D>,
        out: &mut SampleOutput<CudaTensor<D>>,
    ) -> Result<()> {
        plan.launch(&self.device, logits, out)
    }
}
