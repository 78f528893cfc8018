//! Results: the file, and the tables made from it.

use std::path::Path;

use anyhow::Context;
use dsa80_cuda::{Cost, Device, Gpu};
use serde::{Deserialize, Serialize};

use crate::oracle::Accuracy;
use crate::resources::tile_words;
use crate::table::Table;
use dsa80_cuda::ceilings::Ceilings;
use dsa80_cuda::measure::Timing;

/// A run of `bench`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) environment: Environment,
    pub(crate) ceilings: Ceilings,
    pub(crate) cases: Vec<CaseResult>,
    /// What was found out about the results since; written by hand.
    #[serde(default)]
    pub(crate) notes: Vec<String>,
}

/// Where and of what the results are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Environment {
    pub(crate) gpu: String,
    pub(crate) multiprocessors: u32,
    pub(crate) l2_bytes: usize,
    pub(crate) memory_bytes: usize,
    /// The driver's release, and its clocks and limits when asked, as `nvidia-smi` has them.
    pub(crate) nvidia_smi: Option<String>,
    /// The newest CUDA version that the driver knows.
    pub(crate) cuda: String,
    pub(crate) nvrtc: String,
    pub(crate) arch: String,
    pub(crate) git: Option<String>,
    pub(crate) command: String,
    pub(crate) date: String,
}

/// One case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CaseResult {
    pub(crate) kernel: String,
    pub(crate) case: String,
    pub(crate) class: String,
    pub(crate) tile: toml::Table,
    pub(crate) launches: Vec<LaunchResult>,
    /// Sets of inputs that the calls rotate through.
    pub(crate) copies: usize,
    #[serde(flatten)]
    pub(crate) timing: Timing,
    /// Bytes that are asked for.
    pub(crate) bytes: f64,
    /// Those of them that are not others again, which the L2 has.
    pub(crate) distinct_bytes: f64,
    pub(crate) flops: f64,
    /// The distinct bytes as a share of the read ceiling.
    pub(crate) read_share: f64,
    /// Share of the `mma.sync` ceiling.
    pub(crate) mma_share: f64,
    /// What is aimed at on an H200.
    pub(crate) goal_us: Option<f64>,
    /// The same, with what this card's ceilings add.
    pub(crate) goal_here_us: Option<f64>,
    pub(crate) accuracy: Accuracy,
}

/// One launch of a call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct LaunchResult {
    pub(crate) entry: String,
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: usize,
    pub(crate) registers: u32,
    pub(crate) spill_bytes: u32,
    pub(crate) stack_bytes: u32,
}

impl Environment {
    pub(crate) fn of(gpu: &Gpu, device: usize, git: Option<String>) -> dsa80_reference::Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        Ok(Self {
            gpu: gpu.limits().name.clone(),
            multiprocessors: gpu.limits().multiprocessors,
            l2_bytes: gpu.l2_bytes(),
            memory_bytes: gpu.memory()?.1,
            nvidia_smi: nvidia_smi(device),
            cuda: gpu.driver_version().to_owned(),
            nvrtc: gpu.compiler().nvrtc_version(),
            arch: gpu.compiler().arch().to_owned(),
            git,
            command: format!("kernels {}", arguments.join(" ")),
            date: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
        })
    }
}

/// What the tool says about driver and clocks, where it is installed.
fn nvidia_smi(device: usize) -> Option<String> {
    let query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit";
    let output = std::process::Command::new("nvidia-smi")
        .args([query, "--format=csv,noheader", &format!("--id={device}")])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty())
        .then(|| format!("driver, SM clock, memory clock, highest SM clock, power limit: {text}"))
}

/// An H200's ceilings, which the goals were set under.
const H200_READ_GB_S: f64 = 4350.0;
const H200_MMA_TFLOP_S: f64 = 645.0;

/// Microseconds that bytes and operations take at these ceilings.
fn roofline_us(cost: Cost, read_gb_s: f64, mma_tflop_s: f64) -> f64 {
    (cost.bytes / read_gb_s / 1e3).max(cost.flops / mma_tflop_s / 1e6)
}

/// An H200's goal, plus what the roofline here is longer than there.
pub(crate) fn goal_here(goal_us: f64, cost: Cost, ceilings: &Ceilings) -> f64 {
    let here = roofline_us(cost, ceilings.read_gb_s, ceilings.mma_tflop_s);
    let there = roofline_us(cost, H200_READ_GB_S, H200_MMA_TFLOP_S);
    goal_us + (here - there).max(0.0)
}

