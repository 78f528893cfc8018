//! `dsa80 eval`

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use dsa80_model::distributed::Place;
use dsa80_model::launch::Device;
use dsa80_model::measure::GpuFacts;
use serde::{Deserialize, Serialize};

use super::args::ModelArgs;
use super::bench::environment::Environment;
use super::bench::table::Table;
use super::bench::{ReportArgs, print};
use super::load::{load_checkpoint, open_for};
use super::rank;
use crate::eval::{Amount, Prompts, Reference, Report, judge};

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Prompts of a task at most; without it, as many as come to 4,096 tokens, or two that are longer.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "long")]
    prompts: Option<u32>,

    /// All prompts of every task.
    #[arg(long)]
    long: bool,

    #[command(flatten)]
    report: ReportArgs,
}

/// A run of `eval`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Results {
    environment: Environment,
    model: String,
    device: String,
    tp: usize,
    dtype: String,
    kv_cache_dtype: String,
    seconds: f64,
    #[serde(flatten)]
    report: Report,
}

pub(super) fn run(args: &EvalArgs) -> anyhow::Result<ExitCode> {
    if let Some(place) = Place::from_env()? {
        bail!(
            "`eval` runs in one process, and this is rank {} of {} (RANK, WORLD_SIZE): start it without a launcher, with --tp {2}",
            place.rank,
            place.world_size,
            place.world_size
        );
    }
    let checkpoint = open_for(&args.model)?.with_draft_layer()?;
    let (prompts, reference) = (Prompts::read(&checkpoint)?, Reference::read(&checkpoint)?);
    let name = checkpoint.name().to_owned();
    let model = load_checkpoint(&args.model, checkpoint, None).inspect_err(|_| {
        // What a start has left behind may be stuck in a driver, which then does not let the process go.
        rank::end_within(Duration::from_secs(10));
    })?;
    let started = Instant::now();
    let report = judge(&model, &prompts, reference.as_ref(), args.amount(), &mut begin);
    begin("");
    let seconds = started.elapsed().as_secs_f64();
    model.engine.shutdown(Duration::ZERO);
    let report = report.inspect_err(|_| rank::end_within(Duration::from_secs(10)))?;
    let gpu = match args.model.device {
        Device::Cpu | Device::Wgpu => None,
        Device::Cuda | Device::Auto => GpuFacts::found(),
    };
    let options = args.model.launch_options();
    let results = Results {
        environment: Environment::of(gpu, args.report.git.as_deref()),
        model: name,
        device: options.device.to_string(),
        tp: options.tp,
        dtype: options.dtype.to_string(),
        kv_cache_dtype: options.kv_cache_dtype.to_string(),
        seconds,
        report,
    };
    print(&results.words())?;
    args.report.write(&results)?;
    Ok(ExitCode::SUCCESS)
}

impl EvalArgs {
    fn amount(&self) -> Amount {
        match self.prompts {
            Some(prompts) => Amount { prompts: prompts as usize, ..Amount::ALL },
            None if self.long => Amount::ALL,
            None => Amount::QUICK,
        }
    }
}

/// Says on a terminal what is being judged; the table comes at the end.
fn begin(what: &str) {
    const CLEARED: &str = "\r\x1b[K";
    let mut out = std::io::stderr();
    if out.is_terminal() {
        // Whoever does not read it misses nothing.
        let _ = write!(out, "{CLEARED}{what}").and_then(|()| out.flush());
    }
}

impl Results {
    /// For the terminal.
    fn words(&self) -> String {
        let Self { environment, model, device, tp, dtype, kv_cache_dtype, seconds, report } = self;
        let mut words = format!(
            "{}\n{model}: --device {device}, --tp {tp}, --dtype {dtype}, --kv-cache-dtype {kv_cache_dtype}; {seconds:.1} s\n\n",
            environment.words()
        );
        let head = [
            "task",
            "prompts",
            "tokens",
            "right",
            "HF bf16",
            "differ",
            "HF of all",
            "perplexity",
            "HF",
            "drafts",
            "trainer",
        ];
        let mut table = Table::new(1, head);
        for task in &report.tasks {
            let stored = task.stored.as_ref();
            let compared = stored.and_then(|stored| stored.compared);
            table.row([
                task.task.clone(),
                task.prompts.to_string(),
                format!("{:.0}", task.context),
                percent(Some(task.accuracy)),
                percent(compared.map(|compared| compared.stored_accuracy)),
                shown(compared, |compared| compared.differ.to_string()),
                percent(stored.map(|stored| stored.accuracy)),
                format!("{:.4}", task.perplexity),
                shown(stored.and_then(|stored| stored.perplexity), |perplexity| format!("{perplexity:.4}")),
                percent(task.draft_acceptance),
                percent(stored.and_then(|stored| stored.draft_acceptance)),
            ]);
        }
        words.push_str(&table.text(""));
        if let Some(text) = &report.text {
            let against = shown(text.stored_perplexity, |stored| {
                format!("{stored:.4} in HF bf16, {:+.2} %", 100.0 * (text.perplexity / stored - 1.0))
            });
            words.push_str(&format!(
                "\nheld-back text, {} tokens: perplexity {:.4} ({against})\n",
                text.tokens, text.perplexity
            ));
        }
        words
    }
}

fn percent(share: Option<f64>) -> String {
    shown(share, |share| format!("{:.1} %", 100.0 * share))
}

/// A dash for what is not there.
fn shown<T>(value: Option<T>, words: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), words)
}
