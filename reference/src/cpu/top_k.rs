//! `top_k`: the best positions of every row.

use std::ops::Range;

use super::checks::Check;
use super::order::rank;
use super::parallel::for_rows;
use super::{Cpu, CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;

pub(super) fn top_k<F: Real>(
    _cpu: &Cpu<F>,
    batch: &Batch,
    rows: Range<usize>,
    logits: &CpuTensor<F>,
    topk_indices: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("top_k");
    check.batch(batch)?;
    check.rows(&rows, batch)?;
    let [tokens, k] = topk_indices.dims(check.0, "topk_indices")?;
    check.shape("topk_indices", topk_indices, tokens == batch.num_tokens(), || {
        format!("[{}, k]", batch.num_tokens())
    })?;
    // Rows that select everything do not read their logits, so the logits need only fit the others.
    let longest = rows.clone().map(|t| batch.visible(t)).filter(|&visible| visible > k).max().unwrap_or(0);
    let [logits_rows, columns] = logits.dims(check.0, "logits")?;
    check.shape(
        "logits",
        logits,
        longest == 0 || (logits_rows == rows.len() && columns >= longest),
        || format!("[{}, at least {longest}]", rows.len()),
    )?;
    let logits = check.float("logits", logits)?;
    let out = &mut topk_indices.indices_mut(check.0, "topk_indices")?[rows.start * k..rows.end * k];

    // A comparison and its share of the partition passes cost some eight multiply-adds.
    let ops = rows.clone().map(|t| if batch.visible(t) > k { batch.visible(t) * 8 } else { k }).sum();
    for_rows(out, k, ops, |row, out| {
        let visible = batch.visible(rows.start + row);
        if visible <= k {
            for (s, out) in out.iter_mut().enumerate() {
                *out = if s < visible { s as i32 } else { -1 };
            }
        } else {
            select(&logits[row * columns..][..visible], out);
        }
    });
    Ok(())
}

/// Writes the positions of the `out.len()` best of `scores`, ascending; there are more scores than places, and at least one place.
///
/// The k-th best score is found in linear time. Everything above it is in; what equals it fills the places that are left, from
/// the lowest position on.
fn select<F: Real>(scores: &[F], out: &mut [i32]) {
    let mut ranks: Vec<u64> = scores.iter().map(|&score| rank(score)).collect();
    let last_place = out.len() - 1;
    let (above, &mut boundary, _) = ranks.select_nth_unstable_by(last_place, |a, b| b.cmp(a));
    let above = above.iter().filter(|&&rank| rank > boundary).count();
    let mut ties = out.len() - above;
    let mut places = out.iter_mut();
    for (s, &score) in scores.iter().enumerate() {
        let rank = rank(score);
        if rank > boundary || (rank == boundary && ties > 0) {
            ties -= usize::from(rank == boundary);
            match places.next() {
                Some(place) => *place = s as i32,
                None => return,
            }
        }
    }
}
