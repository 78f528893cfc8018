//! The oracle: every kernel in plain Rust, generic over f32 and f64, rayon over rows.
//!
//! One file a kernel. This one holds the memory methods and hands every kernel to its file.
//!
//! Results are deterministic, and a row's result does not depend on the rows beside it nor on the number of
//! threads: the order in which an output element is summed depends on the inner dimension alone.

mod absorb;
mod any_linear;
mod batch;
mod checks;
mod communicator;
mod embed;
mod indexer_logits;
mod latent_rope;
mod layer_norm_rope;
mod linear;
mod linear_int4;
mod linear_split;
mod lm_head;
mod matmul;
mod moe;
mod moe_int4;
pub mod naive;
mod order;
mod paged;
mod parallel;
mod qkv_norm_rope;
mod real;
mod rms_norm;
mod rope;
mod router;
mod sample;
mod sample_plan;
mod silu_mul;
mod sparse_mla;
mod swiglu;
mod tensor;
#[cfg(test)]
mod testing;
mod top_k;
mod vector;

use std::convert::Infallible;
use std::ops::Range;

pub use batch::CpuBatch;
pub use communicator::{CpuCommunicator, Meeting, ThreadCommunicator};
pub use linear_int4::CpuInt4;
pub use moe::CpuExperts;
pub use real::Real;
pub use sample_plan::CpuSamplePlan;
pub use swiglu::CpuSwiGlu;
pub use tensor::CpuTensor;

/// What is refused whatever the backend.
#[cfg(feature = "wgpu")]
pub(crate) use {
    linear_int4::check as check_int4_weight,
    moe::{check_dims as check_expert_dims, check_int4 as check_int4_experts},
    sample::check_row as check_sample_row,
};

use crate::batch::Batch;
use crate::error::Result;
use crate::kernels::{IndexKeys, Kernels, RopeLayout, RouterParams, SampleOutput};
use crate::sampling::SampleRow;
use crate::tensor::{DType, HostExpert, HostInt4, HostLinear, HostTensor};

/// The CPU backend.
///
/// In f64 it judges every other backend; in f32 it serves on a machine without a GPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu<F> {
    rounds: bool,
    float: std::marker::PhantomData<F>,
}

impl<F: Real> Cpu<F> {
    /// The oracle without intermediate rounding.
    pub fn new() -> Self {
        Self { rounds: false, float: std::marker::PhantomData }
    }

    /// The oracle that rounds to bf16 exactly where the contract says that GPU backends do.
    pub fn rounding_to_bf16() -> Self {
        Self { rounds: true, float: std::marker::PhantomData }
    }

    /// Applies a rounding point of the contract.
    #[inline(always)]
    pub(crate) fn act(&self, value: F) -> F {
        if self.rounds { value.round_bf16() } else { value }
    }
}

impl<F: Real> Kernels for Cpu<F> {
    type Tensor = CpuTensor<F>;
    type Int4 = CpuInt4;
    type SwiGlu = CpuSwiGlu;
    type ExpertsInt4 = CpuExperts;
    type Experts = CpuExperts;
    type Batch = CpuBatch;
    type Graph = Infallible;
    type SamplePlan = CpuSamplePlan;

    fn alloc(&self, dtype: DType, shape: &[usize]) -> Result<CpuTensor<F>> {
        CpuTensor::alloc(dtype, shape)
    }

    fn upload(&self, tensor: HostTensor) -> Result<CpuTensor<F>> {
        CpuTensor::from_host(tensor)
    }

    fn upload_int4(&self, weight: HostInt4) -> Result<CpuInt4> {
        CpuInt4::from_host(&weight)
    }

    fn upload_swiglu(&self, gate_proj: HostLinear, up_proj: HostLinear) -> Result<CpuSwiGlu> {
        CpuSwiGlu::from_host(gate_proj, up_proj)
    }

    fn upload_experts_int4(&self, experts: Vec<HostExpert>) -> Result<CpuExperts> {
        CpuExperts::from_host_int4(experts)
    }

    fn upload_experts(&self, experts: Vec<HostExpert>) -> Result<CpuExperts> {
        CpuExperts::from_host(experts)
    }

    fn alloc_batch(&self, max_tokens: usize, max_seqs: usize, max_blocks: usize) -> Result<CpuBatch> {
        Ok(CpuBatch::new(max_tokens, max_seqs, max_blocks))
    }

