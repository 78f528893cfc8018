//! How long steps of GLM-5.2 take: two layers of a rank and the ends, and a whole rank. By hand, on a GPU: `--ignored --nocapture`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dsa80_cuda::Cuda;
use dsa80_model::dummy::DummyWeights;
use dsa80_model::engine::{SampleTarget, Step, StepLimits};
use dsa80_model::runner::{INDEX_LOGITS, Rank};
use dsa80_reference::{Batch, DType, HostTensor, Kernels, LoneRank, SamplingParams, SequenceSlice};
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

/// A decode step of so many sequences that share their pages.
fn decode(sequences: usize, context: usize, temperature: f32) -> Step {
    decode_on(&vec![(0..context.div_ceil(PAGE_SIZE) as u32).collect(); sequences], context, temperature)
}

/// A decode step of sequences on these pages, each of which draws its next token, or takes the best.
fn decode_on(pages: &[Vec<u32>], context: usize, temperature: f32) -> Step {
    let sequences = pages.len();
    let tokens: Vec<u32> = (0..sequences as u32).map(|i| i * 7919 % 19360).collect();
    let slice =
        |i: usize| SequenceSlice { token_ids: &tokens[i..=i], computed_len: context - 1, pages: &pages[i] };
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

/// One rank of eight of GLM-5.2 in full, with random weights; what other ranks would add is left out. Every sequence has pages of its own.
#[test]
#[ignore = "a measurement, for a GPU of 80 GB"]
fn steps_of_a_rank_of_eight() {
    const SEQUENCES: usize = 32;
    const CONTEXT_OF_MANY: usize = 5632;
    const CONTEXT_OF_ONE: usize = 8192;
    const CHUNK: usize = 2048;
    if devices::gpu().is_none() {
        return;
    }
    let config = glm::whole();
    let limits = StepLimits {
        page_size: PAGE_SIZE,
        num_pages: SEQUENCES * CONTEXT_OF_MANY / PAGE_SIZE,
        cache_dtype: DType::Act,
        max_batch_tokens: CHUNK,
        max_batch_seqs: SEQUENCES,
        max_model_len: CONTEXT_OF_ONE,
        vocab_size: config.vocab_size,
        max_logprobs: 20,
    };
    let (lone, weights) = (Box::new(LoneRank::new(0, 8).unwrap()), DummyWeights::new(config, 0));
    let mut rank = Rank::load(Cuda::open().unwrap(), lone, &weights, &limits, INDEX_LOGITS).unwrap();
    let pages_of = |sequence: usize, context: usize| -> Vec<u32> {
        let first = sequence * CONTEXT_OF_MANY / PAGE_SIZE;
        (first..first + context / PAGE_SIZE).map(|page| page as u32).collect()
    };

    let tokens: Vec<u32> = (0..CONTEXT_OF_ONE).map(|i| (i * 7919 % 19360) as u32).collect();
    let chunk = |rank: &mut Rank<Cuda>, sequence: usize, start: usize, end: usize| {
        let pages = pages_of(sequence, end.next_multiple_of(PAGE_SIZE));
        let slice = SequenceSlice { token_ids: &tokens[start..end], computed_len: start, pages: &pages };
        rank.forward(&Batch::new(PAGE_SIZE, &[slice]).unwrap(), None).unwrap();
    };
    for sequence in 0..SEQUENCES {
        for start in (0..CONTEXT_OF_MANY).step_by(CHUNK) {
            chunk(&mut rank, sequence, start, CONTEXT_OF_MANY.min(start + CHUNK));
        }
    }
    let start = CONTEXT_OF_ONE - CHUNK;
    for _ in 0..3 {
        rank.kernels().device().synchronize().unwrap();
        let started = Instant::now();
        chunk(&mut rank, 0, start, CONTEXT_OF_ONE);
        rank.kernels().device().synchronize().unwrap();
        let ms = started.elapsed().as_secs_f64() * 1e3;
        println!("{CHUNK} new tokens after {start}: {ms:.1} ms, {:.0} tokens/s", CHUNK as f64 / ms * 1e3);
    }
    let graphs = rank.record_graphs(&limits).unwrap();
    println!("{graphs} graphs");
    for (sequences, context) in [(1, CONTEXT_OF_ONE), (8, CONTEXT_OF_MANY), (32, CONTEXT_OF_MANY)] {
        let pages: Vec<_> = (0..sequences).map(|sequence| pages_of(sequence, context)).collect();
        // Greedy: logits of other ranks are not there, and a draw among what happens to stand in their place says nothing.
        let Times { step, start, .. } = times(&mut rank, &decode_on(&pages, context, 0.0));
        println!(
            "{sequences:>2} sequences, context {context}: {step:.3} ms a step, the first {start:.0} us the host's"
        );
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
