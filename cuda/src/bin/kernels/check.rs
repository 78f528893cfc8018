//! `check`: small and middle cases against the oracle, twice, with the pinned tile or with all.

use anyhow::bail;
use dsa80_cuda::{Device, Gpu, Tiles};

use crate::args::{Machine, Select};
use crate::cases::{self, LIBRARY, Run};
use crate::oracle::Accuracy;
use crate::resources::tile_words;
use crate::table::Table;

#[expect(clippy::print_stdout, reason = "the table is the command's result")]
pub(crate) fn run(machine: &Machine, select: &Select, all_tiles: bool) -> anyhow::Result<()> {
    let mut selected = cases::all();
    selected.retain(|case| case.check && select.takes(case.kernel, &case.name));
    if selected.is_empty() {
        bail!("no case is selected");
    }
    let gpu = machine.open()?;
    let pinned = Tiles::for_gpu(&gpu.limits().name, machine.tiles.as_deref())?;
    let mut table = Table::new(["kernel", "case", "rel. L2", "limit", "worst", "rows", "", "tile"]);
    let mut failures = Vec::new();
    for case in &selected {
        if case.kernel == LIBRARY && !gpu.has_gemm()? {
            continue;
        }
        let mut tiles = vec![cases::tile(case, &pinned)?];
        if all_tiles && case.kernel != LIBRARY {
            let candidates = cases::registered(case)?.candidates(case.class, gpu.limits());
            tiles.extend(candidates.map_err(anyhow::Error::msg)?);
        }
        let mut run = case.make(&gpu, &pinned)?;
        for tile in &tiles {
            let words = format!("{} {}, {}", case.kernel, case.name, tile_words(tile));
            let accuracy = match check(&gpu, run.as_mut(), tile) {
                Ok(accuracy) if accuracy.ok() => accuracy,
                Ok(accuracy) => {
                    failures.push(format!("{words}: {accuracy:?}"));
                    accuracy
                }
                Err(error) => {
                    failures.push(format!("{words}: {error}"));
                    continue;
                }
            };
            table.row([
                case.kernel.to_owned(),
                case.name.clone(),
                format!("{:.1e}", accuracy.relative_l2),
                format!("{:.1e}", accuracy.relative_l2_limit),
                format!("{:.2}", accuracy.worst),
                accuracy.rows.to_string(),
                if accuracy.ok() { "ok" } else { "WRONG" }.to_owned(),
                tile_words(tile),
            ]);
        }
    }
    println!("{}", table.text());
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("\n")) }
}

/// The output of a first and of a second call.
fn check(gpu: &Gpu, run: &mut dyn Run, tile: &toml::Table) -> dsa80_reference::Result<Accuracy> {
    run.set_tile(gpu, tile)?;
    let mut call = || {
        run.poison(gpu)?;
        run.launch(gpu, 0)?;
        run.check(gpu, 0)
    };
    Ok(call()?.and(call()?))
}