    fn upload_batch(&self, batch: &Batch, device: &mut CpuBatch) -> Result<()> {
        device.replace(batch)
    }

    fn write(&self, values: &[f64], tensor: &mut CpuTensor<F>) -> Result<()> {
        tensor.write(self, values)
    }

    fn write_index(&self, values: &[i32], tensor: &mut CpuTensor<F>) -> Result<()> {
        tensor.write_index(values)
    }

    fn write_bytes(&self, values: &[u8], tensor: &mut CpuTensor<F>) -> Result<()> {
        tensor.write_bytes(values)
    }

    fn read(&self, tensor: &CpuTensor<F>) -> Result<Vec<f64>> {
        tensor.read()
    }

    fn read_index(&self, tensor: &CpuTensor<F>) -> Result<Vec<i32>> {
        Ok(tensor.indices("read_index", "tensor")?.to_vec())
    }

    fn read_bytes(&self, tensor: &CpuTensor<F>) -> Result<Vec<u8>> {
        Ok(tensor.bytes("read_bytes", "tensor")?.to_vec())
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
        batch: &CpuBatch,
        table: &CpuTensor<F>,
        vocab_start: usize,
        out: &mut CpuTensor<F>,
    ) -> Result<()> {
        embed::embed(self, batch, table, vocab_start, out)
    }

    fn rms_norm(
        &self,
        x: &CpuTensor<F>,
        weight: &CpuTensor<F>,
        eps: f64,
        out: &mut CpuTensor<F>,
    ) -> Result<()> {
        rms_norm::rms_norm(self, x, weight, eps, out)
    }

    fn rms_norm_residual(
        &self,
        x: &CpuTensor<F>,
        residual: &mut CpuTensor<F>,
        weight: &CpuTensor<F>,
        eps: f64,
        out: &mut CpuTensor<F>,
    ) -> Result<()> {
        rms_norm::rms_norm_residual(self, x, residual, weight, eps, out)
    }

    fn rope_table(&self, batch: &CpuBatch, theta: f64, cos_sin: &mut CpuTensor<F>) -> Result<()> {
        rope::rope_table(self, batch, theta, cos_sin)
    }

    fn rope(
        &self,
        x: &mut CpuTensor<F>,
        offset: usize,
        layout: RopeLayout,
        cos_sin: &CpuTensor<F>,
    ) -> Result<()> {
        rope::rope(self, x, offset, layout, cos_sin)
    }

    fn layer_norm_rope(
        &self,
        batch: &CpuBatch,
        x: &CpuTensor<F>,
        weight: &CpuTensor<F>,
        bias: &CpuTensor<F>,
        eps: f64,
        layout: RopeLayout,
        cos_sin: &CpuTensor<F>,
        cache: &mut CpuTensor<F>,
    ) -> Result<()> {
        layer_norm_rope::layer_norm_rope(self, batch, x, weight, bias, eps, layout, cos_sin, cache)
    }

    fn latent_rope(
        &self,
        batch: &CpuBatch,
        x: &CpuTensor<F>,
        weight: &CpuTensor<F>,
        eps: f64,
        cos_sin: &CpuTensor<F>,
        cache: &mut CpuTensor<F>,
    ) -> Result<()> {
        latent_rope::latent_rope(self, batch, x, weight, eps, cos_sin, cache)
    }

    fn qkv_norm_rope(
        &self,
        batch: &CpuBatch,
        q_a: &CpuTensor<F>,
        q_weight: &CpuTensor<F>,
        q_latent: &mut CpuTensor<F>,
        kv_a: &CpuTensor<F>,
        kv_weight: &CpuTensor<F>,
        cache: &mut CpuTensor<F>,
        eps: f64,
        cos_sin: &CpuTensor<F>,
        keys: Option<IndexKeys<'_, CpuTensor<F>>>,
    ) -> Result<()> {
        qkv_norm_rope::qkv_norm_rope(
            self, batch, q_a, q_weight, q_latent, kv_a, kv_weight, cache, eps, cos_sin, keys,
        )
    }

    fn linear(&self, x: &CpuTensor<F>, weight: &CpuTensor<F>, out: &mut CpuTensor<F>) -> Result<()> {
        linear::linear(self, x, weight, out)
    }

    fn linear_split(
        &self,
        x: &CpuTensor<F>,
        weight: &CpuTensor<F>,
        outs: &mut [&mut CpuTensor<F>],
    ) -> Result<()> {
        linear_split::linear_split(self, x, weight, outs)
    }

