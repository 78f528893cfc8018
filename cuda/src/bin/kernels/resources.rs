//! What every pinned tile takes of an A100, from the assembler: the check that needs no GPU.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail};
use dsa80_cuda::gpu::{Compiler, Resources};
use dsa80_cuda::registry::{self, Registered};
use dsa80_cuda::{Limits, Program, ProgramEntry, Tiles};

use crate::NoMachine;
use crate::args::Machine;
use crate::table::Table;

/// A tile, and where it is pinned.
#[derive(Clone)]
struct Subject {
    kernel: &'static Registered,
    class: &'static str,
    tile: toml::Table,
}

/// Compiles and prints; fails when a tile uses local memory or does not fit an A100.
#[expect(clippy::print_stdout, reason = "the table is the command's result")]
pub(crate) fn run(machine: &Machine, only: Option<&str>, arch: &str, all_tiles: bool) -> anyhow::Result<()> {
    let limits = Limits::a100();
    let capability = parse_arch(arch)?;
    let compiler = Compiler::new(machine.sources(), capability, None, None).map_err(NoMachine)?;
    let mut table = Table::new([
        "kernel",
        "class",
        "variant",
        "threads",
        "registers",
        "shared",
        "stack",
        "spills",
        "blocks/SM",
        "warps/SM",
        "tile",
    ]);
    let mut entries: Vec<(Subject, ProgramEntry)> = Vec::new();
    for subject in subjects(machine, only, all_tiles)? {
        for entry in subject.kernel.programs(subject.class, &subject.tile).map_err(anyhow::Error::msg)? {
            if entries.iter().all(|(_, seen)| *seen != entry) {
                entries.push((subject.clone(), entry));
            }
        }
    }
    compile_all(&compiler, entries.iter().map(|(_, entry)| &entry.program));
    let mut faults = Vec::new();
    for (Subject { kernel, class, tile }, entry) in &entries {
        let taken = match taken(&compiler, entry) {
            Ok(taken) => taken,
            Err(error) => {
                faults.push(format!("{error:#}"));
                continue;
            }
        };
        let blocks = limits.resident_blocks(entry.threads, taken.registers, entry.shared_bytes);
        table.row([
            kernel.kernel.to_owned(),
            (*class).to_owned(),
            entry.variant.clone(),
            entry.threads.to_string(),
            taken.registers.to_string(),
            entry.shared_bytes.to_string(),
            taken.stack.to_string(),
            (taken.spill_stores + taken.spill_loads).to_string(),
            blocks.to_string(),
            (blocks * entry.threads.div_ceil(32)).to_string(),
            tile_words(tile),
        ]);
        faults.extend(
            fault(entry, &taken, &limits)
                .map(|fault| format!("{} {} ({}): {fault}", kernel.kernel, tile_words(tile), entry.variant)),
        );
    }
    println!("{}", table.text());
    println!("{} programs for {arch}, NVRTC {}", entries.len(), compiler.nvrtc_version());
    if faults.is_empty() { Ok(()) } else { bail!("{}", faults.join("\n")) }
}

/// Compiles into the cache, on all cores; errors come up again where a program is used.
pub(crate) fn compile_all<'a>(compiler: &Compiler, programs: impl Iterator<Item = &'a Program> + Send) {
    let programs = Mutex::new(programs);
    let next = || programs.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(program) = next() {
                    let _ = compiler.compile(program);
                }
            });
        }
    });
}

/// Why a tile may not be pinned, if it may not: what it takes on an A100, whatever GPU it is for.
pub(crate) fn unfit_for_a100(
    compiler: &Compiler,
    kernel: &Registered,
    class: &str,
    tile: &toml::Table,
) -> anyhow::Result<Option<String>> {
    let entries = kernel.programs(class, tile).map_err(anyhow::Error::msg)?;
    compile_all(compiler, entries.iter().map(|entry| &entry.program));
    for entry in &entries {
        if let Some(fault) = fault(entry, &taken(compiler, entry)?, &Limits::a100()) {
            return Ok(Some(fault));
        }
    }
    Ok(None)
}

/// Blocks and warps of each program that a multiprocessor of an A100 holds.
pub(crate) fn resident(
    compiler: &Compiler,
    kernel: &Registered,
    class: &str,
    tile: &toml::Table,
) -> anyhow::Result<Vec<(u32, u32)>> {
    let entries = kernel.programs(class, tile).map_err(anyhow::Error::msg)?;
    let resident = |entry: &ProgramEntry| {
        let registers = taken(compiler, entry)?.registers;
        let blocks = Limits::a100().resident_blocks(entry.threads, registers, entry.shared_bytes);
        Ok((blocks, blocks * entry.threads.div_ceil(32)))
    };
    entries.iter().map(resident).collect()
}

fn taken(compiler: &Compiler, entry: &ProgramEntry) -> anyhow::Result<Resources> {
    let compiled = compiler.compile(&entry.program)?;
    let taken = compiled.resources(entry.entry).cloned();
    taken.with_context(|| format!("the compiler says nothing about {}", entry.entry))
}

