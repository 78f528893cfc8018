//! The kernel contract: one trait, one method per kernel, exactly as the model calls it.
//!
//! # Reading a contract
//!
//! Shapes are row-major; `T` is the number of new tokens of the step ([`Batch::num_tokens`]), `S` its
//! sequences, `H` the heads of this rank. Element types are [`DType`]s: `Act` is bf16 on the GPU backends
//! (or f32 on `Wgpu`, which then rounds nothing), `Float` is f32 there, and both are the oracle's own float on `Cpu`. "Rounds to `Act`" marks the rounding
//! points: the places where a value passes through bf16 on a GPU backend and, when asked to, on the oracle.
//! Between rounding points everything is accumulated in f32 (`Float`). A linear weight is `[out, in]` and is
//! never rounded on its way: bf16 and f16 are widened, INT4 is `(q - z) * scale`.
//!
//! A cache is `Act`, or `Fp8` where the method says so: then its last dimension counts bytes, laid out and
//! quantised as [`fp8`](crate::fp8) says, from the values that an `Act` cache would hold. Whoever reads it
//! computes with `code * scale`, never rounded; the codes of NaN are undefined input.
//!
//! Every method writes into tensors that the caller allocated: no method allocates device memory that
//! outlives it, synchronises with the host, or has a shape that depends on device data, so a step can be
//! captured in a graph. Sizes are taken from the tensors' own shapes ([`DeviceTensor::set_shape`]); a
//! mismatch is an error that names kernel and tensor. Outputs never alias inputs unless a method says "in
//! place".
//!
//! Formulas follow Hugging Face transformers 5.17, `models/glm_moe_dsa/modeling_glm_moe_dsa.py`, and the
//! DeepSeek-V3.2 report for the lightning indexer; where a method differs, it says so.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::batch::Batch;
use crate::buffers::HostMemory;
use crate::error::{Error, Result};
use crate::random::{self, RandomLinear, RandomTensor};
use crate::sampling::SampleRow;
use crate::tensor::{DType, DeviceTensor, HostExpert, HostInt4, HostLinear, HostTensor};

/// How rotary pairs lie in a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Pair `j` is `(x[2j], x[2j + 1])`: GLM-5.2, in attention and indexer alike.
    Interleaved,
    /// Pair `j` is `(x[j], x[j + d/2])`: the indexer of DeepSeek-V3.2.
    Half,
}

/// The constants of `router`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterParams {
    /// Expert groups (`n_group`); divides the number of experts.
    pub n_group: usize,
    /// Groups kept (`topk_group`).
    pub topk_group: usize,
    /// Divide the chosen scores by their sum + 1e-20 (`norm_topk_prob`).
    pub norm_topk_prob: bool,
    /// Multiplied last (`routed_scaling_factor`).
    pub routed_scaling_factor: f64,
}

/// The indexer's keys of `qkv_norm_rope`: arguments of `layer_norm_rope`.
#[derive(Debug)]
pub struct IndexKeys<'a, T> {
    /// `[T, D]` `Act`.
    pub x: &'a T,
    /// `[D]`: the LayerNorm's weight.
    pub weight: &'a T,
    /// `[D]`: its bias.
    pub bias: &'a T,
    /// Its epsilon.
    pub eps: f64,
    /// Which columns are pairs.
    pub layout: RopeLayout,
    /// The indexer's cache.
    pub cache: &'a mut T,
}

/// The launches of one kernel, on one shape, among those of a step.
#[derive(Debug)]
pub struct RecordedKernel<G> {
    /// The kernel.
    pub name: String,
    /// The shape, in words.
    pub shape: String,
    /// How many there are.
    pub launches: usize,
    /// All of them, and nothing else.
    pub graph: G,
}

/// Where `sample` writes. All tensors have one row per sampled row.
#[derive(Debug)]
pub struct SampleOutput<T> {
    /// `[R]` `Index`: the chosen (or forced) token.
    pub token_ids: T,
    /// `[R]` `Float`: its log-probability under the raw logits.
    pub logprobs: T,
    /// `[R, N]` `Index`: the N most probable tokens, best first, ties to the lower id; padded with -1 when
    /// the vocabulary is smaller.
    pub top_ids: T,
    /// `[R, N]` `Float`: theirs; padding is negative infinity.
    pub top_logprobs: T,
}

