//! `sparse_mla`: attention over the selected latent rows.

use super::checks::Check;
use super::paged::PagedRows;
use super::parallel::for_rows;
use super::vector::{add_rows, dot, dot4, sum};
use super::{Cpu, CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;

/// Heads that share a pass over the selected rows. The group is what threads share out when a step has few token rows.
const HEAD_GROUP: usize = 8;

/// Selected rows that all heads of a group read before the next: they stay in the nearest cache meanwhile.
const ROW_BLOCK: usize = 32;

pub(super) fn sparse_mla<F: Real>(
    cpu: &Cpu<F>,
    batch: &Batch,
    q: &CpuTensor<F>,
    cache: &CpuTensor<F>,
    topk_indices: &CpuTensor<F>,
    scale: f64,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check("sparse_mla");
    let tokens = batch.num_tokens();
    let [q_tokens, heads, width] = q.dims(check.0, "q")?;
    check.shape("q", q, q_tokens == tokens, || format!("[{tokens}, H, kv_lora_rank + rope]"))?;
    let [out_tokens, out_heads, rank] = out.dims(check.0, "out")?;
    check.shape("out", out, (out_tokens, out_heads) == (tokens, heads) && rank <= width, || {
        format!("[{tokens}, {heads}, kv_lora_rank] with kv_lora_rank at most {width}")
    })?;
    let cache = PagedRows::new(check, batch, cache, width)?;
    let [index_tokens, k] = topk_indices.dims(check.0, "topk_indices")?;
    check.shape("topk_indices", topk_indices, index_tokens == tokens, || format!("[{tokens}, k]"))?;
    let indices = topk_indices.indices(check.0, "topk_indices")?;
    let mut selected = 0;
    for (t, row) in indices.chunks_exact(k.max(1)).enumerate() {
        let visible = batch.visible(t);
        for &index in row {
            check.value(
                "topk_indices",
                (-1..visible as i64).contains(&i64::from(index)),
                || format!("-1 or a position below {visible} for token row {t}"),
                index,
            )?;
            selected += usize::from(index >= 0);
        }
    }
    let q = check.act("q", q)?;
    let scale = F::of(scale);
    let out = check.act_mut("out", out)?;

    let ops_per_head = width + rank;
    for_rows(out, heads * rank, selected * heads * ops_per_head, |t, out| {
        let rows: Vec<&[F]> = indices[t * k..][..k]
            .iter()
            .filter_map(|&index| usize::try_from(index).ok())
            .map(|position| cache.row(t, position))
            .collect();
        let q = &q[t * heads * width..][..heads * width];
        for_rows(out, HEAD_GROUP * rank, rows.len() * heads * ops_per_head, |group, out| {
            let q = &q[group * HEAD_GROUP * width..][..out.len() / rank * width];
            attend(q, &rows, scale, out, rank);
            out.iter_mut().for_each(|x| *x = cpu.act(*x));
        });
    });
    Ok(())
}

/// Attention of a group of heads over `rows`: `q` `[heads, width]`, `out` `[heads, rank]`.
fn attend<F: Real>(q: &[F], rows: &[&[F]], scale: F, out: &mut [F], rank: usize) {
    out.fill(F::zero());
    let Some(width) = rows.first().map(|row| row.len()) else { return };
    let mut scores = vec![F::zero(); q.len() / width * rows.len()];
    let (fours, rest) = rows.as_chunks::<4>();
    for (i, &four) in fours.iter().enumerate() {
        for (q, scores) in q.chunks_exact(width).zip(scores.chunks_exact_mut(rows.len())) {
            scores[4 * i..][..4].copy_from_slice(&dot4(q, four).map(|dot| dot * scale));
        }
    }
    for (i, row) in rest.iter().enumerate() {
        for (q, scores) in q.chunks_exact(width).zip(scores.chunks_exact_mut(rows.len())) {
            scores[4 * fours.len() + i] = dot(q, row, |x| x) * scale;
        }
    }
    for scores in scores.chunks_exact_mut(rows.len()) {
        softmax(scores);
    }
    for (block, rows_of_block) in rows.chunks(ROW_BLOCK).enumerate() {
        for (p, out) in scores.chunks_exact(rows.len()).zip(out.chunks_exact_mut(rank)) {
            let p = &p[block * ROW_BLOCK..][..rows_of_block.len()];
            add_rows(out, p, |s| &rows_of_block[s][..rank], |x| x);
        }
    }
}

/// Softmax in place; scores that are all negative infinity, which have no softmax, become zeros.
fn softmax<F: Real>(scores: &mut [F]) {
    // `max` passes over a NaN; the exponentials below keep it.
    let max = scores.iter().fold(F::neg_infinity(), |max, &score| max.max(score));
    if scores.iter().all(|&score| score == F::neg_infinity()) {
        scores.fill(F::zero());
        return;
    }
    scores.iter_mut().for_each(|score| *score = (*score - max).exp());
    let total = sum(scores, |p| p);
    scores.iter_mut().for_each(|p| *p /= total);
}
