//! `bench`: every case timed, and its output, as the timed calls left it, checked.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use dsa80_cuda::gpu::Launched;
use dsa80_cuda::{Cost, Device, Gpu, Tiles};

use crate::args::{Machine, Select};
use crate::cases::{self, Case, LIBRARY};
use crate::report::{CaseResult, Environment, LaunchResult, Report, goal_here};
use dsa80_cuda::ceilings::Ceilings;
use dsa80_cuda::measure::time_calls;

const REPLAYS: usize = 30;
const QUICK_REPLAYS: usize = 20;

#[expect(clippy::print_stdout, reason = "the table is the command's result")]
pub(crate) fn run(
    machine: &Machine,
    select: &Select,
    json: Option<PathBuf>,
    quick: bool,
    git: Option<String>,
) -> anyhow::Result<()> {
    let mut selected = cases::all();
    selected.retain(|case| select.takes(case.kernel, &case.name));
    if selected.is_empty() {
        bail!("no case is selected");
    }
    let gpu = machine.open()?;
    let tiles = Tiles::for_gpu(&gpu.limits().name, machine.tiles.as_deref())?;
    let mut report = Report {
        environment: Environment::of(&gpu, machine.device, git)?,
        ceilings: Ceilings::measure(&gpu)?,
        cases: Vec::new(),
        notes: Vec::new(),
    };
    let mut failures = Vec::new();
    for case in &selected {
        if case.kernel == LIBRARY && !gpu.has_gemm()? {
            eprintln!("{} {}: left out, the library is not there", case.kernel, case.name);
            continue;
        }
        let start = Instant::now();
        let replays = if quick { QUICK_REPLAYS } else { REPLAYS };
        let result = bench_case(&gpu, case, &tiles, &report.ceilings, replays);
        let name = format!("{} {}", case.kernel, case.name);
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(result) => {
                eprintln!("{name}: {}, {seconds:.1} s", result.words());
                if !result.accuracy.ok() {
                    failures.push(format!("{name}: wrong: {:?}", result.accuracy));
                }
                report.cases.push(result);
            }
            Err(error) => {
                eprintln!("{name}: {error:#}");
                failures.push(format!("{name}: {error:#}"));
            }
        }
        // A run that is broken off leaves what it has.
        if let Some(path) = &json {
            report.write(path)?;
        }
    }
    println!("{}\n{}", report.table().text(), report.summary());
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("\n")) }
}

fn bench_case(
    gpu: &Gpu,
    case: &Case,
    tiles: &Tiles,
    ceilings: &Ceilings,
    replays: usize,
) -> anyhow::Result<CaseResult> {
    let tile = cases::tile(case, tiles)?;
    let mut run = case.make(gpu, tiles)?;
    run.set_tile(gpu, &tile)?;
    // The first call compiles.
    let launched = gpu.record(|| run.launch(gpu, 0))?;
    let copies = run.copies();
    run.poison(gpu)?;
    let timing = time_calls(gpu, copies, replays, |copy| run.launch(gpu, copy))?;
    let mut accuracy = run.check(gpu, 0)?;
    if copies > 1 {
        accuracy = accuracy.and(run.check(gpu, copies - 1)?);
    }
    let cost = run.cost();
    let distinct = Cost { bytes: run.distinct_bytes(), ..cost };
    Ok(CaseResult {
        kernel: case.kernel.to_owned(),
        case: case.name.clone(),
        class: case.class.to_owned(),
        tile,
        launches: launched.iter().map(|launched| launch_result(gpu, launched)).collect::<Result<_, _>>()?,
        copies,
        timing,
        bytes: cost.bytes,
        distinct_bytes: distinct.bytes,
        flops: cost.flops,
        read_share: distinct.bytes / timing.median_us / 1e3 / ceilings.read_gb_s,
        mma_share: cost.flops / timing.median_us / 1e6 / ceilings.mma_tflop_s,
        goal_us: case.goal_us,
        goal_here_us: case.goal_us.map(|goal| goal_here(goal, distinct, ceilings)),
        accuracy,
    })
}

fn launch_result(gpu: &Gpu, launched: &Launched) -> anyhow::Result<LaunchResult> {
    let compiled = gpu.prepare(&launched.program)?;
    let taken = compiled
        .resources(launched.entry)
        .with_context(|| format!("the compiler says nothing about {}", launched.entry))?;
    Ok(LaunchResult {
        entry: launched.entry.to_owned(),
        grid: launched.grid,
        threads: launched.threads,
        shared_bytes: launched.shared_bytes,
        registers: taken.registers,
        spill_bytes: taken.spill_stores + taken.spill_loads,
        stack_bytes: taken.stack,
    })
}
