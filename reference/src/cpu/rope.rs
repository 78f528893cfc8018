//! `rope_table` and `rope`: rotary position embedding.

use super::checks::Check;
use super::parallel::for_rows;
use super::{Cpu, CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;
use crate::kernels::RopeLayout;

pub(super) fn rope_table<F: Real>(
    _cpu: &Cpu<F>,
    batch: &Batch,
    theta: f64,
    cos_sin: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("rope_table");
    let [rows, pairs, two] = cos_sin.dims(check.0, "cos_sin")?;
    let tokens = batch.num_tokens();
    check.batch(batch)?;
    check.shape("cos_sin", cos_sin, rows == tokens && two == 2, || format!("[{tokens}, dim / 2, 2]"))?;
    check.value("theta", theta.is_finite() && theta > 0.0, || "a positive number".into(), theta)?;
    let dim = 2 * pairs;
    let frequencies: Vec<f64> = (0..pairs).map(|j| theta.powf(-2.0 * j as f64 / dim as f64)).collect();
    let out = check.float_mut("cos_sin", cos_sin)?;
    // A sine costs some twenty multiply-adds.
    for_rows(out, dim, tokens * dim * 20, |t, row| {
        let position = f64::from(batch.positions[t]);
        for (pair, frequency) in row.chunks_exact_mut(2).zip(&frequencies) {
            let (sin, cos) = (position * frequency).sin_cos();
            pair[0] = F::of(cos);
            pair[1] = F::of(sin);
        }
    });
    Ok(())
}

pub(super) fn rope<F: Real>(
    cpu: &Cpu<F>,
    x: &mut CpuTensor<F>,
    offset: usize,
    layout: RopeLayout,
    cos_sin: &CpuTensor<F>,
) -> Result<()> {
    let check = Check("rope");
    let [tokens, heads, width] = x.dims(check.0, "x")?;
    let dim = rotary_dim(check, cos_sin, tokens)?;
    check.value(
        "offset",
        dim <= width && offset <= width - dim,
        || format!("room for {dim} columns in {width}"),
        offset,
    )?;
    let cos_sin = check.float("cos_sin", cos_sin)?;
    let x = check.act_mut("x", x)?;
    for_rows(x, heads * width, tokens * heads * dim * 2, |t, row| {
        for head in row.chunks_exact_mut(width) {
            rotate(cpu, &mut head[offset..offset + dim], layout, &cos_sin[t * dim..][..dim]);
        }
    });
    Ok(())
}

/// The rotary dimension of a table for `tokens` rows.
pub(super) fn rotary_dim<F: Real>(check: Check, cos_sin: &CpuTensor<F>, tokens: usize) -> Result<usize> {
    let [rows, pairs, two] = cos_sin.dims(check.0, "cos_sin")?;
    check.shape("cos_sin", cos_sin, rows == tokens && two == 2, || format!("[{tokens}, dim / 2, 2]"))?;
    Ok(2 * pairs)
}

/// Rotates one head, in place; `cos_sin` has as many elements as `x`.
pub(super) fn rotate<F: Real>(cpu: &Cpu<F>, x: &mut [F], layout: RopeLayout, cos_sin: &[F]) {
    let half = x.len() / 2;
    for (j, pair) in cos_sin.chunks_exact(2).enumerate() {
        let (first, second) = match layout {
            RopeLayout::Interleaved => (2 * j, 2 * j + 1),
            RopeLayout::Half => (j, j + half),
        };
        let (a, b, cos, sin) = (x[first], x[second], pair[0], pair[1]);
        x[first] = cpu.act(a * cos - b * sin);
        x[second] = cpu.act(b * cos + a * sin);
    }
}
