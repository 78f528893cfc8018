//! `dsa80 bench project`: what was measured on one GPU, carried over to another kind and put together. A projection, not a measurement.

mod times;

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use self::times::CollectiveCosts;
use super::collectives::CollectivesReport;
use super::environment::Environment;
use super::spread::digits;
use super::step::{CaseReport, StepReport};
use super::table::Table;
use super::{ReportArgs, print, read_report};

#[derive(Debug, Args)]
pub(super) struct ProjectArgs {
    /// What `bench step --json` wrote.
    #[arg(long, value_name = "FILE")]
    step: PathBuf,

    /// What `bench collectives --json` wrote; may be left out where the steps were measured with live ranks, whose collectives are then
    /// taken to add as much.
    #[arg(long, value_name = "FILE")]
    collectives: Option<PathBuf>,

    /// The kind of GPU to carry over to.
    #[arg(long, value_enum, default_value = "a100")]
    gpu: Target,

    /// What it reads, instead of what is taken for its kind.
    #[arg(long, value_name = "GB/s")]
    bandwidth: Option<f64>,

    /// What its `mma.sync` reaches, instead of what is taken for its kind.
    #[arg(long, value_name = "TFLOP/s")]
    mma: Option<f64>,

    #[command(flatten)]
    report: ReportArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// A100 of 80 GB.
    A100,
    /// H100 of 80 GB, SXM.
    H100,
    /// H200.
    H200,
    /// The GPU that was measured: nothing is carried over.
    Same,
}

/// What an A100 of 80 GB reads, of 2039 GB/s, as others measured it.
pub(super) const A100_READ_GB_S: f64 = 1850.0;

/// What a GPU reaches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Reaches {
    read_gb_s: f64,
    mma_tflop_s: f64,
}

impl Target {
    /// What is taken for its kind, and where that comes from.
    fn reaches(self) -> Option<(Reaches, &'static str)> {
        match self {
            Target::A100 => Some((
                Reaches { read_gb_s: A100_READ_GB_S, mma_tflop_s: 290.0 },
                "an A100: 1850 of 2039 GB/s, as others measured it; 290 of 312 TFLOP/s, assumed",
            )),
            Target::H100 => Some((
                Reaches { read_gb_s: 3115.0, mma_tflop_s: 646.0 },
                "an H100: measured by `kernels bench`",
            )),
            Target::H200 => Some((
                Reaches { read_gb_s: 4550.0, mma_tflop_s: 643.0 },
                "an H200: measured by `kernels bench`",
            )),
            Target::Same => None,
        }
    }
}

/// A projection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Projection {
    /// `projection`: nothing of it was measured as a whole.
    what: String,
    target: Reaches,
    assumptions: Vec<String>,
    /// Of the rank's steps.
    step: Environment,
    /// Of the collectives, where they were measured by themselves.
    collectives: Option<Environment>,
    cases: Vec<ProjectedCase>,
}

/// One step of all ranks. Times in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct ProjectedCase {
    case: String,
    /// A rank alone, where it was measured.
    measured_ms: f64,
    /// The same on the target.
    rank_ms: f64,
    /// The same if only what it reads (or multiplies) were slower there, and launches and waiting as here.
    rank_at_best_ms: f64,
    collectives_ms: f64,
    host_ms: f64,
    step_ms: f64,
    tokens_per_s: f64,
    /// With `rank_at_best_ms`.
    tokens_per_s_at_best: f64,
}

pub(super) fn run(args: &ProjectArgs) -> anyhow::Result<()> {
    let step: StepReport = read_report(&args.step)?;
    let collectives = args.collectives.as_deref().map(read_report::<CollectivesReport>).transpose()?;
    let projection = Projection::new(args, step, collectives.as_ref())?;
    print(&projection.text())?;
    args.report.write(&projection)
}

