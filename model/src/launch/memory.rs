//! A GPU's memory, worked out before any of it is taken: weights, workspace and a reserve; what is left is for the caches.

use std::sync::Arc;

use dsa80_cuda::counting::Allocated;
use dsa80_cuda::{Counting, Cuda, Limits, Tiles};
use dsa80_reference::LoneRank;

use super::cuda::{INDEX_LOGITS, turns};
use super::limits::{CacheMemory, page_bytes, widest, within};
use super::options::{KvCacheDtype, LaunchOptions};
use super::started::RankMemory;
use super::warm_up::{warm_up, warm_up_context};
use crate::checkpoint::Checkpoint;
use crate::dummy::DummyWeights;
use crate::engine::StepLimits;
use crate::error::LaunchError;
use crate::plan::Plan;
use crate::runner::{RankGroup, RankParts, decode_graphs};

/// For what is not counted: compiled kernels, the driver's own.
const RESERVE: u64 = 1 << 30;

/// Bytes of a recorded decode step for every layer of the model, the ends counting as one: 24 launches of 2.7 kB, as measured on an H100.
const GRAPH_BYTES_PER_LAYER: u64 = 64 << 10;

/// bf16.
pub(super) const ACT_BYTES: usize = 2;

/// A GPU's memory, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct GpuMemory {
    pub(super) total: u64,
    /// Before anything of ours is on it.
    pub(super) free: u64,
}

impl GpuMemory {
    fn used(self) -> u64 {
        self.total.saturating_sub(self.free)
    }
}

/// What a rank takes beside its caches, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) weights: u64,
    /// Tensors of a step, and what kernels keep between launches.
    pub(super) workspace: u64,
    /// Recorded decode steps.
    pub(super) graphs: u64,
}

/// The model on a device that only counts, warmed up.
struct Rehearsed {
    #[cfg_attr(not(test), expect(dead_code, reason = "it takes what it takes as long as it is there"))]
    model: RankGroup<Cuda<Counting>>,
    allocated: Allocated,
    /// Of its caches: for the steps of the warm-up and no more.
    num_pages: usize,
}

impl Rehearsed {
    fn new(
        limits: Limits,
        checkpoint: &Arc<Checkpoint>,
        options: &LaunchOptions,
    ) -> Result<Self, LaunchError> {
        let config = checkpoint.config();
        let tiles = Tiles::for_gpu(&limits.name, None)?;
        let device = Counting::new(limits);
        let allocated = device.allocated();
        let communicator = Box::new(LoneRank::new(0, options.tp)?);
        let parts = RankParts { kernels: Cuda::new(device, tiles), communicator };
        let weights = DummyWeights::like(checkpoint);
        let widest = widest(config, options);
        let turns = turns(&widest, config);
        let context = warm_up_context(&StepLimits { num_pages: usize::MAX, ..widest }, config, turns);
        let num_pages = context.div_ceil(widest.page_size);
        let mut model = RankGroup::load_alone(parts, &weights, &widest, INDEX_LOGITS, |_| {
            let max_model_len = widest.max_model_len.min(num_pages.saturating_mul(widest.page_size));
            Ok(StepLimits { num_pages, max_model_len, ..widest })
        })?;
        warm_up(&mut model, config, turns, &mut || ())?;
        Ok(Self { model, allocated, num_pages })
    }
}

impl Needs {
    /// Launches the model on a device that only counts, and warms it up: what that takes is what it will take.
    pub(super) fn rehearse(
        limits: Limits,
        checkpoint: &Arc<Checkpoint>,
        options: &LaunchOptions,
    ) -> Result<Self, LaunchError> {
        let config = checkpoint.config();
        let rehearsed = Rehearsed::new(limits, checkpoint, options)?;
        let caches = (rehearsed.num_pages * page_bytes(config, options, ACT_BYTES)) as u64;
        let weights = Plan::from_checkpoint(checkpoint, options.tp)?.weights.total();
        let workspace = rehearsed.allocated.bytes().saturating_sub(caches).saturating_sub(weights);
        let widest = widest(config, options);
        let graphs = if options.cuda_graphs { decode_graphs(&widest, config.index_topk) as u64 } else { 0 };
        let graphs = graphs * (config.num_hidden_layers as u64 + 1) * GRAPH_BYTES_PER_LAYER;
        Ok(Self { weights, workspace, graphs })
    }

