//! From a checkpoint to a running engine.

use std::str::FromStr;
use std::sync::Arc;

use dsa80_reference::cpu::{Cpu, ThreadCommunicator};

use crate::checkpoint::Checkpoint;
use crate::config::{IndexerType, ModelConfig};
use crate::engine::{Engine, EngineHandle, EngineOptions, StepLimits};
use crate::error::LaunchError;
use crate::runner::{MAX_LOGPROBS, RankGroup, RankParts, WeightSource};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The best one that this build has.
    #[default]
    Auto,
    /// The oracle in f32.
    Cpu,
    /// WGSL shaders.
    Wgpu,
    /// Hand-written CUDA kernels.
    Cuda,
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "wgpu" => Ok(Device::Wgpu),
            "cuda" => Ok(Device::Cuda),
            _ => Err(format!("unknown device `{name}`; expected auto, cpu, wgpu or cuda")),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Device::Auto => "auto",
            Device::Cpu => "cpu",
            Device::Wgpu => "wgpu",
            Device::Cuda => "cuda",
        })
    }
}

/// How a model is launched.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchOptions {
    /// Where it runs.
    pub device: Device,
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// The longest context served; by default the config's `max_position_embeddings`, or what the cache
    /// memory holds if that is less.
    pub max_model_len: Option<usize>,
    /// Sequences in a step at most.
    pub max_num_seqs: usize,
    /// Tokens in a step at most: the chunk that a prompt is cut into.
    pub max_num_batched_tokens: usize,
    /// Tokens a page of the caches holds.
    pub page_size: usize,
    /// Pages of the caches; by default what `max_num_seqs` full contexts need, within `kv_cache_bytes`.
    pub num_pages: Option<usize>,
    /// Memory for the caches of all ranks, in bytes, where `num_pages` is not given.
    pub kv_cache_bytes: usize,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// Reuse the cache rows of equal prompt beginnings.
    pub enable_prefix_caching: bool,
}

impl Default for LaunchOptions {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            tp: 1,
            max_model_len: None,
            max_num_seqs: 32,
            max_num_batched_tokens: 512,
            page_size: 64,
            num_pages: None,
            kv_cache_bytes: 256 << 20,
            max_waiting: 256,
            enable_prefix_caching: true,
        }
    }
}

/// Loads `checkpoint` on the chosen device and starts its engine.
///
/// # Errors
/// A device that this build does not have, options that do not fit the model (with the arithmetic and what
/// would fit), or a damaged checkpoint.
pub fn launch(checkpoint: &Arc<Checkpoint>, options: &LaunchOptions) -> Result<EngineHandle, LaunchError> {
    let config = checkpoint.config();
    match options.device {
        Device::Cpu => tracing::info!("device: cpu, as asked for"),
        Device::Auto => tracing::info!("device: cpu (auto: this build has no GPU backend)"),
        Device::Wgpu | Device::Cuda => {
            return Err(LaunchError::Options(format!(
                "--device {} is not in this build; use --device cpu (or auto)",
                options.device
            )));
        }
    }
    config.check_tp(options.tp)?;
    let limits = cpu_limits(config, options)?;
    tracing::info!(
        tp = options.tp,
        max_model_len = limits.max_model_len,
        num_pages = limits.num_pages,
        page_size = limits.page_size,
        "loading {} layers",
        config.num_hidden_layers,
    );
    let cpu = Cpu::<f32>::new();
    let ranks = ThreadCommunicator::group(cpu, options.tp)
        .into_iter()
        .map(|rank| RankParts { kernels: cpu, communicator: Box::new(rank) })
        .collect();
    let weights: Arc<dyn WeightSource> = Arc::clone(checkpoint) as _;
    let model = RankGroup::load(ranks, &weights, limits)?;
    Ok(Engine::start(
        Box::new(model),
        EngineOptions {
            max_waiting: options.max_waiting,
            eos_token_ids: config.eos_token_ids.clone(),
            max_batch_tokens: options.max_num_batched_tokens,
            max_running: options.max_num_seqs,
            enable_prefix_caching: options.enable_prefix_caching,
        },
    ))
}

/// Bytes of cache a token takes on one rank of `Cpu<f32>`.
fn cpu_cache_bytes_per_token(config: &ModelConfig) -> usize {
    let full = config.indexer_types.iter().filter(|kind| **kind == IndexerType::Full).count();
    let mla = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim);
    (mla + full * config.index_head_dim) * size_of::<f32>()
}

/// What a step and the caches may hold, or why that is impossible.
fn cpu_limits(config: &ModelConfig, options: &LaunchOptions) -> Result<StepLimits, LaunchError> {
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
    if let Some(wanted) = options.max_model_len
        && wanted > config.max_position_embeddings
    {
        return Err(LaunchError::Options(format!(
            "--max-model-len {wanted} is more than the model's max_position_embeddings, {}",
            config.max_position_embeddings
        )));
    }
    let page_size = options.page_size;
    // Saturating: whatever the options say, the comparison below answers, not an overflow.
    let page_bytes = page_size.saturating_mul(cpu_cache_bytes_per_token(config)).saturating_mul(options.tp);
    let affordable = options.num_pages.unwrap_or(options.kv_cache_bytes / page_bytes);
    let wanted = options.max_model_len.unwrap_or(config.max_position_embeddings);
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
    Ok(StepLimits {
        page_size,
        num_pages,
        max_batch_tokens: options.max_num_batched_tokens.max(options.max_num_seqs),
        max_batch_seqs: options.max_num_seqs,
        max_model_len,
        vocab_size: config.vocab_size,
        max_logprobs: MAX_LOGPROBS.min(config.vocab_size),
    })
}
