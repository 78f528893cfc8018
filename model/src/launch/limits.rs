//! What a step and the caches may hold, or why that is impossible.

use dsa80_reference::DType;

use super::options::{Device, Dtype, KvCacheDtype, LaunchOptions};
use crate::config::ModelConfig;
use crate::engine::StepLimits;
use crate::error::LaunchError;
use crate::runner::{CacheWidths, MAX_LOGPROBS};

/// Memory for the caches.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheMemory {
    /// Bytes over all ranks, where the options give no number of pages.
    pub(super) bytes: usize,
    /// Bytes of an element of an activation.
    pub(super) act_bytes: usize,
}

/// Refuses options that no model and no memory can make sense of.
pub(super) fn check(config: &ModelConfig, options: &LaunchOptions) -> Result<(), LaunchError> {
    config.check_tp(options.tp)?;
    for (name, value) in [
        ("--max-num-seqs", options.max_num_seqs),
        ("--max-num-batched-tokens", options.max_num_batched_tokens),
        ("--page-size", options.page_size),
        ("--max-queued-requests", options.max_waiting),
        ("--max-model-len", options.max_model_len.unwrap_or(1)),
        ("--num-pages", options.num_pages.unwrap_or(1)),
    ] {
        if value == 0 {
            return Err(LaunchError::Options(format!("{name} is 0; expected at least 1")));
        }
    }
    if !(options.gpu_memory_utilization > 0.0 && options.gpu_memory_utilization <= 1.0) {
        let found = options.gpu_memory_utilization;
        return Err(LaunchError::Options(format!(
            "--gpu-memory-utilization is {found}; expected a share above 0 and at most 1"
        )));
    }
    for (name, value) in
        [("--step-timeout", options.step_timeout), ("--start-timeout", options.start_timeout)]
    {
        if value.is_zero() {
            return Err(LaunchError::Options(format!("{name} is 0; expected at least 1 second")));
        }
    }
    check_dtype(options)?;
    if options.kv_cache_dtype == KvCacheDtype::Fp8 && !options.page_size.is_multiple_of(4) {
        return Err(LaunchError::Options(format!(
            "--page-size {} is not a multiple of 4, which --kv-cache-dtype fp8 needs",
            options.page_size
        )));
    }
    if let Some(wanted) = options.max_model_len
        && wanted > config.max_position_embeddings
    {
        return Err(LaunchError::Options(format!(
            "--max-model-len {wanted} is more than the model's max_position_embeddings, {}",
            config.max_position_embeddings
        )));
    }
    Ok(())
}

/// Refuses what the device does not compute in.
fn check_dtype(options: &LaunchOptions) -> Result<(), LaunchError> {
    let reason = match (options.dtype, options.device, options.kv_cache_dtype) {
        (Dtype::F32, Device::Cuda, _) => {
            "--dtype f32: the CUDA kernels compute in bf16; use --device wgpu or cpu, or --dtype bf16"
        }
        (Dtype::F32, _, KvCacheDtype::Bf16) => {
            "--kv-cache-dtype bf16 is for what computes in bf16; with --dtype f32 use auto (f32) or fp8"
        }
        _ => return Ok(()),
    };
    Err(LaunchError::Options(reason.into()))
}

/// The limits if memory were no matter: what the tensors of a step are sized by.
pub(super) fn widest(config: &ModelConfig, options: &LaunchOptions) -> StepLimits {
    StepLimits {
        page_size: options.page_size,
        num_pages: options.num_pages.unwrap_or(usize::MAX),
        cache_dtype: options.kv_cache_dtype.dtype(),
        max_batch_tokens: options.max_num_batched_tokens.max(options.max_num_seqs),
        max_batch_seqs: options.max_num_seqs,
        max_model_len: options.max_model_len.unwrap_or(config.max_position_embeddings),
        vocab_size: config.vocab_size,
        max_logprobs: MAX_LOGPROBS.min(config.vocab_size),
    }
}

/// The limits with caches in `memory`.
pub(super) fn within(
    config: &ModelConfig,
    options: &LaunchOptions,
    memory: CacheMemory,
) -> Result<StepLimits, LaunchError> {
    let widest = widest(config, options);
    let page_size = options.page_size;
    // Saturating: whatever the options say, the comparison below answers, not an overflow.
    let page_bytes = page_bytes(config, options, memory.act_bytes).saturating_mul(options.tp);
    let affordable = options.num_pages.unwrap_or(memory.bytes / page_bytes);
    let wanted = widest.max_model_len;
    let held = affordable.saturating_mul(page_size);
    let max_model_len = wanted.min(held);
    if max_model_len == 0 || options.max_model_len.is_some_and(|wanted| wanted > max_model_len) {
        return Err(LaunchError::Options(format!(
            "a context of {wanted} tokens needs {} pages of {page_size} tokens ({page_bytes} bytes each over {} ranks), but only \
             {affordable} fit; the longest context that would fit is {} tokens: lower --max-model-len, or raise --kv-cache-memory \
             or --num-pages",
            wanted.div_ceil(page_size),
            options.tp,
            held,
        )));
    }
    if max_model_len < wanted {
        tracing::warn!(
            "the caches hold {max_model_len} tokens, so contexts are cut from {wanted} to that; raise --kv-cache-memory for more"
        );
    }
    let num_pages = options.num_pages.unwrap_or_else(|| {
        affordable.min(options.max_num_seqs.saturating_mul(max_model_len.div_ceil(page_size)))
    });
    Ok(StepLimits { num_pages, max_model_len, ..widest })
}

/// Bytes of a page on one rank.
pub(super) fn page_bytes(config: &ModelConfig, options: &LaunchOptions, act_bytes: usize) -> usize {
    let dtype = options.kv_cache_dtype.dtype();
    let width = if dtype == DType::Fp8 { 1 } else { act_bytes };
    let token = CacheWidths::new(config, dtype, options.page_size).per_token(config).saturating_mul(width);
    options.page_size.saturating_mul(token)
}
