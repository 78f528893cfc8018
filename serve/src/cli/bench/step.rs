//! `dsa80 bench step`

mod cases;
mod published;
mod report;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use clap::Args;
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::dummy::{DummyWeights, GLM_5_2};
use dsa80_model::launch::{
    Alone, Collectives, Device, Dtype, KvCacheDtype, LaunchOptions, Measurement, launch_alone,
};
use dsa80_model::measure::{ReadBytes, StepTimes, Waits, cache_bytes_per_token, flops, gathered};
use dsa80_model::plan::Plan;

use self::cases::{Case, Kind, SEGMENT};
use self::published::{Published, is_published};
pub(super) use self::report::{
    CaseReport, CollectivesOfStep, KernelReport, Shares, StepReport, StepSettings, WaitsOfStep,
};
use super::environment::{Environment, folder};
use super::spread::Spread;
use super::{ReportArgs, print};
use crate::cli::size;

#[derive(Debug, Args)]
pub(super) struct StepArgs {
    /// A folder with a config.json, whose model is measured with random weights; without it, GLM-5.2 in INT4.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// Where to run it: auto, cpu, wgpu or cuda.
    #[arg(long, default_value = "auto")]
    device: Device,

    /// What activations, and caches of them, are: auto (bf16 on a GPU, f32 on the CPU), bf16, or f32 (on the CPU or with --device wgpu).
    #[arg(long, default_value = "auto")]
    dtype: Dtype,

    /// Tensor-parallel ranks, of which one is measured, or a few.
    #[arg(long, value_name = "N", default_value_t = 8, visible_alias = "tensor-parallel-size")]
    tp: usize,

    /// Which one, or the first; rank 0 alone chooses tokens.
    #[arg(long, value_name = "RANK", default_value_t = 0)]
    rank: usize,

    /// Ranks that step together, from --rank on, each on a GPU of its own (with --device cpu, on a thread): what is between them is measured
    /// with them, and what the step takes without it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    live: usize,

    /// What sums over live ranks on GPUs: auto (peer where they reach each other's memory), peer or nccl.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    collectives: Collectives,

    /// New tokens from which on a prefill's attention is expanded, as far as its context allows it, instead of what the kernels take.
    #[arg(long, value_name = "TOKENS")]
    expand_from: Option<usize>,

    /// Sequences of a decode step, 64 at most; 0 for no decode.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,8,32")]
    batch: Vec<usize>,

    /// Tokens that every sequence has in its context, the new ones included.
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_value = "8192")]
    context: Vec<usize>,

    /// New tokens of a prefill step, the last of a context; 0 for no prefill.
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_value = "4096")]
    chunk: Vec<usize>,

    /// What the caches are stored in: auto (what --dtype is), bf16 or fp8.
    #[arg(long, default_value = "auto")]
    kv_cache_dtype: KvCacheDtype,

    /// Tokens in a page of the caches.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, visible_alias = "block-size")]
    page_size: usize,

    /// The share of a GPU's memory to use.
    #[arg(long, value_name = "SHARE", default_value_t = 0.95)]
    gpu_memory_utilization: f64,

    /// Memory for the caches of all ranks, such as 512M or 4G; by default what is left.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    kv_cache_memory: Option<usize>,

    /// How often every step is made.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,

    /// Do not time the kernels one by one.
    #[arg(long)]
    no_kernels: bool,

    #[command(flatten)]
    report: ReportArgs,
}

/// Sequences that the engine samples at once.
const MOST_SEQUENCES: usize = 64;