/// The shape of a tensor of three dimensions, for `expanded_mla`.
fn three<T: DeviceTensor>(name: &'static str, tensor: &T) -> Result<[usize; 3]> {
    let found = tensor.shape().to_vec();
    let expected = "3 dimensions".to_owned();
    tensor.shape().try_into().map_err(|_| Error::Shape {
        kernel: "expanded_mla",
        tensor: name,
        expected,
        found,
    })
}

/// A backend: device memory and every kernel of the model.
///
/// Implementations: [`Cpu`](crate::cpu::Cpu) (the oracle, and what serves without a GPU), and `Cuda` of
/// `dsa80-cuda`.
pub trait Kernels: Send + Sized {
    /// A tensor on the device.
    type Tensor: DeviceTensor;
    /// A packed INT4 weight in the layout that this backend's `linear_int4` wants.
    type Int4: Send;
    /// The gate and up projections of a SwiGLU in any mix of formats, in the layout that `swiglu` wants.
    type SwiGlu: Send;
    /// The routed experts of one layer, all of them INT4, in the layout that `moe_int4` wants.
    type ExpertsInt4: Send;
    /// The routed experts of one layer in any mix of formats, for `moe`.
    type Experts: Send;
    /// A [`Batch`] on the device.
    type Batch: Send;
    /// What [`record`](Self::record) has recorded.
    type Graph: Send;
    /// What the rows of [`sample_plan`](Self::sample_plan) ask for, on the device.
    type SamplePlan: Send;

    // Memory.

    /// Allocates a tensor; its contents are unspecified.
    ///
    /// # Errors
    /// [`Error::Backend`] when memory runs out.
    fn alloc(&self, dtype: DType, shape: &[usize]) -> Result<Self::Tensor>;

    /// Memory to read weights into that the device copies from at its best; `None` where any memory is as good.
    fn host_memory(&self) -> Option<Arc<dyn HostMemory>> {
        None
    }

    /// Uploads a dense weight and keeps its type.
    ///
    /// # Errors
    /// A shape that does not match the number of elements; memory.
    fn upload(&self, tensor: HostTensor) -> Result<Self::Tensor>;

    /// Uploads and repacks an INT4 weight.
    ///
    /// # Errors
    /// Array lengths that contradict the dimensions; memory.
    fn upload_int4(&self, weight: HostInt4) -> Result<Self::Int4>;

    /// Weights of random numbers, one below the other where there are several: what [`upload`](Self::upload) makes of their numbers. A
    /// backend that has a kernel for it makes them on the device.
    ///
    /// # Errors
    /// Element types, or dimensions but the first, that differ; memory.
    fn random(&self, tensors: &[RandomTensor]) -> Result<Self::Tensor> {
        self.upload(random::stacked(tensors)?)
    }

    /// A packed weight of random numbers: what [`upload_int4`](Self::upload_int4) makes of them.
    ///
    /// # Errors
    /// A weight that is not packed; memory.
    fn random_int4(&self, weight: &RandomLinear) -> Result<Self::Int4> {
        match weight.make() {
            HostLinear::Int4(weight) => self.upload_int4(weight),
            _ => Err(random::not_packed()),
        }
    }

    /// Uploads the projections of a SwiGLU for `swiglu`, both `[I, in]`.
    ///
    /// # Errors
    /// Unequal dimensions; those of [`upload`](Self::upload) and [`upload_int4`](Self::upload_int4).
    fn upload_swiglu(&self, gate_proj: HostLinear, up_proj: HostLinear) -> Result<Self::SwiGlu>;

    /// Uploads a layer's routed experts for `moe_int4`.
    ///
    /// # Errors
    /// Experts that [`HostExpert::fit_moe_int4`] denies or of unequal dimensions; memory.
    fn upload_experts_int4(&self, experts: Vec<HostExpert>) -> Result<Self::ExpertsInt4>;

