//! `embed` against the oracle, to the bit.

use dsa80_cuda::embed::{EmbedDims, EmbedTile, embed};
use dsa80_cuda::{Limits, Tile};
use dsa80_reference::{Batch, DType, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Pair, TestDevice, Values, assert_same};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;

#[derive(Debug, Clone, Copy)]
struct Variant {
    width: usize,
    table: DType,
    out: DType,
    tile: EmbedTile,
}

const fn variant(width: usize, table: DType, out: DType, warps: usize) -> Variant {
    Variant { width, table, out, tile: EmbedTile { warps } }
}

/// Every constant of the kernel in few programs: rows of one pass and of several, aligned and not.
const VARIANTS: &[Variant] = &[
    variant(328, DType::Bf16, DType::Float, 1),
    variant(36, DType::F32, DType::Act, 2),
    variant(35, DType::F16, DType::Float, 1),
];

#[derive(Debug, Clone)]
struct Case {
    token_ids: Vec<i32>,
    vocab: usize,
    vocab_start: usize,
    variant: Variant,
    seed: u64,
}

fn cases(
    variants: impl Strategy<Value = Variant>,
    max_rows: usize,
    max_vocab: usize,
) -> impl Strategy<Value = Case> {
    let shards = (0..=max_vocab, prop_oneof![Just(0_usize), 0..5000_usize, Just(i32::MAX as usize)]);
    let tokens = shards.prop_flat_map(move |(vocab, vocab_start)| {
        let (least, most) = (i64::from(i32::MIN), i64::from(i32::MAX));
        let (start, end) = (vocab_start as i64, (vocab_start + vocab) as i64);
        let edges = select(vec![start - 1, start, end - 1, end, -1, least, most]);
        let token =
            prop_oneof![4 => start..=end, 1 => edges].prop_map(move |token| token.clamp(least, most) as i32);
        (vec(token, 0..=max_rows), Just(vocab), Just(vocab_start))
    });
    (tokens, variants, any::<u64>()).prop_map(|((token_ids, vocab, vocab_start), variant, seed)| Case {
        token_ids,
        vocab,
        vocab_start,
        variant,
        seed,
    })
}

fn batch(token_ids: &[i32]) -> Batch {
    let mut batch = BatchCase::of(16, &[(0, token_ids.len())]).batch;
    batch.token_ids = token_ids.to_vec();
    batch
}

fn run(device: &TestDevice, case: Case) {
    let Variant { width, table, out: out_dtype, tile } = case.variant;
    // Not exact in bf16, so that a wider table's rows are rounded.
    let values = Values::Outliers.take(case.seed, case.vocab * width);
    let values: Vec<f64> =
        values.iter().enumerate().map(|(i, x)| x * (1.0 + (i % 97) as f64 / 997.0)).collect();
    let table = Pair::weight(device, "table", table, &[case.vocab, width], &values);
    let (host, on_device) = parity::batch(device, &batch(&case.token_ids));
    let shape = [case.token_ids.len(), width];
    let bytes = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", out_dtype, &shape);
        embed(device, &tile, &on_device, &table.device, case.vocab_start, &mut out).unwrap();
        parity::read_bytes(device, &out)
    });
    let mut expected = parity::oracle().alloc(out_dtype, &shape).unwrap();
    parity::oracle().embed(&host, &table.host, case.vocab_start, &mut expected).unwrap();
    let expected = parity::oracle().read(&expected).unwrap();
    assert_same("out", width, &parity::numbers(out_dtype, &bytes), &expected);
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("embed", cases(select(VARIANTS), 9, 12), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let tables = select(&[DType::Bf16, DType::F16, DType::F32][..]);
    let variants = (select(&[6144, 512, 1000][..]), tables).prop_flat_map(|(width, table)| {
        let tiles = EmbedTile::candidates(EmbedDims { width }, &Limits::a100());
        let outs = select(&[DType::Act, DType::Float][..]);
        (select(tiles), outs).prop_map(move |(tile, out)| Variant { width, table, out, tile })
    });
    parity::check_on_gpu("embed_at_size", cases(variants, 300, 500), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The borders of the shard.
        ("row >= 0 &&", "row > 0 &&"),
        ("row >= 0 &&", "row >= -1 &&"),
        ("row < vocab;", "row <= vocab;"),
        ("row < vocab;", "row < vocab - 1;"),
        // Wrapped in 32 bits.
        (
            "token_ids[blockIdx.x] - vocab_start;",
            "int32_t(uint32_t(token_ids[blockIdx.x]) - uint32_t(vocab_start));",
        ),
        // The last vector of a row; no zeros.
        ("column < width;", "column < width - VECTOR;"),
        (
            "            store_words(static_cast<float*>(out)",
            "            if (inside) store_words(static_cast<float*>(out)",
        ),
    ] {
        let fault = Fault { file: "embed.cu", find, replace };
        parity::catches(fault, cases(select(&VARIANTS[..1]), 9, 12), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let (_, batch) = parity::batch(device, &batch(&[3, 4]));
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let run = |table: &_, mut out| {
            embed(device, &EmbedTile { warps: 1 }, &batch, table, 0, &mut out).unwrap_err().to_string()
        };
        let table = tensor(DType::Bf16, &[5, 16]);
        let out = || tensor(DType::Act, &[2, 16]);
        expect(run(&tensor(DType::Bf16, &[80]), out()), &["embed: `table`", "2 dimensions"]);
        expect(run(&tensor(DType::Act, &[5, 16]), out()), &["`table` holds activations"]);
        expect(run(&table, tensor(DType::Act, &[2, 8])), &["`out`", "[2, 16]"]);
        expect(run(&table, tensor(DType::Act, &[3, 16])), &["`out`", "[2, 16]"]);
        expect(run(&table, tensor(DType::Index, &[2, 16])), &["`out` holds indices"]);
    });
}
