//! `lm_head` against the oracle: the kernels of `linear`, with rows of its own choice.

use dsa80_cuda::linear::{LinearTiles, LinearWorkspace};
use dsa80_cuda::lm_head::lm_head;
use dsa80_reference::DType;
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity;
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::linear::{VARIANTS, cases, run};

#[test]
fn agrees_with_the_oracle() {
    // Weights of every type, few tokens and many.
    let variants = select(vec![VARIANTS[0], VARIANTS[2], VARIANTS[3], VARIANTS[4]]);
    parity::check("lm_head", cases(variants), |device, case| run(device, case, true));
}

#[test]
fn planted_faults_are_seen() {
    for (variant, file, find, replace) in [
        // The row after the one that is asked for, and the rows one after the other.
        (VARIANTS[0], "linear_few.cu", "row = gathered[row];", "row = gathered[row] + 1;"),
        (VARIANTS[4], "linear_tiles.cuh", "in.gathered == nullptr ? token", "in.gathered != nullptr ? token"),
    ] {
        let fault = Fault { file, find, replace };
        parity::catches(fault, cases(Just(variant)), |device, case| run(device, case, true));
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tiles = LinearTiles::safe();
        let workspace = LinearWorkspace::alloc(device, &tiles).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let (x, weight) = (tensor(DType::Act, &[3, 16]), tensor(DType::Bf16, &[8, 16]));
        let run = |rows: &_, mut logits| {
            lm_head(device, &tiles, &workspace, &x, rows, &weight, &mut logits).unwrap_err().to_string()
        };
        let rows = tensor(DType::Index, &[2]);
        expect(run(&rows, tensor(DType::Act, &[2, 8])), &["lm_head: `logits` holds activations"]);
        expect(run(&rows, tensor(DType::Float, &[3, 8])), &["`logits`", "[2, 8]"]);
        expect(run(&tensor(DType::Float, &[2]), tensor(DType::Float, &[2, 8])), &["`rows` holds floats"]);
        expect(run(&tensor(DType::Index, &[2, 1]), tensor(DType::Float, &[2, 8])), &["`rows`"]);
    });
}
