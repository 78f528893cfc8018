//! The command of whoever works on the kernels: what they take, whether they are right, how fast they are, which tiles are best.

mod adapt;
mod args;
mod bench;
mod cases;
mod check;
mod crossings;
mod inputs;
mod oracle;
mod report;
mod resources;
mod sweep;
mod table;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use dsa80_cuda::{Gpu, Sources};

use crate::args::{Cli, Command, Machine};
use crate::report::Report;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().with_target(false).init();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kernels: {error:#}");
            ExitCode::from(if error.is::<NoMachine>() { 2 } else { 1 })
        }
    }
}

/// What the command needs of this machine is missing.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoMachine(dsa80_reference::Error);

impl Machine {
    fn sources(&self) -> Sources {
        self.kernels.clone().map_or(Sources::Embedded, Sources::Folder)
    }

    fn open(&self) -> anyhow::Result<Gpu> {
        Ok(Gpu::open(self.device, self.sources()).map_err(NoMachine)?)
    }
}

fn run(Cli { command, machine }: Cli) -> anyhow::Result<()> {
    match command {
        Command::Resources { kernel, arch, all_tiles } => {
            resources::run(&machine, kernel.as_deref(), &arch, all_tiles)
        }
        Command::Check { select, all_tiles } => check::run(&machine, &select, all_tiles),
        Command::Bench { select, json, quick, git } => bench::run(&machine, &select, json, quick, git),
        Command::Sweep { select, write, dry_run } => sweep::run(&machine, &select, &write, dry_run),
        Command::Adapt { from, to, write } => adapt::run(&machine, &from, &to, &write),
        Command::Table { file, readme, goals } => table(&file, readme.as_deref(), goals),
    }
}

#[expect(clippy::print_stdout, reason = "the table is the command's result")]
fn table(file: &Path, readme: Option<&Path>, goals: bool) -> anyhow::Result<()> {
    let report = Report::read(file)?;
    let table = if goals { report.with_goals().markdown() } else { report.markdown() };
    let Some(readme) = readme else {
        println!("{table}");
        return Ok(());
    };
    let text = std::fs::read_to_string(readme).with_context(|| readme.display().to_string())?;
    let text =
        report::replace_between_markers(&text, &table).with_context(|| readme.display().to_string())?;
    std::fs::write(readme, text).with_context(|| readme.display().to_string())
}