impl Projection {
    fn new(
        args: &ProjectArgs,
        step: StepReport,
        collectives: Option<&CollectivesReport>,
    ) -> anyhow::Result<Self> {
        let settings = &step.settings;
        let costs = match collectives {
            Some(collectives) => {
                let group =
                    collectives.groups.first().context("the collectives' file has no measurements")?;
                if collectives.hidden != settings.hidden_size {
                    bail!(
                        "the collectives were measured with rows of {} elements, and the model's have {}: use bench collectives --hidden {1}",
                        collectives.hidden,
                        settings.hidden_size
                    );
                }
                let (hidden, gathered) = (collectives.hidden, &collectives.gathered[..]);
                Costs::OfSums(CollectiveCosts { group, hidden, gathered, settings })
            }
            None if step.cases.iter().all(|case| case.collectives.is_some()) => Costs::Added,
            None => bail!(
                "{} was measured on one rank alone: --collectives FILE has what sums take (bench collectives --json), or measure live ranks \
                 (bench step --live 2)",
                args.step.display()
            ),
        };
        let measured = step
            .environment
            .gpu
            .as_ref()
            .and_then(|gpu| Some(Reaches { read_gb_s: gpu.read_gb_s?, mma_tflop_s: gpu.mma_tflop_s? }));
        let has_ceilings = measured.is_some();
        let (kind, source) = match args.gpu.reaches() {
            Some((kind, source)) => (kind, source.to_owned()),
            None => (measured.unwrap_or(NOTHING), "the GPU that was measured".to_owned()),
        };
        let target = Reaches {
            read_gb_s: args.bandwidth.unwrap_or(kind.read_gb_s),
            mma_tflop_s: args.mma.unwrap_or(kind.mma_tflop_s),
        };
        for (name, value) in [("--bandwidth", target.read_gb_s), ("--mma", target.mma_tflop_s)] {
            if !(value.is_finite() && value > 0.0) {
                bail!("{name} is {value}; expected a rate above 0");
            }
        }
        let measured = match (measured, args.gpu) {
            (Some(measured), _) => measured,
            (None, Target::Same) => NOTHING,
            (None, _) => bail!(
                "{} was measured without a GPU, or its ceilings are missing: only --gpu same can be projected",
                args.step.display()
            ),
        };
        if !has_ceilings && (args.bandwidth.is_some() || args.mma.is_some()) {
            bail!(
                "--bandwidth and --mma carry over from what was measured, and {} has no ceilings",
                args.step.display()
            );
        }
        let cases = step.cases.iter().map(|case| project(case, measured, target, &costs)).collect();
        Ok(Self {
            what: "projection".to_owned(),
            assumptions: assumptions(
                &step,
                &costs,
                collectives.map_or(1, |sums| sums.tp),
                measured,
                target,
                &source,
            ),
            target,
            cases: cases_or_refuse(cases)?,
            step: step.environment.clone(),
            collectives: collectives.map(|sums| sums.environment.clone()),
        })
    }

    fn text(&self) -> String {
        let mut table = Table::new(
            1,
            [
                "projected",
                "rank here ms",
                "rank there ms",
                "collectives",
                "host",
                "step ms",
                "tokens/s",
                "at best",
            ],
        );
        for case in &self.cases {
            table.row([
                case.case.clone(),
                digits(case.measured_ms),
                digits(case.rank_ms),
                digits(case.collectives_ms),
                digits(case.host_ms),
                digits(case.step_ms),
                digits(case.tokens_per_s),
                digits(case.tokens_per_s_at_best),
            ]);
        }
        let assumptions: String = self.assumptions.iter().map(|line| format!("  - {line}\n")).collect();
        format!(
            "A projection: nothing of it was measured as a whole.\n\n{}\nIt assumes:\n{assumptions}",
            table.text("")
        )
    }
}

/// What collectives add to steps: as sums were measured by themselves, or as live ranks' steps have it.
enum Costs<'a> {
    OfSums(CollectiveCosts<'a>),
    Added,
}

impl Costs<'_> {
    fn of_step(&self, case: &CaseReport) -> f64 {
        match self {
            Self::OfSums(costs) => costs.of_step(case),
            Self::Added => case.collectives.map_or(f64::NAN, |of| of.added_ms.max(0.0)),
        }
    }
}

/// A CPU's, of which no ceilings are known: it is carried over to itself.
const NOTHING: Reaches = Reaches { read_gb_s: 1.0, mma_tflop_s: 1.0 };

fn cases_or_refuse(cases: Vec<ProjectedCase>) -> anyhow::Result<Vec<ProjectedCase>> {
    if cases.is_empty() {
        bail!("the steps' file has no measurements");
    }
    Ok(cases)
}

