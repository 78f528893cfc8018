//! What the process holds of the machine.

use std::fmt::{Display, Formatter};
use std::time::Duration;

use dsa80_model::launch::Device;
use dsa80_tests::engine::device;
use dsa80_tests::parity::devices;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footprint {
    /// Bytes of memory.
    pub(crate) resident: usize,
    /// Open file descriptors, sockets among them.
    pub(crate) files: usize,
    pub(crate) threads: usize,
    /// Bytes of the GPU that nobody holds.
    pub(crate) device_free: Option<usize>,
}

impl Footprint {
    fn now() -> Self {
        let entries = |folder: &str| std::fs::read_dir(folder).map_or(0, Iterator::count);
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse::<usize>().ok());
        Self {
            resident: kib.unwrap_or(0) << 10,
            files: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            device_free: (device() == Device::Cuda).then(devices::free_memory).flatten(),
        }
    }
}

impl Display for Footprint {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let Self { resident, files, threads, device_free } = self;
        write!(f, "{:.1} MiB, {files} files, {threads} threads", *resident as f64 / (1 << 20) as f64)?;
        match device_free {
            Some(free) => write!(f, ", {} MiB free on the GPU", free >> 20),
            None => Ok(()),
        }
    }
}

/// The footprint when connections have been closed on both sides and idle threads have ended: when it has not shrunk for a while.
pub(crate) async fn settled() -> Footprint {
    let (mut least, mut calm) = (Footprint::now(), 0);
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = Footprint::now();
        calm = if now.files < least.files { 0 } else { calm + 1 };
        least = now;
        if calm >= 6 {
            break;
        }
    }
    least
}