    /// Bytes for the caches of this rank.
    pub(super) fn left(
        self,
        memory: GpuMemory,
        checkpoint: &Checkpoint,
        options: &LaunchOptions,
    ) -> Result<u64, LaunchError> {
        let Self { weights, workspace, graphs } = self;
        let used = memory.used();
        let budget = (memory.total as f64 * options.gpu_memory_utilization) as u64;
        let left = |weights: u64| budget.checked_sub(used + weights + workspace + graphs + RESERVE);
        if let Some(left) = left(weights).filter(|&left| left > 0) {
            return Ok(left);
        }
        let fewer = checkpoint.config().valid_tp().into_iter().find(|&tp| {
            let plan = Plan::from_checkpoint(checkpoint, tp);
            tp > options.tp && plan.is_ok_and(|plan| left(plan.weights.total()).is_some_and(|left| left > 0))
        });
        let ranks = fewer.map_or(String::new(), |tp| format!("--tp {tp}, "));
        Err(LaunchError::Options(format!(
            "{} are not enough for a rank of {}: {}; use {ranks}a higher --gpu-memory-utilization, or a lower \
             --max-num-batched-tokens (now {})",
            size(memory.total),
            options.tp,
            self.arithmetic(memory, options),
            options.max_num_batched_tokens,
        )))
    }

    /// How the caches' memory comes about, in words.
    pub(super) fn arithmetic(self, memory: GpuMemory, options: &LaunchOptions) -> String {
        let used = memory.used();
        format!(
            "--gpu-memory-utilization {} is {}, less {} in use before, {} of weights, {} of workspace, {} of graphs, {} for kernels",
            options.gpu_memory_utilization,
            size((memory.total as f64 * options.gpu_memory_utilization) as u64),
            size(used),
            size(self.weights),
            size(self.workspace),
            size(self.graphs),
            size(RESERVE),
        )
    }
}

/// What holds for a GPU before anything is on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settled {
    pub(super) limits: StepLimits,
    needs: Needs,
    /// What was in use before.
    used: u64,
    page_bytes: u64,
}

impl Settled {
    /// What `rank` has taken with so many pages, now that no more than `free` is left, beside what was planned.
    pub(super) fn memory(&self, rank: usize, num_pages: usize, now: GpuMemory) -> RankMemory {
        let Needs { weights, workspace, graphs } = self.needs;
        RankMemory {
            rank,
            weights,
            workspace,
            graphs,
            caches: self.page_bytes * num_pages as u64,
            reserve: RESERVE,
            taken: now.used().saturating_sub(self.used),
        }
    }
}

/// The limits, from what the GPU's memory holds beside weights and workspace. Nothing has been allocated yet.
pub(super) fn settle(
    memory: GpuMemory,
    device: Limits,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
) -> Result<Settled, LaunchError> {
    settle_needs(Needs::rehearse(device, checkpoint, options)?, memory, checkpoint, options)
}

/// The same of several GPUs: what those that are alike need is worked out once.
pub(super) fn settle_all(
    gpus: &[(GpuMemory, Limits)],
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
) -> Result<Vec<Settled>, LaunchError> {
    let mut rehearsed = Vec::<(&Limits, Needs)>::new();
    let mut all = Vec::new();
    for (memory, device) in gpus {
        let known = rehearsed.iter().find(|(like, _)| *like == device).map(|(_, needs)| *needs);
        let needs = known.map_or_else(|| Needs::rehearse(device.clone(), checkpoint, options), Ok)?;
        rehearsed.push((device, needs));
        all.push(settle_needs(needs, *memory, checkpoint, options)?);
    }
    Ok(all)
}

fn settle_needs(
    needs: Needs,
    memory: GpuMemory,
    checkpoint: &Arc<Checkpoint>,
    options: &LaunchOptions,
) -> Result<Settled, LaunchError> {
    let left = needs.left(memory, checkpoint, options)?;
    // What is asked for, and what the limits are taken from, is over all ranks, which are alike.
    let all_ranks = left.saturating_mul(options.tp as u64);
    let bytes = match options.kv_cache_bytes {
        Some(bytes) if bytes as u64 > all_ranks => {
            return Err(LaunchError::Options(format!(
                "--kv-cache-memory is {bytes} bytes, but {all_ranks} are left: {}; lower it, or raise --gpu-memory-utilization",
                needs.arithmetic(memory, options)
            )));
        }
        Some(bytes) => bytes,
        None => usize::try_from(all_ranks).unwrap_or(usize::MAX),
    };
    let limits = within(checkpoint.config(), options, CacheMemory { bytes, act_bytes: ACT_BYTES }).map_err(
        |error| match error {
            LaunchError::Options(reason) => LaunchError::Options(format!(
                "{reason} ({}){}",
                needs.arithmetic(memory, options),
                advice(checkpoint, options, bytes as u64 / options.tp as u64)
            )),
            other => other,
        },
    )?;
    let page_bytes = page_bytes(checkpoint.config(), options, ACT_BYTES) as u64;
    let caches = page_bytes.saturating_mul(limits.num_pages as u64);
    if caches > left {
        return Err(LaunchError::Options(format!(
            "--num-pages {} takes {caches} bytes, but {left} are left: {}; lower it, or raise --gpu-memory-utilization",
            limits.num_pages,
            needs.arithmetic(memory, options)
        )));
    }
    tracing::info!(
        max_model_len = limits.max_model_len,
        num_pages = limits.num_pages,
        page_size = limits.page_size,
        "memory: {}; {caches} bytes are the caches'",
        needs.arithmetic(memory, options)
    );
    Ok(Settled { limits, needs, used: memory.used(), page_bytes })
}

