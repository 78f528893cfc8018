//! The rows of a paged cache, as a batch names them.

use half::bf16;

use super::checks::Check;
use super::{CpuTensor, Real};
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::fp8::{self, IndexerPage, MLA_GROUP, MlaRow};
use crate::tensor::{DType, DeviceTensor};

/// What a row of a cache is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RowKind {
    /// The indexer's key.
    Indexer { width: usize },
    /// MLA's latent and rotary key.
    Mla { rank: usize, rope: usize },
}

impl RowKind {
    /// Columns of a row.
    pub(crate) fn width(self) -> usize {
        match self {
            RowKind::Indexer { width } => width,
            RowKind::Mla { rank, rope } => rank + rope,
        }
    }

    /// Bytes of a row of an 8-bit cache.
    fn bytes(self) -> usize {
        match self {
            RowKind::Indexer { width } => IndexerPage { page_size: 1, width }.row_bytes(),
            RowKind::Mla { rank, rope } => MlaRow { kv_lora_rank: rank, rope }.row_bytes(),
        }
    }

    /// Appends the row in slot `slot` of an 8-bit cache.
    fn decode<F: Real>(self, cache: &[u8], page_size: usize, slot: usize, out: &mut Vec<F>) {
        let float = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let mut group = |codes: &[u8], scale: f32| {
            out.extend(codes.iter().map(|&code| F::of_f32(fp8::decode(code)) * F::of_f32(scale)));
        };
        match self {
            RowKind::Indexer { width } => {
                let page = IndexerPage { page_size, width };
                group(&cache[page.codes(slot)], float(&cache[page.scale(slot)]));
            }
            RowKind::Mla { rank, rope } => {
                let layout = MlaRow { kv_lora_rank: rank, rope };
                let row = &cache[slot * layout.row_bytes()..][..layout.row_bytes()];
                for (codes, scale) in row[..rank].chunks(MLA_GROUP).zip(row[layout.scales()].chunks_exact(4))
                {
                    group(codes, float(scale));
                }
                let rotary = row[layout.rotary()].chunks_exact(2);
                out.extend(rotary.map(|x| F::of_bf16(bf16::from_le_bytes([x[0], x[1]]))));
            }
        }
    }

