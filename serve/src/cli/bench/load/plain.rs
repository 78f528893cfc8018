//! Files read by several threads, and nothing else done: what loading is compared with.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// A plain read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct PlainRead {
    pub(super) bytes: u64,
    pub(super) threads: usize,
    pub(super) seconds: f64,
    pub(super) gb_s: f64,
    pub(super) from_disk_bytes: Option<u64>,
}

/// What a thread reads at once.
const PART: u64 = 16 << 20;

/// A part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part<'a> {
    file: &'a Path,
    start: u64,
    bytes: u64,
}

/// The weights files of a checkpoint's folder, in order.
pub(super) fn weights_files(dir: &Path) -> anyhow::Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = path.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
            files.push((path, bytes));
        }
    }
    if files.is_empty() {
        bail!("{} has no safetensors files, and there is nothing to load", dir.display());
    }
    files.sort();
    Ok(files)
}

impl PlainRead {
    /// Reads `bytes` of the files, as much of each as of any other, with `threads` threads.
    pub(super) fn of(files: &[(PathBuf, u64)], bytes: u64, threads: usize) -> anyhow::Result<Self> {
        let parts = parts(files, bytes);
        let next = AtomicUsize::new(0);
        let started = Instant::now();
        let read: anyhow::Result<Vec<u64>> = std::thread::scope(|scope| {
            let work = || {
                let mut buffer = vec![0; PART as usize];
                let mut read = 0;
                while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    part.read(&mut buffer)?;
                    read += part.bytes;
                }
                Ok(read)
            };
            let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|read| read.unwrap_or_else(|_| bail!("a thread that read panicked"))).collect()
        });
        let (bytes, seconds) = (read?.into_iter().sum(), started.elapsed().as_secs_f64());
        Ok(Self {
            bytes,
            threads,
            seconds,
            gb_s: bytes as f64 / seconds.max(1e-9) / 1e9,
            from_disk_bytes: None,
        })
    }
}

/// The beginning of every file, `bytes` together or all there is.
fn parts(files: &[(PathBuf, u64)], bytes: u64) -> Vec<Part<'_>> {
    let all: u64 = files.iter().map(|(_, len)| len).sum();
    let share = (bytes as f64 / all.max(1) as f64).min(1.0);
    let mut parts = Vec::new();
    for (file, len) in files {
        let end = (*len as f64 * share).ceil() as u64;
        let starts = (0..end).step_by(PART as usize);
        parts.extend(starts.map(|start| Part { file, start, bytes: PART.min(end - start) }));
    }
    parts
}

impl Part<'_> {
    fn read(&self, buffer: &mut [u8]) -> anyhow::Result<()> {
        let mut read = || {
            let mut file = File::open(self.file)?;
            file.seek(SeekFrom::Start(self.start))?;
            file.read_exact(&mut buffer[..self.bytes as usize])
        };
        read().with_context(|| format!("cannot read {}", self.file.display()))
    }
}

/// Asks the system to forget what it keeps of the files in memory. What is still to be written it keeps.
#[cfg(target_os = "linux")]
pub(super) fn drop_cache(files: &[(PathBuf, u64)]) -> anyhow::Result<()> {
    for (path, _) in files {
        let asked = File::open(path)
            .and_then(|file| Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?));
        asked.with_context(|| format!("the system does not forget {}", path.display()))?;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
pub(super) fn drop_cache(_files: &[(PathBuf, u64)]) -> anyhow::Result<()> {
    bail!("--drop-cache is for Linux")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_of_every_file_as_of_any_other() {
        let files = [("a".into(), 40 << 20), ("b".into(), 8 << 20)];
        let lengths = |bytes| parts(&files, bytes).iter().map(|part| part.bytes >> 20).collect::<Vec<_>>();
        assert_eq!(lengths(24 << 20), [16, 4, 4]);
        assert_eq!(lengths(48 << 20), [16, 16, 8, 8]);
        assert_eq!(lengths(1 << 40), [16, 16, 8, 8]);
        assert_eq!(
            parts(&files, 48 << 20)[2],
            Part { file: Path::new("a"), start: 32 << 20, bytes: 8 << 20 }
        );
    }

    #[test]
    fn a_file_that_ends_early_is_named() {
        let path = std::env::temp_dir().join(format!("dsa80-plain-{}", std::process::id()));
        std::fs::write(&path, [0; 100]).unwrap();
        assert_eq!(PlainRead::of(&[(path.clone(), 100)], 100, 3).unwrap().bytes, 100);
        let error = PlainRead::of(&[(path.clone(), 200)], 200, 3).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(format!("{error:#}").contains(&path.display().to_string()), "{error:#}");
    }
}