pub(super) fn run(args: StepArgs) -> anyhow::Result<()> {
    let checkpoint = Arc::new(args.checkpoint()?);
    let config = checkpoint.config();
    let wanted = args.cases(config.max_position_embeddings)?;
    let plan = Plan::from_checkpoint(&checkpoint, args.tp)?;
    let started = Instant::now();
    let weights = DummyWeights::like(&checkpoint);
    let measurement =
        Measurement { rank: args.rank, live: args.live, ceilings: true, expand_from: args.expand_from };
    let Alone { mut ranks, between, gpu } =
        launch_alone(&checkpoint, &weights, &args.launch_options(&wanted), &measurement)?;
    let limits = ranks.limits();
    let environment = Environment::of(gpu, args.report.git.as_deref());
    let mut report = StepReport {
        settings: StepSettings {
            model: args.model.as_deref().map_or_else(|| "GLM-5.2".to_owned(), folder),
            tp: args.tp,
            rank: args.rank,
            live: args.live,
            between: between.to_owned(),
            expand_from: args.expand_from,
            num_hidden_layers: config.num_hidden_layers,
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            gathered: gathered(config, args.tp),
            dtype: args.dtype.to_string(),
            kv_cache_dtype: args.kv_cache_dtype.to_string(),
            page_size: limits.page_size,
            num_pages: limits.num_pages,
            weight_bytes: plan.weights.total(),
            cache_bytes_per_token: cache_bytes_per_token(config, &limits, ranks.act_bytes()),
        },
        environment,
        notes: notes(args.live),
        cases: Vec::new(),
    };
    print(&report.head(started.elapsed()))?;

    let (mut cases, mut left_out) = (Vec::<Case>::new(), Vec::new());
    for case in &wanted {
        match case.fit(&limits) {
            Some(fitting) => cases.push(fitting),
            None => left_out.push(format!("left out, since the caches are too small for it: {case:?}")),
        }
    }
    for line in left_out {
        print(&format!("{line}\n"))?;
        report.notes.push(line);
    }
    if cases.is_empty() {
        bail!("the caches hold {} tokens, too few for any of the steps", limits.num_pages * limits.page_size);
    }
    let pages = cases.iter().map(|case| case.pages(&limits)).max().unwrap_or(0);
    let vocabulary = cases::vocabulary(config.vocab_size, args.rank..args.rank + args.live, args.tp);
    let started = Instant::now();
    for batch in cases::fill(&limits, pages, &vocabulary)? {
        ranks.fill(&batch)?;
    }
    for case in cases {
        let step = case.step(&limits, &vocabulary)?;
        let seen = ranks.see(&step.batch)?;
        if report.cases.is_empty() {
            // Only what has been looked at is certain to be there.
            let tokens = pages * limits.page_size;
            print(&format!(
                "{tokens} tokens in the caches after {:.1} s\n",
                started.elapsed().as_secs_f64()
            ))?;
        }
        let sampled = step.targets.len();
        let read = ReadBytes::of(config, &plan, &limits, ranks.act_bytes(), &step.batch, &seen, sampled > 0);
        let times = ranks.time(&step, args.runs.into(), !args.no_kernels)?;
        let experts = Spread::of(&seen.experts.values().map(|&n| n as f64).collect::<Vec<_>>(), 1.0);
        let mut result = case_report(
            &case,
            &report.environment,
            times,
            &report.settings,
            CaseReport {
                read,
                flops: flops(config, args.tp, &step.batch, sampled),
                experts_a_layer: experts.map(|spread| spread.median),
                ..CaseReport::default()
            },
        );
        if case.kind == Kind::Decode && args.live == args.tp && is_published(config) {
            result.published = Published::of(&result, args.live, report.environment.gpu.as_ref());
        }
        print(&result.text(&report.environment))?;
        report.cases.push(result);
        // What is measured stays, whatever becomes of the rest.
        args.report.write(&report)?;
    }
    Ok(())
}

impl StepArgs {
    fn checkpoint(&self) -> anyhow::Result<Checkpoint> {
        const SEED: u32 = 0;
        Ok(match &self.model {
            Some(dir) => Checkpoint::open_dummy(dir, SEED)?,
            None if self.device == Device::Cpu => {
                bail!(
                    "a rank of GLM-5.2 is too large for the CPU; use --model DIR with a smaller model's config.json"
                )
            }
            None => Checkpoint::from_static_dummy(&[("config.json", GLM_5_2.as_bytes())], SEED)?,
        })
    }

    fn launch_options(&self, cases: &[Case]) -> LaunchOptions {
        // Without a GPU the auto device is the CPU, for which GLM-5.2 is too large.
        let auto = self.model.is_none() && self.device == Device::Auto;
        let device = if auto { Device::Cuda } else { self.device };
        let tokens = cases.iter().map(|case| case.tokens()).max().unwrap_or(1).max(SEGMENT);
        let sequences = cases.iter().map(|case| case.sequences).max().unwrap_or(1);
        LaunchOptions {
            device,
            tp: self.tp,
            dtype: self.dtype,
            max_model_len: cases.iter().map(|case| case.context).max(),
            // The caches are filled by several sequences a step.
            max_num_seqs: sequences.max(tokens / SEGMENT),
            max_num_batched_tokens: tokens,
            page_size: self.page_size,
            kv_cache_bytes: self.kv_cache_memory,
            kv_cache_dtype: self.kv_cache_dtype,
            collectives: self.collectives,
            gpu_memory_utilization: self.gpu_memory_utilization,
            ..LaunchOptions::default()
        }
    }

    /// Decodes, then prefills, in the order they are given in.
    fn cases(&self, longest: usize) -> anyhow::Result<Vec<Case>> {
        let mut cases = Vec::new();
        for &context in &self.context {
            if context == 0 || context > longest {
                bail!(
                    "--context {context}: expected 1 to {longest} tokens, which is what the model was made for"
                );
            }
            for &sequences in self.batch.iter().filter(|&&sequences| sequences > 0) {
                if sequences > MOST_SEQUENCES {
                    bail!("--batch {sequences}: a decode step has {MOST_SEQUENCES} sequences at most");
                }
                cases.push(Case { kind: Kind::Decode, sequences, context, wanted: context });
            }
        }
        for &context in &self.context {
            for &chunk in self.chunk.iter().filter(|&&chunk| chunk > 0) {
                if chunk > context {
                    bail!("--chunk {chunk} is longer than --context {context}, of which it is the end");
                }
                cases.push(Case { kind: Kind::Prefill { chunk }, sequences: 1, context, wanted: context });
            }
        }
        if cases.is_empty() {
            bail!("nothing to measure: --batch and --chunk are both 0");
        }
        Ok(cases)
    }
}

