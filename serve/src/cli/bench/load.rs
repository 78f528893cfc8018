//! `dsa80 bench load`

mod plain;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use dsa80_model::checkpoint::{Checkpoint, LoadingBar, Shard};
use dsa80_model::launch::{Device, LaunchOptions, Measurement, launch_alone};
use dsa80_model::measure::{LoadPhases, TimedSource};
use serde::{Deserialize, Serialize};

use self::plain::PlainRead;
use super::environment::{Environment, field, kibibytes};
use super::spread::digits;
use super::{ReportArgs, print};
use crate::cli::size;

#[derive(Debug, Args)]
pub(super) struct LoadArgs {
    /// The checkpoint's folder.
    #[arg(long, value_name = "DIR", env = "DSA80_MODEL")]
    model: PathBuf,

    /// Where to load it: auto, cpu or cuda.
    #[arg(long, default_value = "auto")]
    device: Device,

    /// Tensor-parallel ranks, of which one is loaded.
    #[arg(long, value_name = "N", default_value_t = 1, visible_alias = "tensor-parallel-size")]
    tp: usize,

    /// Which one.
    #[arg(long, value_name = "RANK", default_value_t = 0)]
    rank: usize,

    /// Ask the system to forget what it keeps of the files in memory, before each of the two: so that the disk is measured.
    #[arg(long)]
    drop_cache: bool,

    #[command(flatten)]
    report: ReportArgs,
}

/// A run of `bench load`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct LoadReport {
    environment: Environment,
    model: String,
    tp: usize,
    rank: usize,
    /// Of all weights files.
    file_bytes: u64,
    /// That the rank reads.
    bytes: u64,
    seconds: Phases,
    /// Of the rank's bytes, from the first that is asked for until all is on the device.
    gb_s: f64,
    /// What of it came from the disk, not from the system's memory; nothing where the system does not say.
    from_disk_bytes: Option<u64>,
    /// `dropped` or `as it was`.
    page_cache: String,
    /// The highest that the process had in memory while it loaded, and what it had before.
    peak_host_bytes: Option<u64>,
    host_bytes_before: Option<u64>,
    plain: PlainRead,
    /// `gb_s` of the plain read's.
    share: f64,
    notes: Vec<String>,
}

/// Where the time goes, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Phases {
    /// Headers, checked against the config.
    opening: f64,
    /// The device, and the arithmetic of its memory.
    preparing: f64,
    reading: f64,
    /// For the device to take what was read.
    waiting: f64,
    /// The last layer's upload; workspace and caches.
    finishing: f64,
}

pub(super) fn run(args: LoadArgs) -> anyhow::Result<()> {
    let files = plain::weights_files(&args.model)?;
    if args.drop_cache {
        plain::drop_cache(&files)?;
    }
    let opened = Instant::now();
    let checkpoint = Checkpoint::open(&args.model)?;
    let opening = opened.elapsed();
    let shard = Shard { rank: args.rank, world_size: args.tp };
    let bytes = checkpoint.shard_bytes(shard)?;
    let bar = LoadingBar::new(bytes);
    let checkpoint = Arc::new(checkpoint.with_progress(Arc::new(bar)));
    let readers = checkpoint.readers();
    let longest = checkpoint.config().max_position_embeddings;
    let options = LaunchOptions {
        device: args.device,
        tp: args.tp,
        // The caches are not what is measured.
        max_model_len: Some(longest.min(8192)),
        max_num_seqs: 1,
        ..LaunchOptions::default()
    };

    let (host_bytes_before, disk) = (memory("VmRSS"), from_disk());
    let counted = reset_peak();
    let source = TimedSource::new(&*checkpoint);
    let alone = launch_alone(&checkpoint, &source, &options, &Measurement::of(args.rank))?;
    let phases = source.phases();
    let from_disk_bytes = from_disk().zip(disk).map(|(after, before)| after - before);
    let peak_host_bytes = memory("VmHWM").filter(|_| counted);
    let on_cpu = alone.gpu.is_none();
    let environment = Environment::of(alone.gpu.clone(), args.report.git.as_deref());
    let (read, file_bytes) = (checkpoint.bytes_read().total(), checkpoint.file_bytes());
    drop((alone, checkpoint));

    if args.drop_cache {
        plain::drop_cache(&files)?;
    }
    let disk = from_disk();
    let mut plain = PlainRead::of(&files, read, readers)?;
    plain.from_disk_bytes = from_disk().zip(disk).map(|(after, before)| after - before);
    let LoadPhases { before, reading, waiting, after } = phases;
    let gb_s = rate(read, reading + waiting + after);
    let notes = notes(on_cpu, args.drop_cache, from_disk_bytes, &plain);
    let report = LoadReport {
        environment,
        model: args.model.display().to_string(),
        tp: args.tp,
        rank: args.rank,
        file_bytes,
        bytes: read,
        seconds: Phases {
            opening: opening.as_secs_f64(),
            preparing: before.as_secs_f64(),
            reading: reading.as_secs_f64(),
            waiting: waiting.as_secs_f64(),
            finishing: after.as_secs_f64(),
        },
        gb_s,
        from_disk_bytes,
        page_cache: if args.drop_cache { "dropped" } else { "as it was" }.to_owned(),
        peak_host_bytes,
        host_bytes_before,
        share: gb_s / plain.gb_s,
        plain,
        notes,
    };
    if report.bytes == 0 {
        bail!("{} has no weights for rank {} of {}", args.model.display(), args.rank, args.tp);
    }
    print(&report.text())?;
    args.report.write(&report)
}

