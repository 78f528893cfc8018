//! `indexer_logits`: the lightning indexer's scores.

use std::ops::Range;

use multiversion::multiversion;

use super::checks::Check;
use super::paged::{PagedRows, RowKind};
use super::parallel::for_rows;
use super::vector::{dot, dot4};
use super::{Cpu, CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;

/// Positions that a thread takes at a time: a single row with a long context is shared out as well.
const BLOCK: usize = 128;

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
    let keys = PagedRows::new(check, batch, cache, RowKind::Indexer { width })?;
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
            let mut scratch = Vec::new();
            let keys = keys.rows(t, start..start + logits.len(), &mut scratch);
            score(q, weights, &keys, scale, logits);
        });
    });
    Ok(())
}

/// The scores of one token for `keys`; `q` `[HI, D]`, `weights` `[HI]`.
#[multiversion(targets("x86_64+avx2"))]
fn score<F: Real>(q: &[F], weights: &[F], keys: &[&[F]], scale: F, logits: &mut [F]) {
    let width = q.len() / weights.len().max(1);
    let (fours, rest) = logits.as_chunks_mut::<4>();
    for (i, four) in fours.iter_mut().enumerate() {
        let keys = [0, 1, 2, 3].map(|j| keys[4 * i + j]);
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
        let key = keys[4 * fours.len() + i];
        let mut sum = F::zero();
        for (h, &weight) in weights.iter().enumerate() {
            sum += weight * relu(dot(&q[h * width..][..width], key, |x| x));
        }
        *logit = sum * scale;
    }
}

