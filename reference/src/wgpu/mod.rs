//! The kernels in WGSL, through wgpu: on any GPU with Vulkan, Metal or DX12, and on a CPU that stands in for one.
//!
//! `shaders/NAME.wgsl` is a kernel, `NAME.rs` its launcher. This file holds the backend and hands each method to its launcher.
//! Launches are recorded and run when something is read (`recorder.rs`). The kernels take no more than every adapter has: bf16 lies in
//! pairs in a word (activations may be f32 instead: `act.rs`), halves are converted by hand, and subgroups, where there are any, only add up (`reduce_subgroups.wgsl`).

mod absorb;
mod act;
mod batch;
mod block_on;
mod communicator;
mod context;
mod embed;
mod experts;
mod indexer_logits;
mod int4;
mod latent_rope;
mod launch;
mod layer_norm_rope;
mod limits;
mod linear;
mod measure;
mod memory;
mod moe;
mod paged;
mod product;
mod qkv_norm_rope;
mod quantise_rows;
mod recorder;
mod rms_norm;
mod rope;
mod rope_table;
mod router;
mod sample;
mod shader;
mod silu_mul;
mod sparse_mla;
mod tensor;
mod top_k;

use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

pub use act::ActType;
pub use batch::WgpuBatch;
pub use communicator::WgpuCommunicator;
pub use context::{HostTurns, WgpuContext, WgpuOptions};
pub use experts::WgpuExperts;
pub use int4::WgpuInt4;
pub use linear::WgpuSwiGlu;
pub use shader::Edit;
pub use tensor::WgpuTensor;

use self::memory::Pool;
use self::recorder::Recorder;
use self::rope_table::Turns;
use crate::batch::Batch;
use crate::cpu::{CpuSamplePlan, check_int4_experts};
use crate::error::Result;
use crate::kernels::{IndexKeys, Kernels, RopeLayout, RouterParams, SampleOutput};
use crate::sampling::SampleRow;
use crate::tensor::{DType, HostExpert, HostInt4, HostLinear, HostTensor};

/// The backend of one rank on an opened adapter.
#[derive(Debug)]
pub struct Wgpu {
    context: Arc<WgpuContext>,
    pool: Arc<Pool>,
    recorder: Arc<Mutex<Recorder>>,
    turns: RefCell<Option<Turns>>,
}

impl Wgpu {
    /// A backend on `context`, which ranks may share.
    pub fn new(context: Arc<WgpuContext>) -> Self {
        Self { context, pool: Arc::default(), recorder: Arc::default(), turns: RefCell::default() }
    }

    /// The same backend for another owner on the same thread: launches of both are in one order.
    fn share(&self) -> Self {
        let Self { context, pool, recorder, .. } = self;
        let (context, pool, recorder) = (Arc::clone(context), Arc::clone(pool), Arc::clone(recorder));
        Self { context, pool, recorder, turns: RefCell::default() }
    }

    fn recorder(&self) -> MutexGuard<'_, Recorder> {
        context::lock(&self.recorder)
    }

    /// What it runs on.
    pub fn context(&self) -> &Arc<WgpuContext> {
        &self.context
    }

    /// A buffer for a binding that a variant of a kernel does not touch.
    fn nothing(&self) -> Result<WgpuTensor> {
        self.tensor(DType::Index, &[1])
    }
}

impl Kernels for Wgpu {
    type Tensor = WgpuTensor;
    type Int4 = WgpuInt4;
    type SwiGlu = WgpuSwiGlu;
    type ExpertsInt4 = WgpuExperts;
    type Experts = WgpuExperts;
    type Batch = WgpuBatch;
    type Graph = Infallible;
    type SamplePlan = CpuSamplePlan;

    fn alloc(&self, dtype: DType, shape: &[usize]) -> Result<WgpuTensor> {
        self.tensor(dtype, shape)
    }

    fn upload(&self, tensor: HostTensor) -> Result<WgpuTensor> {
        self.upload_host(&tensor)
    }

    fn upload_int4(&self, weight: HostInt4) -> Result<WgpuInt4> {
        WgpuInt4::upload(self, &weight)
    }

    fn upload_swiglu(&self, gate_proj: HostLinear, up_proj: HostLinear) -> Result<WgpuSwiGlu> {
        WgpuSwiGlu::upload(self, gate_proj, up_proj)
    }

    fn upload_experts_int4(&self, experts: Vec<HostExpert>) -> Result<WgpuExperts> {
        check_int4_experts(&experts)?;
        WgpuExperts::upload(self, experts, "upload_experts_int4")
    }

    fn upload_experts(&self, experts: Vec<HostExpert>) -> Result<WgpuExperts> {
        WgpuExperts::upload(self, experts, "upload_experts")
    }

