//! Eight ranks that share the GPU: what the cases of the collectives have in common.

use std::time::Duration;

use dsa80_cuda::all_reduce::Shots;
use dsa80_cuda::exchange::{Exchange, ExchangeDims, alloc_workspace};
use dsa80_cuda::{Gpu, GpuBuffer};
use dsa80_reference::Result;
use half::bf16;

pub(super) const RANKS: usize = 8;
pub(super) const WIDTH: usize = 6144;

#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) shots: Shots,
}

/// A case's name, its class of tiles, its shape, and whether `check` runs it.
type Named = (String, &'static str, Shape, bool);

/// Every number of tokens, in the way that `shots` says of bytes and ranks.
pub(super) fn shapes(shots: fn(usize, usize) -> Shots) -> [Named; 4] {
    [1, 32, 256, 2048].map(|tokens| {
        let shots = shots(2 * WIDTH * tokens, RANKS);
        let class = if shots == Shots::One { "one_shot" } else { "two_shots" };
        (format!("T={tokens}, {RANKS} ranks of one GPU"), class, Shape { tokens, shots }, tokens <= 32)
    })
}

pub(super) fn exchange(gpu: &Gpu) -> Result<Exchange<GpuBuffer>> {
    let dims = ExchangeDims::new(RANKS)?;
    let workspaces = (0..RANKS).map(|_| alloc_workspace(gpu, dims)).collect::<Result<_>>()?;
    Ok(Exchange { dims, workspaces, first_rank: 0, patience: Duration::from_secs(5) })
}

/// The sums of what the ranks have, in rank order, rounded once.
pub(super) fn sums(parts: &[Vec<f64>]) -> Vec<f64> {
    let sum = |i: usize| {
        let sum = parts[1..].iter().fold(parts[0][i] as f32, |sum, part| sum + part[i] as f32);
        bf16::from_f32(sum).to_f64()
    };
    (0..parts[0].len()).map(sum).collect()
}
