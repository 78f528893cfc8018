//! `dsa80 bench collectives`

use clap::Args;
use dsa80_model::launch::Device;
use dsa80_model::measure::{CollectiveTimes, groups, time_all_reduce};
use serde::{Deserialize, Serialize};

use super::environment::Environment;
use super::spread::{Spread, digits};
use super::table::Table;
use super::{ReportArgs, print};

#[derive(Debug, Args)]
pub(super) struct CollectivesArgs {
    /// Where the ranks run: auto, cpu (threads) or cuda (a GPU each; where there are too few, all on one, which measures no link).
    #[arg(long, default_value = "auto")]
    device: Device,

    /// Ranks.
    #[arg(long, value_name = "N", default_value_t = 8, visible_alias = "tensor-parallel-size")]
    tp: usize,

    /// Rows that are summed, of --hidden elements each: the tokens of a step.
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "1,2,4,8,16,32,64,128,256,512,1024,2048",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    rows: Vec<u32>,

    /// Elements of a row.
    #[arg(long, value_name = "N", default_value_t = 6144, value_parser = clap::value_parser!(u32).range(1..))]
    hidden: u32,

    /// How often every size is measured.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,

    #[command(flatten)]
    report: ReportArgs,
}

/// A run of `bench collectives`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct CollectivesReport {
    pub(super) environment: Environment,
    pub(super) tp: usize,
    /// Elements of a row.
    pub(super) hidden: usize,
    pub(super) groups: Vec<GroupReport>,
}

/// One implementation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct GroupReport {
    pub(super) name: String,
    /// Where its ranks were.
    pub(super) placement: String,
    pub(super) measures_a_link: bool,
    pub(super) all_reduce: Vec<SizeReport>,
}

/// One size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SizeReport {
    pub(super) rows: usize,
    /// Of a rank's part.
    pub(super) bytes: usize,
    pub(super) us: Spread,
    pub(super) in_a_graph: bool,
    /// `2 (n - 1) / n` of the bytes a time: what a link carries of the best algorithm that does not sum in the switch.
    pub(super) bus_gb_s: f64,
}

pub(super) fn run(args: CollectivesArgs) -> anyhow::Result<()> {
    let rows: Vec<usize> = args.rows.iter().map(|&rows| rows as usize).collect();
    let (hidden, tp) = (args.hidden as usize, args.tp);
    let groups = groups(args.device, tp)?;
    let gpu = groups.first().and_then(|group| group.gpu.clone());
    let environment = Environment::of(gpu, args.report.git.as_deref());
    print(&format!("{}\n", environment.words()))?;
    let mut report = CollectivesReport { environment, tp, hidden, groups: Vec::new() };
    for group in groups {
        let (name, measures_a_link) = (group.name.to_owned(), group.measures_a_link);
        let placement = group.placement.clone();
        // Two bytes on a GPU, four on the CPU.
        let width = if group.gpu.is_some() { 2 } else { 4 };
        let size = |CollectiveTimes { rows, us, in_a_graph }: CollectiveTimes| {
            let (bytes, us) = (rows * hidden * width, Spread::of(&us, 1.0)?);
            let carried = 2.0 * (tp - 1) as f64 / tp as f64 * bytes as f64;
            Some(SizeReport { rows, bytes, us, in_a_graph, bus_gb_s: carried / us.median / 1e3 })
        };
        let times = time_all_reduce(group, &rows, hidden, args.runs.into())?;
        let all_reduce = times.into_iter().filter_map(size).collect();
        let group = GroupReport { name, placement, measures_a_link, all_reduce };
        print(&group.text(hidden))?;
        report.groups.push(group);
    }
    args.report.write(&report)
}

impl GroupReport {
    fn text(&self, hidden: usize) -> String {
        let how = if self.all_reduce.iter().all(|size| size.in_a_graph) {
            "replayed from a graph"
        } else {
            "launched one by one"
        };
        let mut table = Table::new(0, ["rows", "bytes", "us", "p10", "p90", "bus GB/s"]);
        for SizeReport { rows, bytes, us, bus_gb_s, .. } in &self.all_reduce {
            table.row([
                rows.to_string(),
                bytes.to_string(),
                digits(us.median),
                digits(us.p10),
                digits(us.p90),
                digits(*bus_gb_s),
            ]);
        }
        format!(
            "\nall_reduce by {}, rows of {hidden}, {how}; {}\n{}",
            self.name,
            self.placement,
            table.text("  ")
        )
    }
}
