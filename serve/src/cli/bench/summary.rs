//! `dsa80 bench summary`: what was measured, as tables in Markdown.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::collectives::{CollectivesReport, SizeReport};
use super::environment::Environment;
use super::serve::{Latency, ServeReport};
use super::spread::digits;
use super::start::StartReport;
use super::step::StepReport;
use super::{print, read_report};

#[derive(Debug, Args)]
pub(super) struct SummaryArgs {
    /// What `bench step`, `collectives`, `start` and `serve` wrote with --json, of one kind or several.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

pub(super) fn run(args: &SummaryArgs) -> anyhow::Result<()> {
    let mut reports = Reports::default();
    for path in &args.files {
        let json: Json = read_report(path)?;
        reports.add(json).with_context(|| format!("in {}", path.display()))?;
    }
    print(&reports.text())
}

/// What there is, by kind.
#[derive(Debug, Default)]
struct Reports {
    starts: Vec<StartReport>,
    collectives: Vec<CollectivesReport>,
    steps: Vec<StepReport>,
    serves: Vec<ServeReport>,
}

impl Reports {
    fn add(&mut self, json: Json) -> anyhow::Result<()> {
        fn read<T: DeserializeOwned>(json: Json) -> anyhow::Result<T> {
            Ok(serde_path_to_error::deserialize(json)?)
        }
        let has = |key: &str| json.get(key).is_some();
        if has("started") {
            self.starts.push(read(json)?);
        } else if has("groups") {
            self.collectives.push(read(json)?);
        } else if has("cases") && has("settings") {
            self.steps.push(read(json)?);
        } else if has("conditions") {
            self.serves.push(read(json)?);
        } else {
            bail!("expected results of bench step, collectives, start or serve, found something else");
        }
        Ok(())
    }

    fn text(&self) -> String {
        let tables = self.starts.iter().map(start).chain(self.collectives.iter().map(collectives));
        let tables = tables.chain(self.steps.iter().map(steps)).chain((!self.serves.is_empty()).then(|| {
            let mut serves: Vec<&ServeReport> = self.serves.iter().collect();
            serves.sort_by_key(|report| report.conditions.concurrency);
            serve(&serves)
        }));
        tables.collect::<Vec<_>>().join("\n")
    }
}

/// Rows of cells, the first of which is text.
fn markdown(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let rule = format!("| --- |{}\n", " ---: |".repeat(head.len().saturating_sub(1)));
    let rows: String = rows.into_iter().map(|row| line(&row)).collect();
    line(&head) + &rule + &rows
}

/// What was measured, on what.
fn title(what: &str, environment: &Environment) -> String {
    let on = environment.gpu.as_ref().map_or(environment.cpu.as_str(), |gpu| &gpu.name);
    format!("{what}, {on}, {}:\n\n", environment.date)
}

fn gib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / (1_u64 << 30) as f64)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn start(report: &StartReport) -> String {
    let phases = report.started.phases.iter().map(|phase| (phase.name.clone(), phase.seconds));
    let phases = phases.chain([("together".to_owned(), report.seconds)]);
    let phases = phases.map(|(name, seconds)| vec![name, format!("{seconds:.1}")]);
    let what = format!("A start with {} layers, {} ranks", report.num_hidden_layers, report.tp);
    let text = title(&what, &report.environment) + &markdown(&["phase", "seconds"], phases);
    if report.started.memory.is_empty() {
        return text;
    }
    let rows = report.started.memory.iter().map(|memory| {
        let over = format!("{:+.1} %", 100.0 * memory.over());
        vec![
            memory.rank.to_string(),
            gib(memory.weights),
            gib(memory.caches),
            gib(memory.planned()),
            gib(memory.taken),
            over,
        ]
    });
    let head = ["rank", "weights GiB", "caches GiB", "planned GiB", "taken GiB", "over the plan"];
    text + "\n" + &markdown(&head, rows)
}

