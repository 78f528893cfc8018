//! How long a step of a shard of GLM-5.2 takes: two layers and the ends. By hand, on a GPU: `--ignored --nocapture`.

use std::time::Instant;

use dsa80_cuda::Cuda;
use dsa80_model::runner::Rank;
use dsa80_reference::{Batch, SequenceSlice};
use dsa80_tests::glm::GlmShard;
use dsa80_tests::parity::devices;
use dsa80_tests::{judge, prompt};

const CONTEXT: usize = 4096;
const PAGE_SIZE: usize = 64;

/// Milliseconds from the batch to the hidden states, the best of a few: launches, waiting for the last, and all that the host does between.
fn milliseconds(rank: &mut Rank<Cuda>, sequences: usize, tokens: usize) -> f64 {
    let pages: Vec<u32> = (0..CONTEXT.div_ceil(PAGE_SIZE) as u32).collect();
    let token_ids: Vec<u32> = (0..tokens).map(|i| (i * 7919 % 19360) as u32).collect();
    let slice = SequenceSlice { token_ids: &token_ids, computed_len: CONTEXT - tokens, pages: &pages };
    let batch = Batch::new(PAGE_SIZE, &vec![slice; sequences]).unwrap();
    let step = |rank: &mut Rank<Cuda>| {
        let started = Instant::now();
        rank.forward(&batch, None).unwrap();
        // Waits for the device.
        rank.logits(&[0]).unwrap();
        started.elapsed().as_secs_f64() * 1e3
    };
    step(rank);
    (0..20).map(|_| step(rank)).fold(f64::INFINITY, f64::min)
}

#[test]
#[ignore = "a measurement, for a GPU"]
fn steps_of_a_shard_of_glm() {
    if devices::gpu().is_none() {
        return;
    }
    let mut limits = prompt::limits(CONTEXT, PAGE_SIZE, 19360);
    limits.max_batch_seqs = 64;
    let started = Instant::now();
    let mut rank =
        judge::load_weights(Cuda::open().unwrap(), &GlmShard::new(256, 2048, 19360), &limits).unwrap();
    println!("loaded in {:.1} s", started.elapsed().as_secs_f64());
    for start in (0..CONTEXT).step_by(2048) {
        let pages: Vec<u32> = (0..CONTEXT.div_ceil(PAGE_SIZE) as u32).collect();
        let token_ids: Vec<u32> = (start..start + 2048).map(|i| (i * 31 % 19360) as u32).collect();
        let slice = SequenceSlice { token_ids: &token_ids, computed_len: start, pages: &pages };
        rank.forward(&Batch::new(PAGE_SIZE, &[slice]).unwrap(), None).unwrap();
    }
    for (sequences, tokens) in [(1, 1), (8, 1), (32, 1), (64, 1), (1, 512), (1, 2048)] {
        let milliseconds = milliseconds(&mut rank, sequences, tokens);
        println!(
            "{sequences:>2} sequences of {tokens:>4} new tokens, context {CONTEXT}: {milliseconds:.2} ms"
        );
    }
}
