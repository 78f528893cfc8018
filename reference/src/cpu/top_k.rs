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

/// Writes the positions of the `out.len()` best of `scores`, ascending; there are more scores than places,
/// and at least one place.
///
/// The k-th best score is found in linear time. Everything above it is in; what equals it fills the places
/// that are left, from the lowest position on.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::testing::{
        batch, index, message, on_one_and_four_threads, poisoned, randoms, read_index, tensor,
    };
    use crate::tensor::DType;

    /// One decode row over `scores`, and one place more in the logits than is visible.
    fn best(scores: &[f64], k: usize) -> Vec<i32> {
        let batch = batch(scores.len(), 1, &[(scores.len() - 1, 1)], 0);
        let padded = [scores, &[f64::INFINITY]].concat();
        let logits = tensor::<f32>(DType::Float, &[1, padded.len()], &padded);
        let mut out = poisoned(DType::Index, &[1, k]);
        top_k(&Cpu::new(), &batch, 0..1, &logits, &mut out).unwrap();
        read_index(&out)
    }

    /// A full stable sort by an order that is written out case by case.
    fn sorted(scores: &[f64], k: usize) -> Vec<i32> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| match (scores[a].is_nan(), scores[b].is_nan()) {
            (false, false) => scores[b].partial_cmp(&scores[a]).unwrap(),
            (a_is_nan, b_is_nan) => a_is_nan.cmp(&b_is_nan),
        });
        order.truncate(k);
        order.sort_unstable();
        order.iter().map(|&s| s as i32).chain(std::iter::repeat(-1)).take(k).collect()
    }

    #[test]
    fn edges_by_hand() {
        assert_eq!(best(&[1.0, 3.0, 2.0], 2), [1, 2]);
        assert_eq!(best(&[1.0, 3.0, 2.0], 3), [0, 1, 2]);
        assert_eq!(best(&[1.0, 3.0, 2.0], 5), [0, 1, 2, -1, -1]);
        assert_eq!(best(&[0.0, -0.0, 0.0, 1.0], 2), [0, 3]);
        assert_eq!(best(&[-0.0, 0.0, -0.0], 2), [0, 1]);
        assert_eq!(best(&[f64::NAN, f64::NEG_INFINITY, f64::NAN], 1), [1]);
        assert_eq!(best(&[f64::NAN; 3], 2), [0, 1]);
        assert_eq!(best(&[f64::INFINITY, 1.0, f64::INFINITY], 1), [0]);
        assert_eq!(best(&[-5.0, -3.0, -4.0, -3.0], 1), [1]);
        assert_eq!(best(&[1.0], 0), [] as [i32; 0]);
    }

    proptest! {
        #[test]
        fn is_a_stable_sort_with_planted_ties(
            scores in prop::collection::vec(
                prop_oneof![
                    4 => (-3..3i32).prop_map(f64::from),
                    2 => any::<f32>().prop_map(f64::from),
                    1 => prop::sample::select(vec![
                        0.0, -0.0, f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY,
                    ]),
                ],
                1..120,
            ),
            k in 1..130usize,
        ) {
            prop_assert_eq!(best(&scores, k), sorted(&scores, k));
        }
    }

    #[test]
    fn writes_its_rows_alone_on_any_number_of_threads() {
        // Enough work to reach the pool.
        let batch = batch(2048, 2, &[(1400, 40), (0, 9)], 0);
        let logits = tensor::<f64>(DType::Float, &[41, 1440], &randoms(1, 41 * 1440));
        let [one, four] = on_one_and_four_threads(|| {
            let mut out = index(&[49, 20], &[-7; 49 * 20]);
            top_k(&Cpu::new(), &batch, 3..44, &logits, &mut out).unwrap();
            read_index(&out)
        });
        assert_eq!(one, four);
        for (t, row) in one.chunks(20).enumerate() {
            if !(3..44).contains(&t) {
                assert_eq!(row, [-7; 20]);
            } else {
                assert!(row.iter().all(|&s| (-1..batch.visible(t) as i32).contains(&s)));
                assert_eq!(row.iter().filter(|&&s| s >= 0).count(), batch.visible(t).min(20));
            }
        }
    }

    #[test]
    fn short_rows_do_not_need_logits_and_long_ones_do() {
        let batch = batch(8, 2, &[(0, 4), (4, 1)], 0);
        let nothing = poisoned::<f32>(DType::Float, &[0, 0]);
        let mut out = poisoned(DType::Index, &[5, 5]);
        top_k(&Cpu::new(), &batch, 0..5, &nothing, &mut out).unwrap();
        assert_eq!(read_index(&out)[10..15], [0, 1, 2, -1, -1]);
        let mut out = poisoned(DType::Index, &[5, 4]);
        let text = message(top_k(&Cpu::new(), &batch, 0..5, &nothing, &mut out));
        assert!(text.contains("top_k: `logits`") && text.contains("[5, at least 5]"), "{text}");
        let act = poisoned::<f32>(DType::Act, &[5, 8]);
        assert!(message(top_k(&Cpu::new(), &batch, 0..5, &act, &mut out)).contains("holds activations"));
        let mut short = poisoned(DType::Index, &[4, 4]);
        assert!(message(top_k(&Cpu::new(), &batch, 0..5, &nothing, &mut short)).contains("`topk_indices`"));
    }
}
