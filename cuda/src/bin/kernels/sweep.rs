//! `sweep`: the candidates of each class of shapes, timed on its cases; the best is pinned.

use std::path::Path;

use anyhow::{Context, bail};
use dsa80_cuda::gpu::Compiler;
use dsa80_cuda::tiles::{About, Pinned, short_name};
use dsa80_cuda::{Device, Gpu, Limits, ProgramEntry, Tiles};

use crate::NoMachine;
use crate::args::{Machine, Select};
use crate::cases::{self, Case, LIBRARY};
use crate::crossings;
use crate::report::microseconds;
use crate::resources::{compile_all, tile_words, unfit_for_a100};
use crate::table::Table;
use dsa80_cuda::measure::time_calls;

const REPLAYS: usize = 20;

/// Where the incumbent is slower by less than this, it stays: two sweeps differ by as much.
const NOISE: f64 = 0.015;

/// A tile and its geometric mean over the cases, in microseconds; none where it was wrong or refused.
#[derive(Debug, Clone, PartialEq)]
struct Timed {
    tile: toml::Table,
    us: Option<f64>,
}

#[expect(clippy::print_stdout, reason = "the table is the command's result")]
pub(crate) fn run(machine: &Machine, select: &Select, folder: &Path, dry_run: bool) -> anyhow::Result<()> {
    let mut selected = cases::all();
    selected.retain(|case| case.kernel != LIBRARY && select.takes(case.kernel, &case.name));
    if selected.is_empty() {
        bail!("no case is selected");
    }
    let gpu = machine.open()?;
    let mut tiles = Tiles::for_gpu(&gpu.limits().name, machine.tiles.as_deref())?;
    tiles.about = About {
        gpu: gpu.limits().name.clone(),
        note: "measured by `kernels sweep` where a median is given: the geometric mean over the cases; the margin is the runner-up's"
            .to_owned(),
    };
    let path = folder.join(format!("{}.toml", short_name(&gpu.limits().name)));
    let for_a100 = Compiler::new(machine.sources(), (8, 0), None, None).map_err(NoMachine)?;
    let mut done: Vec<(&str, &str)> = Vec::new();
    for case in &selected {
        let class = (case.kernel, case.class);
        if done.contains(&class) {
            continue;
        }
        done.push(class);
        let cases: Vec<&Case> =
            selected.iter().filter(|other| (other.kernel, other.class) == class).collect();
        let (incumbent, mut timed) = sweep_class(&gpu, &cases, &tiles)?;
        let kernel = cases::registered(case)?;
        let (best, margin) = loop {
            let Some((best, margin)) = choose(&incumbent, &timed) else {
                bail!("{} {}: no tile works", case.kernel, case.class);
            };
            match unfit_for_a100(&for_a100, kernel, case.class, &best.tile)? {
                None => break (best.clone(), margin),
                Some(fault) => {
                    let unfit = best.tile.clone();
                    eprintln!("  {}: {fault}", tile_words(&unfit));
                    timed.iter_mut().filter(|timed| timed.tile == unfit).for_each(|timed| timed.us = None);
                }
            }
        };
        let mut table = Table::new(["kernel", "class", "us", "", "tile"]);
        for Timed { tile, us } in &timed {
            table.row([
                case.kernel.to_owned(),
                case.class.to_owned(),
                us.map_or("-".into(), microseconds),
                if *tile == best.tile { "pinned" } else { "" }.to_owned(),
                tile_words(tile),
            ]);
        }
        println!("{}", table.text());
        let pinned = Pinned {
            chosen: format!("sweep of {} tiles on {} cases", timed.len(), cases.len()),
            median_us: best.us.map(|us| (us * 1e3).round() / 1e3),
            margin_percent: margin.map(|margin| (margin * 1e3).round() / 10.0),
            tile: best.tile.clone(),
        };
        tiles.pin(case.kernel, case.class, pinned);
        if !dry_run {
            // A sweep that is broken off leaves what it has.
            std::fs::write(&path, tiles.to_toml()?).with_context(|| path.display().to_string())?;
        }
    }
    if done.iter().any(|(kernel, _)| crossings::KERNELS.contains(kernel)) {
        crossings::pin(machine, &mut tiles)?;
        if !dry_run {
            std::fs::write(&path, tiles.to_toml()?).with_context(|| path.display().to_string())?;
        }
    }
    if !dry_run {
        println!("written to {}", path.display());
    }
    Ok(())
}

/// The incumbent, and all tiles with their times.
fn sweep_class(gpu: &Gpu, cases: &[&Case], tiles: &Tiles) -> anyhow::Result<(toml::Table, Vec<Timed>)> {
    let first = cases.first().context("a class without cases")?;
    let incumbent = cases::tile(first, tiles)?;
    let kernel = cases::registered(first)?;
    let mut all = vec![incumbent.clone()];
    for tile in kernel.candidates(first.class, gpu.limits()).map_err(anyhow::Error::msg)? {
        // What is pinned anywhere fits an A100.
        if !all.contains(&tile) && kernel.validate(first.class, &tile, &Limits::a100()).is_ok() {
            all.push(tile);
        }
    }
    let programs: Vec<ProgramEntry> =
        all.iter().filter_map(|tile| kernel.programs(first.class, tile).ok()).flatten().collect();
    compile_all(gpu.compiler(), programs.iter().map(|entry| &entry.program));
    let mut timed = time_tiles(gpu, cases, tiles, &all)?;
    // Candidates mostly differ from the safe tile in one part: the best parts together are one more.
    let safe = kernel.safe(first.class).map_err(anyhow::Error::msg)?;
    let combined = combine(&safe, &timed);
    if !all.contains(&combined) && kernel.validate(first.class, &combined, &Limits::a100()).is_ok() {
        timed.extend(time_tiles(gpu, cases, tiles, &[combined])?);
    }
    Ok((incumbent, timed))
}

