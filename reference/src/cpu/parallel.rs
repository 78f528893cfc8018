//! When a kernel's rows are worth waking rayon's pool for.

use rayon::prelude::*;

/// Multiply-adds below which one thread is faster: some 15 to 30 microseconds of work, several times what
/// waking the pool costs. A decode step of a small model stays below it in most of its kernels.
const PARALLEL_FROM: usize = 1 << 18;

/// Multiply-adds that a task has at least, so that short rows are not handed out one by one.
const TASK_FROM: usize = PARALLEL_FROM / 4;

/// Calls `body(i, row)` for every row `i` of `out`, `width` elements each.
///
/// `ops` are the multiply-adds of the whole call. Which thread computes a row never changes what is in it, so
/// a kernel that fixes the order of its sums inside a row gives the same bits on any number of threads.
pub(crate) fn for_rows<T: Send>(
    out: &mut [T],
    width: usize,
    ops: usize,
    body: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    if width == 0 || out.is_empty() {
        return;
    }
    if ops < PARALLEL_FROM {
        out.chunks_mut(width).enumerate().for_each(|(i, row)| body(i, row));
        return;
    }
    let rows = out.len().div_ceil(width);
    let min_len = (TASK_FROM / (ops / rows).max(1)).max(1);
    out.par_chunks_mut(width).with_min_len(min_len).enumerate().for_each(|(i, row)| body(i, row));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_visited_once_on_either_path() {
        for ops in [0, PARALLEL_FROM * 100] {
            // 23 elements in rows of 5: the last row is short.
            let mut out = vec![0usize; 23];
            for_rows(&mut out, 5, ops, |i, row| row.iter_mut().for_each(|x| *x += i + 1));
            let expected: Vec<usize> = (0..23).map(|x| x / 5 + 1).collect();
            assert_eq!(out, expected);
        }
        for_rows(&mut [] as &mut [u8], 4, 0, |_, _| panic!("there are no rows"));
        for_rows(&mut [1u8], 0, 0, |_, _| panic!("rows are empty"));
    }
}
