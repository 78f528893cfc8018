//! How fast a checkpoint reaches a GPU, beside a plain parallel read of its files. By hand, on a GPU: `--ignored --nocapture`.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use dsa80_cuda::Cuda;
use dsa80_model::checkpoint::Checkpoint;
use dsa80_tests::parity::devices;
use dsa80_tests::skeleton::{Scheme, Skeleton};
use dsa80_tests::{judge, prompt};

/// Seconds for 16 threads that read everything in pieces of 8 MiB.
fn plain_read(dir: &Path) -> f64 {
    const PIECE: u64 = 8 << 20;
    let files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    let files: Vec<File> = files.iter().map(|path| File::open(path).unwrap()).collect();
    let pieces = files.iter().flat_map(|file| {
        let len = file.metadata().unwrap().len();
        (0..len).step_by(PIECE as usize).map(move |start| (file, start, PIECE.min(len - start)))
    });
    let pieces = Mutex::new(pieces);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let mut buffer = vec![0; PIECE as usize];
                loop {
                    let Some((file, start, len)) = pieces.lock().unwrap().next() else { return };
                    file.read_exact_at(&mut buffer[..len as usize], start).unwrap();
                }
            });
        }
    });
    started.elapsed().as_secs_f64()
}

/// `DSA80_LOAD_DIR` is where the files are written (10 GB), a temporary folder by default; `DSA80_LOAD_COLD`, a command that empties the
/// system's cache of files, runs before each reading.
#[test]
#[ignore = "a measurement, for a GPU"]
fn a_checkpoint_reaches_the_gpu() {
    if devices::gpu().is_none() {
        return;
    }
    let dir = match std::env::var_os("DSA80_LOAD_DIR") {
        Some(parent) => tempfile::tempdir_in(parent).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    Skeleton::new(Scheme::EXPERTS, 4).save(dir.path(), true).unwrap();
    let cold = || {
        if let Some(command) = std::env::var_os("DSA80_LOAD_COLD") {
            let status = std::process::Command::new("sh")
                .arg("-c")
                .arg(command)
                .current_dir(dir.path())
                .status()
                .unwrap();
            assert!(status.success());
        }
    };
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let (bytes, limits) = (checkpoint.file_bytes() as f64 / 1e9, prompt::limits(4096, 64, 154_880));
    for _ in 0..2 {
        cold();
        let plain = plain_read(dir.path());
        cold();
        let started = Instant::now();
        let rank = judge::load_weights(Cuda::open().unwrap(), &checkpoint, &limits).unwrap();
        rank.kernels().device().synchronize().unwrap();
        let loaded = started.elapsed().as_secs_f64();
        println!(
            "{bytes:.1} GB: a plain read {plain:.2} s ({:.1} GB/s), loaded in {loaded:.2} s ({:.1} GB/s): {:.0} %",
            bytes / plain,
            bytes / loaded,
            100.0 * plain / loaded
        );
    }
}