/// What a reader of the results has to know.
fn notes(on_cpu: bool, dropped: bool, from_disk: Option<u64>, plain: &PlainRead) -> Vec<String> {
    let mut notes = Vec::new();
    if on_cpu {
        notes.push("the device is the CPU: the weights themselves are in host memory, in the width that it computes in".to_owned());
    }
    if !dropped && from_disk > plain.from_disk_bytes {
        notes.push(
            "the plain read found in memory what loading had read from the disk: use --drop-cache to compare the two".to_owned(),
        );
    }
    if dropped && from_disk == Some(0) {
        notes.push("nothing came from the disk although the system was asked to forget the files".to_owned());
    }
    notes
}

fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64().max(1e-9) / 1e9
}

/// A field of this process's memory.
fn memory(name: &str) -> Option<u64> {
    kibibytes(&field("/proc/self/status", name)?)
}

/// Bytes that this process has had fetched from a disk.
fn from_disk() -> Option<u64> {
    field("/proc/self/io", "read_bytes")?.parse().ok()
}

/// Forgets the peak so far; whether the system can.
fn reset_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

impl LoadReport {
    fn text(&self) -> String {
        let Self { model, tp, rank, bytes, file_bytes, seconds, plain, .. } = self;
        let mut text = format!("{}\n\nrank {rank} of {tp} of {model}\n", self.environment.words());
        let mut line = |name: &str, words: String| text.push_str(&format!("  {name:<11}{words}\n"));
        line("bytes", format!("{} of {} in the files", size::show(*bytes), size::show(*file_bytes)));
        for (name, seconds, what) in [
            ("opening", seconds.opening, "headers, checked against the config"),
            ("preparing", seconds.preparing, "the device, and the arithmetic of its memory"),
            ("reading", seconds.reading, ""),
            ("waiting", seconds.waiting, "for the device to take what was read"),
            ("finishing", seconds.finishing, "the last layer's upload; workspace and caches"),
        ] {
            line(name, format!("{} s  {what}", digits(seconds)).trim_end().to_owned());
        }
        let disk = |bytes: Option<u64>| {
            bytes.map_or_else(|| "unknown".to_owned(), |bytes| format!("{} from the disk", size::show(bytes)))
        };
        line("loaded at", format!("{} GB/s, {}", digits(self.gb_s), disk(self.from_disk_bytes)));
        line(
            "plain read",
            format!(
                "{} GB/s of {} with {} threads, {}; loading reaches {:.0} % of it (page cache {})",
                digits(plain.gb_s),
                size::show(plain.bytes),
                plain.threads,
                disk(plain.from_disk_bytes),
                100.0 * self.share,
                self.page_cache,
            ),
        );
        if let (Some(peak), Some(before)) = (self.peak_host_bytes, self.host_bytes_before) {
            line("host memory", format!(" {} at most, {} before", size::show(peak), size::show(before)));
        }
        self.notes.iter().for_each(|note| text.push_str(&format!("  note: {note}\n")));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_with_a_warmer_read_is_noted() {
        let plain =
            |from_disk_bytes| PlainRead { bytes: 10, threads: 1, seconds: 1.0, gb_s: 1.0, from_disk_bytes };
        let notes =
            |dropped, from_disk, plain_disk| notes(false, dropped, from_disk, &plain(plain_disk)).join("; ");
        assert!(notes(false, Some(10), Some(0)).contains("use --drop-cache"));
        assert_eq!(notes(false, Some(0), Some(0)), "");
        assert_eq!(notes(true, Some(10), Some(10)), "");
        assert!(notes(true, Some(0), Some(0)).contains("nothing came from the disk"));
        assert_eq!(notes(true, None, None), "");
    }
}
