//! The kernels in WGSL, through wgpu: on any GPU with Vulkan, Metal or DX12, and on a CPU that stands in for one.
//!
//! `shaders/NAME.wgsl` is a kernel, `NAME.rs` its launcher. This file holds the backend and hands each method to its launcher.
//! Launches are recorded and run when something is read (`recorder.rs`). The kernels take no more than every adapter has: bf16 lies in
//! pairs in a word, halves are converted by hand, and subgroups, where there are any, only add up (`reduce_subgroups.wgsl`).

mod batch;
mod block_on;
mod context;
mod int4;
mod launch;
mod memory;
mod recorder;
mod rms_norm;
mod shader;
mod tensor;

use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

pub use batch::WgpuBatch;
pub use context::{WgpuContext, WgpuOptions};
pub use int4::WgpuInt4;
pub use shader::Edit;
pub use tensor::WgpuTensor;

use self::memory::Pool;
use self::recorder::Recorder;
use crate::batch::Batch;
use crate::cpu::CpuSamplePlan;
use crate::error::{Error, Result};
use crate::kernels::{IndexKeys, Kernels, RopeLayout, RouterParams, SampleOutput};
use crate::sampling::SampleRow;
use crate::tensor::{DType, HostExpert, HostInt4, HostLinear, HostTensor};

/// The backend of one rank on an opened adapter.
#[derive(Debug)]
pub struct Wgpu {
    context: Arc<WgpuContext>,
    pool: Arc<Pool>,
    recorder: RefCell<Recorder>,
}

impl Wgpu {
    /// A backend on `context`, which ranks may share.
    pub fn new(context: Arc<WgpuContext>) -> Self {
        Self { context, pool: Arc::default(), recorder: RefCell::default() }
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

/// What a kernel says that is not here.
fn no_form(kernel: &'static str) -> Error {
    Error::Launch {
        kernel,
        shape: "any".into(),
        message: format!("kernel {kernel} has no WGSL form yet; use cuda or cpu"),
    }
}

impl Kernels for Wgpu {
    type Tensor = WgpuTensor;
    type Int4 = WgpuInt4;
    type SwiGlu = Infallible;
    type ExpertsInt4 = Infallible;
    type Experts = Infallible;
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

    fn upload_swiglu(&self, _gate_proj: HostLinear, _up_proj: HostLinear) -> Result<Infallible> {
        Err(no_form("swiglu"))
    }

    fn upload_experts_int4(&self, _experts: Vec<HostExpert>) -> Result<Infallible> {
        Err(no_form("moe_int4"))
    }

    fn upload_experts(&self, _experts: Vec<HostExpert>) -> Result<Infallible> {
        Err(no_form("moe"))
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
        _batch: &WgpuBatch,
        _table: &WgpuTensor,
        _vocab_start: usize,
        _out: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("embed"))
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

    fn rope_table(&self, _batch: &WgpuBatch, _theta: f64, _cos_sin: &mut WgpuTensor) -> Result<()> {
        Err(no_form("rope_table"))
    }

    fn rope(
        &self,
        _x: &mut WgpuTensor,
        _offset: usize,
        _layout: RopeLayout,
        _cos_sin: &WgpuTensor,
    ) -> Result<()> {
        Err(no_form("rope"))
    }

    fn layer_norm_rope(
        &self,
        _batch: &WgpuBatch,
        _x: &WgpuTensor,
        _weight: &WgpuTensor,
        _bias: &WgpuTensor,
        _eps: f64,
        _layout: RopeLayout,
        _cos_sin: &WgpuTensor,
        _cache: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("layer_norm_rope"))
    }

    fn latent_rope(
        &self,
        _batch: &WgpuBatch,
        _x: &WgpuTensor,
        _weight: &WgpuTensor,
        _eps: f64,
        _cos_sin: &WgpuTensor,
        _cache: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("latent_rope"))
    }

