//! Kernels that make a cache row of each token: what they have written, against the intervals that the rows may lie in.

use dsa80_cuda::{CudaBatch, CudaTensor};
use dsa80_reference::cpu::{CpuBatch, CpuTensor};
use dsa80_reference::fp8::{self, IndexerPage, MLA_GROUP, MlaRow};
use dsa80_reference::{DType, Kernels, Result};
use dsa80_tests::parity::{self, BatchCase, F32_UNIT, Interval, Pair, TestDevice, Values, assert_close};
use half::bf16;

/// Rounding to bf16 flips where the oracle's value is close to a boundary: rarely, and by one step.
const RELATIVE_L2: f64 = 2.5e-3;
/// A step of e4m3 is sixteen times one of bf16.
const RELATIVE_L2_FP8: f64 = 16.0 * RELATIVE_L2;

/// A launch of such a kernel, in one of its variants.
#[derive(Debug, Clone)]
pub(crate) struct Case<V> {
    pub(crate) batch: BatchCase,
    pub(crate) variant: V,
    pub(crate) fp8: bool,
    pub(crate) values: Values,
    pub(crate) seed: u64,
}

impl<V> Case<V> {
    /// The rotary table of the batch: any turns.
    pub(crate) fn cos_sin(&self, device: &TestDevice, rope: usize) -> Pair {
        let rows = self.batch.batch.num_tokens();
        let turns = (0..rows * rope / 2).flat_map(|i| {
            let (sin, cos) = (37.0 * Values::Normal.at(self.seed ^ 3, i)).sin_cos();
            [cos, sin]
        });
        Pair::new(device, "cos_sin", DType::Float, &[rows, rope / 2, 2], &turns.collect::<Vec<_>>())
    }

    fn cache(&self, layout: Layout) -> (DType, [usize; 3]) {
        let (dtype, row) = match self.fp8 {
            false => (DType::Act, layout.width()),
            true => (DType::Fp8, layout.row_bytes()),
        };
        (dtype, [self.batch.pages, self.batch.batch.page_size, row])
    }

    /// What `launch` leaves in a poisoned cache.
    pub(crate) fn written(
        &self,
        device: &TestDevice,
        layout: Layout,
        launch: impl FnOnce(&CudaBatch<TestDevice>, &mut CudaTensor<TestDevice>) -> Result<()>,
    ) -> Vec<u8> {
        let (_, batch) = parity::batch(device, &self.batch.batch);
        let (dtype, shape) = self.cache(layout);
        let mut cache = parity::poisoned(device, "cache", dtype, &shape);
        launch(&batch, &mut cache).unwrap();
        parity::read_bytes(device, &cache)
    }

    /// Compares `found` with the cache of the oracle's `launch`, within `rows`: `[T, width]`, before quantisation.
    pub(crate) fn check(
        &self,
        device: &TestDevice,
        layout: Layout,
        rows: &[Interval],
        found: &[u8],
        launch: impl FnOnce(&CpuBatch, &mut CpuTensor<f64>) -> Result<()>,
    ) {
        let oracle = parity::oracle();
        let (batch, _) = parity::batch(device, &self.batch.batch);
        let (dtype, shape) = self.cache(layout);
        let mut cache = oracle.alloc(dtype, &shape).unwrap();
        launch(&batch, &mut cache).unwrap();
        let expected = Expected {
            slot_mapping: &self.batch.batch.slot_mapping,
            slots: self.batch.slots(),
            rows,
            width: layout.width(),
        };
        if self.fp8 {
            expected.check_fp8(layout, found, &oracle.read_bytes(&cache).unwrap());
        } else {
            expected.check_act(&parity::numbers(DType::Act, found), &oracle.read(&cache).unwrap());
        }
    }
}

/// Four of seven tokens have no slot in the cache: `launch` writes the other three, whose rows have `act` bytes, or `fp8`.
pub(crate) fn assert_rows_outside_are_skipped<V: Copy>(
    variant: V,
    (act, fp8): (usize, usize),
    launch: impl Fn(&TestDevice, &Case<V>) -> Vec<u8>,
) {
    parity::small_cases(|device| {
        for (is_fp8, row) in [(false, act), (true, fp8)] {
            let mut batch = BatchCase::of(4, &[(3, 5), (0, 2)]);
            let slots = batch.slots() as i64;
            for (t, slot) in [(0, -1), (2, slots), (4, i64::MAX), (6, i64::MIN)] {
                batch.batch.slot_mapping[t] = slot;
            }
            let case = Case { batch, variant, fp8: is_fp8, values: Values::Normal, seed: 5 };
            let found = launch(device, &case);
            let untouched = found.iter().filter(|&&byte| byte == 0xff).count();
            let (written, bytes) = (found.len() - untouched, found.len());
            assert!(written <= 3 * row, "{written} of {bytes} bytes");
            assert!(written > 2 * row, "{written} of {bytes} bytes");
        }
    });
}

/// Fails unless an error has these words.
pub(crate) fn expect(error: String, words: &[&str]) {
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
}

/// What a cache should hold.
struct Expected<'a> {
    slot_mapping: &'a [i64],
    slots: usize,
    /// `[T, width]`, before quantisation.
    rows: &'a [Interval],
    width: usize,
}

/// Columns of a row, and how they lie in an 8-bit cache.
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
    fn check_act(&self, found: &[f64], oracle: &[f64]) {
        let tokens = self.tokens();
        let bound = |i: usize| {
            let Some(t) = tokens[i / self.width] else { return 0.0 };
            self.row(t)[i % self.width].bound(oracle[i])
        };
        assert_close("cache", self.width, found, oracle, RELATIVE_L2, bound);
    }

    /// Compares an 8-bit cache with the oracle's, scales and codes; nothing else was written.
    fn check_fp8(&self, layout: Layout, found: &[u8], oracle: &[u8]) {
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
    fn width(self) -> usize {
        match self {
            Layout::Indexer(page) => page.width,
            Layout::Mla(row) => row.kv_lora_rank + row.rope,
        }
    }

    fn row_bytes(self) -> usize {
        match self {
            Layout::Indexer(page) => page.row_bytes(),
            Layout::Mla(row) => row.row_bytes(),
        }
    }

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