/// The geometric mean of every tile over the cases.
fn time_tiles(gpu: &Gpu, cases: &[&Case], tiles: &Tiles, all: &[toml::Table]) -> anyhow::Result<Vec<Timed>> {
    let mut logs: Vec<Option<f64>> = vec![Some(0.0); all.len()];
    for case in cases {
        eprintln!("{} {}: {} tiles", case.kernel, case.name, all.len());
        let mut run = case.make(gpu, tiles)?;
        for (tile, log) in all.iter().zip(&mut logs) {
            let timed = (|| {
                run.set_tile(gpu, tile)?;
                run.poison(gpu)?;
                run.launch(gpu, 0)?;
                let copies = run.copies();
                let timing = time_calls(gpu, copies, REPLAYS, |copy| run.launch(gpu, copy))?;
                let accuracy = run.check(gpu, copies - 1)?;
                Ok::<_, dsa80_reference::Error>((timing.median_us, accuracy))
            })();
            match timed {
                Ok((us, accuracy)) if accuracy.ok() => *log = log.map(|log| log + us.ln()),
                Ok((_, accuracy)) => {
                    eprintln!("  {} is wrong: {accuracy:?}", tile_words(tile));
                    *log = None;
                }
                Err(error) => {
                    eprintln!("  {}: {error}", tile_words(tile));
                    *log = None;
                }
            }
        }
    }
    let mean = |log: f64| (log / cases.len() as f64).exp();
    Ok(all.iter().zip(logs).map(|(tile, log)| Timed { tile: tile.clone(), us: log.map(mean) }).collect())
}

/// For every key, the value of the fastest tile that differs from `base` in this key alone, or its own.
fn combine(base: &toml::Table, timed: &[Timed]) -> toml::Table {
    let mut combined = base.clone();
    for (key, value) in &mut combined {
        let alone = |tile: &toml::Table| {
            tile.iter().all(|(other, value)| other == key || base.get(other) == Some(value))
        };
        let fastest = timed
            .iter()
            .filter(|timed| alone(&timed.tile))
            .filter_map(|timed| Some((timed.us?, timed.tile.get(key)?)))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, best)) = fastest {
            *value = best.clone();
        }
    }
    combined
}

/// The fastest tile, or the incumbent where the fastest is not clearly faster; and how much slower the runner-up is.
fn choose<'a>(incumbent: &toml::Table, timed: &'a [Timed]) -> Option<(&'a Timed, Option<f64>)> {
    let mut ranked: Vec<(&Timed, f64)> = timed.iter().filter_map(|timed| Some((timed, timed.us?))).collect();
    ranked.sort_by(|a, b| a.1.total_cmp(&b.1));
    let fastest = *ranked.first()?;
    let stays =
        ranked.iter().find(|(timed, us)| timed.tile == *incumbent && *us <= fastest.1 * (1.0 + NOISE));
    let best = *stays.unwrap_or(&fastest);
    let runner_up = ranked.iter().find(|(timed, _)| timed.tile != best.0.tile);
    Some((best.0, runner_up.map(|(_, us)| us / best.1 - 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(keys: i64, us: impl Into<Option<f64>>) -> Timed {
        Timed { tile: [("keys".to_owned(), keys.into())].into_iter().collect(), us: us.into() }
    }

    #[test]
    fn the_incumbent_stays_inside_the_noise() {
        let all = [timed(1, 10.1), timed(2, 10.0), timed(3, None), timed(4, 12.0)];
        let (best, margin) = choose(&all[0].tile, &all).unwrap();
        assert_eq!(best, &all[0]);
        assert!((margin.unwrap() + 0.0099).abs() < 1e-4, "the runner-up is a little faster: {margin:?}");
        let (best, margin) = choose(&all[3].tile, &all).unwrap();
        assert_eq!(best, &all[1]);
        assert!((margin.unwrap() - 0.01).abs() < 1e-9);
    }

    #[test]
    fn the_best_parts_are_combined() {
        let tile = |keys: i64, stages: i64| -> toml::Table {
            [("keys".to_owned(), keys.into()), ("stages".to_owned(), stages.into())].into_iter().collect()
        };
        let timed = |keys, stages, us| Timed { tile: tile(keys, stages), us };
        let all = [
            timed(1, 1, Some(10.0)),
            timed(2, 1, Some(9.0)),
            timed(3, 1, None),
            timed(1, 2, Some(11.0)),
            timed(1, 3, Some(8.0)),
            timed(4, 4, Some(1.0)),
        ];
        assert_eq!(combine(&tile(1, 1), &all), tile(2, 3));
        assert_eq!(combine(&tile(7, 7), &all), tile(7, 7));
    }

    #[test]
    fn wrong_tiles_are_never_chosen() {
        let all = [timed(1, None), timed(2, 10.0)];
        assert_eq!(choose(&all[0].tile, &all), Some((&all[1], None)));
        assert_eq!(choose(&all[0].tile, &all[..1]), None);
    }
}