/// What a reader of the results has to know.
fn notes(live: usize) -> Vec<String> {
    let ranks = if live == 1 {
        "one rank alone with random weights: what collectives take, and what other ranks would add, is left out"
    } else {
        "live ranks with random weights, of which the slowest counts: they sum and gather in the shapes of the whole group, and what ranks that \
         are not there would add, to the sums and to what is moved, is left out; alone: the same step without collectives, each rank with \
         tokens of its own part of the vocabulary; what collectives add is the difference, in which waiting for the slower rank is contained; lost to skew: how long a \
         rank is in every collective of a replayed step beyond the one that came to it last, all together, the mean over ranks"
    };
    [
        ranks,
        "every sequence has pages of its own; the caches were filled by prefilling segments of 512 tokens",
        "device: the step's launches, just as they are, replayed from one graph, by the GPU's clock; step: as the engine makes it, by the \
         host's clock, from the step to its tokens, decode from its graph, prefill launch by launch",
        "a kernel's time is that of its launches alone, replayed from a graph of their own, on what the last step has left: what it shares \
         with its neighbours (overlap, the L2, gaps) is the difference between their sum and the step",
        "read: weights, experts that were chosen, rows that were selected, once each; activations are not counted",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Puts the times to what is known of the step.
fn case_report(
    case: &Case,
    environment: &Environment,
    times: StepTimes,
    settings: &StepSettings,
    rest: CaseReport,
) -> CaseReport {
    const MILLI: f64 = 1e-3;
    let StepTimes { step_us, host_us, device_us, alone_us, waits, kernels } = times;
    let (step_ms, device_ms) = (Spread::of(&step_us, MILLI), Spread::of(&device_us, MILLI));
    let ms = device_ms.or(step_ms).map_or(f64::NAN, |spread| spread.median);
    let device_us = device_ms.map(|spread| spread.median / MILLI);
    let kernels: Vec<KernelReport> = kernels
        .into_iter()
        .filter_map(|kernel| {
            let us = Spread::of(&kernel.us, 1.0)?.median;
            let share = us / device_us?;
            Some(KernelReport {
                name: kernel.name,
                shape: kernel.shape,
                launches: kernel.launches,
                us,
                share,
            })
        })
        .collect();
    let collectives = Spread::of(&alone_us, MILLI).map(|alone_ms| CollectivesOfStep {
        alone_ms,
        added_ms: ms - alone_ms.median,
        share: (ms - alone_ms.median) / ms,
        kernels_ms: (settings.between == "peer" && !kernels.is_empty()).then(|| {
            let sums = kernels.iter().filter(|kernel| is_collective(&kernel.name));
            sums.map(|kernel| kernel.us).sum::<f64>() * MILLI
        }),
    });
    let waits = waits.and_then(|waits: Waits| {
        Some(WaitsOfStep {
            lost_ms: Spread::of(&waits.lost_us, MILLI)?,
            collectives_ms: Spread::of(&waits.collectives_us, MILLI)?,
            of_ranks_ms: waits.of_ranks_us.iter().map(|us| us * MILLI).collect(),
        })
    });
    let shares = step_ms.and_then(|step| {
        let device_ms = device_ms?.median;
        let alone_ms = collectives.map_or(device_ms, |of| of.alone_ms.median);
        let lost_ms = waits.as_ref().map(|waits| waits.lost_ms.median);
        let host_ms = Spread::of(&host_us, MILLI).map(|host| host.median);
        Some(Shares::of(step.median, device_ms, alone_ms, host_ms, lost_ms))
    });
    let gpu = environment.gpu.as_ref();
    let of_ceiling = |value: f64, ceiling: Option<f64>| ceiling.map(|ceiling| value / ceiling);
    let (read_gb_s, tflop_s) = (rest.read.total() as f64 / ms / 1e6, rest.flops / ms / 1e9);
    CaseReport {
        kind: case.kind.name().to_owned(),
        sequences: case.sequences,
        context: case.context,
        wanted_context: case.wanted,
        tokens: case.tokens(),
        tokens_per_s: case.tokens() as f64 / ms * 1e3,
        step_ms,
        host_us: Spread::of(&host_us, 1.0),
        device_ms,
        read_bytes: rest.read.total(),
        read_gb_s,
        read_share: of_ceiling(read_gb_s, gpu.and_then(|gpu| gpu.read_gb_s)),
        mma_share: of_ceiling(tflop_s, gpu.and_then(|gpu| gpu.mma_tflop_s)),
        collectives,
        waits,
        shares,
        kernels_ms: device_us.map(|_| kernels.iter().map(|kernel| kernel.us).sum::<f64>() * MILLI),
        kernels,
        ..rest
    }
}

/// Whether a kernel sums, gathers or sends between ranks.
fn is_collective(kernel: &str) -> bool {
    ["all_reduce", "all_gather", "broadcast"].iter().any(|name| kernel.starts_with(name))
}