fn project(case: &CaseReport, here: Reaches, there: Reaches, costs: &Costs<'_>) -> ProjectedCase {
    let median = |spread: &super::spread::Spread| spread.median;
    let step_ms = case.step_ms.as_ref().map(median);
    let whole_ms = case.device_ms.as_ref().map(median).or(step_ms).unwrap_or(f64::NAN);
    // Live ranks' collectives are not the rank's own work.
    let measured_ms = case.collectives.map_or(whole_ms, |of| of.alone_ms.median);
    let slower_reads = here.read_gb_s / there.read_gb_s;
    let slower_mma = here.mma_tflop_s / there.mma_tflop_s;
    let (floor_ms, slower) = if case.kind == "decode" {
        (case.read_bytes as f64 / here.read_gb_s / 1e6, slower_reads)
    } else {
        (case.flops / here.mma_tflop_s / 1e9, slower_mma)
    };
    let floor_ms = floor_ms.min(measured_ms);
    let rest_ms = measured_ms - floor_ms;
    let rank_ms = floor_ms * slower + rest_ms * slower_reads;
    let rank_at_best_ms = floor_ms * slower + rest_ms;
    let collectives_ms = costs.of_step(case);
    let host_ms = step_ms.map_or(0.0, |step_ms| (step_ms - whole_ms).max(0.0));
    let tokens_per_s = |rank_ms: f64| case.tokens as f64 / (rank_ms + collectives_ms + host_ms) * 1e3;
    ProjectedCase {
        case: case.title(),
        measured_ms,
        rank_ms,
        rank_at_best_ms,
        collectives_ms,
        host_ms,
        step_ms: rank_ms + collectives_ms + host_ms,
        tokens_per_s: tokens_per_s(rank_ms),
        tokens_per_s_at_best: tokens_per_s(rank_at_best_ms.min(rank_ms)),
    }
}

fn assumptions(
    step: &StepReport,
    costs: &Costs<'_>,
    ranks: usize,
    here: Reaches,
    there: Reaches,
    source: &str,
) -> Vec<String> {
    let settings = &step.settings;
    let tp = settings.tp;
    let measured_on = step.environment.gpu.as_ref().map_or("the CPU", |gpu| &gpu.name);
    let mut lines = vec![
        format!(
            "{tp} GPUs, each as fast as rank {} of {tp} was alone on {measured_on} ({}, random weights): no rank waits for another",
            settings.rank, settings.model
        ),
        format!(
            "read {:.0} GB/s here and {:.0} there, mma.sync {:.0} TFLOP/s here and {:.0} there; {source}",
            here.read_gb_s, there.read_gb_s, here.mma_tflop_s, there.mma_tflop_s
        ),
        "a decode step takes as much longer there as reading does, all of it: launches and waiting too".to_owned(),
        "a prefill step takes as much longer there as mma.sync does, as far as its products would keep that busy here, and as much as \
         reading for the rest; products of NVIDIA's library, which may use more than mma.sync here, count with the rest"
            .to_owned(),
        "at best: only the reading (of a decode) or the products (of a prefill) are slower there, and the rest is as here".to_owned(),
        "links between GPUs, and the host, are as fast there as where they were measured".to_owned(),
        "rank 0 chooses the tokens, in its step; what the host adds to a step is added whole".to_owned(),
    ];
    match costs {
        Costs::OfSums(costs) => lines.extend(of_sums(step, costs, ranks)),
        Costs::Added => lines.push(format!(
            "collectives of {tp} ranks add to a step what they added between {0} ranks ({1}) where those were measured, waiting for the slower \
             one included: as if more ranks made no difference",
            settings.live, settings.between
        )),
    }
    lines
}

/// What is assumed of sums that were measured by themselves.
fn of_sums(step: &StepReport, costs: &CollectiveCosts<'_>, ranks: usize) -> Vec<String> {
    let (layers, tp, group) = (step.settings.num_hidden_layers, step.settings.tp, costs.group);
    let columns: usize = step.settings.gathered.iter().sum();
    let gatherings = if columns == 0 {
        String::new()
    } else {
        let takes = if costs.gatherings_measured() {
            "as measured"
        } else {
            "which takes as long as a sum of as many bytes"
        };
        format!("a gathering a layer of what ranks share of q_a and kv_a ({columns} columns), {takes}; ")
    };
    let mut lines = vec![
        format!(
            "{} sums over ranks a step: two a layer of {layers}, each of the step's tokens, and one of the embedding, twice as wide (f32); \
             {gatherings}a gathering of the logits, which takes as long as a sum of as many bytes; nothing of them is hidden behind anything",
            2 * layers + 1
        ),
        format!(
            "a sum takes what it took by {} between {ranks} ranks on {}; sizes between those that were measured lie on a line, larger ones \
             are in proportion",
            group.name, group.placement
        ),
    ];
    if columns == 0 && tp > 1 {
        lines.push("what ranks gather in a layer (of q_a and kv_a) is left out: the steps' file does not say how many columns".to_owned());
    }
    if ranks != tp {
        lines.push(format!(
            "the sums were measured between {ranks} ranks, not {tp}: as if that made no difference"
        ));
    }
    if !group.measures_a_link {
        lines.push("NO LINK WAS MEASURED between ranks: the collectives' time is that of the threads that stand for them".to_owned());
    }
    lines
}

