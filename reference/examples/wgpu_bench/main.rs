//! Times of the WGSL kernels at GLM-5.2's shapes, beside what a copy reaches and beside the oracle's on the CPU.
//!
//! ```sh
//! cargo run --release -p dsa80-reference --example wgpu_bench -- [--json FILE] [--no-oracle] [--only KERNEL,KERNEL] [PART OF THE ADAPTER'S NAME]
//! ```
//!
//! A call's time is a share of many that follow each other, by the device's clock: what lies between launches is in it. Weights take turns,
//! so that no cache holds them. Beside its share of a large copy's bandwidth stands the time that a copy of as many bytes takes, launch and all.

#![expect(clippy::print_stdout, reason = "what it measures is what it is for")]

mod cases;

use std::fmt::Write as _;
use std::time::Instant;

use dsa80_reference::cpu::Cpu;
use dsa80_reference::wgpu::{Wgpu, WgpuOptions};
use dsa80_reference::{DType, Error, Kernels, Result};

use self::cases::{Case, Step};

/// Seconds of runs after the last that was faster than all before, until the fastest counts: a GPU that had nothing to do has slowed its
/// clock, down to a fifth, and raises it under load.
const STEADY: f64 = 0.5;
/// A run is faster than another if it takes such a share of its time at most.
const FASTER: f64 = 0.98;
/// Seconds that a run takes about.
const RUN: f64 = 0.01;
/// Calls of a run at most.
const CALLS: usize = 64;
/// Bytes that no cache of a GPU holds.
const CACHE: f64 = 2e8;
/// Multiplications that the oracle is asked for at most: a few seconds.
const ORACLE: f64 = 3e8;
/// Bytes of which bindings are a multiple.
const VECTOR: usize = 32;
/// Bytes of what is copied to see what the memory gives.
const COPIED: usize = 1 << 28;

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for tokens in [1, 32, 2048] {
        cases.extend([
            Case::Embed { tokens },
            Case::RmsNorm { tokens, residual: false },
            Case::RmsNorm { tokens, residual: true },
            Case::RopeTable { tokens },
            Case::Rope { tokens },
            Case::LayerNormRope { tokens },
            Case::LatentRope { tokens },
            Case::SiluMul { tokens },
            Case::AbsorbQuery { tokens },
            Case::AbsorbOutput { tokens },
            Case::Router { tokens },
        ]);
    }
    // One rank of eight, and all of it: what a GPU reads within a few microseconds, and what it reads for longer.
    for (columns, features) in [(2048, 6144), (6144, 3072), (16384, 6144), (6144, 24576)] {
        cases.push(Case::Linear { tokens: 1, columns, features });
        for group_size in [32, 128] {
            cases.push(Case::LinearInt4 { tokens: 1, columns, features, group_size });
        }
    }
    for tokens in [16, 512] {
        cases.push(Case::Linear { tokens, columns: 6144, features: 3072 });
        cases.push(Case::LinearInt4 { tokens, columns: 6144, features: 3072, group_size: 128 });
    }
    for tokens in [1, 32] {
        cases.extend([
            Case::Swiglu { tokens },
            Case::Moe { tokens, int4: true },
            Case::LmHead { tokens },
            Case::Sample { tokens },
        ]);
    }
    cases.push(Case::Moe { tokens: 512, int4: true });
    cases.push(Case::Moe { tokens: 1, int4: false });
    let step = |seqs, new, context| Step { seqs, new, context };
    for step in [step(1, 1, 32768), step(32, 1, 32768), step(1, 2048, 8192)] {
        cases.extend([false, true].map(|fp8| Case::IndexerLogits { step, fp8 }));
        cases.push(Case::TopK { step });
    }
    for step in [step(1, 1, 8192), step(32, 1, 8192), step(1, 2048, 8192)] {
        cases.extend([false, true].map(|fp8| Case::SparseMla { step, fp8 }));
    }
    cases
}

/// Seconds of what `work` launches, by the device's clock or, where it has none, by the host's.
fn seconds(wgpu: &Wgpu, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    if let Some(seconds) = wgpu.device_seconds(&mut work)? {
        return Ok(seconds);
    }
    let last = wgpu.alloc(DType::Index, &[1])?;
    let started = Instant::now();
    work()?;
    wgpu.read_index(&last)?;
    Ok(started.elapsed().as_secs_f64())
}

/// Seconds of a call: the best of the runs, of as many calls as make a run long enough.
fn seconds_of_call(wgpu: &Wgpu, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    let once = seconds(wgpu, &mut call)?;
    let calls = ((RUN / once) as usize).clamp(1, CALLS);
    let (mut best, mut faster) = (f64::INFINITY, Instant::now());
    while faster.elapsed().as_secs_f64() < STEADY {
        let seconds = seconds(wgpu, || (0..calls).try_for_each(|_| call()))? / calls as f64;
        if seconds < FASTER * best {
            faster = Instant::now();
        }
        best = best.min(seconds);
    }
    Ok(best)
}

