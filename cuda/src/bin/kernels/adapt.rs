//! `adapt`: tiles for a GPU that is not here, from those that were measured on another.

use std::path::Path;

use anyhow::{Context, bail};
use dsa80_cuda::gpu::Compiler;
use dsa80_cuda::tiles::{About, Pinned};
use dsa80_cuda::{Limits, Tiles, registry};

use crate::NoMachine;
use crate::args::Machine;
use crate::resources::{self, tile_words};

/// Blocks of a prefill chunk with a token each, whose waves are told.
const CHUNK: u32 = 2048;

#[expect(clippy::print_stdout, reason = "what was chosen is the command's result")]
pub(crate) fn run(machine: &Machine, from: &str, to: &str, folder: &Path) -> anyhow::Result<()> {
    let files = Tiles::all(machine.tiles.as_deref().or(Some(folder)))?;
    let file = |name: &str| {
        let file = files.iter().find(|tiles| tiles.file == format!("{name}.toml"));
        file.with_context(|| format!("{} has no {name}.toml", folder.display()))
    };
    let (source, target) = (file(from)?, file(to)?);
    let limits = Limits::a100();
    let compiler = Compiler::new(machine.sources(), (8, 0), None, None).map_err(NoMachine)?;
    let mut adapted = Tiles::default();
    adapted.about = About {
        gpu: target.about.gpu.clone(),
        note: format!(
            "chosen by occupancy and wave arithmetic for an A100 and not measured: what `kernels sweep` chose on an {}, where it fits; one \
             sweep on a real one replaces this file",
            source.about.gpu
        ),
    };
    for kernel in registry::KERNELS {
        for &class in kernel.classes {
            let measured = source.pinned(kernel.kernel, class).map(|pinned| pinned.tile.clone());
            let safe = kernel.safe(class).map_err(anyhow::Error::msg)?;
            let mut choice = None;
            for tile in measured.into_iter().chain([safe]) {
                match resources::unfit_for_a100(&compiler, kernel, class, &tile)? {
                    None => {
                        choice = Some(tile);
                        break;
                    }
                    Some(fault) => println!("{} {class}: {}: {fault}", kernel.kernel, tile_words(&tile)),
                }
            }
            let Some(tile) = choice else { bail!("{} {class}: no tile fits an A100", kernel.kernel) };
            let resident = resources::resident(&compiler, kernel, class, &tile)?;
            let chosen = in_words(from, &resident, limits.multiprocessors);
            println!("{} {class}: {}: {chosen}", kernel.kernel, tile_words(&tile));
            let pinned = Pinned { chosen, median_us: None, margin_percent: None, tile };
            adapted.pin(kernel.kernel, class, pinned);
        }
    }
    let path = folder.join(format!("{to}.toml"));
    std::fs::write(&path, adapted.to_toml()?).with_context(|| path.display().to_string())
}

/// `(blocks, warps)` of each program on a multiprocessor, in words.
fn in_words(from: &str, resident: &[(u32, u32)], multiprocessors: u32) -> String {
    let range = |of: fn(&(u32, u32)) -> u32| {
        let (low, high) = (resident.iter().map(of).min(), resident.iter().map(of).max());
        match (low.unwrap_or(0), high.unwrap_or(0)) {
            (low, high) if low == high => low.to_string(),
            (low, high) => format!("{low} to {high}"),
        }
    };
    let blocks = resident.iter().map(|&(blocks, _)| blocks).min().unwrap_or(1).max(1);
    let waves = f64::from(CHUNK) / f64::from(blocks * multiprocessors);
    let full = waves / waves.ceil();
    format!(
        "{from}'s; {} blocks of {} warps are resident on a multiprocessor; {CHUNK} blocks are {waves:.2} waves, {:.0} % full",
        range(|&(blocks, _)| blocks),
        range(|&(blocks, warps)| warps / blocks.max(1)),
        100.0 * full
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_are_counted() {
        assert_eq!(
            in_words("h200", &[(1, 4), (3, 12)], 108),
            "h200's; 1 to 3 blocks of 4 warps are resident on a multiprocessor; 2048 blocks are 18.96 waves, 100 % full"
        );
        assert!(in_words("h200", &[(2, 8)], 108).contains("2 blocks of 4 warps"));
        assert!(in_words("h200", &[(16, 64)], 108).ends_with("1.19 waves, 59 % full"));
    }
}
