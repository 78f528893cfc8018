//! How fast a checkpoint reaches a GPU, beside a plain parallel read of its files. By hand, on a GPU: `--ignored --nocapture`.

use std::time::Instant;

use dsa80_cuda::Cuda;
use dsa80_model::checkpoint::Checkpoint;
use dsa80_tests::parity::devices;
use dsa80_tests::plain_read::plain_read;
use dsa80_tests::skeleton::{Scheme, Skeleton};
use dsa80_tests::{judge, prompt};

/// A rank's share at TP=8.
const VOCAB: usize = 19_360;

/// Layers half as large as those of a rank of eight (16 whole experts are a sixteenth of 256), and more of them than a rank would have in as
/// many bytes: the first is read, and the last copied, while nothing else is done.
///
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
    Skeleton::new(Scheme::EXPERTS, 16, 16, VOCAB).save(dir.path(), true).unwrap();
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
    let (bytes, limits) = (checkpoint.file_bytes() as f64 / 1e9, prompt::limits(4096, 64, VOCAB));
    for _ in 0..2 {
        cold();
        let plain = plain_read(dir.path(), 16).unwrap();
        cold();
        let cuda = Cuda::open().unwrap();
        let started = Instant::now();
        let rank = judge::load_weights(cuda, &checkpoint, &limits).unwrap();
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