    /// Uploads a layer's routed experts for `moe`.
    ///
    /// # Errors
    /// Unequal dimensions; memory.
    fn upload_experts(&self, experts: Vec<HostExpert>) -> Result<Self::Experts>;

    /// An empty batch that can hold `max_tokens` tokens of `max_seqs` sequences with `max_blocks` pages each.
    ///
    /// # Errors
    /// Memory.
    fn alloc_batch(&self, max_tokens: usize, max_seqs: usize, max_blocks: usize) -> Result<Self::Batch>;

    /// Replaces the contents of `device` by `batch`.
    ///
    /// # Errors
    /// [`Error::Capacity`] when `batch` is larger than `device` was allocated for.
    fn upload_batch(&self, batch: &Batch, device: &mut Self::Batch) -> Result<()>;

    /// Writes `values` into an `Act` or `Float` tensor (rounded to its type); as many as it has elements.
    ///
    /// # Errors
    /// Another length or element type.
    fn write(&self, values: &[f64], tensor: &mut Self::Tensor) -> Result<()>;

    /// Writes `values` into an `Index` tensor; as many as it has elements.
    ///
    /// # Errors
    /// Another length or element type.
    fn write_index(&self, values: &[i32], tensor: &mut Self::Tensor) -> Result<()>;

    /// Writes the bytes of an `Fp8` tensor; as many as it has elements.
    ///
    /// # Errors
    /// Another length or element type.
    fn write_bytes(&self, values: &[u8], tensor: &mut Self::Tensor) -> Result<()>;

    /// Reads an `Act`, `Float` or weight tensor, widened. Waits for the device.
    ///
    /// # Errors
    /// An `Index` or `Fp8` tensor.
    fn read(&self, tensor: &Self::Tensor) -> Result<Vec<f64>>;

    /// Reads an `Index` tensor. Waits for the device.
    ///
    /// # Errors
    /// Another element type.
    fn read_index(&self, tensor: &Self::Tensor) -> Result<Vec<i32>>;

    /// Reads the bytes of an `Fp8` tensor. Waits for the device.
    ///
    /// # Errors
    /// Another element type.
    fn read_bytes(&self, tensor: &Self::Tensor) -> Result<Vec<u8>>;

    // Graphs.

    /// Runs `launches`, which calls kernels and nothing else, then records it: [`replay`](Self::replay) runs the same kernels again, on the same
    /// tensors and batches as they are then. Their shapes, and the numbers of a batch that fix them (tokens, sequences, the widest block
    /// table, the longest context), are those of the recording. `None`, and nothing has run, on a backend that has no graphs.
    ///
    /// # Errors
    /// `launches` failed, or did what cannot be recorded: it read, wrote or allocated memory.
    fn record(&self, launches: impl FnMut() -> Result<()>) -> Result<Option<Self::Graph>>;

    /// Room for what up to `max_rows` rows of logits of `vocab_size` tokens ask of [`sample_plan`](Self::sample_plan).
    ///
    /// # Errors
    /// Memory.
    fn alloc_sample_plan(&self, max_rows: usize, vocab_size: usize) -> Result<Self::SamplePlan>;

