//! The command line: `dsa80 serve`, `dsa80 generate`, `dsa80 inspect`, `dsa80 bench`, `dsa80 eval`.

mod args;
mod bench;
mod eval;
mod generate;
mod inspect;
mod load;
mod rank;
mod serve;
mod size;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// GLM-5.2 (`glm_moe_dsa`) in Rust: serve it, talk to it, look at its checkpoints.
#[derive(Debug, Parser)]
#[command(name = "dsa80", version)]
pub struct Cli {
    /// What to log, as `RUST_LOG` has it: a level, or `target=level,...`. Default: `info` for serve, `warn`
    /// otherwise.
    #[arg(long, global = true, env = "RUST_LOG", value_name = "FILTER")]
    log_level: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over OpenAI's HTTP API.
    Serve(Box<serve::ServeArgs>),
    /// Generate from one prompt and stream the text to the terminal.
    Generate(Box<generate::GenerateArgs>),
    /// Say what a checkpoint holds and what it needs, without loading it.
    Inspect(inspect::InspectArgs),
    /// Measure steps, collectives, loading and a server, and project them to other GPUs.
    Bench(bench::BenchArgs),
    /// Judge a model by its answers to prompts in its folder, beside those of Hugging Face transformers.
    Eval(Box<eval::EvalArgs>),
}

/// Runs what the command line asks for.
///
/// # Errors
/// What went wrong, for people.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let default = if matches!(cli.command, Command::Serve(_)) { "info" } else { "warn" };
    let filter = EnvFilter::try_new(cli.log_level.as_deref().unwrap_or(default))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Generate(args) => generate::run(*args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::Eval(args) => eval::run(&args),
    }
}
