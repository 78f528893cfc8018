//! `dsa80 bench collectives`

use anyhow::bail;
use clap::Args;
use dsa80_model::launch::Device;
use dsa80_model::measure::{Check, CollectiveTimes, Summed, groups, serves_up_to};
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

    /// Columns of what is gathered before its norms, which the ranks divide: GLM-5.2's q_a_proj and kv_a_proj_with_mqa.
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "2048,576",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    gathered: Vec<u32>,

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
    /// Columns of the tensors that are gathered at once.
    #[serde(default)]
    pub(super) gathered: Vec<usize>,
    pub(super) groups: Vec<GroupReport>,
    /// Where one of our own ways, and NVIDIA's library, take over from another.
    #[serde(default)]
    pub(super) crossover: Option<CrossoverReport>,
}

/// One implementation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct GroupReport {
    pub(super) name: String,
    /// Where its ranks were.
    pub(super) placement: String,
    pub(super) measures_a_link: bool,
    pub(super) all_reduce: Vec<SizeReport>,
    /// With the residual add and the norm that follow it.
    #[serde(default)]
    pub(super) all_reduce_norm: Vec<SizeReport>,
    /// Of what is gathered.
    #[serde(default)]
    pub(super) all_gather: Vec<SizeReport>,
}

/// One size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SizeReport {
    pub(super) rows: usize,
    /// Of a rank's part of a sum; of all that is gathered.
    pub(super) bytes: usize,
    pub(super) us: Spread,
    pub(super) in_a_graph: bool,
    /// Whether all of it is one launch.
    #[serde(default)]
    pub(super) fused: bool,
    /// `2 (n - 1) / n` of the bytes a time, what a link carries of the best algorithm that does not sum in the switch; half of that of a
    /// gathering.
    pub(super) bus_gb_s: f64,
    #[serde(default)]
    pub(super) check: Option<CheckReport>,
}

/// Whether it was computed right, in the same run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct CheckReport {
    /// On every rank, bit for bit.
    identical: bool,
    /// From run to run, bit for bit.
    repeats: bool,
    /// Of what rounding explains.
    worst: f64,
    holds: bool,
}

/// Up to which bytes of a rank's part a way serves, by the times of this run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct CrossoverReport {
    /// One shot instead of two.
    all_reduce_bytes: usize,
    all_reduce_norm_bytes: usize,
    /// Our own, the quicker of both, instead of NCCL.
    own_all_reduce_bytes: Option<usize>,
    own_all_reduce_norm_bytes: Option<usize>,
    /// What is to be pinned in the tile file of this GPU.
    pin: String,
}

const BOTH: [Summed; 2] = [Summed::Alone, Summed::WithNorm];

pub(super) fn run(args: CollectivesArgs) -> anyhow::Result<()> {
    let mut rows: Vec<usize> = args.rows.iter().map(|&rows| rows as usize).collect();
    rows.sort_unstable();
    rows.dedup();
    let (hidden, tp) = (args.hidden as usize, args.tp);
    let groups = groups(args.device, tp)?;
    // What ranks do not divide each of them has whole.
    let gathered: Vec<usize> =
        args.gathered.iter().map(|&n| n as usize).filter(|n| n.is_multiple_of(tp)).collect();
    let gpu = groups.first().and_then(|group| group.gpu.clone());
    let environment = Environment::of(gpu, args.report.git.as_deref());
    print(&format!("{}\n", environment.words()))?;
    let mut report = CollectivesReport {
        environment,
        tp,
        hidden,
        gathered: gathered.clone(),
        groups: Vec::new(),
        crossover: None,
    };
    for mut group in groups {
        let (name, measures_a_link) = (group.name.to_owned(), group.measures_a_link);
        let placement = group.placement.clone();
        // Two bytes on a GPU, four on the CPU.
        let width = if group.gpu.is_some() { 2 } else { 4 };
        let size = |times: CollectiveTimes, columns: usize, carried: f64| {
            let CollectiveTimes { rows, us, in_a_graph, fused, check } = times;
            let (bytes, us) = (rows * columns * width, Spread::of(&us, 1.0)?);
            let carried = carried * (tp - 1) as f64 / tp as f64 * bytes as f64;
            let bus_gb_s = carried / us.median / 1e3;
            let holds = check.holds();
            let Check { identical, repeats, worst } = check;
            let check = Some(CheckReport { identical, repeats, worst, holds });
            Some(SizeReport { rows, bytes, us, in_a_graph, fused, bus_gb_s, check })
        };
        let mut of = |summed| -> anyhow::Result<Vec<SizeReport>> {
            let times = group.time(summed, &rows, hidden, args.runs.into())?;
            Ok(times.into_iter().filter_map(|times| size(times, hidden, 2.0)).collect())
        };
        let [all_reduce, all_reduce_norm] = [of(BOTH[0])?, of(BOTH[1])?];
        let mut all_gather = Vec::new();
        if !gathered.is_empty() {
            let times = group.time_gather(&rows, &gathered, args.runs.into())?;
            all_gather =
                times.into_iter().filter_map(|times| size(times, gathered.iter().sum(), 1.0)).collect();
        }
        let group = GroupReport { name, placement, measures_a_link, all_reduce, all_reduce_norm, all_gather };
        print(&group.text(hidden, &gathered))?;
        report.groups.push(group);
        // What is measured stays, whatever becomes of the rest.
        args.report.write(&report)?;
    }
    report.crossover = report.crossover();
    print(&report.text())?;
    args.report.write(&report)?;
    report.check()
}