    /// Quantises a row into slot `slot` of an 8-bit cache.
    fn encode<F: Real>(self, row: &[F], cache: &mut [u8], page_size: usize, slot: usize) {
        let values: Vec<f32> = row.iter().map(|x| x.wide() as f32).collect();
        match self {
            RowKind::Indexer { width } => {
                let page = IndexerPage { page_size, width };
                let scale = fp8::quantise(&values, &mut cache[page.codes(slot)]);
                cache[page.scale(slot)].copy_from_slice(&scale.to_le_bytes());
            }
            RowKind::Mla { rank, rope } => {
                let layout = MlaRow { kv_lora_rank: rank, rope };
                let out = &mut cache[slot * layout.row_bytes()..][..layout.row_bytes()];
                out.fill(0);
                let (codes, rest) = out.split_at_mut(rank);
                let groups = values[..rank].chunks(MLA_GROUP).zip(codes.chunks_mut(MLA_GROUP));
                for ((values, codes), scale) in groups.zip(rest.chunks_exact_mut(4)) {
                    scale.copy_from_slice(&fp8::quantise(values, codes).to_le_bytes());
                }
                for (x, bytes) in row[rank..].iter().zip(out[layout.rotary()].chunks_exact_mut(2)) {
                    bytes.copy_from_slice(&bf16::from_f64(x.round_bf16().wide()).to_le_bytes());
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Rows<'a, F> {
    Real(&'a [F]),
    Fp8(&'a [u8]),
}

/// A cache `[pages, page_size, width]` and the block table to read it through.
///
/// [`new`](Self::new) has checked every page that a context needs, so reading is infallible.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PagedRows<'a, F> {
    rows: Rows<'a, F>,
    kind: RowKind,
    batch: &'a Batch,
}

impl<'a, F: Real> PagedRows<'a, F> {
    /// Fails unless `cache` has rows of `kind` and the batch's page size, and holds every page of every
    /// context.
    pub(crate) fn new(
        check: Check,
        batch: &'a Batch,
        cache: &'a CpuTensor<F>,
        kind: RowKind,
    ) -> Result<Self> {
        let slots = cache_slots(check, batch, cache, kind)?;
        let rows = match cache.dtype() {
            DType::Fp8 => Rows::Fp8(cache.bytes(check.0, "cache")?),
            _ => Rows::Real(check.act("cache", cache)?),
        };
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
        Ok(Self { rows, kind, batch })
    }

    /// The cache rows of `positions` of the sequence that token row `t` belongs to, in that order. Those of
    /// an 8-bit cache are decoded into `scratch`.
    pub(crate) fn rows<'s>(
        &'s self,
        t: usize,
        positions: impl Iterator<Item = usize>,
        scratch: &'s mut Vec<F>,
    ) -> Vec<&'s [F]> {
        let width = self.kind.width();
        let slots = positions.map(|position| self.batch.slot(t, position));
        match self.rows {
            Rows::Real(rows) => slots.map(|slot| &rows[slot * width..][..width]).collect(),
            Rows::Fp8(cache) => {
                scratch.clear();
                slots.for_each(|slot| self.kind.decode(cache, self.batch.page_size, slot, scratch));
                scratch.chunks_exact(width).collect()
            }
        }
    }
}

/// The number of slots of a cache, or an error when its type or shape is not that of rows of `kind`.
fn cache_slots<F: Real>(check: Check, batch: &Batch, cache: &CpuTensor<F>, kind: RowKind) -> Result<usize> {
    let width = match cache.dtype() {
        DType::Act => kind.width(),
        DType::Fp8 => kind.bytes(),
        found => {
            let expected = "activations or 8-bit cache rows";
            return Err(Error::DType { kernel: check.0, tensor: "cache", expected, found });
        }
    };
    let [pages, page_size, columns] = cache.dims(check.0, "cache")?;
    check.shape("cache", cache, page_size == batch.page_size && columns == width && page_size > 0, || {
        format!("[pages, {}, {width}]", batch.page_size)
    })?;
    let aligned = cache.dtype() != DType::Fp8 || matches!(kind, RowKind::Mla { .. }) || page_size % 4 == 0;
    check.value("page_size", aligned, || "a multiple of 4 for an 8-bit indexer cache".into(), page_size)?;
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
    kind: RowKind,
    mut row: impl FnMut(usize, &mut [F]),
) -> Result<()> {
    let slots = cache_slots(check, batch, cache, kind)?;
    check.batch(batch)?;
    for (t, &slot) in batch.slot_mapping.iter().enumerate() {
        check.value(
            "slot_mapping",
            usize::try_from(slot).is_ok_and(|slot| slot < slots),
            || format!("a slot below {slots} for token row {t}"),
            slot,
        )?;
    }
    let width = kind.width();
    let targets = batch.slot_mapping.iter().map(|&slot| slot as usize).enumerate();
    if cache.dtype() == DType::Fp8 {
        let mut values = vec![F::zero(); width];
        let cache = cache.bytes_mut(check.0, "cache")?;
        for (t, slot) in targets {
            row(t, &mut values);
            kind.encode(&values, cache, batch.page_size, slot);
        }
    } else {
        let cache = check.act_mut("cache", cache)?;
        for (t, slot) in targets {
            row(t, &mut cache[slot * width..][..width]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use crate::cpu::testing::{batch, message, poisoned, randoms, read, tensor};
    use crate::kernels::{Kernels, RopeLayout};
    use crate::tensor::DType;

    const CHECK: Check = Check("test");

    /// Writes `rows` into an 8-bit cache of poison.
    fn quantised(batch: &Batch, pages: usize, kind: RowKind, rows: &[f64]) -> CpuTensor<f64> {
        let mut cache = poisoned(DType::Fp8, &[pages, batch.page_size, kind.bytes()]);
        write_rows(CHECK, batch, &mut cache, kind, |t, out| {
            out.copy_from_slice(&rows[t * kind.width()..][..kind.width()]);
        })
        .unwrap();
        cache
    }

    /// An `Act` cache of the values that an 8-bit one of one sequence stands for.
    fn decoded(batch: &Batch, cache: &CpuTensor<f64>, kind: RowKind) -> CpuTensor<f64> {
        let rows = PagedRows::new(CHECK, batch, cache, kind).unwrap();
        let mut values = vec![f64::NAN; cache.shape()[0] * batch.page_size * kind.width()];
        for position in 0..batch.max_context_len {
            let mut scratch = Vec::new();
            let row = rows.rows(0, std::iter::once(position), &mut scratch)[0];
            values[batch.slot(0, position) * kind.width()..][..kind.width()].copy_from_slice(row);
        }
        tensor(DType::Act, &[cache.shape()[0], batch.page_size, kind.width()], &values)
    }

    #[test]
    fn an_indexer_row_by_hand() {
        let batch = batch(4, 3, &[(5, 1)], 1);
        let kind = RowKind::Indexer { width: 4 };
        let cache = quantised(&batch, 3, kind, &[1.0, -7.0, 0.0, 0.11]);
        let bytes = Cpu::new().read_bytes(&cache).unwrap();
        let (page, place) = (batch.slot(0, 5) / 4, batch.slot(0, 5) % 4);
        let page = &bytes[page * 32..][..32];
        // In steps of 1/64: 64, -448, 0, 7.04.
        assert_eq!(page[place * 4..][..4], [0x68, 0xfe, 0x00, 0x4e]);
        assert_eq!(page[16 + place * 4..][..4], (7.0_f32 / 448.0).to_le_bytes());
        assert_eq!(bytes.iter().filter(|&&byte| byte != 0xff).count(), 8);
    }

    #[test]
    fn an_mla_row_by_hand() {
        // Two groups, the second short: 128 times 1, then 2 and 0; rotary -1.5 and pi.
        let batch = batch(3, 1, &[(0, 2)], 0);
        let kind = RowKind::Mla { rank: 130, rope: 2 };
        let row = [vec![1.0; 128], vec![2.0, 0.0, -1.5, std::f64::consts::PI]].concat();
        let cache = quantised(&batch, 1, kind, &[vec![0.0; 132], row].concat());
        let bytes = Cpu::new().read_bytes(&cache).unwrap();
        assert_eq!(cache.shape(), [1, 3, 144]);
        let row = &bytes[144..288];
        assert_eq!((&row[..128], &row[128..130]), (&[0x7e; 128][..], &[0x7e, 0x00][..]));
        assert_eq!(
            row[130..138],
            [(1.0_f32 / 448.0).to_le_bytes(), (2.0_f32 / 448.0).to_le_bytes()].concat()
        );
        assert_eq!(row[138..142], [0xc0, 0xbf, 0x49, 0x40]);
        assert_eq!((&row[142..], bytes[288]), (&[0, 0][..], 0xff));
    }

    #[test]
    fn indexer_logits_of_an_8_bit_cache_are_those_of_its_values() {
        let batch = batch(4, 40, &[(0, 150)], 5);
        let kind = RowKind::Indexer { width: 16 };
        let x = tensor::<f64>(DType::Act, &[150, 16], &randoms(1, 150 * 16));
        let [weight, bias] = [2, 3].map(|seed| tensor(DType::Float, &[16], &randoms(seed, 16)));
        let cos_sin = tensor(DType::Float, &[150, 4, 2], &randoms(4, 150 * 8));
        let mut cache = poisoned(DType::Fp8, &[40, 4, 20]);
        let cpu = Cpu::rounding_to_bf16();
        let layout = RopeLayout::Half;
        cpu.layer_norm_rope(&batch_of(&batch), &x, &weight, &bias, 1e-6, layout, &cos_sin, &mut cache)
            .unwrap();
        let mut keys = poisoned(DType::Act, &[40, 4, 16]);
        cpu.layer_norm_rope(&batch_of(&batch), &x, &weight, &bias, 1e-6, layout, &cos_sin, &mut keys)
            .unwrap();
        let values = decoded(&batch, &cache, kind);
        let [exact, rounded] = [&keys, &values].map(read);
        for (row, rounded) in exact.chunks(16).zip(rounded.chunks(16)).filter(|(row, _)| row[0].is_finite()) {
            // Half a step of three bits of fraction, of the value or of the row's smallest normal number.
            let largest = row.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
            for (x, rounded) in row.iter().zip(rounded) {
                assert!((x - rounded).abs() <= (x.abs() / 16.0).max(largest / 448.0 / 1024.0) * 1.0001);
            }
        }
        let q = tensor(DType::Act, &[150, 2, 16], &randoms(6, 150 * 32));
        let weights = tensor(DType::Float, &[150, 2], &randoms(7, 300));
        let [from_codes, from_values] = [&cache, &values].map(|cache| {
            let mut logits = poisoned(DType::Float, &[150, 150]);
            cpu.indexer_logits(&batch_of(&batch), 0..150, &q, &weights, cache, 0.3, &mut logits).unwrap();
            read(&logits).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        });
        assert_eq!(from_codes, from_values);
    }

    #[test]
    fn attention_over_an_8_bit_cache_is_that_over_its_values() {
        let batch = batch(3, 20, &[(0, 31)], 5);
        let kind = RowKind::Mla { rank: 144, rope: 16 };
        let x = tensor::<f64>(DType::Act, &[31, 160], &randoms(1, 31 * 160));
        let weight = tensor(DType::Float, &[144], &randoms(2, 144));
        let cos_sin = tensor(DType::Float, &[31, 8, 2], &randoms(3, 31 * 16));
        let mut cache = poisoned(DType::Fp8, &[20, 3, 192]);
        let cpu = Cpu::new();
        cpu.latent_rope(&batch_of(&batch), &x, &weight, 1e-6, &cos_sin, &mut cache).unwrap();
        let values = decoded(&batch, &cache, kind);
        let q = tensor(DType::Act, &[31, 3, 160], &randoms(4, 31 * 480));
        let selected: Vec<i32> =
            (0..31).flat_map(|t| (0..31).map(move |s| if s > t { -1 } else { s })).collect();
        let mut topk_indices = poisoned(DType::Index, &[31, 31]);
        cpu.write_index(&selected, &mut topk_indices).unwrap();
        let [from_codes, from_values] = [&cache, &values].map(|cache| {
            let mut out = poisoned(DType::Act, &[31, 3, 144]);
            cpu.sparse_mla(&batch_of(&batch), &q, cache, &topk_indices, 0.2, &mut out).unwrap();
            read(&out)
        });
        assert!(from_codes.iter().all(|x| x.is_finite()));
        assert_eq!(from_codes, from_values);
    }

    #[test]
    fn misfits_of_8_bit_caches_are_named() {
        let batch = batch(3, 4, &[(0, 3)], 0);
        let write = |dtype, shape: &[usize], kind: RowKind| {
            message(write_rows(CHECK, &batch, &mut poisoned::<f32>(dtype, shape), kind, |_, _| ()))
        };
        let (key, row) = (RowKind::Indexer { width: 16 }, RowKind::Mla { rank: 16, rope: 4 });
        let text = write(DType::Fp8, &[4, 3, 20], key);
        assert!(text.contains("`page_size` is 3, expected a multiple of 4"), "{text}");
        assert!(write(DType::Fp8, &[4, 3, 16], key).contains("expected [pages, 3, 20]"));
        assert!(write(DType::Fp8, &[4, 3, 20], row).contains("expected [pages, 3, 32]"));
        let text = write(DType::Float, &[4, 3, 20], row);
        assert!(text.contains("`cache` holds floats, expected activations or 8-bit cache rows"), "{text}");
    }

    fn batch_of(batch: &Batch) -> crate::cpu::CpuBatch {
        let cpu = Cpu::<f64>::new();
        let mut device = cpu.alloc_batch(batch.num_tokens(), batch.num_seqs(), batch.max_blocks).unwrap();
        cpu.upload_batch(batch, &mut device).unwrap();
        device
    }
}