    /// Replaces what is asked for, if it fits: rows that change many logits, all of them together, may not. Then `plan` is as it was, and
    /// [`sample`](Self::sample) does what it cannot.
    ///
    /// # Errors
    /// More rows than there is room for; those of [`sample`](Self::sample).
    fn upload_sample_plan(&self, rows: &[SampleRow<'_>], plan: &mut Self::SamplePlan) -> Result<bool>;

    /// Runs what was recorded; does not wait for it. The tensors and batches that it was recorded with must still be there.
    ///
    /// # Errors
    /// The device failed.
    fn replay(&self, graph: &Self::Graph) -> Result<()>;

    /// Records the launches of every kernel among `launches` by themselves, in the order of their first: what a kernel takes of a step, on
    /// what the last step has left. `launches` must have been [recorded](Self::record) before. None on a backend that has no graphs.
    ///
    /// # Errors
    /// As for [`record`](Self::record).
    fn record_kernels(
        &self,
        _launches: impl FnMut() -> Result<()>,
    ) -> Result<Vec<RecordedKernel<Self::Graph>>> {
        Ok(Vec::new())
    }

    /// Microseconds of each of `times` replays, one after the other, by the device's clock where it has one. Waits for the device.
    ///
    /// # Errors
    /// The device failed.
    fn time_replays(&self, graph: &Self::Graph, times: usize) -> Result<Vec<f64>> {
        host_times(times, || self.replay(graph))
    }

    // Kernels.

    /// Token rows of a vocabulary shard: `out[t] = table[token_ids[t] - vocab_start]`, and zeros for a token
    /// outside the shard, so that the sum over ranks is the embedding.
    ///
    /// `table` `[V_local, hidden]` weight; `out` `[T, hidden]` `Act` (rounds) or `Float` (does not).
    fn embed(
        &self,
        batch: &Self::Batch,
        table: &Self::Tensor,
        vocab_start: usize,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps)`.
    ///
    /// `x` `[T, D]` `Act` or `Float`; `weight` `[D]`; `out` `[T, D]` `Act`. Computed in `Float`; rounds to `Act`
    /// once, at the end (HF rounds the normalised row before it multiplies by the weight as well).
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        eps: f64,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// The residual add and the norm that follows: `residual[t] += x[t]` (in place), then `rms_norm` of the
    /// residual into `out`.
    ///
    /// `x`, `out` `[T, D]` `Act`; `residual` `[T, D]` `Float`; `weight` `[D]`. The residual stream is not rounded
    /// (HF keeps it in the model's type, and rounds it twice a layer).
    fn rms_norm_residual(
        &self,
        x: &Self::Tensor,
        residual: &mut Self::Tensor,
        weight: &Self::Tensor,
        eps: f64,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// The rotary table of a step: for token row `t` and pair `j < dim / 2`,
    /// `cos_sin[t, j] = (cos a, sin a)` with `a = positions[t] * theta^(-2j / dim)`.
    ///
    /// `cos_sin` `[T, dim / 2, 2]` `Float`. The angle is reduced in f64: at positions near 2^20 an f32 angle
    /// is off by 0.03 rad.
    fn rope_table(&self, batch: &Self::Batch, theta: f64, cos_sin: &mut Self::Tensor) -> Result<()>;

    /// RoPE in place on columns `offset..offset + dim` of every head; the rest passes. `dim` is twice the
    /// pairs of `cos_sin`.
    ///
    /// Pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)`, written back where it was read, in either
    /// layout (HF writes the interleaved pairs de-interleaved; dot products do not change as long as query
    /// and key agree). `x` `[T, H, D]` `Act`, in place, rounds to `Act`; `cos_sin` `[T, dim / 2, 2]`.
    fn rope(
        &self,
        x: &mut Self::Tensor,
        offset: usize,
        layout: RopeLayout,
        cos_sin: &Self::Tensor,
    ) -> Result<()>;

    /// The indexer's keys: LayerNorm, RoPE on the first columns, write to the paged indexer cache.
    ///
    /// `y = weight * (x[t] - mean) / sqrt(var + eps) + bias` with the biased variance, RoPE on columns
    /// `0..dim`, then `cache[slot_mapping[t]] = y`. `x` `[T, D]` `Act`; `weight`, `bias` `[D]`; `cache`
    /// `[pages, page_size, D]` `Act`, or `Fp8` in [`IndexerPage`](crate::fp8::IndexerPage)s. Rounds to `Act`
    /// after the LayerNorm (where HF's module returns) and after RoPE.
    ///
    /// A slot outside the cache is an error on `Cpu`; a GPU backend, which reads slots on the device, skips
    /// the row. Of two tokens with one slot the later stays on `Cpu`, and either (or a mixture) on a GPU.
    fn layer_norm_rope(
        &self,
        batch: &Self::Batch,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        bias: &Self::Tensor,
        eps: f64,
        layout: RopeLayout,
        cos_sin: &Self::Tensor,
        cache: &mut Self::Tensor,
    ) -> Result<()>;

    /// MLA's cache row: RMSNorm of the latent, RoPE on the shared key part, write to the paged MLA cache.
    ///
    /// `x` `[T, kv_lora_rank + rope]` `Act` is the output of `kv_a_proj_with_mqa`; `weight` `[kv_lora_rank]`;
    /// `cache[slot_mapping[t]] = [rms_norm(x[t, ..kv_lora_rank]), rope(x[t, kv_lora_rank..])]`, `cache`
    /// `[pages, page_size, kv_lora_rank + rope]` `Act`, or `Fp8` in [`MlaRow`](crate::fp8::MlaRow)s; RoPE is
    /// interleaved. Rounds to `Act` on writing. Slots are as for [`layer_norm_rope`](Self::layer_norm_rope).
    fn latent_rope(
        &self,
        batch: &Self::Batch,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        eps: f64,
        cos_sin: &Self::Tensor,
        cache: &mut Self::Tensor,
    ) -> Result<()>;

    /// What follows a layer's first projections, together: `q_latent = rms_norm(q_a)`,
    /// [`latent_rope`](Self::latent_rope) of `kv_a` into `cache` and, in a layer with an indexer,
    /// [`layer_norm_rope`](Self::layer_norm_rope) of the `keys`, each with that method's roundings.
    ///
    /// `q_a`, `q_latent` `[T, q_lora_rank]` `Act`; `q_weight` `[q_lora_rank]`; `kv_a`, `kv_weight` and `cache` are
    /// `latent_rope`'s `x`, `weight` and `cache`; `eps` is that of both RMSNorms.
    fn qkv_norm_rope(
        &self,
        batch: &Self::Batch,
        q_a: &Self::Tensor,
        q_weight: &Self::Tensor,
        q_latent: &mut Self::Tensor,
        kv_a: &Self::Tensor,
        kv_weight: &Self::Tensor,
        cache: &mut Self::Tensor,
        eps: f64,
        cos_sin: &Self::Tensor,
        keys: Option<IndexKeys<'_, Self::Tensor>>,
    ) -> Result<()>;

    /// `out = x weight^T`. `x` `[T, in]` `Act`; `weight` `[out, in]` dense; `out` `[T, out]`, `Act` (rounds)
    /// or `Float` (does not).
    fn linear(&self, x: &Self::Tensor, weight: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// One to four projections of the same `x` whose weights lie one below the other: `outs[0] = x weight[..A]^T`,
    /// `outs[1] = x weight[A..A + B]^T` and so on. Rows of `weight` below the last of them are not read.
    ///
    /// `x` `[T, in]` `Act`; `weight` `[at least A + B + .., in]` dense; `outs` `[T, A]`, `[T, B]`, .., each `Act`
    /// (rounds) or `Float` (does not).
    fn linear_split(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        outs: &mut [&mut Self::Tensor],
    ) -> Result<()>;

    /// [`linear`](Self::linear) with a packed INT4 weight.
    fn linear_int4(&self, x: &Self::Tensor, weight: &Self::Int4, out: &mut Self::Tensor) -> Result<()>;

    /// The query into the latent space: per head `h`, `out[t, h] = [K_h^T q_nope, rope(q_rope)]`, where
    /// `q[t, h] = [q_nope, q_rope]` and `K_h = kv_b[h, ..nope]`.
    ///
    /// `q` `[T, H, nope + rope]` `Act`; `kv_b` `[H, nope + v, kv_lora_rank]` dense; `cos_sin`
    /// `[T, rope / 2, 2]`; `out` `[T, H, kv_lora_rank + rope]` `Act`. RoPE is interleaved, as in
    /// [`latent_rope`](Self::latent_rope), and gives what [`rope`](Self::rope) gives. Rounds to `Act`.
    fn absorb_query(
        &self,
        q: &Self::Tensor,
        kv_b: &Self::Tensor,
        cos_sin: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// The attention output out of the latent space: `out[t, h] = V_h o[t, h]` with `V_h = kv_b[h, nope..]`.
    ///
    /// `o` `[T, H, kv_lora_rank]` `Act`; `kv_b` `[H, nope + v, kv_lora_rank]` dense; `out` `[T, H, v]` `Act`.
    /// Rounds to `Act`.
    fn absorb_output(&self, o: &Self::Tensor, kv_b: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// The lightning indexer's scores of a chunk of token rows:
    /// `logits[t - rows.start, s] = sum_h weights[t, h] * relu(q[t, h] . k[s]) * scale` for
    /// `s <= position of t`, `k[s]` the indexer cache row of position `s` of `t`'s sequence.
    ///
    /// `q` `[T, HI, D]` `Act` (RoPE applied); `weights` `[T, HI]` `Float`, may be negative; `cache` as
    /// [`layer_norm_rope`](Self::layer_norm_rope) wrote it, `Act` or `Fp8`; `scale > 0` is
    /// `HI^-0.5 * D^-0.5`; `logits` `[rows, C]` `Float`, `C >= ` the longest context among the rows. Entries
    /// at invisible positions are unspecified. Nothing is rounded to `Act`. The row chunk bounds the
    /// workspace: `rows.len() * C` floats.
    fn indexer_logits(
        &self,
        batch: &Self::Batch,
        rows: Range<usize>,
        q: &Self::Tensor,
        weights: &Self::Tensor,
        cache: &Self::Tensor,
        scale: f64,
        logits: &mut Self::Tensor,
    ) -> Result<()>;

    /// The `min(k, visible)` best positions of every row of the chunk, `visible = position + 1`.
    ///
    /// `logits` `[rows, C]` `Float` as `indexer_logits` left them; `topk_indices` `[T, k]` `Index`: rows
    /// `rows` are written, the others left alone. A row with `visible <= k` selects `0..visible` and its
    /// logits are not read (so `logits` may hold nothing of use when the whole batch is that short). Equal
    /// scores: the lower position wins; -0.0 equals +0.0; NaN ranks below every number. The order inside a
    /// row is ascending on `Cpu` and unspecified elsewhere; unused places are -1, at the end.
    fn top_k(
        &self,
        batch: &Self::Batch,
        rows: Range<usize>,
        logits: &Self::Tensor,
        topk_indices: &mut Self::Tensor,
    ) -> Result<()>;

    /// Attention over the selected latent rows, in the absorbed form: with `c[s]` the MLA cache row of
    /// position `s` (its first `kv_lora_rank` columns are both key and value, the rest is the rotary key),
    /// `p = softmax_s(q[t, h] . c[s] * scale)`, `out[t, h] = sum_s p[s] c[s, ..kv_lora_rank]` over `s` in
    /// `topk_indices[t]`.
    ///
    /// `q` `[T, H, kv_lora_rank + rope]` `Act`; `cache` as [`latent_rope`](Self::latent_rope) wrote it, `Act`
    /// or `Fp8`; `topk_indices` `[T, k]` `Index`, -1 anywhere is a hole; `out` `[T, H, kv_lora_rank]` `Act`, rounded
    /// once at the end (tensor-core backends also round `p`, unnormalised, to bf16 before the second
    /// product). A row with nothing selected gives zeros. An index outside the context is undefined, and so is one
    /// that a row has twice.
    fn sparse_mla(
        &self,
        batch: &Self::Batch,
        q: &Self::Tensor,
        cache: &Self::Tensor,
        topk_indices: &Self::Tensor,
        scale: f64,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// [`sparse_mla`](Self::sparse_mla), then [`absorb_output`](Self::absorb_output) of its result, each with its roundings.
    ///
    /// `kv_b` and `out` are those of `absorb_output`; `o_latent` `[T, H, kv_lora_rank]` `Act` is room for what lies between, unspecified
    /// afterwards: a backend may keep it to itself.
    fn sparse_mla_output(
        &self,
        batch: &Self::Batch,
        q: &Self::Tensor,
        cache: &Self::Tensor,
        topk_indices: &Self::Tensor,
        scale: f64,
        kv_b: &Self::Tensor,
        o_latent: &mut Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.sparse_mla(batch, q, cache, topk_indices, scale, o_latent)?;
        self.absorb_output(o_latent, kv_b, out)
    }

    /// Whether [`expanded_mla`](Self::expanded_mla) is less work for a step than the absorbed form: its arguments are that method's. The model
    /// then calls it instead of [`absorb_query`](Self::absorb_query), [`sparse_mla`](Self::sparse_mla) and
    /// [`absorb_output`](Self::absorb_output). It depends on shapes and types alone.
    fn expands(
        &self,
        _batch: &Self::Batch,
        _q: &Self::Tensor,
        _kv_b: &Self::Tensor,
        _cache: &Self::Tensor,
        _topk_indices: &Self::Tensor,
    ) -> bool {
        false
    }

    /// Attention over the selected rows from the projected query to the heads' outputs, in the expanded form, which is HF's: per head `h`
    /// with `[K_h; V_h] = kv_b[h]`, `key[s] = [K_h c[s], rotary key of s]`, `value[s] = V_h c[s]`, `c[s]` the latent columns of the cache row of
    /// position `s`; `p = softmax_s([q_nope, rope(q_rope)] . key[s] * scale)` and `out[t, h] = sum_s p[s] value[s]` over `s` in
    /// `topk_indices[t]`. Without rounding that is what `absorb_query`, `sparse_mla` and `absorb_output` give, one after the other.
    ///
    /// Arguments as for those three; `q` may be rotated in place; `cache` is `Act`; `out` `[T, H, v]` `Act`. Rounds to `Act`: the rotated query,
    /// `K_h c[s]` and `V_h c[s]` (all three as HF does), the result (tensor-core backends also round `p`, unnormalised). A backend whose
    /// [`expands`](Self::expands) is never true may do the three instead, each with its own rounding points, as this does. What no token has
    /// selected, up to the last token's position, may be read too, and must be finite. A backend may refuse a step that
    /// [`expands`](Self::expands) denies; after an error `q` is unspecified.
    fn expanded_mla(
        &self,
        batch: &Self::Batch,
        q: &mut Self::Tensor,
        kv_b: &Self::Tensor,
        cos_sin: &Self::Tensor,
        cache: &Self::Tensor,
        topk_indices: &Self::Tensor,
        scale: f64,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        let ([tokens, heads, _], [_, _, rank], [_, pairs, _]) =
            (three("q", q)?, three("kv_b", kv_b)?, three("cos_sin", cos_sin)?);
        let mut absorbed = self.alloc(DType::Act, &[tokens, heads, rank + 2 * pairs])?;
        self.absorb_query(q, kv_b, cos_sin, &mut absorbed)?;
        let mut latent = self.alloc(DType::Act, &[tokens, heads, rank])?;
        self.sparse_mla(batch, &absorbed, cache, topk_indices, scale, &mut latent)?;
        self.absorb_output(&latent, kv_b, out)
    }

    /// Expert choice. `s = sigmoid(logits[t])`; chosen by `s + bias`: each group is scored by the sum of its
    /// two best (its one, if it has one), experts outside the best `topk_group` groups are dropped, then the
    /// best `K` are taken; their weights are `s` without the bias, divided by their sum + 1e-20 when
    /// `norm_topk_prob`, times `routed_scaling_factor`.
    ///
    /// `logits` `[T, E]` `Float`; `bias` `[E]` weight; `topk_ids` `[T, K]` `Index`, best first;
    /// `topk_weights` `[T, K]` `Float`. Ties (experts and groups): the lower index. Nothing is rounded to
    /// `Act`.
    fn router(
        &self,
        logits: &Self::Tensor,
        bias: &Self::Tensor,
        params: RouterParams,
        topk_ids: &mut Self::Tensor,
        topk_weights: &mut Self::Tensor,
    ) -> Result<()>;

    /// Routed experts, all INT4:
    /// `out[t] = shared[t] + sum_k topk_weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t])`,
    /// `e = topk_ids[t, k]`.
    ///
    /// `x`, `out`, `shared` `[T, hidden]` `Act`; `topk_ids` `[T, K]` `Index`; `topk_weights` `[T, K]`
    /// `Float`. Rounds to `Act` after `silu * up` and at the end; the weighted sum over `k` runs in `Float`,
    /// in the order of `k`.
    fn moe_int4(
        &self,
        x: &Self::Tensor,
        topk_ids: &Self::Tensor,
        topk_weights: &Self::Tensor,
        experts: &Self::ExpertsInt4,
        shared: Option<&Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// [`moe_int4`](Self::moe_int4) for experts in any mix of formats.
    fn moe(
        &self,
        x: &Self::Tensor,
        topk_ids: &Self::Tensor,
        topk_weights: &Self::Tensor,
        experts: &Self::Experts,
        shared: Option<&Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// A SwiGLU with its projections: `out = silu(x gate_proj^T) * (x up_proj^T)`.
    ///
    /// `x` `[T, in]`, `out` `[T, I]`, both `Act`. Rounds to `Act` once, at the end: the projections are not
    /// rounded, as in [`moe_int4`](Self::moe_int4) (HF rounds them).
    fn swiglu(&self, x: &Self::Tensor, weights: &Self::SwiGlu, out: &mut Self::Tensor) -> Result<()>;

    /// [`swiglu`](Self::swiglu) into `out` and [`linear`](Self::linear) of the same `x` into `weight_out`, each with that method's roundings:
    /// what a sparse layer's shared expert and its router begin with.
    ///
    /// # Errors
    /// Those of the two.
    fn swiglu_and_linear(
        &self,
        x: &Self::Tensor,
        weights: &Self::SwiGlu,
        out: &mut Self::Tensor,
        weight: &Self::Tensor,
        weight_out: &mut Self::Tensor,
    ) -> Result<()> {
        self.swiglu(x, weights, out)?;
        self.linear(x, weight, weight_out)
    }

    /// [`linear`](Self::linear) of `x` into `out` and [`router`](Self::router) of `logits`, which know nothing of each other: what a sparse
    /// layer's shared expert ends with, and the choice of the others.
    ///
    /// # Errors
    /// Those of the two.
    fn linear_and_router(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        out: &mut Self::Tensor,
        logits: &Self::Tensor,
        bias: &Self::Tensor,
        params: RouterParams,
        topk_ids: &mut Self::Tensor,
        topk_weights: &mut Self::Tensor,
    ) -> Result<()> {
        self.linear(x, weight, out)?;
        self.router(logits, bias, params, topk_ids, topk_weights)
    }

    /// SwiGLU: `out = silu(gate) * up`, `silu(x) = x / (1 + exp(-x))`. All `[T, I]` `Act`; rounds to `Act`
    /// once.
    fn silu_mul(&self, gate: &Self::Tensor, up: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// Logits of chosen token rows over a vocabulary shard: `logits[i] = weight x[rows[i]]`.
    ///
    /// `x` `[T, hidden]` `Act`; `rows` `[R]` `Index`; `weight` `[V_local, hidden]` dense; `logits`
    /// `[R, V_local]` `Float`. Not rounded to `Act`.
    fn lm_head(
        &self,
        x: &Self::Tensor,
        rows: &Self::Tensor,
        weight: &Self::Tensor,
        logits: &mut Self::Tensor,
    ) -> Result<()>;

    /// Chooses a token for every row and reports log-probabilities; see
    /// [`SamplingParams`](crate::SamplingParams) for the order of operations and
    /// [`uniform`](crate::sampling::uniform) for the random numbers.
    ///
    /// The draw is Gumbel-max: the kept token with the largest `logit / temperature - ln(-ln(uniform))`, ties
    /// to the lower id. `logits` `[R, V]` `Float`, left unchanged.
    fn sample(
        &self,
        logits: &Self::Tensor,
        rows: &[SampleRow<'_>],
        out: &mut SampleOutput<Self::Tensor>,
    ) -> Result<()>;

    /// [`sample`](Self::sample) of what `plan` asks for when it runs: what can be recorded. `logits` has as many rows as `plan` then has; no
    /// alternatives are reported (`top_ids` `[R, 0]`).
    fn sample_plan(
        &self,
        logits: &Self::Tensor,
        plan: &Self::SamplePlan,
        out: &mut SampleOutput<Self::Tensor>,
    ) -> Result<()>;
}

/// Microseconds of each of `times` runs of `work`, which waits for what it starts, by the host's clock.
///
/// # Errors
/// `work` failed.
pub fn host_times(times: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    (0..times)
        .map(|_| {
            let started = Instant::now();
            work().map(|()| started.elapsed().as_secs_f64() * 1e6)
        })
        .collect()
}