/// What a case took.
struct Line {
    case: Case,
    wgpu: f64,
    /// A copy that reads and writes as many bytes, altogether.
    copy: f64,
    oracle: Option<f64>,
}

impl Line {
    fn measure(wgpu: &Wgpu, case: Case, with_oracle: bool) -> Result<Self> {
        let copies = (CACHE / case.bytes()).clamp(1.0, 24.0) as usize;
        let seconds = seconds_of_call(wgpu, case.ready(wgpu, copies)?)?;
        let copy = copy_seconds(wgpu, case.bytes(), copies)?;
        let mut oracle = None;
        if with_oracle && case.multiplications() <= ORACLE {
            let cpu = Cpu::<f64>::rounding_to_bf16();
            let mut call = case.ready(&cpu, 1)?;
            let started = Instant::now();
            call()?;
            oracle = Some(started.elapsed().as_secs_f64());
        }
        Ok(Self { case, wgpu: seconds, copy, oracle })
    }

    fn share(&self, copy: f64) -> f64 {
        self.case.bytes() / self.wgpu / copy
    }

    fn table(&self, copy: f64) -> String {
        let oracle = self.oracle.map_or("-".into(), |seconds| format!("{:.0} us", 1e6 * seconds));
        format!(
            "{:18} {:32} {:10.1} us {:9.1} GB/s {:4.0} % {:8.1} us {oracle:>14}",
            self.case.kernel(),
            self.case.shape(),
            1e6 * self.wgpu,
            1e-9 * self.case.bytes() / self.wgpu,
            100.0 * self.share(copy),
            1e6 * self.copy
        )
    }

    fn json(&self, copy: f64) -> String {
        let oracle = self.oracle.map_or("null".into(), |seconds| format!("{:.1}", 1e6 * seconds));
        format!(
            r#"{{"kernel": "{}", "case": "{}", "us": {:.2}, "bytes": {:.0}, "copy_share": {:.4}, "copy_us": {:.2}, "oracle_us": {oracle}}}"#,
            self.case.kernel(),
            self.case.shape(),
            1e6 * self.wgpu,
            self.case.bytes(),
            self.share(copy),
            1e6 * self.copy
        )
    }
}

/// Seconds of a copy by a kernel that reads and writes `bytes` altogether, of `copies` places in turns; of very many, what a part of them takes, times
/// as many parts as there are.
fn copy_seconds(wgpu: &Wgpu, bytes: f64, copies: usize) -> Result<f64> {
    let halves =
        (bytes as usize).div_ceil(4).clamp(1, COPIED.min(wgpu.largest_binding()) / VECTOR * VECTOR / 2);
    let tensors = || (0..copies).map(|_| wgpu.alloc(DType::Act, &[halves])).collect::<Result<Vec<_>>>();
    let (from, mut to, mut turn) = (tensors()?, tensors()?, 0);
    let seconds = seconds_of_call(wgpu, || {
        turn = (turn + 1) % copies;
        wgpu.copy(&from[turn], &mut to[turn])
    })?;
    Ok(seconds * (bytes / (4 * halves) as f64).max(1.0))
}

/// Bytes a second, read and written, of a copy by a kernel.
fn copy_rate(wgpu: &Wgpu) -> Result<f64> {
    let bytes = (2 * COPIED.min(wgpu.largest_binding())) as f64;
    Ok(bytes / copy_seconds(wgpu, bytes, 1)?)
}

fn main() -> Result<()> {
    let (mut options, mut json, mut with_oracle, mut only) =
        (WgpuOptions::default(), None, true, None::<String>);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = arguments.next(),
            "--only" => only = arguments.next(),
            "--no-oracle" => with_oracle = false,
            _ => options.adapter = Some(argument),
        }
    }
    let wgpu = Wgpu::open(&options)?;
    let (name, copy) = (wgpu.context().name(), copy_rate(&wgpu)?);
    println!("{name}: a copy reads and writes {:.1} GB/s", 1e-9 * copy);
    println!(
        "{:18} {:32} {:>13} {:>14} {:>6} {:>11} {:>14}",
        "kernel", "shape", "time", "bytes", "share", "a copy's", "the oracle's"
    );
    let mut lines = Vec::new();
    for case in cases()
        .into_iter()
        .filter(|case| only.as_ref().is_none_or(|only| only.split(',').any(|name| case.kernel() == name)))
    {
        let line = Line::measure(&wgpu, case, with_oracle)?;
        println!("{}", line.table(copy));
        lines.push(line.json(copy));
    }
    if let Some(path) = json {
        let mut text =
            format!("{{\"adapter\": \"{name}\", \"copy_gb_s\": {:.1}, \"cases\": [\n", 1e-9 * copy);
        let _ = writeln!(text, "{}\n]}}", lines.join(",\n"));
        std::fs::write(&path, text).map_err(|error| Error::Backend {
            backend: "wgpu_bench",
            message: format!("{path} cannot be written: {error}"),
        })?;
    }
    Ok(())
}