#[cfg(test)]
mod tests {
    use dsa80_model::measure::GpuFacts;

    use super::super::collectives::{GroupReport, SizeReport};
    use super::super::spread::Spread;
    use super::super::step::{CollectivesOfStep, StepSettings};
    use super::*;

    fn spread(median: f64) -> Option<Spread> {
        Some(Spread { median, p10: median, p90: median, runs: 1 })
    }

    fn gpu() -> GpuFacts {
        GpuFacts {
            name: "NVIDIA H100".into(),
            compute_capability: "9.0".into(),
            multiprocessors: 132,
            l2_bytes: 1,
            memory_bytes: 1,
            cuda: "13.0".into(),
            nvrtc: "12.8".into(),
            driver: None,
            read_gb_s: Some(3000.0),
            mma_tflop_s: Some(600.0),
        }
    }

    fn steps() -> StepReport {
        StepReport {
            environment: Environment::of(Some(gpu()), None),
            settings: StepSettings {
                model: "GLM-5.2".into(),
                tp: 8,
                rank: 0,
                live: 1,
                between: "none".into(),
                expand_from: None,
                num_hidden_layers: 10,
                hidden_size: 100,
                vocab_size: 1000,
                gathered: vec![40, 20],
                dtype: "auto".into(),
                kv_cache_dtype: "auto".into(),
                page_size: 64,
                num_pages: 1,
                weight_bytes: 1,
                cache_bytes_per_token: 1,
            },
            notes: Vec::new(),
            cases: vec![
                CaseReport {
                    kind: "decode".into(),
                    sequences: 4,
                    context: 8,
                    tokens: 4,
                    device_ms: spread(5.0),
                    step_ms: spread(5.5),
                    // 4 ms at 3000 GB/s.
                    read_bytes: 12_000_000_000,
                    ..CaseReport::default()
                },
                CaseReport {
                    kind: "prefill".into(),
                    sequences: 1,
                    context: 8,
                    tokens: 8,
                    device_ms: spread(5.0),
                    // 2 ms at 600 TFLOP/s.
                    flops: 1.2e12,
                    ..CaseReport::default()
                },
            ],
        }
    }

    fn sums(measures_a_link: bool) -> CollectivesReport {
        let size = |rows, median| SizeReport {
            rows,
            bytes: 200 * rows,
            us: Spread { median, p10: median, p90: median, runs: 1 },
            in_a_graph: true,
            fused: false,
            bus_gb_s: 1.0,
            check: None,
        };
        let group = GroupReport {
            name: "peer".into(),
            placement: "8 GPUs".into(),
            measures_a_link,
            all_reduce: vec![size(1, 10.0), size(16, 25.0)],
            all_reduce_norm: Vec::new(),
            all_gather: Vec::new(),
        };
        CollectivesReport {
            environment: Environment::of(None, None),
            tp: 8,
            hidden: 100,
            gathered: Vec::new(),
            groups: vec![group],
            crossover: None,
        }
    }

    fn args(gpu: Target, bandwidth: Option<f64>, mma: Option<f64>) -> ProjectArgs {
        let report = ReportArgs { json: None, git: None };
        ProjectArgs { step: "s".into(), collectives: None, gpu, bandwidth, mma, report }
    }

