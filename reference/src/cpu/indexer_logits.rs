//! `indexer_logits`: the lightning indexer's scores.

use std::ops::Range;

use super::checks::Check;
use super::paged::PagedRows;
use super::parallel::for_rows;
use super::vector::{dot, dot4};
use super::{Cpu, CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;

/// Positions that a thread takes at a time: a single row with a long context is shared out as well.
const BLOCK: usize = 256;

pub(super) fn indexer_logits<F: Real>(
    _cpu: &Cpu<F>,
    batch: &Batch,
    rows: Range<usize>,
    q: &CpuTensor<F>,
    weights: &CpuTensor<F>,
    cache: &CpuTensor<F>,
    scale: f64,
    logits: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("indexer_logits");
    let tokens = batch.num_tokens();
    let [q_tokens, heads, width] = q.dims(check.0, "q")?;
    check.shape("q", q, q_tokens == tokens, || format!("[{tokens}, HI, D]"))?;
    weights.expect_shape(check.0, "weights", &[tokens, heads])?;
    let keys = PagedRows::new(check, batch, cache, width)?;
    check.rows(&rows, batch)?;
    check.value("scale", scale.is_finite() && scale > 0.0, || "a positive number".into(), scale)?;
    let longest = rows.clone().map(|t| batch.visible(t)).max().unwrap_or(0);
    let [logits_rows, columns] = logits.dims(check.0, "logits")?;
    check.shape("logits", logits, logits_rows == rows.len() && columns >= longest, || {
        format!("[{}, at least {longest}]", rows.len())
    })?;
    let q = check.act("q", q)?;
    let weights = check.float("weights", weights)?;
    let logits = check.float_mut("logits", logits)?;
    let scale = F::of(scale);

    let ops_per_key = heads * width;
    let total: usize = rows.clone().map(|t| batch.visible(t) * ops_per_key).sum();
    for_rows(logits, columns, total, |row, logits| {
        let t = rows.start + row;
        let visible = batch.visible(t);
        let q = &q[t * ops_per_key..][..ops_per_key];
        let weights = &weights[t * heads..][..heads];
        for_rows(&mut logits[..visible], BLOCK, visible * ops_per_key, |block, logits| {
            let start = block * BLOCK;
            let (fours, rest) = logits.as_chunks_mut::<4>();
            for (i, four) in fours.iter_mut().enumerate() {
                let keys = [0, 1, 2, 3].map(|j| keys.row(t, start + 4 * i + j));
                let mut sums = [F::zero(); 4];
                for (h, &weight) in weights.iter().enumerate() {
                    let dots = dot4(&q[h * width..][..width], keys);
                    for (sum, dot) in sums.iter_mut().zip(dots) {
                        *sum += weight * relu(dot);
                    }
                }
                *four = sums.map(|sum| sum * scale);
            }
            for (i, logit) in rest.iter_mut().enumerate() {
                let key = keys.row(t, start + 4 * fours.len() + i);
                let mut sum = F::zero();
                for (h, &weight) in weights.iter().enumerate() {
                    sum += weight * relu(dot(&q[h * width..][..width], key, |x| x));
                }
                *logit = sum * scale;
            }
        });
    });
    Ok(())
}

/// `max(x, 0)` that keeps NaN, so that a broken key ranks last instead of looking irrelevant.
#[inline(always)]
fn relu<F: Real>(x: F) -> F {
    if x < F::zero() { F::zero() } else { x }
}
