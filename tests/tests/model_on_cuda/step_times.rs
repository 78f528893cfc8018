//! How long steps of two layers of a rank of GLM-5.2 and the ends take; `dsa80 bench step` times a whole rank. By hand, on a GPU: `--ignored --nocapture`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dsa80_cuda::Cuda;
use dsa80_model::engine::{SampleTarget, Step};
use dsa80_model::runner::Rank;
use dsa80_reference::{Batch, DType, HostTensor, Kernels, SamplingParams, SequenceSlice};
use dsa80_tests::glm;
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

/// A decode step of so many sequences that share their pages, each of which draws its next token, or takes the best.
fn decode(sequences: usize, context: usize, temperature: f32) -> Step {
    let pages: Vec<u32> = (0..context.div_ceil(PAGE_SIZE) as u32).collect();
    let tokens: Vec<u32> = (0..sequences as u32).map(|i| i * 7919 % 19360).collect();
    let slice =
        |i: usize| SequenceSlice { token_ids: &tokens[i..=i], computed_len: context - 1, pages: &pages };
    let slices: Vec<_> = (0..sequences).map(slice).collect();
    let params = Arc::new(SamplingParams { temperature, top_p: 0.95, ..SamplingParams::default() });
    let target = |row| SampleTarget {
        row,
        params: Arc::clone(&params),
        prompt: Arc::default(),
        output: Vec::new(),
        banned: Arc::default(),
        position: context as u32,
        forced: None,
        logprobs: None,
    };
    let batch = Batch::new(PAGE_SIZE, &slices).unwrap();
    Step { batch, targets: (0..sequences).map(target).collect() }
}

/// What a decode step takes, each the median of 40.
#[derive(Debug)]
struct Times {
    /// Milliseconds from the step to its tokens.
    step: f64,
    /// Microseconds of the host until all is on its way.
    start: f64,
    /// Microseconds of the host from the end of the device's work to the tokens.
    end: f64,
}

fn times(rank: &mut Rank<Cuda>, step: &Step) -> Times {
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    (0..3).for_each(|_| drop(rank.step(step).unwrap()));
    let timed = |_| {
        let started = Instant::now();
        rank.step(step).unwrap();
        started.elapsed().as_secs_f64() * 1e3
    };
    let steps = (0..40).map(timed).collect();
    let (mut starts, mut ends) = (Vec::new(), Vec::new());
    for _ in 0..40 {
        // Time enough for the device to end before it is waited for.
        let (started, mut started_by, mut ended) = (Instant::now(), Duration::ZERO, Instant::now());
        rank.step_while(step, &mut || {
            started_by = started.elapsed();
            std::thread::sleep(Duration::from_millis(3));
            ended = Instant::now();
        })
        .unwrap();
        starts.push(started_by.as_secs_f64() * 1e6);
        ends.push(ended.elapsed().as_secs_f64() * 1e6);
    }
    Times { step: median(steps), start: median(starts), end: median(ends) }
}

/// The host's part of a replayed step of 32 streams, in microseconds: a goal of the project.
const HOST_OF_32: f64 = 200.0;

#[test]
#[ignore = "a measurement, for a GPU"]
fn steps_of_a_shard_of_glm() {
    if devices::gpu().is_none() {
        return;
    }
    // Longer than the contexts, as the buckets of a server are.
    let mut limits = prompt::limits(2 * CONTEXT, PAGE_SIZE, 19360);
    limits.max_batch_seqs = 64;
    let started = Instant::now();
    let mut rank =
        judge::load_weights(Cuda::open().unwrap(), &glm::shard(256, 2048, 19360), &limits).unwrap();
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

    let sizes = [1, 2, 8, 13, 16, 32, 64];
    let eager = sizes.map(|sequences| times(&mut rank, &decode(sequences, CONTEXT, 0.8)));
    let free = || devices::free_memory().unwrap_or_default();
    let (before, started) = (free(), Instant::now());
    let graphs = rank.record_graphs(&limits).unwrap();
    let (after, elapsed) = (free(), started.elapsed().as_secs_f64());
    let mib = before.saturating_sub(after) >> 20;
    println!("{graphs} graphs recorded in {elapsed:.2} s, {mib} MiB together");
    println!("sequences  launched ms  replayed ms  the same, greedy  host: start us  end us");
    for (sequences, eager) in sizes.into_iter().zip(eager) {
        let replayed = times(&mut rank, &decode(sequences, CONTEXT, 0.8));
        let greedy = times(&mut rank, &decode(sequences, CONTEXT, 0.0));
        println!(
            "{sequences:>9}  {:>11.3}  {:>11.3}  {:>16.3}  {:>14.0}  {:>6.0}",
            eager.step, replayed.step, greedy.step, replayed.start, replayed.end
        );
        let host = replayed.start + replayed.end;
        assert!(sequences > 32 || host < HOST_OF_32, "{host:.0} us of the host for {sequences} sequences");
    }
}

/// What a graph's launches take of a GPU's memory.
#[test]
#[ignore = "a measurement, for a GPU"]
fn memory_of_graphs() {
    const LAUNCHES: usize = 2000;
    const GRAPHS: usize = 40;
    if devices::gpu().is_none() {
        return;
    }
    let cuda = Cuda::open().unwrap();
    let weight = cuda.upload(HostTensor::f32([16, 32], vec![1.0; 16 * 32])).unwrap();
    let x = cuda.alloc(DType::Act, &[4, 32]).unwrap();
    let mut out = cuda.alloc(DType::Float, &[4, 16]).unwrap();
    let mut record =
        || cuda.record(|| (0..LAUNCHES).try_for_each(|_| cuda.linear(&x, &weight, &mut out))).unwrap();
    let _first = record();
    let (before, started) = (cuda.device().memory().unwrap().0, Instant::now());
    let graphs: Vec<_> = (0..GRAPHS).map(|_| record()).collect();
    let (after, elapsed) = (cuda.device().memory().unwrap().0, started.elapsed().as_secs_f64());
    let launches = graphs.len() * LAUNCHES;
    println!(
        "{} graphs of {LAUNCHES} launches: {} bytes a launch, recorded at {:.1} us a launch",
        graphs.len(),
        before.saturating_sub(after) / launches,
        elapsed * 1e6 / launches as f64,
    );
}
