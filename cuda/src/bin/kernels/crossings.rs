//! What a sweep of the collectives needs several GPUs for: up to which size one shot serves.

use std::sync::Arc;

use dsa80_cuda::crossover;
use dsa80_cuda::tiles::PinnedCrossover;
use dsa80_cuda::{Device, Gpu, Tiles};

use crate::NoMachine;
use crate::args::Machine;

/// The kernels that have two ways.
pub(crate) const KERNELS: [&str; 2] = ["all_reduce", "all_reduce_norm"];

/// Measures it for 2, 4 and 8 of the GPUs that are there, and pins it.
#[expect(clippy::print_stdout, reason = "what was chosen is the command's result")]
pub(crate) fn pin(machine: &Machine, tiles: &mut Tiles) -> anyhow::Result<()> {
    let count = dsa80_cuda::devices()?.len();
    if count < 2 {
        eprintln!("one GPU: up to which size one shot serves is measured where there are several");
        return Ok(());
    }
    let gpus = (0..count)
        .map(|ordinal| Gpu::open(ordinal, machine.sources()).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()
        .map_err(NoMachine)?;
    for gpu in &gpus {
        gpus.iter().try_for_each(|other| gpu.reach(other))?;
    }
    let name = &gpus[0].limits().name;
    for ranks in [2, 4, 8].into_iter().filter(|&ranks| ranks <= count) {
        let sizes = crossover::measure(&gpus[..ranks], &tiles.all_reduce(gpus[0].limits()))?;
        println!("{ranks} ranks: {sizes:?}");
        tiles.pin_crossover(
            ranks,
            PinnedCrossover { chosen: format!("measured between {ranks} {name}"), sizes },
        );
    }
    Ok(())
}
