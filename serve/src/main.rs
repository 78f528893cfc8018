//! The `dsa80` command.

use std::process::ExitCode;

use clap::Parser;
use dsa80_serve::cli::{Cli, run};

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
