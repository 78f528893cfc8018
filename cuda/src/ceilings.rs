//! What the machine reaches at best, in the same run.

use dsa80_reference::Result;
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Program};
use crate::gpu::{Gpu, GpuBuffer};
use crate::measure::time_calls;

/// The machine's limits as simple kernels reach them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Streaming reads of device memory.
    pub read_gb_s: f64,
    /// Copies, reads and writes counted.
    pub copy_gb_s: f64,
    /// `mma.sync` m16n8k16 of bf16, operands in registers.
    pub mma_tflop_s: f64,
    /// A launch of nothing in a graph.
    pub launch_us: f64,
}

const BYTES: usize = 1 << 30;
const MMA_ROUNDS: i32 = 4096;
const MMA_WARPS: u32 = 8;

impl Ceilings {
    /// Measures them; takes 2 GiB of memory while it does.
    ///
    /// # Errors
    /// Memory runs out; the driver refuses.
    pub fn measure(gpu: &Gpu) -> Result<Self> {
        let multiprocessors = gpu.limits().multiprocessors;
        let (input, output) = (gpu.alloc("ceiling input", BYTES)?, gpu.alloc("ceiling output", BYTES)?);
        gpu.fill(&input, 0)?;
        let streaming = |entry, blocks, args: &[Arg<'_, GpuBuffer>]| {
            best(gpu, entry, [blocks * multiprocessors, 1, 1], 512, args)
        };
        let mut read_us = f64::INFINITY;
        let mut copy_us = f64::INFINITY;
        for blocks in [2, 4, 8, 16] {
            let args = [Arg::Buffer(&input), Arg::Buffer(&output), Arg::I64((BYTES / 16) as i64)];
            read_us = streaming("ceiling_read", blocks, &args)?.min(read_us);
            copy_us = streaming("ceiling_copy", blocks, &args)?.min(copy_us);
        }
        let blocks = 2 * multiprocessors;
        let mma_args = [Arg::Buffer(&output), Arg::I32(MMA_ROUNDS)];
        let mma_us = best(gpu, "ceiling_mma", [blocks, 1, 1], 32 * MMA_WARPS, &mma_args)?;
        let flops = f64::from(blocks * MMA_WARPS) * f64::from(MMA_ROUNDS) * 8.0 * 2.0 * 16.0 * 8.0 * 16.0;
        Ok(Self {
            read_gb_s: BYTES as f64 / read_us / 1e3,
            copy_gb_s: 2.0 * BYTES as f64 / copy_us / 1e3,
            mma_tflop_s: flops / mma_us / 1e6,
            launch_us: best(gpu, "ceiling_launch", [1, 1, 1], 32, &[])?,
        })
    }
}

fn best(
    gpu: &Gpu,
    entry: &'static str,
    grid: [u32; 3],
    threads: u32,
    args: &[Arg<'_, GpuBuffer>],
) -> Result<f64> {
    let program = Program { source: "ceilings.cu", defines: Vec::new() };
    let launch = || {
        let shape = format!("{grid:?} blocks");
        gpu.launch(&Launch { program: &program, entry, grid, threads, shared_bytes: 0, shape, args })
    };
    launch()?;
    time_calls(gpu, 1, 10, |_| launch()).map(|timing| timing.median_us)
}
