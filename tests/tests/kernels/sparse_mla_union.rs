//! `sparse_mla_union` against sets on the host.

use dsa80_cuda::Device;
use dsa80_cuda::sparse_mla_union::{SparseMlaUnionTile, SparseMlaUnionWorkspace, sparse_mla_union};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, BatchCase, Batches, Pair, TestDevice};
use proptest::prelude::*;
use proptest::sample::select;

use crate::sparse_mla_wide::{UNION_TILE, selections, union_entries};

#[derive(Debug, Clone)]
struct Case {
    batch: BatchCase,
    tile: SparseMlaUnionTile,
    group: usize,
    k: usize,
    seed: u64,
}

/// Contexts of one window and of several.
fn cases(tiles: &'static [SparseMlaUnionTile], size: usize) -> impl Strategy<Value = Case> {
    let batches = Batches { page_sizes: &[1, 3, 16], max_seqs: 4, max_computed: size, max_chunk: 20 }.any();
    (batches, select(tiles), select(vec![2, 4, 8]), 1..=size, any::<u64>())
        .prop_map(|(batch, tile, group, k, seed)| Case { batch, tile, group, k, seed })
}

fn run(device: &TestDevice, case: Case) {
    let Case { batch, tile, group, k, seed } = case;
    let tokens = batch.batch.num_tokens();
    let selections = selections(&batch, k, seed);
    let topk_indices = Pair::index(device, "topk_indices", &[tokens, k], &selections);
    let groups = tokens.div_ceil(group);
    let found = parity::twice(device, || {
        let (_, on_device) = parity::batch(device, &batch.batch);
        let workspace = SparseMlaUnionWorkspace::alloc(device, tokens, k).unwrap();
        sparse_mla_union(device, &tile, &workspace, &on_device, &topk_indices.device, group).unwrap();
        let read = |buffer, places: usize| {
            let mut bytes = vec![0; 4 * places];
            device.read(buffer, 0, &mut bytes).unwrap();
            parity::integers(&bytes)
        };
        let (entries, counts) =
            (read(workspace.entries(), groups * group * k), read(workspace.counts(), groups));
        let unions = entries.chunks(group * k).zip(counts);
        flat(unions.map(|(entries, count)| entries[..count as usize].to_vec()))
    });
    assert_eq!(found, flat(union_entries(&batch, &selections, group, k).into_iter()));
}

/// Each list after its length.
fn flat(unions: impl Iterator<Item = Vec<i32>>) -> Vec<u8> {
    unions
        .flat_map(|union| std::iter::once(union.len() as i32).chain(union))
        .flat_map(i32::to_le_bytes)
        .collect()
}

#[test]
fn unions_are_exact() {
    const SHORT_WINDOW: SparseMlaUnionTile = SparseMlaUnionTile { threads: 32, blocks: 1, window: 128 };
    parity::check("sparse_mla_union", cases(&[UNION_TILE, SHORT_WINDOW], 300), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // The neighbour's bit.
        ("(place % 4 * 8 + t)", "(place % 4 * 8 + (t + 1) % TILE_TOKENS)"),
        // A window's last position is left out.
        ("if (place < WINDOW)", "if (place < WINDOW - 1)"),
        // Tokens of the next sequence join in.
        ("token >= run && token < run_end", "token >= run && token < end"),
        // Counting starts before the window is full.
        (
            "            }\n            __syncthreads();\n\n            const uint32_t* words",
            "            }\n\n            const uint32_t* words",
        ),
    ] {
        let fault = Fault { file: "sparse_mla_union.cu", find, replace };
        parity::catches(
            fault,
            cases(&[SparseMlaUnionTile { threads: 64, blocks: 1, window: 256 }], 300),
            run,
        );
    }
}