/// `max(x, 0)` that keeps NaN, so that a broken key ranks last instead of looking irrelevant.
#[inline(always)]
fn relu<F: Real>(x: F) -> F {
    if x < F::zero() { F::zero() } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::naive;
    use crate::cpu::testing::{
        assert_close, batch, message, on_one_and_four_threads, paged_cache, poisoned, randoms, read, tensor,
    };
    use crate::tensor::DType;

    const PAGES: usize = 64;
    const SCALE: f64 = 0.125;

    struct Case<F> {
        batch: Batch,
        sequences: Vec<(usize, usize)>,
        heads: usize,
        width: usize,
        q: Vec<f64>,
        weights: Vec<f64>,
        keys: Vec<Vec<f64>>,
        cache: CpuTensor<F>,
    }

    impl<F: Real> Case<F> {
        fn new(sequences: &[(usize, usize)], page_size: usize, heads: usize, width: usize) -> Self {
            let batch = batch(page_size, PAGES, sequences, 5);
            let tokens = batch.num_tokens();
            let keys: Vec<_> =
                (10..).zip(sequences).map(|(seed, (old, new))| randoms(seed, (old + new) * width)).collect();
            let cache = paged_cache(&batch, PAGES, width, &keys);
            let (q, weights) = (randoms(1, tokens * heads * width), randoms(2, tokens * heads));
            Self { batch, sequences: sequences.to_vec(), heads, width, q, weights, keys, cache }
        }

        fn run(&self, rows: Range<usize>, columns: usize) -> Vec<f64> {
            let tokens = self.batch.num_tokens();
            let q = tensor(DType::Act, &[tokens, self.heads, self.width], &self.q);
            let weights = tensor(DType::Float, &[tokens, self.heads], &self.weights);
            let mut out = poisoned(DType::Float, &[rows.len(), columns]);
            indexer_logits(&Cpu::new(), &self.batch, rows, &q, &weights, &self.cache, SCALE, &mut out)
                .unwrap();
            read(&out)
        }

        /// What each token row sees, by the naive loops.
        fn expected(&self) -> Vec<Vec<f64>> {
            let (mut rows, mut t) = (Vec::new(), 0);
            for (&(old, new), keys) in self.sequences.iter().zip(&self.keys) {
                let (heads, width) = (self.heads, self.width);
                let q = &self.q[t * heads * width..][..new * heads * width];
                let weights = &self.weights[t * heads..][..new * heads];
                let scores = naive::indexer_scores(q, weights, keys, heads, width, SCALE);
                rows.extend(scores.chunks(old + new).enumerate().map(|(i, row)| row[..old + i + 1].to_vec()));
                t += new;
            }
            rows
        }
    }

    #[test]
    fn matches_the_naive_loops_over_shuffled_pages_and_ragged_rows() {
        let case = Case::<f64>::new(&[(0, 7), (30, 1), (13, 5), (0, 1)], 4, 5, 11);
        let (columns, expected) = (40, case.expected());
        assert!(case.weights.iter().any(|&w| w < 0.0));
        for (row, expected) in case.run(0..14, columns).chunks(columns).zip(&expected) {
            assert_close(&row[..expected.len()], expected, 1e-13);
            assert!(row[expected.len()..].iter().all(|x| x.is_nan()), "invisible places stay as they were");
        }
    }

    #[test]
    fn chunks_of_rows_and_threads_keep_the_bits() {
        // Enough work to reach the pool, and a context that is no multiple of the block.
        let case = Case::<f32>::new(&[(600, 1), (3, 9)], 16, 8, 64);
        let [whole, four] = on_one_and_four_threads(|| case.run(0..10, 601));
        let bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&whole), bits(&four));
        for rows in [0..1, 1..4, 4..10, 2..2] {
            let part = case.run(rows.clone(), 601);
            assert_eq!(bits(&part), bits(&whole[rows.start * 601..rows.end * 601]));
        }
        for (row, expected) in whole.chunks(601).zip(case.expected()) {
            assert_close(&row[..expected.len()], &expected, 1e-5);
        }
    }

    #[test]
    fn a_broken_key_gives_nan_instead_of_zero() {
        let mut case = Case::<f32>::new(&[(4, 1)], 8, 2, 4);
        case.keys[0][2 * 4] = f64::NAN;
        case.cache = paged_cache(&case.batch, PAGES, 4, &case.keys);
        let row = case.run(0..1, 5);
        assert_eq!(row.iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [false, false, true, false, false]);
    }

    #[test]
    fn misfits_are_named() {
        let case = Case::<f32>::new(&[(4, 2)], 8, 2, 4);
        let cpu = Cpu::new();
        let q = tensor(DType::Act, &[2, 2, 4], &case.q);
        let weights = tensor(DType::Float, &[2, 2], &case.weights);
        let mut out = poisoned(DType::Float, &[2, 6]);
        let mut run = |batch: &Batch, rows, scale, columns| {
            out = poisoned(DType::Float, &[2, columns]);
            message(indexer_logits(&cpu, batch, rows, &q, &weights, &case.cache, scale, &mut out))
        };
        assert!(run(&case.batch, 0..2, 1.0, 5).contains("[2, at least 6]"));
        assert!(run(&case.batch, 0..1, 1.0, 6).contains("`logits`"));
        assert!(run(&case.batch, 1..3, 1.0, 6).contains("`rows` is 1..3"));
        assert!(run(&case.batch, 0..2, -1.0, 6).contains("`scale`"));
        let mut bad = case.batch.clone();
        bad.block_table[0] = PAGES as i32;
        assert!(run(&bad, 0..2, 1.0, 6).contains("`block_table` is 64, expected a page below 64"));
        bad.block_table[0] = -1;
        assert!(run(&bad, 0..2, 1.0, 6).contains("`block_table` is -1"));
        bad = case.batch.clone();
        bad.context_lens[0] = 100;
        assert!(run(&bad, 0..2, 1.0, 6).contains("13 pages for sequence 0"));
        bad = case.batch.clone();
        bad.seq_ids[1] = 1;
        assert!(run(&bad, 0..2, 1.0, 6).contains("`seq_ids`"));
        bad = case.batch.clone();
        bad.positions[1] = 6;
        assert!(run(&bad, 0..2, 1.0, 6).contains("`positions`"));
    }
}
