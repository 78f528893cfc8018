//! Caches that a kernel has written, against the intervals that their rows may lie in.

use dsa80_reference::fp8::{self, IndexerPage, MLA_GROUP, MlaRow};
use dsa80_tests::parity::{F32_UNIT, Interval, assert_close};
use half::bf16;

/// Rounding to bf16 flips where the oracle's value is close to a boundary: rarely, and by one step.
const RELATIVE_L2: f64 = 2.5e-3;
/// A step of e4m3 is sixteen times one of bf16.
const RELATIVE_L2_FP8: f64 = 16.0 * RELATIVE_L2;

/// What a cache should hold.
pub(crate) struct Expected<'a> {
    pub(crate) slot_mapping: &'a [i64],
    pub(crate) slots: usize,
    /// `[T, width]`, before quantisation.
    pub(crate) rows: &'a [Interval],
    pub(crate) width: usize,
}

/// Layout of an 8-bit cache.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layout {
    Indexer(IndexerPage),
    Mla(MlaRow),
}

impl Expected<'_> {
    /// The token whose row lies in every slot.
    fn tokens(&self) -> Vec<Option<usize>> {
        let mut tokens = vec![None; self.slots];
        for (t, &slot) in self.slot_mapping.iter().enumerate() {
            if let Some(token) = usize::try_from(slot).ok().and_then(|slot| tokens.get_mut(slot)) {
                *token = Some(t);
            }
        }
        tokens
    }

    fn row(&self, t: usize) -> &[Interval] {
        &self.rows[t * self.width..][..self.width]
    }

    /// Compares a bf16 cache with the oracle's: `[slots, width]`, poison where nothing was written.
    pub(crate) fn check_act(&self, found: &[f64], oracle: &[f64]) {
        let tokens = self.tokens();
        let bound = |i: usize| {
            let Some(t) = tokens[i / self.width] else { return 0.0 };
            let interval = self.row(t)[i % self.width];
            assert!(interval.contains(oracle[i]), "the bound misses the oracle: {interval:?}, {}", oracle[i]);
            interval.farthest(oracle[i])
        };
        assert_close("cache", self.width, found, oracle, RELATIVE_L2, bound);
    }

    /// Compares an 8-bit cache with the oracle's, scales and codes; nothing else was written.
    pub(crate) fn check_fp8(&self, layout: Layout, found: &[u8], oracle: &[u8]) {
        let mut poison = vec![true; found.len()];
        let (mut values, mut expected, mut bounds) = (Vec::new(), Vec::new(), Vec::new());
        for (slot, token) in self.tokens().into_iter().enumerate() {
            let Some(t) = token else { continue };
            let row = self.row(t);
            for place in layout.bytes(slot) {
                poison[place] = false;
            }
            let groups = layout.groups(slot);
            for (columns, codes, scale_at) in &groups {
                let scale = float(&found[scale_at.clone()]);
                let largest = row[columns.clone()].iter().map(|x| x.abs());
                let largest = largest.fold(Interval { lo: 0.0, hi: 0.0 }, |a, b| Interval {
                    lo: a.lo.max(b.lo),
                    hi: a.hi.max(b.hi),
                });
                let scales = largest.map(|largest| f64::from(fp8::scale(largest as f32)));
                assert!(
                    scales.contains(f64::from(scale)),
                    "slot {slot}: scale {scale:e}, expected {scales:?}"
                );
                let oracle_scale = float(&oracle[scale_at.clone()]);
                for (column, place) in columns.clone().zip(codes.clone()) {
                    values.push(value(found[place], scale));
                    expected.push(value(oracle[place], oracle_scale));
                    let quotient = row[column] * (1.0 / f64::from(scale));
                    let quotient = quotient.widened(4.0 * F32_UNIT * quotient.magnitude());
                    let stored = quotient.map(|x| value(fp8::encode(x as f32), scale));
                    bounds.push(stored.farthest(value(oracle[place], oracle_scale)));
                }
            }
            if let Layout::Mla(mla) = layout {
                let (found, oracle) = (&found[slot * mla.row_bytes()..], &oracle[slot * mla.row_bytes()..]);
                for (interval, i) in row[mla.kv_lora_rank..].iter().zip(mla.rotary().step_by(2)) {
                    let [found, oracle] =
                        [found, oracle].map(|row| bf16::from_le_bytes([row[i], row[i + 1]]).to_f64());
                    values.push(found);
                    expected.push(oracle);
                    bounds.push(interval.farthest(oracle));
                }
                assert!(
                    found[mla.rotary().end..mla.row_bytes()].iter().all(|&byte| byte == 0),
                    "slot {slot}: padding"
                );
            }
        }
        assert_close("cache", self.width, &values, &expected, RELATIVE_L2_FP8, |i| bounds[i]);
        for (i, _) in poison.iter().enumerate().filter(|(_, poison)| **poison) {
            assert_eq!(found[i], 0xff, "byte {i} belongs to no row of this step");
        }
    }
}

type Range = std::ops::Range<usize>;

impl Layout {
    /// The bytes of a slot.
    fn bytes(self, slot: usize) -> Vec<usize> {
        match self {
            Layout::Indexer(page) => page.codes(slot).chain(page.scale(slot)).collect(),
            Layout::Mla(row) => (slot * row.row_bytes()..(slot + 1) * row.row_bytes()).collect(),
        }
    }

    /// Columns, codes and scale of what shares a scale.
    fn groups(self, slot: usize) -> Vec<(Range, Range, Range)> {
        match self {
            Layout::Indexer(page) => vec![(0..page.width, page.codes(slot), page.scale(slot))],
            Layout::Mla(row) => (0..row.groups())
                .map(|group| {
                    let columns = group * MLA_GROUP..((group + 1) * MLA_GROUP).min(row.kv_lora_rank);
                    let (start, scale) = (slot * row.row_bytes(), row.scales().start + 4 * group);
                    (
                        columns.clone(),
                        start + columns.start..start + columns.end,
                        start + scale..start + scale + 4,
                    )
                })
                .collect(),
        }
    }
}

fn float(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn value(code: u8, scale: f32) -> f64 {
    f64::from(fp8::decode(code)) * f64::from(scale)
}
