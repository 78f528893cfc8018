//! Ranks that start together, as threads and as processes would: who does not get on, or has something else, is named to all.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use dsa80_model::checkpoint::{Checkpoint, Progress};
use dsa80_model::distributed::Place;
use dsa80_model::launch::{Device, LaunchOptions, follow, launch, launch_leader};

/// Far beyond what anything here takes.
const LONG: Duration = Duration::from_secs(120);

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/default")
}

fn options(tp: usize, start_timeout: Duration) -> LaunchOptions {
    LaunchOptions { device: Device::Cpu, tp, start_timeout, join_timeout: LONG, ..LaunchOptions::default() }
}

/// Takes its time at every piece that is read, and for ever at one of them.
struct Slow {
    pieces: AtomicUsize,
    each: Duration,
    hangs_at: usize,
}

impl Progress for Slow {
    fn advance(&self, _bytes: u64) {
        let piece = self.pieces.fetch_add(1, Ordering::Relaxed);
        thread::sleep(if piece == self.hangs_at { Duration::from_secs(3600) } else { self.each });
    }
}

fn slow(each: Duration, hangs_at: usize) -> Arc<Checkpoint> {
    let slow = Slow { pieces: AtomicUsize::new(0), each, hangs_at };
    Arc::new(Checkpoint::open(&dir()).unwrap().with_progress(Arc::new(slow)))
}

#[test]
fn a_thread_that_hangs_while_it_loads_ends_the_start() {
    let started = Instant::now();
    let error = launch(&slow(Duration::ZERO, 20), &options(2, Duration::from_secs(2)));
    let error = error.map(drop).unwrap_err().to_string();
    assert!(error.contains("no rank has got on for 2s while the model was started"), "{error}");
    assert!(error.contains("rank 0: loading") && error.contains("rank 1: loading"), "{error}");
    assert!(started.elapsed() < LONG, "{:?}", started.elapsed());
}

#[test]
fn loading_that_gets_on_may_take_longer_than_the_timeout() {
    let (timeout, started) = (Duration::from_secs(3), Instant::now());
    let checkpoint = slow(Duration::from_millis(150), usize::MAX);
    launch(&checkpoint, &options(1, timeout)).unwrap().shutdown(Duration::ZERO);
    assert!(started.elapsed() > timeout, "{:?} prove nothing", started.elapsed());
}

/// Rank 0 and rank 1 of two, each with its checkpoint: how rank 0's launch fails, and what rank 1 hears; its own end, if it comes to one.
fn fail(
    checkpoints: [Arc<Checkpoint>; 2],
    start_timeout: Duration,
) -> (String, Receiver<String>, Receiver<String>) {
    // One at a time: a port that is free now can be taken by another test before rank 0 listens.
    static PORT: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _port = PORT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let place = move |rank| Place { rank, world_size: 2, local_rank: 0, master: "127.0.0.1".into(), port };
    let [first, second] = checkpoints;
    let ((lost, loses), (end, ended)) = (channel(), channel());
    thread::spawn(move || {
        let lost = move |reason: &str| drop(lost.send(reason.to_owned()));
        let followed = follow(&second, &options(2, start_timeout), &place(1), Arc::new(lost));
        let _ = end.send(followed.unwrap_err().to_string());
    });
    let launched = launch_leader(&first, &options(2, start_timeout), &place(0));
    (launched.map(drop).unwrap_err().to_string(), loses, ended)
}

#[test]
fn a_process_that_hangs_while_it_loads_is_told_and_named() {
    let checkpoints = [slow(Duration::ZERO, usize::MAX), slow(Duration::ZERO, 20)];
    let (error, lost, _) = fail(checkpoints, Duration::from_secs(3));
    // Rank 1 is stuck: what ends its process is called from another thread.
    for reason in [error, lost.recv_timeout(LONG).unwrap()] {
        assert!(reason.contains("no rank has got on for 3s while the model was started"), "{reason}");
        assert!(reason.contains("rank 1: loading"), "{reason}");
    }
}

#[test]
fn ranks_with_other_weights_are_refused() {
    let whole = || Arc::new(Checkpoint::open(&dir()).unwrap());
    let refused = |other: Arc<Checkpoint>, words: &str| {
        let (error, _, ended) = fail([whole(), other], LONG);
        for reason in [error, ended.recv_timeout(LONG).unwrap()] {
            assert!(reason.contains(words) && reason.contains("all ranks need the same"), "{reason}");
        }
    };
    refused(
        Arc::new(Checkpoint::open_dummy(&dir(), 0).unwrap()),
        "--load-format is dummy on rank 1, and safetensors on rank 0",
    );

    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(dir().join(name), copy.path().join(name)).unwrap();
    }
    let copied = |change: &dyn Fn(&mut [u8])| {
        let path = copy.path().join("model.safetensors");
        let mut bytes = std::fs::read(dir().join("model.safetensors")).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
        Arc::new(Checkpoint::open(copy.path()).unwrap())
    };
    // The same file elsewhere would do; other numbers in the same shapes do not, nor the same bytes as another type.
    let words = "the hash of the checkpoint's tensors (names, types, shapes, samples) is ";
    refused(
        copied(&|bytes| floats(bytes).for_each(|range| bytes[range].iter_mut().for_each(|byte| *byte ^= 1))),
        words,
    );
    refused(
        copied(&|bytes| {
            let (bf16, f16) = (b"\"BF16\"", b"\"F16\" ");
            let at = bytes.windows(bf16.len()).position(|window| window == bf16).unwrap();
            bytes[at..at + f16.len()].copy_from_slice(f16);
        }),
        words,
    );
}

/// Where the floats of a safetensors file lie.
fn floats(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> + use<> {
    let start = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes[8..start]).unwrap();
    header.into_iter().filter(|(_, entry)| entry["dtype"] == "BF16").map(move |(_, entry)| {
        let at = |i: usize| start + usize::try_from(entry["data_offsets"][i].as_u64().unwrap()).unwrap();
        at(0)..at(1)
    })
}