    fn linear_int4(&self, x: &CpuTensor<F>, weight: &CpuInt4, out: &mut CpuTensor<F>) -> Result<()> {
        linear_int4::linear_int4(self, x, weight, out)
    }

    fn absorb_query(
        &self,
        q: &CpuTensor<F>,
        kv_b: &CpuTensor<F>,
        cos_sin: &CpuTensor<F>,
        out: &mut CpuTensor<F>,
    ) -> Result<()> {
        absorb::absorb_query(self, q, kv_b, cos_sin, out)
    }

    fn absorb_output(&self, o: &CpuTensor<F>, kv_b: &CpuTensor<F>, out: &mut CpuTensor<F>) -> Result<()> {
        absorb::absorb_output(self, o, kv_b, out)
    }

    fn indexer_logits(
        &self,
        batch: &CpuBatch,
        rows: Range<usize>,
        q: &CpuTensor<F>,
        weights: &CpuTensor<F>,
        cache: &CpuTensor<F>,
        scale: f64,
        logits: &mut CpuTensor<F>,
    ) -> Result<()> {
        indexer_logits::indexer_logits(self, batch, rows, q, weights, cache, scale, logits)
    }

    fn top_k(
        &self,
        batch: &CpuBatch,
        rows: Range<usize>,
        logits: &CpuTensor<F>,
        topk_indices: &mut CpuTensor<F>,
    ) -> Result<()> {
        top_k::top_k(self, batch, rows, logits, topk_indices)
    }

    fn sparse_mla(
        &self,
        batch: &CpuBatch,
        q: &CpuTensor<F>,
        cache: &CpuTensor<F>,
        topk_indices: &CpuTensor<F>,
        scale: f64,
        out: &mut CpuTensor<F>,
    ) -> Result<()> {
        sparse_mla::sparse_mla(self, batch, q, cache, topk_indices, scale, out)
    }

    fn router(
        &self,
        logits: &CpuTensor<F>,
        bias: &CpuTensor<F>,
        params: RouterParams,
        topk_ids: &mut CpuTensor<F>,
        topk_weights: &mut CpuTensor<F>,
    ) -> Result<()> {
        router::router(self, logits, bias, params, topk_ids, topk_weights)
    }

    fn moe_int4(
        &self,
        x: &CpuTensor<F>,
        topk_ids: &CpuTensor<F>,
        topk_weights: &CpuTensor<F>,
        experts: &CpuExperts,
        shared: Option<&CpuTensor<F>>,
        out: &mut CpuTensor<F>,
    ) -> Result<()> {
        moe_int4::moe_int4(self, x, topk_ids, topk_weights, experts, shared, out)
    }

    fn moe(
        &self,
        x: &CpuTensor<F>,
        topk_ids: &CpuTensor<F>,
        topk_weights: &CpuTensor<F>,
        experts: &CpuExperts,
        shared: Option<&CpuTensor<F>>,
        out: &mut CpuTensor<F>,
    ) -> Result<()> {
        moe::moe(self, x, topk_ids, topk_weights, experts, shared, out)
    }

    fn swiglu(&self, x: &CpuTensor<F>, weights: &CpuSwiGlu, out: &mut CpuTensor<F>) -> Result<()> {
        swiglu::swiglu(self, x, weights, out)
    }

    fn silu_mul(&self, gate: &CpuTensor<F>, up: &CpuTensor<F>, out: &mut CpuTensor<F>) -> Result<()> {
        silu_mul::silu_mul(self, gate, up, out)
    }

    fn lm_head(
        &self,
        x: &CpuTensor<F>,
        rows: &CpuTensor<F>,
        weight: &CpuTensor<F>,
        logits: &mut CpuTensor<F>,
    ) -> Result<()> {
        lm_head::lm_head(self, x, rows, weight, logits)
    }

    fn sample(
        &self,
        logits: &CpuTensor<F>,
        rows: &[SampleRow<'_>],
        out: &mut SampleOutput<CpuTensor<F>>,
    ) -> Result<()> {
        sample::sample(self, logits, rows, out)
    }

    fn sample_plan(
        &self,
        logits: &CpuTensor<F>,
        plan: &CpuSamplePlan,
        out: &mut SampleOutput<CpuTensor<F>>,
    ) -> Result<()> {
        sample::sample(self, logits, &plan.rows(), out)
    }
}
