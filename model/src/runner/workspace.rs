//! The tensors that a step computes in, allocated once.

use dsa80_reference::{DType, DeviceTensor, Kernels, Result, SampleOutput};

use super::gathered::Gathered;
use super::shape::RankShape;

/// Rows that are projected to logits at once; more are taken in turns. Bounds the logits at 64 rows of the
/// vocabulary.
pub(crate) const LOGIT_ROWS: usize = 64;

/// Alternatives with log-probabilities that a token can carry at most.
pub(crate) const MAX_LOGPROBS: usize = 20;

/// Every intermediate of a step. `M` is the most tokens a step can have; shapes in the comments are of one
/// step of `T`.
pub(crate) struct Workspace<K: Kernels> {
    pub(crate) cos_sin: K::Tensor,        // [T, rope / 2, 2]
    pub(crate) residual: K::Tensor,       // [T, hidden], not rounded between layers
    pub(crate) normed: K::Tensor,         // [T, hidden]
    pub(crate) delta: K::Tensor,          // [T, hidden], what a block adds to the residual stream
    pub(crate) shared: K::Tensor,         // [T, hidden], output of the shared expert
    pub(crate) q_a: Gathered<K>,          // [T, q_lora_rank], before its norm
    pub(crate) q_latent: K::Tensor,       // [T, q_lora_rank]
    pub(crate) q: K::Tensor,              // [T, heads, nope + rope]
    pub(crate) q_absorbed: K::Tensor,     // [T, heads, kv_lora_rank + rope]
    pub(crate) kv_a: Gathered<K>,         // [T, kv_lora_rank + rope]
    pub(crate) o_latent: K::Tensor,       // [T, heads, kv_lora_rank]
    pub(crate) o: K::Tensor,              // [T, heads, v]
    pub(crate) index_q: K::Tensor,        // [T, index_heads, index_dim]
    pub(crate) index_k: K::Tensor,        // [T, index_dim]
    pub(crate) index_weights: K::Tensor,  // [T, index_heads]
    pub(crate) index_logits: K::Tensor,   // [rows of a chunk, longest context]
    pub(crate) topk_indices: K::Tensor,   // [T, index_topk]
    pub(crate) activated: K::Tensor,      // [T, intermediate]
    pub(crate) router_logits: K::Tensor,  // [T, experts]
    pub(crate) expert_ids: K::Tensor,     // [T, experts per token]
    pub(crate) expert_weights: K::Tensor, // [T, experts per token]
    pub(crate) logit_rows: K::Tensor,     // [R]
    pub(crate) every_row: K::Tensor,      // [R], 0, 1, 2, ..: the logit rows of a recorded step
    pub(crate) logits_shard: K::Tensor,   // [R, vocab / world_size]
    pub(crate) logits: K::Tensor,         // [R, vocab]
    pub(crate) sampled: SampleOutput<K::Tensor>,
}

impl<K: Kernels> Workspace<K> {
    /// `index_logits` is the size in floats of the indexer's score chunk; at least one row of the longest
    /// context.
    pub(crate) fn alloc(
        kernels: &K,
        shape: &RankShape,
        max_tokens: usize,
        index_logits: usize,
    ) -> Result<Self> {
        let act = |columns: usize| kernels.alloc(DType::Act, &[max_tokens, columns]);
        let float = |columns: usize| kernels.alloc(DType::Float, &[max_tokens, columns]);
        let index = |columns: usize| kernels.alloc(DType::Index, &[max_tokens, columns]);
        let latent = shape.kv_lora_rank + shape.qk_rope_head_dim;
        let mut every_row = kernels.alloc(DType::Index, &[LOGIT_ROWS])?;
        kernels.write_index(&std::array::from_fn::<_, LOGIT_ROWS, _>(|row| row as i32), &mut every_row)?;
        Ok(Self {
            every_row,
            cos_sin: float(shape.qk_rope_head_dim)?,
            residual: float(shape.hidden_size)?,
            normed: act(shape.hidden_size)?,
            delta: act(shape.hidden_size)?,
            shared: act(shape.hidden_size)?,
            q_a: Gathered::alloc(act, shape.q_a_shard, shape.q_lora_rank)?,
            q_latent: act(shape.q_lora_rank)?,
            q: act(shape.heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim))?,
            q_absorbed: act(shape.heads * latent)?,
            kv_a: Gathered::alloc(act, shape.kv_a_shard, latent)?,
            o_latent: act(shape.heads * shape.kv_lora_rank)?,
            o: act(shape.heads * shape.v_head_dim)?,
            index_q: act(shape.index_n_heads * shape.index_head_dim)?,
            index_k: act(shape.index_head_dim)?,
            index_weights: float(shape.index_n_heads)?,
            index_logits: kernels.alloc(DType::Float, &[index_logits])?,
            topk_indices: index(shape.index_topk)?,
            activated: act(shape.max_intermediate)?,
            router_logits: float(shape.n_routed_experts)?,
            expert_ids: index(shape.num_experts_per_tok)?,
            expert_weights: float(shape.num_experts_per_tok)?,
            logit_rows: kernels.alloc(DType::Index, &[LOGIT_ROWS])?,
            logits_shard: kernels.alloc(DType::Float, &[LOGIT_ROWS, shape.vocab_shard])?,
            logits: kernels.alloc(DType::Float, &[LOGIT_ROWS, shape.vocab_size])?,
            sampled: SampleOutput {
                token_ids: kernels.alloc(DType::Index, &[LOGIT_ROWS])?,
                logprobs: kernels.alloc(DType::Float, &[LOGIT_ROWS])?,
                top_ids: kernels.alloc(DType::Index, &[LOGIT_ROWS, MAX_LOGPROBS])?,
                top_logprobs: kernels.alloc(DType::Float, &[LOGIT_ROWS, MAX_LOGPROBS])?,
            },
        })
    }

    /// Shapes everything whose rows are the step's tokens.
    pub(crate) fn set_tokens(&mut self, shape: &RankShape, tokens: usize) -> Result<()> {
        self.cos_sin.set_shape(&[tokens, shape.qk_rope_head_dim / 2, 2])?;
        self.q_absorbed.set_shape(&[tokens, shape.heads, shape.kv_lora_rank + shape.qk_rope_head_dim])?;
        self.o_latent.set_shape(&[tokens, shape.heads, shape.kv_lora_rank])?;
        for tensor in [
            &mut self.residual,
            &mut self.normed,
            &mut self.delta,
            &mut self.shared,
            &mut self.q_latent,
            &mut self.index_k,
            &mut self.index_weights,
            &mut self.topk_indices,
            &mut self.router_logits,
            &mut self.expert_ids,
            &mut self.expert_weights,
        ] {
            tensor.set_rows(tokens)?;
        }
        self.q_a.set_rows(tokens)?;
        self.kv_a.set_rows(tokens)
    }

    /// Shapes the tensors whose rows are logits.
    pub(crate) fn set_logit_rows(&mut self, rows: usize, top: usize) -> Result<()> {
        self.logit_rows.set_rows(rows)?;
        self.every_row.set_rows(rows)?;
        self.logits_shard.set_rows(rows)?;
        self.logits.set_rows(rows)?;
        self.sampled.token_ids.set_rows(rows)?;
        self.sampled.logprobs.set_rows(rows)?;
        self.sampled.top_ids.set_shape(&[rows, top])?;
        self.sampled.top_logprobs.set_shape(&[rows, top])
    }
}
