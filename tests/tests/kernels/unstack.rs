//! `unstack`, to the bit.

use dsa80_cuda::unstack::unstack;
use dsa80_cuda::{CudaTensor, Device};
use dsa80_reference::DType;
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone)]
struct Case {
    dtype: DType,
    ranks: usize,
    rows: usize,
    /// Of a shard, in multiples of `step`: of one tensor or of two.
    widths: Vec<usize>,
    step: usize,
    first_row: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let dtype = select(&[DType::Act, DType::Float][..]);
    let widths = proptest::collection::vec(1..40_usize, 1..3);
    (dtype, 1..9_usize, 0..6_usize, widths, select(&[1, 4, 8][..]), 0..3_usize, any::<u64>()).prop_map(
        |(dtype, ranks, rows, widths, step, first_row, seed)| Case {
            dtype,
            ranks,
            rows,
            widths,
            step,
            first_row,
            seed,
        },
    )
}

fn run(device: &TestDevice, case: Case) {
    let Case { dtype, ranks, rows, widths, step, first_row, seed } = case;
    let sizes: Vec<usize> = widths.iter().map(|width| ranks * rows * width * step).collect();
    let all: usize = sizes.iter().sum();
    let numbers = Values::Normal.take(seed, all);
    let stacked = Pair::new(device, "stacked", dtype, &[all], &numbers).device;
    let held = parity::numbers(dtype, &parity::read_bytes(device, &stacked));
    let shape = |width: &usize| [first_row + rows, ranks * width * step];
    parity::twice(device, || {
        let outs: Vec<CudaTensor<_>> =
            widths.iter().map(|width| parity::poisoned(device, "out", dtype, &shape(width))).collect();
        let before: Vec<_> = outs.iter().map(|out| parity::read_bytes(device, out)).collect();
        let all: Vec<&CudaTensor<_>> = outs.iter().collect();
        unstack(device, stacked.buffer(), &all, ranks, [first_row, rows]).unwrap();
        let (mut start, mut bytes) = (0, Vec::new());
        for (((width, size), out), before) in widths.iter().zip(&sizes).zip(&outs).zip(before) {
            let (columns, shards) = (width * step, &held[start..start + size]);
            let row = |row: usize| {
                (0..ranks).flat_map(move |rank| &shards[(rank * rows + row) * columns..][..columns])
            };
            let found = parity::read_bytes(device, out);
            let above = found.len() / (first_row + rows).max(1) * first_row;
            assert_eq!(found[..above], before[..above], "rows above");
            let expected: Vec<f64> = (0..rows).flat_map(row).copied().collect();
            assert_eq!(parity::numbers(dtype, &found[above..]), expected);
            (start, bytes) = (start + size, found);
        }
        bytes
    });
}

#[test]
fn shards_are_side_by_side() {
    parity::check("unstack", cases(), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        ("(first_row + row) * ranks", "row * ranks"),
        ("(next ? static_cast<int64_t>(ranks) * rows * columns : 0)", "0"),
        ("i < cells", "i <= cells"),
    ] {
        parity::catches(Fault { file: "unstack.cu", find, replace }, cases(), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let stacked = device.alloc("stacked", 64).unwrap();
        let out = |dtype, shape: &[usize]| parity::poisoned(device, "out", dtype, shape);
        let refused = |outs: &[&CudaTensor<_>], words: &str| {
            let error = unstack(device, &stacked, outs, 2, [0, 3]).unwrap_err().to_string();
            assert!(error.contains("unstack") && error.contains(words), "{error}");
        };
        let (fits, short, odd) =
            (out(DType::Act, &[3, 4]), out(DType::Act, &[2, 4]), out(DType::Act, &[3, 3]));
        refused(&[], "1 to 2");
        refused(&[&fits, &fits, &fits], "1 to 2");
        refused(&[&fits, &out(DType::Float, &[3, 4])], "element type of the first tensor");
        refused(&[&out(DType::Index, &[3, 4])], "holds indices");
        refused(&[&short], "at least 3 rows");
        refused(&[&odd], "a multiple of 2");
    });
}