fn collectives(report: &CollectivesReport) -> String {
    let group = |name: &str| report.groups.iter().find(|group| group.name == name);
    // Our own, whatever it is here.
    let own = group("peer").or(report.groups.first());
    let mut rows = Vec::new();
    for (index, rows_of) in own.iter().flat_map(|own| own.all_reduce.iter().map(|size| size.rows).enumerate())
    {
        let us = |sizes: Option<&[SizeReport]>| {
            sizes.and_then(|sizes| sizes.get(index)).map_or("-".to_owned(), |size| digits(size.us.median))
        };
        let mut row = vec![rows_of.to_string()];
        for name in [own.map_or("peer", |own| &own.name), "nccl"] {
            let group = group(name);
            row.push(us(group.map(|group| &group.all_reduce[..])));
            row.push(us(group.map(|group| &group.all_reduce_norm[..])));
            row.push(us(group.map(|group| &group.all_gather[..])));
        }
        rows.push(row);
    }
    let what = format!("Microseconds of sums of M x {} and gatherings, {} ranks", report.hidden, report.tp);
    let head = ["M", "all_reduce", "with the norm", "all_gather", "NCCL", "then the norm", "all_gather"];
    title(&what, &report.environment) + &markdown(&head, rows)
}

fn steps(report: &StepReport) -> String {
    let settings = &report.settings;
    let rows = report.cases.iter().map(|case| {
        let ms = case.device_ms.or(case.step_ms).map_or(f64::NAN, |spread| spread.median);
        let share = |of: &dyn Fn(&super::step::Shares) -> Option<f64>| {
            case.shares.as_ref().and_then(of).map_or("-".to_owned(), percent)
        };
        vec![
            case.title(),
            digits(ms),
            digits(case.tokens_per_s),
            share(&|shares| Some(shares.kernels)),
            share(&|shares| Some(shares.collectives)),
            share(&|shares| Some(shares.host)),
            case.waits.as_ref().map_or("-".to_owned(), |waits| digits(waits.lost_ms.median)),
            case.published.map_or("-".to_owned(), |published| format!("{:.2}", published.ratio)),
        ]
    });
    let what =
        format!("Steps of {} ranks of {}, {} layers", settings.live, settings.tp, settings.num_hidden_layers);
    let head = [
        "step",
        "ms",
        "tokens/s",
        "kernels",
        "collectives",
        "host",
        "ms lost to skew",
        "of 8 A100 as published, scaled",
    ];
    title(&what, &report.environment) + &markdown(&head, rows)
}

fn serve(reports: &[&ServeReport]) -> String {
    let latency = |latency: Option<Latency>| {
        latency.map_or_else(
            || "-".to_owned(),
            |Latency { p50, p99, .. }| format!("{} / {}", digits(p50), digits(p99)),
        )
    };
    let rows = reports.iter().map(|report| {
        vec![
            report.conditions.concurrency.map_or("-".to_owned(), |streams| streams.to_string()),
            format!("{} of {}", report.completed, report.requests),
            latency(report.time_to_first_token),
            latency(report.inter_token_latency),
            digits(report.output_tokens_per_s),
        ]
    });
    let head = ["streams", "answered", "TTFT ms p50 / p99", "inter-token ms p50 / p99", "tokens/s out"];
    let date = reports.first().map_or("", |report| report.environment.date.as_str());
    let lengths = reports.first().map_or_else(String::new, |report| {
        let conditions = &report.conditions;
        format!(", {} tokens in and {} out", conditions.input_len, conditions.output_len)
    });
    format!("Served{lengths}, {date}:\n\n") + &markdown(&head, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_result_is_refused() {
        let refused = Reports::default().add(serde_json::json!({ "cases": [] })).unwrap_err().to_string();
        assert!(refused.contains("expected results of bench step"), "{refused}");
        let torn = Reports::default().add(serde_json::json!({ "groups": 3 })).unwrap_err().to_string();
        assert!(torn.contains("groups") || torn.contains("environment"), "{torn}");
    }

    #[test]
    fn tables_have_their_rule_and_a_cell_for_every_column() {
        let table = markdown(&["a", "b"], [vec!["x".to_owned(), "1".to_owned()]]);
        assert_eq!(table, "| a | b |\n| --- | ---: |\n| x | 1 |\n");
    }
}