    #[test]
    fn reading_scales_a_decode_and_products_a_prefill() {
        let args = args(Target::A100, Some(1500.0), Some(200.0));
        let Projection { cases, .. } = Projection::new(&args, steps(), Some(&sums(true))).unwrap();
        let [decode, prefill] = &cases[..] else { panic!("{cases:?}") };
        // Reads take twice as long there, products three times.
        assert_eq!((decode.rank_ms, decode.rank_at_best_ms, decode.host_ms), (10.0, 9.0, 0.5));
        assert_eq!((prefill.rank_ms, prefill.rank_at_best_ms), (2.0 * 3.0 + 3.0 * 2.0, 2.0 * 3.0 + 3.0));
        assert_eq!(decode.step_ms, decode.rank_ms + decode.collectives_ms + 0.5);
        assert_eq!(decode.tokens_per_s, 4.0 / decode.step_ms * 1e3);
        assert!(decode.tokens_per_s_at_best > decode.tokens_per_s);
    }

    #[test]
    fn nothing_is_carried_over_to_the_same_gpu() {
        let projection =
            Projection::new(&args(Target::Same, None, None), steps(), Some(&sums(true))).unwrap();
        assert_eq!(projection.cases[0].rank_ms, 5.0);
        assert_eq!(projection.target, Reaches { read_gb_s: 3000.0, mma_tflop_s: 600.0 });
        let mut on_cpu = steps();
        on_cpu.environment.gpu = None;
        let same =
            Projection::new(&args(Target::Same, None, None), on_cpu.clone(), Some(&sums(false))).unwrap();
        assert_eq!(same.cases[0].rank_ms, 5.0);
        let error = Projection::new(&args(Target::A100, None, None), on_cpu, Some(&sums(false))).unwrap_err();
        assert!(error.to_string().contains("only --gpu same"), "{error}");
    }

    #[test]
    fn every_assumption_is_told_and_it_is_called_a_projection() {
        let text = |link| {
            Projection::new(&args(Target::A100, None, None), steps(), Some(&sums(link))).unwrap().text()
        };
        let words = text(true);
        for expected in [
            "A projection",
            "read 3000 GB/s here and 1850 there",
            "21 sums over ranks a step",
            "of q_a and kv_a (60 columns), which takes as long as a sum of as many bytes",
            "by peer between 8 ranks on 8 GPUs",
            "rank 0 chooses the tokens",
        ] {
            assert!(words.contains(expected), "{words}");
        }
        assert!(!words.contains("NO LINK") && text(false).contains("NO LINK"));
    }

    #[test]
    fn files_that_do_not_belong_together_are_refused() {
        let refused = |change: &dyn Fn(&mut StepReport, &mut CollectivesReport), bandwidth| {
            let (mut steps, mut sums) = (steps(), sums(true));
            change(&mut steps, &mut sums);
            Projection::new(&args(Target::A100, bandwidth, None), steps, Some(&sums)).unwrap_err().to_string()
        };
        assert!(refused(&|_, sums| sums.hidden = 7, None).contains("--hidden 100"));
        assert!(refused(&|_, sums| sums.groups.clear(), None).contains("no measurements"));
        assert!(refused(&|steps, _| steps.cases.clear(), None).contains("no measurements"));
        assert!(refused(&|_, _| (), Some(0.0)).contains("--bandwidth is 0"));
    }

    #[test]
    fn live_ranks_add_what_their_collectives_added() {
        let mut steps = steps();
        steps.settings.live = 2;
        let alone = spread(4.5).unwrap();
        for case in &mut steps.cases {
            case.collectives =
                Some(CollectivesOfStep { alone_ms: alone, added_ms: 0.5, share: 0.1, kernels_ms: None });
        }
        let same = args(Target::Same, None, None);
        let projection = Projection::new(&same, steps.clone(), None).unwrap();
        let decode = &projection.cases[0];
        assert_eq!(
            (decode.rank_ms, decode.collectives_ms, decode.host_ms, decode.step_ms),
            (4.5, 0.5, 0.5, 5.5)
        );
        assert!(projection.text().contains("what they added between 2 ranks"), "{}", projection.text());
        // Sums that were measured by themselves say more.
        let by_sums = Projection::new(&same, steps.clone(), Some(&sums(true))).unwrap();
        assert!(by_sums.cases[0].rank_ms == 4.5 && by_sums.cases[0].collectives_ms != 0.5);
        steps.cases[1].collectives = None;
        let refused = Projection::new(&same, steps, None).unwrap_err().to_string();
        assert!(refused.contains("on one rank alone") && refused.contains("--live 2"), "{refused}");
    }
}