    fn qkv_norm_rope(
        &self,
        _batch: &WgpuBatch,
        _q_a: &WgpuTensor,
        _q_weight: &WgpuTensor,
        _q_latent: &mut WgpuTensor,
        _kv_a: &WgpuTensor,
        _kv_weight: &WgpuTensor,
        _cache: &mut WgpuTensor,
        _eps: f64,
        _cos_sin: &WgpuTensor,
        _keys: Option<IndexKeys<'_, WgpuTensor>>,
    ) -> Result<()> {
        Err(no_form("qkv_norm_rope"))
    }

    fn linear(&self, _x: &WgpuTensor, _weight: &WgpuTensor, _out: &mut WgpuTensor) -> Result<()> {
        Err(no_form("linear"))
    }

    fn linear_split(
        &self,
        _x: &WgpuTensor,
        _weight: &WgpuTensor,
        _outs: &mut [&mut WgpuTensor],
    ) -> Result<()> {
        Err(no_form("linear_split"))
    }

    fn linear_int4(&self, _x: &WgpuTensor, _weight: &WgpuInt4, _out: &mut WgpuTensor) -> Result<()> {
        Err(no_form("linear_int4"))
    }

    fn absorb_query(
        &self,
        _q: &WgpuTensor,
        _kv_b: &WgpuTensor,
        _cos_sin: &WgpuTensor,
        _out: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("absorb_query"))
    }

    fn absorb_output(&self, _o: &WgpuTensor, _kv_b: &WgpuTensor, _out: &mut WgpuTensor) -> Result<()> {
        Err(no_form("absorb_output"))
    }

    fn indexer_logits(
        &self,
        _batch: &WgpuBatch,
        _rows: Range<usize>,
        _q: &WgpuTensor,
        _weights: &WgpuTensor,
        _cache: &WgpuTensor,
        _scale: f64,
        _logits: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("indexer_logits"))
    }

    fn top_k(
        &self,
        _batch: &WgpuBatch,
        _rows: Range<usize>,
        _logits: &WgpuTensor,
        _topk_indices: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("top_k"))
    }

    fn sparse_mla(
        &self,
        _batch: &WgpuBatch,
        _q: &WgpuTensor,
        _cache: &WgpuTensor,
        _topk_indices: &WgpuTensor,
        _scale: f64,
        _out: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("sparse_mla"))
    }

    fn router(
        &self,
        _logits: &WgpuTensor,
        _bias: &WgpuTensor,
        _params: RouterParams,
        _topk_ids: &mut WgpuTensor,
        _topk_weights: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("router"))
    }

    fn moe_int4(
        &self,
        _x: &WgpuTensor,
        _topk_ids: &WgpuTensor,
        _topk_weights: &WgpuTensor,
        experts: &Infallible,
        _shared: Option<&WgpuTensor>,
        _out: &mut WgpuTensor,
    ) -> Result<()> {
        match *experts {}
    }

    fn moe(
        &self,
        _x: &WgpuTensor,
        _topk_ids: &WgpuTensor,
        _topk_weights: &WgpuTensor,
        experts: &Infallible,
        _shared: Option<&WgpuTensor>,
        _out: &mut WgpuTensor,
    ) -> Result<()> {
        match *experts {}
    }

    fn swiglu(&self, _x: &WgpuTensor, weights: &Infallible, _out: &mut WgpuTensor) -> Result<()> {
        match *weights {}
    }

    fn silu_mul(&self, _gate: &WgpuTensor, _up: &WgpuTensor, _out: &mut WgpuTensor) -> Result<()> {
        Err(no_form("silu_mul"))
    }

    fn lm_head(
        &self,
        _x: &WgpuTensor,
        _rows: &WgpuTensor,
        _weight: &WgpuTensor,
        _logits: &mut WgpuTensor,
    ) -> Result<()> {
        Err(no_form("lm_head"))
    }

    fn sample(
        &self,
        _logits: &WgpuTensor,
        _rows: &[SampleRow<'_>],
        _out: &mut SampleOutput<WgpuTensor>,
    ) -> Result<()> {
        Err(no_form("sample"))
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