impl CaseResult {
    /// `met`, `missed`, or nothing without a goal; a wrong result meets none.
    fn verdict(&self) -> &'static str {
        match self.goal_here_us {
            _ if !self.accuracy.ok() => "WRONG",
            None => "",
            Some(goal) if self.timing.median_us <= goal => "met",
            Some(_) => "missed",
        }
    }

    /// For the eye while others run.
    pub(crate) fn words(&self) -> String {
        let goal = self.goal_here_us.map_or(String::new(), |goal| format!(" of {}", microseconds(goal)));
        let (us, verdict) = (microseconds(self.timing.median_us), self.verdict());
        format!("{us}{goal} us {verdict}, rel. L2 {:.1e}", self.accuracy.relative_l2)
    }

    fn share(&self) -> String {
        if self.mma_share > self.read_share {
            format!("{:.0} % mma", 100.0 * self.mma_share)
        } else {
            format!("{:.0} % read", 100.0 * self.read_share)
        }
    }
}

impl Report {
    /// For the terminal.
    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new([
            "kernel", "case", "us", "p10", "p90", "goal", "", "GB/s", "TFLOP/s", "share", "rel. L2", "worst",
            "rows", "tile",
        ]);
        for case in &self.cases {
            let Timing { median_us, p10_us, p90_us, .. } = case.timing;
            table.row([
                case.kernel.clone(),
                case.case.clone(),
                microseconds(median_us),
                microseconds(p10_us),
                microseconds(p90_us),
                case.goal_here_us.map_or(String::new(), microseconds),
                case.verdict().to_owned(),
                format!("{:.0}", case.bytes / median_us / 1e3),
                format!("{:.0}", case.flops / median_us / 1e6),
                case.share(),
                format!("{:.1e}", case.accuracy.relative_l2),
                format!("{:.2}", case.accuracy.worst),
                case.accuracy.rows.to_string(),
                tile_words(&case.tile),
            ]);
        }
        table
    }

    /// What lies under the table.
    pub(crate) fn summary(&self) -> String {
        let Environment { gpu, nvrtc, cuda, date, .. } = &self.environment;
        let Ceilings { read_gb_s, copy_gb_s, mma_tflop_s, launch_us } = self.ceilings;
        format!(
            "{gpu}, CUDA {cuda}, NVRTC {nvrtc}, {date}; ceilings in the same run: read {read_gb_s:.0} GB/s, copy {copy_gb_s:.0} GB/s, \
             mma.sync {mma_tflop_s:.0} TFLOP/s, an empty launch {launch_us:.2} us"
        )
    }

    /// The cases that have a goal.
    pub(crate) fn with_goals(mut self) -> Self {
        self.cases.retain(|case| case.goal_us.is_some());
        self
    }

    /// For the README.
    pub(crate) fn markdown(&self) -> String {
        let mut table = Table::new([
            "kernel",
            "case",
            "us (p10 - p90)",
            "goal",
            "ceiling",
            "relative L2",
            "worst element",
        ]);
        for case in &self.cases {
            let Timing { median_us, p10_us, p90_us, .. } = case.timing;
            let explained = !self.notes.is_empty() && case.accuracy.only_elements_exceed();
            let verdict = if explained { "see the note" } else { case.verdict() };
            let goal = case.goal_here_us.map(|goal| format!("{}, {verdict}", microseconds(goal)));
            let accuracy = if case.accuracy.relative_l2 == 0.0 {
                "exact".to_owned()
            } else {
                format!("{:.1e}", case.accuracy.relative_l2)
            };
            table.row([
                format!("`{}`", case.kernel),
                case.case.clone(),
                format!("{} ({} - {})", microseconds(median_us), microseconds(p10_us), microseconds(p90_us)),
                goal.unwrap_or_default(),
                case.share(),
                accuracy,
                format!("{:.2}", case.accuracy.worst),
            ]);
        }
        let notes: String = self.notes.iter().map(|note| format!("\n\nNote: {note}")).collect();
        format!("{}\n\n{}.{notes}", table.markdown(), self.summary())
    }

    /// A case a line, so that two files can be compared.
    fn json(&self) -> serde_json::Result<String> {
        let environment = serde_json::to_string_pretty(&self.environment)?.replace('\n', "\n  ");
        let ceilings = serde_json::to_string(&self.ceilings)?;
        let cases: Vec<String> = self.cases.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        let cases = cases.join(",\n    ");
        let notes = serde_json::to_string(&self.notes)?;
        Ok(format!(
            "{{\n  \"environment\": {environment},\n  \"ceilings\": {ceilings},\n  \"notes\": {notes},\n  \"cases\": [\n    {cases}\n  ]\n}}\n"
        ))
    }

    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        std::fs::write(path, self.json()?).with_context(|| path.display().to_string())
    }

    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }
}

/// Three digits.
pub(crate) fn microseconds(us: f64) -> String {
    match us {
        _ if us >= 99.95 => format!("{us:.0}"),
        _ if us >= 9.995 => format!("{us:.1}"),
        _ => format!("{us:.2}"),
    }
}

const BEGIN: &str = "<!-- kernels:begin -->";
const END: &str = "<!-- kernels:end -->";

