//! The model on an adapter of wgpu, which all ranks share.

use std::sync::Arc;
use std::time::Instant;

use dsa80_reference::communicator::SingleRank;
use dsa80_reference::wgpu::{ActType, Wgpu, WgpuCommunicator, WgpuContext, WgpuOptions, WgpuTensor};
use dsa80_reference::{Communicator, DType};

use super::limits::{self, CacheMemory};
use super::options::{Dtype, LaunchOptions};
use super::warm_up::{Turns, first_step, warm_up};
use super::{FIRST_STEPS, Hardware, WEIGHTS, reason, say_what_is_loaded, start};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::engine::{StepLimits, StepModel};
use crate::error::LaunchError;
use crate::headway::Headway;
use crate::runner::{CacheWidths, RankGroup, RankParts, RankShape};

/// Caches, where nothing else is said: what is free, wgpu does not say.
const CACHE_BYTES: usize = 256 << 20;

pub(super) type Opened = Arc<WgpuContext>;

/// An adapter, or why there is none and what to do about it. `DSA80_WGPU_ADAPTER` is a part of its name, where there are several.
pub(super) fn open(hardware: Hardware, options: &LaunchOptions) -> Result<Opened, String> {
    let act = if options.dtype == Dtype::F32 { ActType::F32 } else { ActType::Bf16 };
    let options = WgpuOptions {
        act,
        hardware: hardware == Hardware::Gpu,
        adapter: std::env::var("DSA80_WGPU_ADAPTER").ok(),
        ..WgpuOptions::default()
    };
    WgpuContext::open(&options).map_err(reason)
}

/// Loads the model, and makes a few steps so that the first request finds every kernel compiled.
pub(super) fn load(
    context: Opened,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
    headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    let config = checkpoint.config();
    tracing::info!("device: wgpu, {}", context.name());
    if !context.is_hardware() {
        tracing::warn!("this adapter is a CPU that stands in for a GPU: --device cpu is faster");
    }
    let limits = settle(&context, config, options)?;
    say_what_is_loaded(config, options, &limits);
    headway.enter(WEIGHTS);
    let mut group = RankGroup::load(parts(&context, options.tp), &start::told(checkpoint, headway), limits)?;
    headway.enter(FIRST_STEPS);
    let started = Instant::now();
    let mut begin = || headway.begin_together("a first step");
    let warmed = if context.is_hardware() {
        warm_up(&mut group, config, Turns::default(), &mut begin)
    } else {
        // The rest would take a CPU longer than it spares a request.
        begin();
        first_step(&mut group)
    };
    // The others hear why before rank 0 leaves them.
    warmed.inspect_err(|error| group.give_up(&error.to_string()))?;
    tracing::info!(elapsed_ms = started.elapsed().as_millis() as u64, "the kernels are compiled");
    group.set_step_timeout(options.step_timeout);
    Ok(Box::new(group))
}

/// Ranks that share an adapter, before they have weights.
pub(super) fn parts(context: &Opened, ranks: usize) -> Vec<RankParts<Wgpu>> {
    let backends: Vec<Wgpu> = (0..ranks).map(|_| Wgpu::new(Arc::clone(context))).collect();
    let parts = communicators(&backends).into_iter().zip(backends);
    parts.map(|(communicator, kernels)| RankParts { kernels, communicator }).collect()
}

fn communicators(backends: &[Wgpu]) -> Vec<Box<dyn Communicator<WgpuTensor>>> {
    match backends {
        [_] => vec![Box::new(SingleRank::default())],
        _ => WgpuCommunicator::group(backends).into_iter().map(|rank| Box::new(rank) as _).collect(),
    }
}

/// Rows of activations are whole words of two: what a rank multiplies must be even.
fn check_columns(config: &ModelConfig, tp: usize) -> Result<(), LaunchError> {
    let odd = |tp: usize| {
        let RankShape { q_a_shard, kv_a_shard, .. } = RankShape::new(config, tp);
        [q_a_shard, kv_a_shard].into_iter().find(|columns| !columns.is_multiple_of(2))
    };
    let Some(columns) = odd(tp) else { return Ok(()) };
    let fewer = config.valid_tp().into_iter().rev().find(|&fewer| fewer < tp && odd(fewer).is_none());
    let fewer = fewer.map_or(String::new(), |tp| format!("use --tp {tp}, or "));
    Err(LaunchError::Options(format!(
        "--device wgpu: --tp {tp} leaves a rank {columns} columns of the latents, and it takes an even number: {fewer}--device cpu"
    )))
}

/// The limits, with no more pages than the adapter binds of a layer.
pub(super) fn settle(
    context: &WgpuContext,
    config: &ModelConfig,
    options: &LaunchOptions,
) -> Result<StepLimits, LaunchError> {
    check_columns(config, options.tp)?;
    let (dtype, page_size) = (options.kv_cache_dtype.dtype(), options.page_size);
    let CacheWidths { mla, indexer } = CacheWidths::new(config, dtype, page_size);
    let act_bytes = context.act().bytes();
    let width = if dtype == DType::Fp8 { 1 } else { act_bytes };
    let of_a_layer = mla.max(indexer).saturating_mul(page_size).saturating_mul(width);
    let bound = context.most_pages(of_a_layer);
    if let Some(pages) = options.num_pages.filter(|&pages| pages > bound) {
        return Err(LaunchError::Options(format!(
            "--num-pages {pages} of {page_size} tokens ({of_a_layer} bytes each in a layer) are more than the {bound} that this adapter binds: \
             lower it{}",
            or_bf16(context, options, |of_bf16| context.most_pages(of_bf16), of_a_layer, "pages")
        )));
    }
    let page_bytes = limits::page_bytes(config, options, act_bytes).saturating_mul(options.tp);
    let bytes = options.kv_cache_bytes.unwrap_or(CACHE_BYTES).min(bound.saturating_mul(page_bytes));
    limits::within(config, options, CacheMemory { bytes, act_bytes }).map_err(|error| match error {
        LaunchError::Options(reason) if options.num_pages.is_none() => {
            let held = |of_bf16: usize| bytes / of_bf16.max(1) * page_size;
            LaunchError::Options(reason + &or_bf16(context, options, held, page_bytes, "tokens"))
        }
        other => other,
    })
}

/// What caches in f32 of `bytes` would hold in bf16, in words; nothing where they are not in f32.
fn or_bf16(
    context: &WgpuContext,
    options: &LaunchOptions,
    held: impl Fn(usize) -> usize,
    bytes: usize,
    what: &str,
) -> String {
    if context.act() == ActType::Bf16 || options.kv_cache_dtype.dtype() == DType::Fp8 {
        return String::new();
    }
    let of_bf16 = bytes / ActType::F32.bytes() * ActType::Bf16.bytes();
    format!(", or use --dtype bf16, of which there is room for {} {what}", held(of_bf16))
}