/// Every pinned and every safe tile, or every candidate, once.
fn subjects(machine: &Machine, only: Option<&str>, all_tiles: bool) -> anyhow::Result<Vec<Subject>> {
    let files = Tiles::all(machine.tiles.as_deref())?;
    let mut subjects: Vec<Subject> = Vec::new();
    for kernel in registry::KERNELS.iter().filter(|kernel| only.is_none_or(|only| only == kernel.kernel)) {
        for &class in kernel.classes {
            let pinned =
                files.iter().filter_map(|file| Some(file.pinned(kernel.kernel, class)?.tile.clone()));
            let mut tiles: Vec<toml::Table> = pinned.collect();
            tiles.push(kernel.safe(class).map_err(anyhow::Error::msg)?);
            if all_tiles {
                tiles.extend(kernel.candidates(class, &Limits::a100()).map_err(anyhow::Error::msg)?);
            }
            for tile in tiles {
                let known = subjects.iter().any(|subject| {
                    subject.kernel.kernel == kernel.kernel && subject.class == class && subject.tile == tile
                });
                if !known {
                    subjects.push(Subject { kernel, class, tile });
                }
            }
        }
    }
    if subjects.is_empty() {
        let known: Vec<&str> = registry::KERNELS.iter().map(|kernel| kernel.kernel).collect();
        bail!("no kernel is called {}; there are {}", only.unwrap_or_default(), known.join(", "));
    }
    Ok(subjects)
}

fn fault(entry: &ProgramEntry, taken: &Resources, limits: &Limits) -> Option<String> {
    if taken.uses_local_memory() {
        return Some(format!(
            "uses local memory: {} bytes of stack, {} and {} bytes of spills stored and loaded",
            taken.stack, taken.spill_stores, taken.spill_loads
        ));
    }
    if entry.shared_bytes > limits.shared_per_block {
        let (asked, there) = (entry.shared_bytes, limits.shared_per_block);
        return Some(format!("asks for {asked} bytes of shared memory, an A100 has {there} for a block"));
    }
    let blocks = limits.resident_blocks(entry.threads, taken.registers, entry.shared_bytes);
    (blocks == 0).then(|| {
        format!("no block of {} threads with {} registers fits an A100", entry.threads, taken.registers)
    })
}

/// `warps 4, vector 8`.
pub(crate) fn tile_words(tile: &toml::Table) -> String {
    let word = |(key, value): (&String, &toml::Value)| match value {
        toml::Value::Table(inner) => format!("{key} ({})", tile_words(inner)),
        value => format!("{key} {value}"),
    };
    tile.iter().map(word).collect::<Vec<_>>().join(", ")
}

/// `sm_80` is `(8, 0)`.
fn parse_arch(arch: &str) -> anyhow::Result<(u32, u32)> {
    let digits = arch.strip_prefix("sm_").unwrap_or(arch);
    let number: u32 =
        digits.parse().with_context(|| format!("`{arch}` is not an architecture like sm_80"))?;
    Ok((number / 10, number % 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(shared_bytes: usize) -> ProgramEntry {
        let program = Program { source: "top_k.cu", defines: Vec::new() };
        ProgramEntry { program, entry: "top_k", threads: 256, shared_bytes, variant: String::new() }
    }

    #[test]
    fn what_an_a100_cannot_hold_is_a_fault() {
        let limits = Limits::a100();
        let taken = Resources { registers: 64, ..Resources::default() };
        assert_eq!(fault(&entry(163 * 1024), &taken, &limits), None);
        assert!(fault(&entry(163 * 1024 + 1), &taken, &limits).unwrap().contains("shared memory"));
        let large = ProgramEntry { threads: 1024, ..entry(0) };
        let many = Resources { registers: 72, ..Resources::default() };
        assert!(fault(&large, &many, &limits).unwrap().contains("no block of 1024 threads"));
        for spilled in [
            Resources { stack: 8, ..taken.clone() },
            Resources { spill_stores: 4, ..taken.clone() },
            Resources { spill_loads: 4, ..taken.clone() },
        ] {
            assert!(fault(&entry(0), &spilled, &limits).unwrap().contains("local memory"));
        }
    }

    #[test]
    fn occupancy_is_that_of_an_a100() {
        let limits = Limits::a100();
        // Registers, shared memory, threads and the 32 blocks limit in turn.
        assert_eq!(limits.resident_blocks(256, 128, 0), 2);
        assert_eq!(limits.resident_blocks(256, 129, 0), 1);
        assert_eq!(limits.resident_blocks(128, 32, 81 * 1024), 2);
        assert_eq!(limits.resident_blocks(128, 32, 81 * 1024 + 1), 1);
        assert_eq!(limits.resident_blocks(1024, 32, 0), 2);
        assert_eq!(limits.resident_blocks(32, 16, 0), 32);
        assert_eq!(limits.resident_blocks(1024, 65, 0), 0);
        assert_eq!(limits.resident_blocks(32, 16, 164 * 1024), 0);
    }

    #[test]
    fn architectures_and_tiles_in_words() {
        assert_eq!(parse_arch("sm_80").unwrap(), (8, 0));
        assert_eq!(parse_arch("sm_100").unwrap(), (10, 0));
        assert!(parse_arch("ampere").is_err());
        let tile: toml::Table = "keys = 64\nsplit = { parts = 2 }".parse().unwrap();
        assert_eq!(tile_words(&tile), "keys 64, split (parts 2)");
    }
}
