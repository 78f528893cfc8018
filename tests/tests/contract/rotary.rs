//! What the kernels with rotary columns share.

use dsa80_reference::cpu::CpuTensor;
use dsa80_reference::wgpu::ActType;
use dsa80_reference::{DType, Kernels, RopeLayout};
use dsa80_tests::parity::contract::{self, Backend};
use dsa80_tests::parity::{F32_UNIT, Interval, Values};

/// The error of what rotates in bf16: rounding flips where the oracle's value is close to a boundary, rarely, and by one step.
pub(crate) const RELATIVE_L2: f64 = 3e-3;

/// Turns of `rows` tokens, any number of times around.
pub(crate) fn turns<K: Kernels>(
    kernels: &Backend<'_, K>,
    rows: usize,
    dim: usize,
    seed: u64,
) -> (CpuTensor<f64>, K::Tensor) {
    let turns = (0..rows * dim / 2).flat_map(|i| {
        let (sin, cos) = (37.0 * Values::Normal.at(seed ^ 3, i)).sin_cos();
        [cos, sin]
    });
    contract::numbers(kernels, DType::Float, &[rows, dim / 2, 2], &turns.collect::<Vec<f64>>())
}

/// Rotates what the columns of a head may be.
pub(crate) fn rotate(columns: &mut [Interval], layout: RopeLayout, turns: &[f64], act: ActType) {
    let dim = turns.len();
    for (j, turn) in turns.chunks(2).enumerate() {
        let (first, second) = match layout {
            RopeLayout::Interleaved => (2 * j, 2 * j + 1),
            RopeLayout::Half => (j, j + dim / 2),
        };
        let (a, b, cos, sin) = (columns[first], columns[second], turn[0], turn[1]);
        let turned = |a: Interval, b: Interval, sin: f64| {
            let error = 2.0 * F32_UNIT * (a.magnitude() * cos.abs() + b.magnitude() * sin.abs());
            (a * cos + b * sin).widened(1.01 * error).stored(act)
        };
        columns[first] = turned(a, b, -sin);
        columns[second] = turned(b, a, sin);
    }
}