/// What to do where the caches of a GPU are too small, and what it would come to.
pub(super) fn advice(checkpoint: &Checkpoint, options: &LaunchOptions, bytes: u64) -> String {
    let eight = LaunchOptions { kv_cache_dtype: KvCacheDtype::Fp8, ..options.clone() };
    let page = page_bytes(checkpoint.config(), &eight, ACT_BYTES) as u64;
    if options.kv_cache_dtype == KvCacheDtype::Fp8 || !options.page_size.is_multiple_of(4) || page == 0 {
        return String::new();
    }
    let tokens = bytes / page * options.page_size as u64;
    format!("; --kv-cache-dtype fp8 would hold {tokens} tokens")
}

fn size(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / (1_u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn checkpoint() -> Arc<Checkpoint> {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/default");
        Arc::new(Checkpoint::open(std::path::Path::new(dir)).unwrap())
    }

    fn a100() -> Limits {
        Limits::a100()
    }

    #[test]
    fn a_rehearsal_counts_weights_and_workspace() {
        let checkpoint = checkpoint();
        let needs = |options: &LaunchOptions| Needs::rehearse(a100(), &checkpoint, options).unwrap();
        let options = LaunchOptions::default();
        let one = needs(&options);
        assert_eq!(one.weights, Plan::from_checkpoint(&checkpoint, 1).unwrap().weights.total());
        // The indexer's scores alone are 16 MiB: 512 tokens of 8192 positions.
        assert!((16 << 20..GIB).contains(&one.workspace), "{}", one.workspace);
        let more = needs(&LaunchOptions { max_num_batched_tokens: 2048, ..options.clone() });
        assert!(more.workspace > one.workspace + (10 << 20), "{} {}", more.workspace, one.workspace);
        // What is for the caches is not counted.
        let eight = needs(&LaunchOptions { kv_cache_dtype: KvCacheDtype::Fp8, ..options.clone() });
        assert!(eight.workspace.abs_diff(one.workspace) < 1 << 20, "{} {}", eight.workspace, one.workspace);
        let shared = needs(&LaunchOptions { tp: 2, ..options });
        assert!(shared.weights < one.weights);
    }

    /// Whatever is served then finds what the kernels keep between launches as large as it must be: also chunks that are longer than those
    /// whose attention is expanded, and chunks far behind the beginning.
    #[test]
    fn no_step_takes_memory_that_the_warm_up_has_not_taken() {
        use crate::dummy::GLM_5_2;
        use crate::engine::StepModel as _;
        use crate::measure::greedy_step;
        use dsa80_reference::{Batch, SequenceSlice};

        let glm = Checkpoint::from_static_dummy(&[("config.json", GLM_5_2.as_bytes())], 0).unwrap();
        let glm = Arc::new(glm);
        for (most, max_model_len) in [(1024, 1 << 17), (8192, 1 << 17), (32768, 1 << 17), (2048, 8192)] {
            let options = LaunchOptions {
                tp: 8,
                max_num_batched_tokens: most,
                max_model_len: Some(max_model_len),
                ..LaunchOptions::default()
            };
            let Rehearsed { mut model, allocated, .. } = Rehearsed::new(a100(), &glm, &options).unwrap();
            let warm = allocated.bytes();
            let (pages, token_ids): (Vec<u32>, _) = ((0..64).collect(), vec![1; most / 2]);
            let slice = SequenceSlice {
                token_ids: &token_ids[..token_ids.len().min(4096)],
                computed_len: 0,
                pages: &pages,
            };
            let step = greedy_step(Batch::new(64, &vec![slice; 2]).unwrap(), [0]);
            model.step(Arc::new(step)).unwrap();
            let grown = allocated.bytes() - warm;
            assert_eq!(grown, 0, "two chunks together, up to {most}: {grown} bytes");
            for tokens in [1, 100, 1024, 1280, 4096, 5000, 8192, 10_000, 16_384, 20_000, 32_768] {
                for computed in [0, 2000, 6000, 30_000, 98_304] {
                    if tokens > most || computed + tokens > max_model_len {
                        continue;
                    }
                    let pages: Vec<u32> = (0..(computed + tokens).div_ceil(64) as u32).collect();
                    let token_ids = vec![1; tokens];
                    let slice =
                        SequenceSlice { token_ids: &token_ids, computed_len: computed, pages: &pages };
                    let step = greedy_step(Batch::new(64, &[slice]).unwrap(), [tokens - 1]);
                    model.step(Arc::new(step)).unwrap();
                    let grown = allocated.bytes() - warm;
                    assert_eq!(grown, 0, "{tokens} after {computed}, up to {most}: {grown} bytes");
                }
            }
        }
    }

    #[test]
    fn what_is_left_is_for_the_caches_and_too_little_says_why() {
        let checkpoint = checkpoint();
        let needs = Needs { weights: 50 * GIB, workspace: 2 * GIB, graphs: GIB / 2 };
        let memory = GpuMemory { total: 80 * GIB, free: 79 * GIB };
        let options = LaunchOptions::default();
        // 72 less 1, 50, 2, half of one and 1.
        assert_eq!(needs.left(memory, &checkpoint, &options).unwrap(), 17 * GIB + GIB / 2);
        let more = LaunchOptions { gpu_memory_utilization: 1.0, ..options.clone() };
        assert_eq!(needs.left(memory, &checkpoint, &more).unwrap(), 25 * GIB + GIB / 2);
        let small = GpuMemory { total: 40 * GIB, free: 39 * GIB };
        let error = needs.left(small, &checkpoint, &options).unwrap_err().to_string();
        for words in [
            "40.00 GiB are not enough for a rank of 1",
            "0.9 is 36.00 GiB, less 1.00 GiB in use before, 50.00 GiB of weights, 2.00 GiB of workspace, 0.50 GiB of graphs, 1.00 GiB",
            // The fixture's own weights would fit.
            "use --tp 2, ",
            "--max-num-batched-tokens (now 512)",
        ] {
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn settled_limits_fit_and_what_does_not_is_refused_with_the_arithmetic() {
        let checkpoint = checkpoint();
        let memory = GpuMemory { total: 80 * GIB, free: 79 * GIB };
        let options = LaunchOptions::default();
        let settled = settle(memory, a100(), &checkpoint, &options).unwrap();
        let limits = settled.limits;
        // Full contexts for all sequences are less than there is.
        assert_eq!((limits.max_model_len, limits.num_pages), (8192, 32 * 128));
        // Enough for the weights, and for little more than the reserve.
        let needs = Needs::rehearse(a100(), &checkpoint, &options).unwrap();
        let page = page_bytes(checkpoint.config(), &options, ACT_BYTES) as u64;
        let total = needs.weights + needs.workspace + needs.graphs + RESERVE + 10 * page + page / 2;
        let tight = GpuMemory { total, free: total };
        let all = LaunchOptions { gpu_memory_utilization: 1.0, ..options };
        assert_eq!(settle(tight, a100(), &checkpoint, &all).unwrap().limits.num_pages, 10);
        let refused =
            |options: LaunchOptions| settle(tight, a100(), &checkpoint, &options).unwrap_err().to_string();
        let long = refused(LaunchOptions { max_model_len: Some(8192), ..all.clone() });
        for words in [
            "the longest context that would fit is 640",
            "of weights",
            "--kv-cache-dtype fp8 would hold 832 tokens",
        ] {
            assert!(long.contains(words), "{long}");
        }
        // GPUs that are alike, of which the second has less free, and another kind, whose tiles need more: in the memory of the first it is refused.
        let less = GpuMemory { total, free: total - 2 * page };
        let other = Limits { name: "another".into(), ..a100() };
        let alike = [(tight, a100()), (less, a100())];
        let pages = settle_all(&alike, &checkpoint, &all).unwrap();
        assert_eq!(pages.iter().map(|settled| settled.limits.num_pages).collect::<Vec<_>>(), [10, 8]);
        let unlike = [(tight, a100()), (tight, other)];
        assert!(settle_all(&unlike, &checkpoint, &all).is_err());
        // All is taken that was planned, and a GiB is left.
        let settled = settle(tight, a100(), &checkpoint, &all).unwrap();
        let took = settled.memory(1, 10, GpuMemory { total, free: GIB + page / 2 });
        assert_eq!((took.caches, took.planned() + page / 2), (10 * page, total));
        assert_eq!((took.rank, took.taken), (1, took.planned() - GIB));
        let pages = refused(LaunchOptions { num_pages: Some(11), ..all.clone() });
        assert!(pages.contains("--num-pages 11 takes") && pages.contains("of workspace"), "{pages}");
        let cache = refused(LaunchOptions { kv_cache_bytes: Some(11 * page as usize), ..all });
        assert!(cache.contains("--kv-cache-memory is") && cache.contains("are left"), "{cache}");
    }
}
