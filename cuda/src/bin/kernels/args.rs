//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Checks, times and tunes the CUDA kernels.
#[derive(Debug, Parser)]
#[command(name = "kernels", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) machine: Machine,
}

/// Where kernels run and what they are made of.
#[derive(Debug, Args)]
pub(crate) struct Machine {
    /// Kernel sources from a folder like `cuda/kernels`, so that an edit needs no rebuild; else the ones built in
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) kernels: Option<PathBuf>,
    /// Tile files from a folder like `cuda/tiles`; else the ones built in
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) tiles: Option<PathBuf>,
    /// The GPU's number
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    pub(crate) device: usize,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compiles every pinned tile (no GPU needed): registers, shared memory, spills, occupancy; fails on local memory
    Resources {
        /// Only this kernel
        kernel: Option<String>,
        /// The architecture, as NVRTC calls it
        #[arg(long, default_value = "sm_80")]
        arch: String,
        /// Every candidate of a sweep, not only the pinned tiles
        #[arg(long)]
        all_tiles: bool,
    },
    /// Small and middle cases against the f64 oracle
    Check {
        #[command(flatten)]
        select: Select,
        /// Every candidate tile, not only the pinned ones
        #[arg(long)]
        all_tiles: bool,
    },
    /// Times the cases of the goals, each checked against the f64 oracle
    Bench {
        #[command(flatten)]
        select: Select,
        /// Also writes the results, with the environment, to a file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Fewer repetitions
        #[arg(long)]
        quick: bool,
        /// The commit that the results are of
        #[arg(long, value_name = "HASH", env = "DSA80_GIT")]
        git: Option<String>,
    },
    /// Times the candidate tiles and pins the best in `<gpu>.toml`; between several GPUs also up to which size one shot of `all_reduce` serves
    Sweep {
        #[command(flatten)]
        select: Select,
        /// The folder to write to
        #[arg(long, value_name = "DIR", default_value = "cuda/tiles")]
        write: PathBuf,
        /// Shows the choice without writing it
        #[arg(long)]
        dry_run: bool,
    },
    /// Pins tiles for a GPU that is not here from those measured on another, by what they take of an A100 (no GPU needed)
    Adapt {
        /// The file with measured tiles: `h200`
        from: String,
        /// The file to write: `a100`
        to: String,
        /// The folder of both
        #[arg(long, value_name = "DIR", default_value = "cuda/tiles")]
        write: PathBuf,
    },
    /// Prints the table of a result file in Markdown
    Table {
        /// What `bench --json` wrote
        file: PathBuf,
        /// Replaces the table between `<!-- kernels:begin -->` and `<!-- kernels:end -->` in this file
        #[arg(long, value_name = "FILE")]
        readme: Option<PathBuf>,
        /// Only cases that have a goal
        #[arg(long)]
        goals: bool,
    },
}

/// Which cases.
#[derive(Debug, Args)]
pub(crate) struct Select {
    /// Only this kernel
    pub(crate) kernel: Option<String>,
    /// Only cases whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub(crate) filter: Option<String>,
}

impl Select {
    pub(crate) fn takes(&self, kernel: &str, case: &str) -> bool {
        // `sparse_mla` is also `sparse_mla_wide`.
        let same = |only: &String| {
            kernel.strip_prefix(only.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        };
        self.kernel.as_ref().is_none_or(same)
            && self.filter.as_ref().is_none_or(|text| case.contains(text.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_kernel_is_selected_with_its_variants() {
        let select = |kernel: &str, filter: Option<&str>| Select {
            kernel: Some(kernel.to_owned()),
            filter: filter.map(str::to_owned),
        };
        assert!(select("sparse_mla", None).takes("sparse_mla_wide", "B=1"));
        assert!(!select("sparse_mla_wide", None).takes("sparse_mla", "B=1"));
        assert!(!select("sparse_ml", None).takes("sparse_mla", "B=1"));
        assert!(!select("sparse_mla", Some("B=8")).takes("sparse_mla", "B=1"));
    }
}
