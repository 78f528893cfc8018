//! The plainest way to read files, which loading is measured against.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;

/// Seconds for `threads` threads that read every file of `dir` in pieces of 8 MiB.
///
/// # Errors
/// A file that cannot be read.
pub fn plain_read(dir: &Path, threads: usize) -> Result<f64> {
    const PIECE: u64 = 8 << 20;
    let files: Vec<File> =
        std::fs::read_dir(dir)?.map(|entry| Ok(File::open(entry?.path())?)).collect::<Result<_>>()?;
    let mut pieces = Vec::new();
    for file in &files {
        let len = file.metadata()?.len();
        pieces.extend((0..len).step_by(PIECE as usize).map(|start| (file, start, PIECE.min(len - start))));
    }
    let pieces = Mutex::new(pieces.into_iter());
    let started = Instant::now();
    std::thread::scope(|scope| {
        let read = || -> Result<()> {
            let mut buffer = vec![0; PIECE as usize];
            loop {
                let next = pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((file, start, len)) = next else { return Ok(()) };
                file.read_exact_at(&mut buffer[..len as usize], start)?;
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(read)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
    })?;
    Ok(started.elapsed().as_secs_f64())
}