impl GroupReport {
    fn sizes(&self, summed: Summed) -> &[SizeReport] {
        match summed {
            Summed::Alone => &self.all_reduce,
            Summed::WithNorm => &self.all_reduce_norm,
        }
    }

    fn text(&self, hidden: usize, gathered: &[usize]) -> String {
        let sums = BOTH.map(|summed| {
            let sizes = self.sizes(summed);
            let what = match summed {
                Summed::Alone => "all_reduce",
                Summed::WithNorm if sizes.iter().all(|size| size.fused) => {
                    "all_reduce, residual add and norm in one launch"
                }
                Summed::WithNorm if sizes.iter().any(|size| size.fused) => {
                    "all_reduce, residual add and norm, in one launch where it fits"
                }
                Summed::WithNorm => "all_reduce, then residual add and norm,",
            };
            self.table(what, sizes, &hidden.to_string())
        });
        let columns: Vec<String> = gathered.iter().map(usize::to_string).collect();
        let gathers = (!gathered.is_empty())
            .then(|| self.table("all_gather", &self.all_gather, &columns.join(" and ")));
        sums.into_iter().chain(gathers).collect()
    }

    fn table(&self, what: &str, sizes: &[SizeReport], columns: &str) -> String {
        let how = if sizes.iter().all(|size| size.in_a_graph) {
            "replayed from a graph"
        } else {
            "launched one by one"
        };
        let mut table = Table::new(0, ["rows", "bytes", "us", "p10", "p90", "bus GB/s", "bits", "worst"]);
        for SizeReport { rows, bytes, us, bus_gb_s, check, .. } in sizes {
            table.row([
                rows.to_string(),
                bytes.to_string(),
                digits(us.median),
                digits(us.p10),
                digits(us.p90),
                digits(*bus_gb_s),
                check.map_or_else(String::new, |check| check.bits().to_owned()),
                check.map_or_else(String::new, |check| format!("{:.2}", check.worst)),
            ]);
        }
        format!(
            "\n{what} by {}, rows of {columns}, {how}; {}\n{}",
            self.name,
            self.placement,
            table.text("  ")
        )
    }
}

impl CheckReport {
    fn bits(self) -> &'static str {
        match (self.identical, self.repeats) {
            (true, true) => "same",
            (true, false) => "OTHERS EACH RUN",
            (false, true) => "OTHERS ON EACH RANK",
            (false, false) => "OTHERS",
        }
    }
}

impl CollectivesReport {
    fn group(&self, name: &str) -> Option<&GroupReport> {
        self.groups.iter().find(|group| group.name == name)
    }

