//! `embed`, to the bit: what it widens and rounds is what all kernels of WGSL widen and round by.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{BatchCase, Values, assert_same};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone)]
struct Case {
    token_ids: Vec<i32>,
    vocab: usize,
    vocab_start: usize,
    width: usize,
    table: DType,
    out: DType,
    seed: u64,
}

struct Embed;

impl Contract for Embed {
    const NAME: &'static str = "contract_embed";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let shards = (0..=12_usize, prop_oneof![Just(0_usize), 0..5000_usize, Just(i32::MAX as usize)]);
        let tokens = shards.prop_flat_map(|(vocab, start)| {
            let (first, end) = (start as i64, (start + vocab) as i64);
            let edges =
                select(vec![first - 1, first, end - 1, end, -1, i64::from(i32::MIN), i64::from(i32::MAX)]);
            let token = prop_oneof![4 => first..=end, 1 => edges];
            let token = token.prop_map(|token| token.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32);
            (vec(token, 0..=9), Just(vocab), Just(start))
        });
        let types =
            select(&[(DType::Bf16, DType::Float), (DType::F32, DType::Act), (DType::F16, DType::Float)][..]);
        (tokens, select(&[36_usize, 328][..]), types, any::<u64>()).prop_map(
            |((token_ids, vocab, vocab_start), width, (table, out), seed)| Case {
                token_ids,
                vocab,
                vocab_start,
                width,
                table,
                out,
                seed,
            },
        )
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { vocab, vocab_start, width, .. } = case;
        // Not exact in bf16, so that a wider table's rows are rounded; every fifth is subnormal in f16, every seventh halfway.
        let values = Values::Outliers.take(case.seed, vocab * width).into_iter().enumerate();
        let values: Vec<f64> = values
            .map(|(i, x)| match i {
                i if i % 5 == 0 => x * 1e-6,
                i if i % 7 == 0 => x * (1.0 + 1.0 / 256.0),
                i => x * (1.0 + (i % 97) as f64 / 997.0),
            })
            .collect();
        let table = contract::weight(kernels, case.table, &[vocab, width], &values);
        let mut batch = BatchCase::of(16, &[(0, case.token_ids.len())]).batch;
        batch.token_ids = case.token_ids.clone();
        let batch = contract::batch(kernels, &batch);
        let mut out = contract::output(kernels, case.out, &[case.token_ids.len(), width]);
        kernels.oracle().embed(&batch.0, &table.0, vocab_start, &mut out.0).unwrap();
        kernels.embed(&batch.1, &table.1, vocab_start, &mut out.1).unwrap();
        let (found, expected) = (kernels.read(&out.1).unwrap(), kernels.oracle().read(&out.0).unwrap());
        assert_same("out", width, &found, &expected);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<Embed>();
}

#[test]
fn a_table_of_several_bindings_is_whole() {
    let case = Case {
        token_ids: (-1..140).step_by(3).collect(),
        vocab: 139,
        vocab_start: 0,
        width: 36,
        table: DType::F32,
        out: DType::Act,
        seed: 5,
    };
    // A binding has 28 rows, and starts at every sixteenth of them.
    contract::with_small_bindings((4096 + 1024) / 2, |wgpu| Embed::run(wgpu, &case));
}

#[test]
fn planted_faults_are_seen() {
    for (shader, find, replace) in [
        ("embed", "id >= 0 &&", "id > 0 &&"),
        ("embed", "row < params.vocab;", "row <= params.vocab;"),
        ("embed", "if !inside {\n        return 0.0;\n    }\n", ""),
        // Ties go up, not to even.
        ("prelude", "0x7fffu + ((bits >> 16u) & 1u)", "0x8000u"),
        // The subnormal halves, and the signs of all.
        ("prelude", "f32(magnitude) * 0x1p-24f", "0.0"),
        ("prelude", "(bits & 0x8000u) << 16u", "0u"),
        ("prelude", "word & 0xffff0000u, (i & 1u) == 1u", "word & 0xffff0000u, (i & 1u) == 0u"),
    ] {
        contract::catches::<Embed>(Edit { shader, find, replace });
    }
}
