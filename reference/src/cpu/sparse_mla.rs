//! `sparse_mla`: attention over the selected latent rows.

use multiversion::multiversion;

use super::checks::Check;
use super::paged::{PagedRows, RowKind};
use super::parallel::for_rows;
use super::vector::{add_rows, dot, dot4, sum};
use super::{Cpu, CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;

/// Heads that share a pass over the selected rows. The group is what threads share out when a step has few
/// token rows.
const HEAD_GROUP: usize = 8;

/// Selected rows that all heads of a group read before the next: they stay in the nearest cache meanwhile.
const ROW_BLOCK: usize = 16;

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
    let cache = PagedRows::new(check, batch, cache, RowKind::Mla { rank, rope: width - rank })?;
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
        let selected = indices[t * k..][..k].iter().filter_map(|&index| usize::try_from(index).ok());
        let mut scratch = Vec::new();
        let rows = cache.rows(t, selected, &mut scratch);
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
#[multiversion(targets("x86_64+avx2"))]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::absorb::{absorb_output, absorb_query};
    use crate::cpu::naive::{self, MlaDims};
    use crate::cpu::testing::{
        assert_close, batch, bf16_weight, index, message, on_one_and_four_threads, paged_cache, poisoned,
        randoms, read, tensor,
    };
    use crate::tensor::DType;

    const PAGES: usize = 300;

    /// One sequence of `old + new` tokens, latent rank 12, rope 4, and what selects among its rows.
    struct Case {
        batch: Batch,
        heads: usize,
        rank: usize,
        width: usize,
        q: Vec<f64>,
        rows: Vec<f64>,
    }

    impl Case {
        fn new(old: usize, new: usize, heads: usize, rank: usize, rope: usize) -> Self {
            let width = rank + rope;
            Self {
                batch: batch(4, PAGES, &[(old, new)], 3),
                heads,
                rank,
                width,
                q: randoms(1, new * heads * width),
                rows: randoms(2, (old + new) * width),
            }
        }

        fn run<F: Real>(&self, cpu: Cpu<F>, topk_indices: &CpuTensor<F>) -> Vec<f64> {
            let tokens = self.batch.num_tokens();
            let q = tensor(DType::Act, &[tokens, self.heads, self.width], &self.q);
            let cache = paged_cache(&self.batch, PAGES, self.width, std::slice::from_ref(&self.rows));
            let mut out = poisoned(DType::Act, &[tokens, self.heads, self.rank]);
            sparse_mla(&cpu, &self.batch, &q, &cache, topk_indices, 0.7, &mut out).unwrap();
            read(&out)
        }

        /// Softmax attention of every head over the rows that `indices` name.
        fn dense(&self, indices: &[Vec<usize>]) -> Vec<f64> {
            let mut out = Vec::new();
            for (i, q) in self.q.chunks(self.width).enumerate() {
                let rows: Vec<_> = indices[i / self.heads]
                    .iter()
                    .map(|s| &self.rows[s * self.width..][..self.width])
                    .collect();
                let dot = |row: &&[f64]| q.iter().zip(*row).map(|(q, c)| q * c).sum::<f64>();
                let e: Vec<f64> = rows.iter().map(|row| (0.7 * dot(row)).exp()).collect();
                let total: f64 = e.iter().sum();
                out.extend(
                    (0..self.rank)
                        .map(|c| e.iter().zip(&rows).map(|(e, row)| e * row[c]).sum::<f64>() / total),
                );
            }
            out
        }
    }

    fn all_visible(batch: &Batch) -> Vec<Vec<usize>> {
        (0..batch.num_tokens()).map(|t| (0..batch.visible(t)).collect()).collect()
    }

    fn padded<F: Real>(indices: &[Vec<usize>], k: usize) -> CpuTensor<F> {
        let values: Vec<i32> = indices
            .iter()
            .flat_map(|row| row.iter().map(|&s| s as i32).chain(std::iter::repeat(-1)).take(k))
            .collect();
        index(&[indices.len(), k], &values)
    }

    #[test]
    fn over_all_rows_it_is_dense_attention() {
        for heads in [1, 3, 8, 11] {
            let case = Case::new(33, 6, heads, 12, 4);
            let all = all_visible(&case.batch);
            let actual = case.run(Cpu::<f64>::new(), &padded(&all, 40));
            assert_close(&actual, &case.dense(&all), 1e-13);
        }
    }

    #[test]
    fn over_a_selection_with_holes_it_is_attention_over_the_selection() {
        let case = Case::new(90, 2, 9, 12, 4);
        let chosen = vec![(0..91).step_by(2).collect::<Vec<_>>(), vec![91, 5, 17]];
        let expected = case.dense(&chosen);
        // The first row fills its places; in the second, holes stand before, between and after.
        let mut values: Vec<i32> = chosen[0].iter().map(|&s| s as i32).collect();
        values.extend([-1, 91, -1, 5, -1, -1, 17]);
        values.resize(2 * 46, -1);
        assert_close(&case.run(Cpu::<f64>::new(), &index(&[2, 46], &values)), &expected, 1e-13);
    }

    #[test]
    fn a_row_that_selects_nothing_gives_zeros() {
        let case = Case::new(3, 2, 2, 12, 4);
        let out = case.run(Cpu::<f32>::new(), &index(&[2, 3], &[-1, -1, -1, 0, -1, -1]));
        assert_eq!(out[..24], [0.0; 24]);
        let first: Vec<f64> = [&case.rows[..12], &case.rows[..12]].concat();
        assert_eq!(out[24..], first);
        let none = case.run(Cpu::<f32>::new(), &index(&[2, 0], &[]));
        assert_eq!(none, [0.0; 48]);
    }

    #[test]
    fn scores_of_negative_infinity_give_zeros_and_nan_stays() {
        let mut case = Case::new(2, 1, 2, 12, 4);
        case.rows.fill(1.0);
        case.q[..16].fill(f64::NEG_INFINITY);
        case.q[16] = f64::NAN;
        let out = case.run(Cpu::<f32>::new(), &index(&[1, 3], &[0, 1, 2]));
        assert_eq!(out[..12], [0.0; 12]);
        assert!(out[12..].iter().all(|x| x.is_nan()));
    }

    #[test]
    fn an_empty_step_is_no_work() {
        let case = Case::new(0, 0, 2, 12, 4);
        assert_eq!(case.run(Cpu::<f32>::new(), &index(&[0, 5], &[])), [] as [f64; 0]);
    }

    #[test]
    fn huge_scores_do_not_overflow() {
        let mut case = Case::new(8, 1, 2, 12, 4);
        case.q.iter_mut().for_each(|q| *q *= 1e4);
        let all = all_visible(&case.batch);
        let out = case.run(Cpu::<f32>::new(), &padded(&all, 9));
        assert!(out.iter().all(|x| x.abs() <= 1.0), "{out:?}");
    }

    #[test]
    fn absorbed_and_sparse_equals_naive_and_masked() {
        let dims =
            MlaDims { heads: 10, qk_nope_head_dim: 6, qk_rope_head_dim: 4, v_head_dim: 5, kv_lora_rank: 12 };
        let (old, new, k) = (60, 5, 17);
        let case = Case::new(old, new, dims.heads, 12, 4);
        let positions: Vec<usize> = (old..old + new).collect();
        let mask = naive::select(&randoms(8, new * (old + new)), &positions, k);
        let (kv_b, kv_b_values) = bf16_weight::<f64>(4, &[10, 11, 12]);
        let q_values = randoms(5, new * 10 * 10);
        let latents: Vec<f64> = case.rows.chunks(16).flat_map(|row| row[..12].to_vec()).collect();
        let rope_keys: Vec<f64> = case.rows.chunks(16).flat_map(|row| row[12..].to_vec()).collect();
        let expected = naive::mla(dims, &q_values, &latents, &rope_keys, &kv_b_values, &mask, 0.3);

        let cpu = Cpu::new();
        let q = tensor(DType::Act, &[new, 10, 10], &q_values);
        let mut latent_q = poisoned(DType::Act, &[new, 10, 16]);
        // Queries and keys are rotated already.
        let no_turn = tensor(DType::Float, &[new, 2, 2], &[1.0, 0.0].repeat(2 * new));
        absorb_query(&cpu, &q, &kv_b, &no_turn, &mut latent_q).unwrap();
        let selected: Vec<Vec<usize>> =
            mask.chunks(old + new).map(|row| (0..row.len()).filter(|&s| row[s]).collect()).collect();
        assert!(selected.iter().all(|row| row.len() == k));
        let cache = paged_cache(&case.batch, PAGES, 16, std::slice::from_ref(&case.rows));
        let mut latent_out = poisoned(DType::Act, &[new, 10, 12]);
        sparse_mla(&cpu, &case.batch, &latent_q, &cache, &padded(&selected, k), 0.3, &mut latent_out)
            .unwrap();
        let mut out = poisoned(DType::Act, &[new, 10, 5]);
        absorb_output(&cpu, &latent_out, &kv_b, &mut out).unwrap();
        assert_close(&read(&out), &expected, 1e-13);
    }

    #[test]
    fn bits_depend_on_neither_threads_nor_neighbours_nor_page_size() {
        let case = Case::new(700, 3, 10, 64, 16);
        let all = all_visible(&case.batch);
        let [one, four] = on_one_and_four_threads(|| case.run(Cpu::<f32>::new(), &padded(&all, 703)));
        assert_eq!(one, four);
        // The last token alone, in pages of another size and order.
        let alone = Case {
            batch: batch(64, PAGES, &[(702, 1)], 9),
            q: case.q[2 * 10 * 80..].to_vec(),
            rows: case.rows.clone(),
            ..case
        };
        assert_eq!(alone.run(Cpu::<f32>::new(), &padded(&all[2..], 703)), one[2 * 640..]);
    }

    #[test]
    fn rounds_once_at_the_end() {
        let case = Case::new(20, 2, 3, 12, 4);
        let indices = padded(&all_visible(&case.batch), 22);
        let exact = case.run(Cpu::<f64>::new(), &indices);
        let rounded = case.run(Cpu::<f64>::rounding_to_bf16(), &indices);
        assert_eq!(rounded, exact.iter().map(|x| x.round_bf16()).collect::<Vec<_>>());
    }

    #[test]
    fn what_points_outside_is_refused() {
        let case = Case::new(3, 2, 2, 12, 4);
        let cpu = Cpu::<f32>::new();
        let q = tensor(DType::Act, &[2, 2, 16], &case.q);
        let cache = paged_cache(&case.batch, PAGES, 16, std::slice::from_ref(&case.rows));
        let mut out = poisoned(DType::Act, &[2, 2, 12]);
        for bad in [4, -2, i32::MIN, i32::MAX] {
            let indices = index(&[2, 1], &[bad, 0]);
            let text = message(sparse_mla(&cpu, &case.batch, &q, &cache, &indices, 1.0, &mut out));
            assert!(text.contains("`topk_indices`") && text.contains("below 4 for token row 0"), "{text}");
        }
        let indices = index(&[2, 1], &[0, 0]);
        let mut wide = poisoned(DType::Act, &[2, 2, 17]);
        assert!(
            message(sparse_mla(&cpu, &case.batch, &q, &cache, &indices, 1.0, &mut wide)).contains("`out`")
        );
        let small = poisoned(DType::Act, &[1, 4, 16]);
        assert!(
            message(sparse_mla(&cpu, &case.batch, &q, &small, &indices, 1.0, &mut out))
                .contains("`block_table`")
        );
        let short = index(&[1, 2], &[0, 0]);
        assert!(
            message(sparse_mla(&cpu, &case.batch, &q, &cache, &short, 1.0, &mut out))
                .contains("`topk_indices`")
        );
    }
}