    fn alloc_batch(&self, max_tokens: usize, max_seqs: usize, max_blocks: usize) -> Result<WgpuBatch> {
        WgpuBatch::alloc(self, max_tokens, max_seqs, max_blocks)
    }

    fn upload_batch(&self, batch: &Batch, device: &mut WgpuBatch) -> Result<()> {
        device.upload(self, batch)
    }

    fn write(&self, values: &[f64], tensor: &mut WgpuTensor) -> Result<()> {
        self.write_numbers(values, tensor)
    }

    fn write_index(&self, values: &[i32], tensor: &mut WgpuTensor) -> Result<()> {
        tensor.expect_len("write_index", values.len())?;
        tensor.expect_index("write_index", "tensor")?;
        self.write_bytes_to(tensor, bytemuck::cast_slice(values))
    }

    fn write_bytes(&self, values: &[u8], tensor: &mut WgpuTensor) -> Result<()> {
        tensor.expect_len("write_bytes", values.len())?;
        tensor.expect_dtype("write_bytes", "tensor", &[DType::Fp8], "8-bit cache rows")?;
        self.write_bytes_to(tensor, values)
    }

    fn read(&self, tensor: &WgpuTensor) -> Result<Vec<f64>> {
        self.read_numbers(tensor)
    }

    fn read_index(&self, tensor: &WgpuTensor) -> Result<Vec<i32>> {
        tensor.expect_index("read_index", "tensor")?;
        self.elements(tensor, |x: i32| x)
    }

    fn read_bytes(&self, tensor: &WgpuTensor) -> Result<Vec<u8>> {
        tensor.expect_dtype("read_bytes", "tensor", &[DType::Fp8], "8-bit cache rows")?;
        self.read_bytes_of(tensor)
    }

    fn record(&self, _launches: impl FnMut() -> Result<()>) -> Result<Option<Infallible>> {
        Ok(None)
    }

    fn replay(&self, graph: &Infallible) -> Result<()> {
        match *graph {}
    }

    fn alloc_sample_plan(&self, max_rows: usize, vocab_size: usize) -> Result<CpuSamplePlan> {
        Ok(CpuSamplePlan::new(max_rows, vocab_size))
    }

