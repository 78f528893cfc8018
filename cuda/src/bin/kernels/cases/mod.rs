//! What is timed: one module a kernel, one case a shape.

mod absorb;
mod all_reduce;
mod all_reduce_norm;
mod embed;
mod expanded_mla;
mod indexer_logits;
mod latent_rope;
mod layer_norm_rope;
mod linear;
mod linear_int4;
mod linear_split;
mod lm_head;
mod moe_int4;
mod plain;
mod qkv_norm_rope;
mod ranks;
mod repack_int4;
mod rms_norm;
mod rope;
mod rope_table;
mod router;
mod rows;
mod sample;
mod silu_mul;
mod sparse_mla;
mod swiglu;
mod top_k;

use dsa80_cuda::{Cost, Gpu, Tiles};
use dsa80_reference::{Error, Result};

use crate::oracle::Accuracy;

/// What cases are called that NVIDIA's library computes: they have no tile, and are left out where it is missing.
pub(crate) const LIBRARY: &str = "cublaslt";

/// A shape of a kernel.
pub(crate) struct Case {
    pub(crate) kernel: &'static str,
    /// The shape, in words.
    pub(crate) name: String,
    /// The class of shapes whose tile it is launched with.
    pub(crate) class: &'static str,
    /// What is aimed at on an H200, in microseconds.
    pub(crate) goal_us: Option<f64>,
    /// Part of `check`: small enough to be compared whole or nearly so.
    pub(crate) check: bool,
    make: Make,
}

type Make = Box<dyn Fn(&Gpu, &Tiles) -> Result<Box<dyn Run>>>;

/// A case that is set up: inputs for as many calls as it takes to pass the L2, and room for their outputs.
pub(crate) trait Run {
    /// Launches with this tile from now on.
    fn set_tile(&mut self, gpu: &Gpu, tile: &toml::Table) -> Result<()>;

    /// Sets of inputs and outputs.
    fn copies(&self) -> usize;

    /// What one call moves and computes.
    fn cost(&self) -> Cost;

    /// Of the bytes, those that are not another's again, which the L2 has.
    fn distinct_bytes(&self) -> f64 {
        self.cost().bytes
    }

    /// One call on the set `copy`.
    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()>;

    /// Fills the outputs with what no kernel writes.
    fn poison(&mut self, gpu: &Gpu) -> Result<()>;

    /// The output of the set `copy`, as it lies there, against the oracle.
    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy>;
}

impl Case {
    /// Sets it up, with these tiles.
    pub(crate) fn make(&self, gpu: &Gpu, tiles: &Tiles) -> Result<Box<dyn Run>> {
        (self.make)(gpu, tiles)
    }
}

/// Every case, in the order of a model's layer.
pub(crate) fn all() -> Vec<Case> {
    [
        embed::cases(),
        rope_table::cases(),
        rms_norm::cases(),
        rope::cases(),
        router::cases(),
        silu_mul::cases(),
        sample::cases(),
        linear::cases(),
        absorb::cases(),
        lm_head::cases(),
        layer_norm_rope::cases(),
        latent_rope::cases(),
        qkv_norm_rope::cases(),
        indexer_logits::cases(),
        top_k::cases(),
        sparse_mla::cases(),
        expanded_mla::cases(),
        moe_int4::cases(),
        repack_int4::cases(),
        linear_int4::cases(),
        swiglu::cases(),
        linear_split::cases(),
        all_reduce::cases(),
        all_reduce_norm::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Rotated inputs reach this many times the L2.
const PAST_THE_L2: f64 = 3.0;

/// Sets of inputs at most: cases that move next to nothing stay in the L2.
const MAX_COPIES: usize = 256;

/// Sets of inputs, of which each touches `bytes`.
fn copies(gpu: &Gpu, bytes: f64) -> usize {
    ((PAST_THE_L2 * gpu.l2_bytes() as f64 / bytes).ceil() as usize).clamp(1, MAX_COPIES)
}

/// The tile in the kernel's own type.
fn typed<T: dsa80_cuda::Tile>(tile: &toml::Table) -> Result<T> {
    dsa80_cuda::registry::from_table(tile).map_err(|reason| Error::Tile {
        kernel: T::KERNEL,
        tile: tile.to_string(),
        reason,
    })
}

/// The tile that `tiles` has for a case, or the safe one.
pub(crate) fn tile(case: &Case, tiles: &Tiles) -> anyhow::Result<toml::Table> {
    if case.kernel == LIBRARY {
        return Ok(toml::Table::new());
    }
    if let Some(pinned) = tiles.pinned(case.kernel, case.class) {
        return Ok(pinned.tile.clone());
    }
    registered(case)?.safe(case.class).map_err(anyhow::Error::msg)
}

/// The case's kernel in the registry.
pub(crate) fn registered(case: &Case) -> anyhow::Result<&'static dsa80_cuda::registry::Registered> {
    dsa80_cuda::registry::find(case.kernel)
        .ok_or_else(|| anyhow::anyhow!("{} is not in the registry", case.kernel))
}

/// `2048`, `8K`.
fn short(count: usize) -> String {
    if count >= 4096 && count.is_multiple_of(1024) { format!("{}K", count / 1024) } else { count.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_registered_and_named_once() {
        let cases = all();
        for (i, case) in cases.iter().enumerate() {
            if case.kernel != LIBRARY {
                let classes = registered(case).unwrap().classes;
                let (kernel, class) = (case.kernel, case.class);
                assert!(classes.contains(&class), "{kernel}: {class} is not in {classes:?}");
            }
            let same = |other: &&Case| other.kernel == case.kernel && other.name == case.name;
            assert!(cases[..i].iter().find(same).is_none(), "{} {} twice", case.kernel, case.name);
        }
    }

    #[test]
    fn every_class_has_a_case_to_be_swept_on() {
        for kernel in dsa80_cuda::registry::KERNELS {
            for &class in kernel.classes {
                let swept = all().iter().any(|case| case.kernel == kernel.kernel && case.class == class);
                assert!(swept, "{} {class} has no case", kernel.kernel);
            }
        }
    }
}
