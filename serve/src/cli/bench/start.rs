//! `dsa80 bench start`

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use dsa80_model::launch::{RankMemory, Started, launch_and_tell};
use dsa80_model::measure::GpuFacts;
use serde::{Deserialize, Serialize};

use super::environment::{Environment, folder};
use super::table::Table;
use super::{ReportArgs, print};
use crate::cli::args::ModelArgs;
use crate::cli::{load, size};

#[derive(Debug, Args)]
pub(super) struct StartArgs {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    report: ReportArgs,
}

/// A run of `bench start`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct StartReport {
    pub(super) environment: Environment,
    pub(super) model: String,
    pub(super) tp: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) max_model_len: usize,
    pub(super) num_pages: usize,
    pub(super) page_size: usize,
    /// From the first phase to a model that answers.
    pub(super) seconds: f64,
    pub(super) started: Started,
}

pub(super) fn run(args: &StartArgs) -> anyhow::Result<()> {
    let checkpoint = load::open_for(&args.model)?;
    let options = args.model.launch_options();
    let name = args.model.model.as_deref().map_or_else(|| checkpoint.name().to_owned(), folder);
    let layers = checkpoint.config().num_hidden_layers;
    let began = Instant::now();
    let (engine, started) = launch_and_tell(&Arc::new(checkpoint), &options)?;
    let seconds = began.elapsed().as_secs_f64();
    let gpu = if started.memory.is_empty() { None } else { GpuFacts::found() };
    let report = StartReport {
        environment: Environment::of(gpu, args.report.git.as_deref()),
        model: name,
        tp: options.tp,
        num_hidden_layers: layers,
        max_model_len: engine.max_model_len(),
        num_pages: engine.stats().pages_total,
        page_size: options.page_size,
        seconds,
        started,
    };
    engine.shutdown(Duration::ZERO);
    print(&report.text())?;
    args.report.write(&report)
}

impl StartReport {
    fn text(&self) -> String {
        let Self { model, tp, num_hidden_layers, num_pages, page_size, seconds, .. } = self;
        let mut phases = Table::new(1, ["phase", "seconds"]);
        for phase in &self.started.phases {
            phases.row([phase.name.clone(), format!("{:.2}", phase.seconds)]);
        }
        phases.row(["together".to_owned(), format!("{seconds:.2}")]);
        format!(
            "{}\n{model}, {num_hidden_layers} layers, {tp} ranks, caches of {} tokens\n{}{}",
            self.environment.words(),
            num_pages * page_size,
            phases.text("  "),
            self.memory()
        )
    }

    fn memory(&self) -> String {
        if self.started.memory.is_empty() {
            return String::new();
        }
        let head =
            ["rank", "weights", "workspace", "graphs", "caches", "reserve", "planned", "taken", "over"];
        let mut table = Table::new(0, head);
        for memory in &self.started.memory {
            let &RankMemory { rank, weights, workspace, graphs, caches, reserve, taken } = memory;
            let [weights, workspace, graphs, caches, reserve, planned, taken] =
                [weights, workspace, graphs, caches, reserve, memory.planned(), taken].map(size::show);
            let over = format!("{:+.1} %", 100.0 * memory.over());
            table.row([rank.to_string(), weights, workspace, graphs, caches, reserve, planned, taken, over]);
        }
        table.text("  ")
    }
}

#[cfg(test)]
mod tests {
    use dsa80_model::launch::Phase;

    use super::*;

    #[test]
    fn phases_and_memory_stand_beside_their_sums() {
        let phase = |name: &str, seconds| Phase { name: name.into(), seconds };
        let memory = |rank, taken| RankMemory {
            rank,
            weights: 50 << 30,
            workspace: 2 << 30,
            graphs: 1 << 30,
            caches: 46 << 30,
            reserve: 1 << 30,
            taken,
        };
        let report = StartReport {
            environment: Environment::of(None, None),
            model: "m".into(),
            tp: 2,
            num_hidden_layers: 5,
            max_model_len: 64,
            num_pages: 10,
            page_size: 16,
            seconds: 3.5,
            started: Started {
                phases: vec![phase("weights and caches", 1.25), phase("decode graphs", 2.25)],
                memory: vec![memory(0, 99 << 30), memory(1, 101 << 30)],
            },
        };
        let text = report.text();
        let (_, rest) = text.split_once('\n').unwrap();
        expect_test::expect![[r#"
            m, 5 layers, 2 ranks, caches of 160 tokens
              phase               seconds
              weights and caches     1.25
              decode graphs          2.25
              together               3.50
              rank   weights  workspace   graphs    caches  reserve    planned      taken    over
                 0  50.0 GiB    2.0 GiB  1.0 GiB  46.0 GiB  1.0 GiB  100.0 GiB   99.0 GiB  -1.0 %
                 1  50.0 GiB    2.0 GiB  1.0 GiB  46.0 GiB  1.0 GiB  100.0 GiB  101.0 GiB  +1.0 %
        "#]]
        .assert_eq(rest);
    }
}