    fn crossover(&self) -> Option<CrossoverReport> {
        let (one, two) = (self.group("peer_one_shot")?, self.group("peer_two_shots")?);
        let nccl = self.group("nccl");
        let row_bytes = one.all_reduce.first().map(|size| size.bytes / size.rows)?;
        let between = |summed, first: &dyn Fn(usize) -> f64, second: &GroupReport| {
            let sizes = one.sizes(summed).iter().zip(second.sizes(summed)).enumerate();
            let sizes: Vec<_> =
                sizes.map(|(i, (size, second))| (size.rows, [first(i), second.us.median])).collect();
            serves_up_to(row_bytes, &sizes)
        };
        let of_one = |summed| between(summed, &|i| one.sizes(summed)[i].us.median, two);
        let best = |summed, i: usize| one.sizes(summed)[i].us.median.min(two.sizes(summed)[i].us.median);
        let own = |summed| nccl.and_then(|nccl| between(summed, &|i| best(summed, i), nccl));
        let (all_reduce_bytes, all_reduce_norm_bytes) = (of_one(BOTH[0])?, of_one(BOTH[1])?);
        let gpu = self.environment.gpu.as_ref().map_or("GPU", |gpu| &gpu.name);
        let tp = self.tp;
        Some(CrossoverReport {
            all_reduce_bytes,
            all_reduce_norm_bytes,
            own_all_reduce_bytes: own(BOTH[0]),
            own_all_reduce_norm_bytes: own(BOTH[1]),
            pin: format!(
                "[crossover.ranks_{tp}]\nchosen = \"measured between {tp} {gpu} by bench collectives\"\n\n\
                 [crossover.ranks_{tp}.sizes]\nall_reduce_bytes = {all_reduce_bytes}\nall_reduce_norm_bytes = {all_reduce_norm_bytes}\n"
            ),
        })
    }

    /// All ways beside each other, where there are several.
    fn text(&self) -> String {
        let Some(crossover) = &self.crossover else { return String::new() };
        let mut table = Table::new(
            0,
            ["rows", "one shot", "two shots", "nccl", "with norm: one shot", "two shots", "nccl, then norm"],
        );
        let names = ["peer_one_shot", "peer_two_shots", "nccl"];
        let rows = self.groups.first().map_or(&[][..], |group| &group.all_reduce);
        for (i, size) in rows.iter().enumerate() {
            let us = |name: &str, summed| {
                let size = self.group(name).and_then(|group| group.sizes(summed).get(i));
                size.map_or_else(|| "-".to_owned(), |size| digits(size.us.median))
            };
            let [alone, normed] = BOTH.map(|summed| names.map(|name| us(name, summed)));
            let ([a, b, c], [d, e, f]) = (alone, normed);
            table.row([size.rows.to_string(), a, b, c, d, e, f]);
        }
        let serves = |bytes: Option<usize>| match bytes {
            None => "NCCL was not measured".to_owned(),
            Some(bytes) if bytes > usize::MAX >> 2 => "our own at every size".to_owned(),
            Some(bytes) => format!("our own up to {bytes} bytes, NCCL beyond"),
        };
        format!(
            "\nmicroseconds:\n{}\nthe quicker one beside NCCL: all_reduce {}, with the norm {}\nto pin for this GPU:\n{}",
            table.text("  "),
            serves(crossover.own_all_reduce_bytes),
            serves(crossover.own_all_reduce_norm_bytes),
            crossover.pin
        )
    }

    /// Fails if anything was computed wrongly: then its times count for nothing.
    fn check(&self) -> anyhow::Result<()> {
        for group in &self.groups {
            let sums =
                BOTH.iter().flat_map(|&s| group.sizes(s).iter().map(move |size| (format!("{s:?}"), size)));
            let gathers = group.all_gather.iter().map(|size| ("Gathered".to_owned(), size));
            for (what, size) in sums.chain(gathers) {
                if let Some(check) = size.check.filter(|check| !check.holds) {
                    bail!(
                        "{what} of {} rows by {} is wrong: identical on all ranks {}, from run to run {}, worst error {:.3} of what \
                         rounding explains",
                        size.rows,
                        group.name,
                        check.identical,
                        check.repeats,
                        check.worst
                    );
                }
            }
        }
        Ok(())
    }
}
