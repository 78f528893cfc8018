//! The rows of a paged cache, as a batch names them.

use super::checks::Check;
use super::{CpuTensor, Real};
use crate::batch::Batch;
use crate::error::Result;

/// A cache `[pages, page_size, width]` and the block table to read it through.
///
/// [`new`](Self::new) has checked every page that a context needs, so reading is infallible.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PagedRows<'a, F> {
    rows: &'a [F],
    width: usize,
    batch: &'a Batch,
}

impl<'a, F: Real> PagedRows<'a, F> {
    /// Fails unless `cache` has rows of `width` and the batch's page size, and holds every page of every
    /// context.
    pub(crate) fn new(check: Check, batch: &'a Batch, cache: &'a CpuTensor<F>, width: usize) -> Result<Self> {
        let rows = check.act("cache", cache)?;
        let slots = cache_slots(check, batch, cache, width)?;
        check.batch(batch)?;
        let pages = (slots / batch.page_size) as i32;
        for (seq, &context_len) in batch.context_lens.iter().enumerate() {
            let needed = context_len.max(0) as usize;
            let needed = needed.div_ceil(batch.page_size);
            check.value(
                "block_table",
                needed <= batch.max_blocks,
                || format!("{needed} pages for sequence {seq} of {context_len} tokens"),
                batch.max_blocks,
            )?;
            let table = &batch.block_table[seq * batch.max_blocks..][..needed];
            if let Some(page) = table.iter().find(|page| !(0..pages).contains(page)) {
                let expected = format!("a page below {pages} in sequence {seq}");
                return Err(check.bad_value("block_table", expected, page));
            }
        }
        Ok(Self { rows, width, batch })
    }

    /// The cache row of position `position` of the sequence that token row `t` belongs to.
    #[inline]
    pub(crate) fn row(&self, t: usize, position: usize) -> &'a [F] {
        &self.rows[self.batch.slot(t, position) * self.width..][..self.width]
    }
}

/// The number of slots of a cache, or an error when its shape is not `[pages, page_size, width]`.
fn cache_slots<F: Real>(check: Check, batch: &Batch, cache: &CpuTensor<F>, width: usize) -> Result<usize> {
    let [pages, page_size, columns] = cache.dims(check.0, "cache")?;
    check.shape("cache", cache, page_size == batch.page_size && columns == width && page_size > 0, || {
        format!("[pages, {}, {width}]", batch.page_size)
    })?;
    Ok(pages * page_size)
}

/// Writes `row(t, out)` to `cache[slot_mapping[t]]` for every token row, in order: of two tokens with one
/// slot the later stays.
///
/// One thread: the rows scatter over the cache, and they are few next to the projection that made them.
pub(crate) fn write_rows<F: Real>(
    check: Check,
    batch: &Batch,
    cache: &mut CpuTensor<F>,
    width: usize,
    mut row: impl FnMut(usize, &mut [F]),
) -> Result<()> {
    let slots = cache_slots(check, batch, cache, width)?;
    check.batch(batch)?;
    let cache = check.act_mut("cache", cache)?;
    for (t, &slot) in batch.slot_mapping.iter().enumerate() {
        check.value(
            "slot_mapping",
            usize::try_from(slot).is_ok_and(|slot| slot < slots),
            || format!("a slot below {slots} for token row {t}"),
            slot,
        )?;
    }
    for (t, &slot) in batch.slot_mapping.iter().enumerate() {
        row(t, &mut cache[slot as usize * width..][..width]);
    }
    Ok(())
}