    fn upload_sample_plan(&self, rows: &[SampleRow<'_>], plan: &mut CpuSamplePlan) -> Result<bool> {
        plan.replace(rows).map(|()| true)
    }

    fn embed(
        &self,
        batch: &WgpuBatch,
        table: &WgpuTensor,
        vocab_start: usize,
        out: &mut WgpuTensor,
    ) -> Result<()> {
        embed::embed(self, batch, table, vocab_start, out)
    }

    fn rms_norm(&self, x: &WgpuTensor, weight: &WgpuTensor, eps: f64, out: &mut WgpuTensor) -> Result<()> {
        rms_norm::rms_norm(self, x, weight, eps, out)
    }

    fn rms_norm_residual(
        &self,
        x: &WgpuTensor,
        residual: &mut WgpuTensor,
        weight: &WgpuTensor,
        eps: f64,
        out: &mut WgpuTensor,
    ) -> Result<()> {
        rms_norm::rms_norm_residual(self, x, residual, weight, eps, out)
    }

    fn rope_table(&self, batch: &WgpuBatch, theta: f64, cos_sin: &mut WgpuTensor) -> Result<()> {
        rope_table::rope_table(self, batch, theta, cos_sin)
    }

    fn rope(
        &self,
        x: &mut WgpuTensor,
        offset: usize,
        layout: RopeLayout,
        cos_sin: &WgpuTensor,
    ) -> Result<()> {
        rope::rope(self, x, offset, layout, cos_sin)
    }

    fn layer_norm_rope(
        &self,
        batch: &WgpuBatch,
        x: &WgpuTensor,
        weight: &WgpuTensor,
        bias: &WgpuTensor,
        eps: f64,
        layout: RopeLayout,
        cos_sin: &WgpuTensor,
        cache: &mut WgpuTensor,
    ) -> Result<()> {
        layer_norm_rope::layer_norm_rope(self, batch, x, weight, bias, eps, layout, cos_sin, cache)
    }

    fn latent_rope(
        &self,
        batch: &WgpuBatch,
        x: &WgpuTensor,
        weight: &WgpuTensor,
        eps: f64,
        cos_sin: &WgpuTensor,
        cache: &mut WgpuTensor,
    ) -> Result<()> {
        latent_rope::latent_rope(self, batch, x, weight, eps, cos_sin, cache)
    }

    fn qkv_norm_rope(
        &self,
        batch: &WgpuBatch,
        q_a: &WgpuTensor,
        q_weight: &WgpuTensor,
        q_latent: &mut WgpuTensor,
        kv_a: &WgpuTensor,
        kv_weight: &WgpuTensor,
        cache: &mut WgpuTensor,
        eps: f64,
        cos_sin: &WgpuTensor,
        keys: Option<IndexKeys<'_, WgpuTensor>>,
    ) -> Result<()> {
        qkv_norm_rope::qkv_norm_rope(
            self, batch, q_a, q_weight, q_latent, kv_a, kv_weight, cache, eps, cos_sin, keys,
        )
    }

    fn linear(&self, x: &WgpuTensor, weight: &WgpuTensor, out: &mut WgpuTensor) -> Result<()> {
        linear::linear(self, x, weight, out)
    }

    fn linear_split(&self, x: &WgpuTensor, weight: &WgpuTensor, outs: &mut [&mut WgpuTensor]) -> Result<()> {
        linear::linear_split(self, x, weight, outs)
    }

    fn linear_int4(&self, x: &WgpuTensor, weight: &WgpuInt4, out: &mut WgpuTensor) -> Result<()> {
        linear::linear_int4(self, x, weight, out)
    }

    fn absorb_query(
        &self,
        q: &WgpuTensor,
        kv_b: &WgpuTensor,
        cos_sin: &WgpuTensor,
        out: &mut WgpuTensor,
    ) -> Result<()> {
        absorb::absorb_query(self, q, kv_b, cos_sin, out)
    }

    fn absorb_output(&self, o: &WgpuTensor, kv_b: &WgpuTensor, out: &mut WgpuTensor) -> Result<()> {
        absorb::absorb_output(self, o, kv_b, out)
    }

    fn indexer_logits(
        &self,
        batch: &WgpuBatch,
        rows: Range<usize>,
        q: &WgpuTensor,
        weights: &WgpuTensor,
        cache: &WgpuTensor,
        scale: f64,
        logits: &mut WgpuTensor,
    ) -> Result<()> {
        indexer_logits::indexer_logits(self, batch, rows, q, weights, cache, scale, logits)
    }

    fn top_k(
        &self,
        batch: &WgpuBatch,
        rows: Range<usize>,
        logits: &WgpuTensor,
        topk_indices: &mut WgpuTensor,
    ) -> Result<()> {
        top_k::top_k(self, batch, rows, logits, topk_indices)
    }

    fn sparse_mla(
        &self,
        batch: &WgpuBatch,
        q: &WgpuTensor,
        cache: &WgpuTensor,
        topk_indices: &WgpuTensor,
        scale: f64,
        out: &mut WgpuTensor,
    ) -> Result<()> {
        sparse_mla::sparse_mla(self, batch, q, cache, topk_indices, scale, out)
    }

    fn router(
        &self,
        logits: &WgpuTensor,
        bias: &WgpuTensor,
        params: RouterParams,
        topk_ids: &mut WgpuTensor,
        topk_weights: &mut WgpuTensor,
    ) -> Result<()> {
        router::router(self, logits, bias, params, topk_ids, topk_weights)
    }

    fn moe_int4(
        &self,
        x: &WgpuTensor,
        topk_ids: &WgpuTensor,
        topk_weights: &WgpuTensor,
        experts: &WgpuExperts,
        shared: Option<&WgpuTensor>,
        out: &mut WgpuTensor,
    ) -> Result<()> {
        moe::moe(self, "moe_int4", x, topk_ids, topk_weights, experts, shared, out)
    }

    fn moe(
        &self,
        x: &WgpuTensor,
        topk_ids: &WgpuTensor,
        topk_weights: &WgpuTensor,
        experts: &WgpuExperts,
        shared: Option<&WgpuTensor>,
        out: &mut WgpuTensor,
    ) -> Result<()> {
        moe::moe(self, "moe", x, topk_ids, topk_weights, experts, shared, out)
    }

    fn swiglu(&self, x: &WgpuTensor, weights: &WgpuSwiGlu, out: &mut WgpuTensor) -> Result<()> {
        linear::swiglu(self, x, weights, out)
    }

    fn silu_mul(&self, gate: &WgpuTensor, up: &WgpuTensor, out: &mut WgpuTensor) -> Result<()> {
        silu_mul::silu_mul(self, gate, up, out)
    }

    fn lm_head(
        &self,
        x: &WgpuTensor,
        rows: &WgpuTensor,
        weight: &WgpuTensor,
        logits: &mut WgpuTensor,
    ) -> Result<()> {
        linear::lm_head(self, x, rows, weight, logits)
    }

    fn sample(
        &self,
        logits: &WgpuTensor,
        rows: &[SampleRow<'_>],
        out: &mut SampleOutput<WgpuTensor>,
    ) -> Result<()> {
        sample::sample(self, logits, rows, out)
    }

    fn sample_plan(
        &self,
        logits: &WgpuTensor,
        plan: &CpuSamplePlan,
        out: &mut SampleOutput<WgpuTensor>,
    ) -> Result<()> {
        self.sample(logits, &plan.rows(), out)
    }
}
