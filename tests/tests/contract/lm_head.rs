//! `lm_head`.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::Values;
use dsa80_tests::parity::contract::{self, Backend, Contract};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::products::{Stored, assert_products};

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    rows: Vec<i32>,
    hidden: usize,
    vocab: usize,
    weight: DType,
    seed: u64,
}

struct LmHead;

impl Contract for LmHead {
    const NAME: &'static str = "contract_lm_head";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let rows = (1..=20_i32).prop_flat_map(|tokens| (Just(tokens as usize), vec(0..tokens, 0..=20)));
        let weight = select(&[DType::Bf16, DType::F32][..]);
        (rows, select(&[64_usize, 200][..]), select(&[33_usize, 80][..]), weight, any::<u64>()).prop_map(
            |((tokens, rows), hidden, vocab, weight, seed)| Case {
                tokens,
                rows,
                hidden,
                vocab,
                weight,
                seed,
            },
        )
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { tokens, hidden, vocab, seed, .. } = case;
        let count = case.rows.len();
        let x = contract::numbers(
            kernels,
            DType::Act,
            &[tokens, hidden],
            &Values::Normal.take(seed, tokens * hidden),
        );
        let rows = contract::index(kernels, &[count], &case.rows);
        let weights = Values::Normal.take(seed ^ 1, vocab * hidden);
        let weight = contract::weight(kernels, case.weight, &[vocab, hidden], &weights);
        let mut logits = contract::output(kernels, DType::Float, &[count, vocab]);
        let oracle = kernels.oracle();
        oracle.lm_head(&x.0, &rows.0, &weight.0, &mut logits.0).unwrap();
        kernels.lm_head(&x.1, &rows.1, &weight.1, &mut logits.1).unwrap();
        let (found, expected) = (kernels.read(&logits.1).unwrap(), oracle.read(&logits.0).unwrap());
        let x = oracle.read(&x.0).unwrap();
        let chosen: Vec<f64> =
            case.rows.iter().flat_map(|&row| x[row as usize * hidden..][..hidden].to_vec()).collect();
        let weights = oracle.read(&weight.0).unwrap();
        assert_products("logits", &found, &expected, &chosen, &weights, [hidden, vocab], Stored::Floats);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<LmHead>();
}

#[test]
fn planted_faults_are_seen() {
    let edit = Edit { shader: "product", find: "u32(rows[t])", replace: "t" };
    contract::catches::<LmHead>(edit);
    let edit = Edit {
        shader: "product",
        find: "if feature + 1u < params.features {\n            out[i + 1u]",
        replace: "{\n            out[i + 1u]",
    };
    contract::catches::<LmHead>(edit);
}
