//! `dsa80 bench`: what steps, collectives, loading and a server take, and what that comes to on eight GPUs.

mod collectives;
pub(super) mod environment;
mod load;
mod project;
mod serve;
mod spread;
mod start;
mod step;
mod summary;
pub(super) mod table;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    what: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Decode and prefill steps of one rank of several, with random weights: time, tokens a second, bytes read, and what every kernel takes.
    /// What other ranks would add is left out.
    Step(Box<step::StepArgs>),
    /// Sums over ranks, by size.
    Collectives(collectives::CollectivesArgs),
    /// The start of a server, by phase, and the memory that every GPU has afterwards beside what was planned.
    Start(Box<start::StartArgs>),
    /// Loading a checkpoint for one rank, beside a plain read of the same files.
    Load(Box<load::LoadArgs>),
    /// A server's latencies and throughput under load: any that speaks OpenAI's API.
    Serve(Box<serve::ServeArgs>),
    /// Tables in Markdown of what the others have written.
    Summary(summary::SummaryArgs),
    /// A projection: what measured steps and collectives come to on eight GPUs of a kind.
    Project(project::ProjectArgs),
}

/// Where results go beside the terminal.
#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// A file for the results, with the environment they were measured in.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// The commit that is measured, for the results.
    #[arg(long, value_name = "COMMIT")]
    pub(super) git: Option<String>,
}

pub(super) fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        Bench::Step(args) => step::run(*args),
        Bench::Collectives(args) => collectives::run(args),
        Bench::Start(args) => start::run(&args),
        Bench::Load(args) => load::run(*args),
        Bench::Serve(args) => serve::run(&args),
        Bench::Summary(args) => summary::run(&args),
        Bench::Project(args) => project::run(&args),
    }?;
    Ok(ExitCode::SUCCESS)
}

impl ReportArgs {
    /// Writes the results where they are wanted.
    pub(super) fn write(&self, report: &impl Serialize) -> anyhow::Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let text = serde_json::to_string_pretty(report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Results that were written before.
fn read_report<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let reader = &mut serde_json::Deserializer::from_str(&text);
    serde_path_to_error::deserialize(reader)
        .with_context(|| format!("{} is not what is expected here", path.display()))
}

/// Prints at once, so that results are seen while others are measured. A reader that has gone away is no error.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