/// Puts the table between the markers of a text.
pub(crate) fn replace_between_markers(text: &str, table: &str) -> anyhow::Result<String> {
    let start = text.find(BEGIN).with_context(|| format!("there is no {BEGIN}"))? + BEGIN.len();
    let end = text[start..].find(END).with_context(|| format!("there is no {END} after {BEGIN}"))? + start;
    Ok(format!("{}\n{table}\n{}", &text[..start], &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ceilings() -> Ceilings {
        Ceilings { read_gb_s: 4350.0, copy_gb_s: 4000.0, mma_tflop_s: 645.0, launch_us: 0.5 }
    }

    fn report() -> Report {
        let timing = Timing { median_us: 4.5, p10_us: 4.25, p90_us: 5.0, calls: 200, replays: 20 };
        let accuracy = Accuracy { rows: 4, relative_l2: 1.5e-3, relative_l2_limit: 2.5e-3, worst: 0.5 };
        Report {
            environment: Environment {
                gpu: "NVIDIA H200".into(),
                multiprocessors: 132,
                l2_bytes: 60 << 20,
                memory_bytes: 139 << 30,
                nvidia_smi: None,
                cuda: "13.0".into(),
                nvrtc: "12.8".into(),
                arch: "sm_90".into(),
                git: None,
                command: "kernels bench".into(),
                date: "2026-11-25 17:00 UTC".into(),
            },
            ceilings: ceilings(),
            cases: vec![CaseResult {
                kernel: "sparse_mla".into(),
                case: "decode, 8 heads, B=1".into(),
                class: "decode".into(),
                tile: "keys = 32".parse().unwrap(),
                launches: Vec::new(),
                copies: 60,
                timing,
                bytes: 2.4e6,
                distinct_bytes: 2.4e6,
                flops: 1e6,
                read_share: 0.123,
                mma_share: 0.01,
                goal_us: Some(7.0),
                goal_here_us: Some(7.0),
                accuracy,
            }],
            notes: Vec::new(),
        }
    }

    #[test]
    fn the_readme_table() {
        expect_test::expect![[r#"
            | kernel | case | us (p10 - p90) | goal | ceiling | relative L2 | worst element |
            | --- | --- | ---: | ---: | ---: | ---: | ---: |
            | `sparse_mla` | decode, 8 heads, B=1 | 4.50 (4.25 - 5.00) | 7.00, met | 12 % read | 1.5e-3 | 0.50 |

            NVIDIA H200, CUDA 13.0, NVRTC 12.8, 2026-11-25 17:00 UTC; ceilings in the same run: read 4350 GB/s, copy 4000 GB/s, mma.sync 645 TFLOP/s, an empty launch 0.50 us."#]]
        .assert_eq(&report().markdown());
    }

    #[test]
    fn a_wrong_result_meets_no_goal() {
        let mut report = report();
        assert!(report.table().text().contains("met"));
        report.cases[0].accuracy.worst = 1.5;
        assert!(report.table().text().contains("WRONG"));
        assert!(report.markdown().contains("7.00, WRONG"));
        report.notes.push("the bound was wrong".into());
        assert!(
            report.markdown().contains("7.00, see the note")
                && report.markdown().ends_with("Note: the bound was wrong")
        );
        report.cases[0].accuracy.relative_l2 = 1.0;
        assert!(report.markdown().contains("7.00, WRONG"));
    }

    #[test]
    fn cases_without_a_goal_can_be_left_out() {
        let mut report = report();
        let all = report.cases.len();
        report.cases[0].goal_us = None;
        assert_eq!(report.with_goals().cases.len(), all - 1);
    }

    #[test]
    fn a_slower_card_gets_more_time() {
        let streaming = Cost { bytes: 435e6, flops: 0.0 };
        assert_eq!(goal_here(150.0, streaming, &ceilings()), 150.0);
        let half = Ceilings { read_gb_s: 2175.0, ..ceilings() };
        assert!((goal_here(150.0, streaming, &half) - 250.0).abs() < 1e-9);
        let faster = Ceilings { read_gb_s: 8700.0, ..ceilings() };
        assert_eq!(goal_here(150.0, streaming, &faster), 150.0);
    }

    #[test]
    fn a_file_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results/h200.json");
        report().write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report());
    }

    #[test]
    fn only_what_lies_between_the_markers_is_replaced() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let expected = format!("a\n{BEGIN}\nnew\n{END}\nb\n");
        assert_eq!(replace_between_markers(&text, "new").unwrap(), expected);
        assert!(replace_between_markers("a", "new").is_err());
        assert!(replace_between_markers(&format!("{END}{BEGIN}"), "new").is_err());
    }

    #[test]
    fn three_digits() {
        assert_eq!([1.234, 12.34, 123.4].map(microseconds), ["1.23", "12.3", "123"]);
    }
}
