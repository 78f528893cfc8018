//! Where and of what results are.

use std::path::Path;

use dsa80_model::measure::GpuFacts;
use serde::{Deserialize, Serialize};

/// What a result needs beside it to be compared with another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::cli) struct Environment {
    /// This program's version.
    pub(in crate::cli) dsa80: String,
    /// The commit, where it was given.
    pub(in crate::cli) git: Option<String>,
    pub(in crate::cli) date: String,
    /// The command line, without the secrets in it, and of files their names alone.
    pub(in crate::cli) command: String,
    pub(in crate::cli) cpu: String,
    /// Threads that the CPU runs at once for this process.
    pub(in crate::cli) cpu_threads: usize,
    pub(in crate::cli) host_memory_bytes: Option<u64>,
    /// Nothing where no GPU took part.
    pub(in crate::cli) gpu: Option<GpuFacts>,
}

impl Environment {
    pub(in crate::cli) fn of(gpu: Option<GpuFacts>, git: Option<&str>) -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        Self {
            dsa80: env!("CARGO_PKG_VERSION").to_owned(),
            git: git.map(str::to_owned),
            date: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
            command: format!("dsa80 {}", without_folders(without_secrets(arguments)).join(" ")),
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpu_threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            host_memory_bytes: field("/proc/meminfo", "MemTotal").and_then(|text| kibibytes(&text)),
            gpu,
        }
    }

    /// In one line.
    pub(in crate::cli) fn words(&self) -> String {
        let Self { dsa80, date, cpu, cpu_threads, gpu, .. } = self;
        let on = match gpu {
            Some(GpuFacts { name, cuda, nvrtc, read_gb_s, mma_tflop_s, .. }) => {
                let ceilings = match (read_gb_s, mma_tflop_s) {
                    (Some(read), Some(mma)) => {
                        format!("; ceilings in the same run: read {read:.0} GB/s, mma.sync {mma:.0} TFLOP/s")
                    }
                    _ => String::new(),
                };
                format!("{name}, CUDA {cuda}, NVRTC {nvrtc}{ceilings}")
            }
            None => format!("{cpu}, {cpu_threads} threads"),
        };
        format!("dsa80 {dsa80}, {date}, {on}")
    }
}

/// What is not for a file that is passed on: an API key, and who a URL says one is.
fn without_secrets(arguments: Vec<String>) -> Vec<String> {
    let mut secret_follows = false;
    let shown = |argument: String| {
        if std::mem::replace(&mut secret_follows, argument == "--api-key") {
            return "***".to_owned();
        }
        if argument.starts_with("--api-key=") {
            return "--api-key=***".to_owned();
        }
        match argument.split_once("://") {
            Some((scheme, rest)) => match rest.split_once('@') {
                Some((_, host)) => format!("{scheme}://***@{host}"),
                None => argument,
            },
            None => argument,
        }
    };
    arguments.into_iter().map(shown).collect()
}

/// Where a file lies is not for a file that is passed on either.
fn without_folders(arguments: Vec<String>) -> Vec<String> {
    let shown = |argument: String| {
        let (option, path) = match argument.split_once('=') {
            Some((option, path)) if option.starts_with("--") => (format!("{option}="), path),
            _ => (String::new(), argument.as_str()),
        };
        match (path.starts_with('/'), Path::new(path).file_name()) {
            (true, Some(name)) => format!("{option}{}", name.display()),
            _ => argument,
        }
    };
    arguments.into_iter().map(shown).collect()
}

/// A model's folder, by its name.
pub(super) fn folder(dir: &Path) -> String {
    dir.file_name().map_or_else(|| dir.display().to_string(), |name| name.display().to_string())
}

/// What stands after `name` and a colon in one of the kernel's tables.
pub(super) fn field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// `123 kB` in bytes.
pub(super) fn kibibytes(text: &str) -> Option<u64> {
    Some(text.strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_the_kernel_writes_them() {
        assert_eq!([kibibytes("16 kB"), kibibytes("16"), kibibytes("x kB")], [Some(16 << 10), None, None]);
    }

    #[test]
    fn a_command_line_keeps_no_secrets() {
        let line = "bench serve --api-key k1 --api-key=k2 --base-url http://me:pw@host:80 --json x.json";
        let shown = without_secrets(line.split(' ').map(str::to_owned).collect()).join(" ");
        assert_eq!(
            shown,
            "bench serve --api-key *** --api-key=*** --base-url http://***@host:80 --json x.json"
        );
    }

    #[test]
    fn a_command_line_keeps_no_folders() {
        let line =
            "bench step --json /a/b/c.json --model=/models/glm --base-url http://host:80/v1 --tp 8 d/e.json";
        let shown = without_folders(line.split(' ').map(str::to_owned).collect()).join(" ");
        assert_eq!(
            shown,
            "bench step --json c.json --model=glm --base-url http://host:80/v1 --tp 8 d/e.json"
        );
    }

    #[test]
    fn an_environment_comes_back_from_its_file() {
        let environment = Environment::of(None, Some("abc"));
        let text = serde_json::to_string(&environment).unwrap();
        assert_eq!(serde_json::from_str::<Environment>(&text).unwrap(), environment);
        assert!(environment.words().contains("threads"), "{}", environment.words());
    }
}
