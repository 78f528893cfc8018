//! Decode steps that are replayed from graphs: bit for bit what the same kernels compute when they are launched one by one.

use std::sync::Arc;
use std::time::Duration;

use dsa80_cuda::{Cuda, CudaTensor};
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::engine::{Engine, EngineOptions, Request, SampleTarget, Sampled, Step, StepLimits};
use dsa80_model::runner::{INDEX_LOGITS, Rank, RankGroup, RankParts, WeightSource};
use dsa80_reference::communicator::SingleRank;
use dsa80_reference::cpu::Cpu;
use dsa80_reference::{Batch, Communicator, Error, Kernels, Result, SamplingParams, SequenceSlice};
use dsa80_tests::engine::{Answer, collect};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge::{self, BF16_BOUND_OF_ONE_PROMPT, Bf16Distance};
use dsa80_tests::parity::TestDevice;
use dsa80_tests::prompt::{self, Run};

use super::{emulated, every_fixture_on_a_gpu, on_gpu};

const PAGE_SIZE: usize = 16;

fn fixture() -> Fixture {
    Fixture::open(fixture::root().join("cases/int4_channel")).unwrap()
}

/// Both ranks of a comparison: one that replays, one that launches.
struct Both {
    replaying: Rank<Cuda<TestDevice>>,
    eager: Rank<Cuda<TestDevice>>,
    limits: StepLimits,
}

impl Both {
    fn new(device: impl Fn() -> Option<Cuda<TestDevice>>, fixture: &Fixture) -> Option<Self> {
        let limits = judge::limits(fixture, PAGE_SIZE);
        let load = || Some(judge::load(device()?, fixture, PAGE_SIZE).unwrap());
        let (mut replaying, eager) = (load()?, load()?);
        // 1, 2 and 4 sequences; contexts that the indexer selects whole, and longer ones.
        assert!(replaying.record_graphs(&limits).unwrap() >= 6, "too few graphs");
        Some(Self { replaying, eager, limits })
    }
}

/// A sequence of the prompt's tokens that stands at `computed`, and what it asks for.
#[derive(Clone)]
pub(super) struct Sequence {
    pub(super) computed: usize,
    pub(super) pages: Vec<u32>,
    pub(super) target: SampleTarget,
}

fn slices<'a>(sequences: &'a [Sequence], tokens: &'a [u32]) -> Vec<SequenceSlice<'a>> {
    let slice = |sequence: &'a Sequence| SequenceSlice {
        token_ids: &tokens[sequence.computed..=sequence.computed],
        computed_len: sequence.computed,
        pages: &sequence.pages,
    };
    sequences.iter().map(slice).collect()
}

pub(super) fn step(sequences: &[Sequence], tokens: &[u32]) -> Step {
    let batch = Batch::new(PAGE_SIZE, &slices(sequences, tokens)).unwrap();
    let target = |(row, sequence): (usize, &Sequence)| SampleTarget { row, ..sequence.target.clone() };
    Step { batch, targets: sequences.iter().enumerate().map(target).collect() }
}

pub(super) fn target(params: SamplingParams) -> SampleTarget {
    SampleTarget {
        row: 0,
        params: Arc::new(params),
        prompt: Arc::from([3, 5, 8]),
        output: vec![5, 13],
        banned: Arc::from([21]),
        position: 9,
        forced: None,
        logprobs: None,
    }
}

/// Greedy; with everything at once; scored.
fn targets() -> [SampleTarget; 3] {
    let greedy = target(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
    let drawn = target(SamplingParams {
        top_k: 40,
        top_p: 0.9,
        min_p: 0.01,
        repetition_penalty: 1.3,
        frequency_penalty: 0.5,
        logit_bias: vec![(7, 2.0)],
        seed: 11,
        ..SamplingParams::default()
    });
    let scored = SampleTarget { forced: Some(2), logprobs: Some(0), ..target(SamplingParams::default()) };
    [greedy, drawn, scored]
}

/// Steps of one to three sequences, each of which grows on, past the number of positions that the indexer selects.
fn compare(device: impl Fn() -> Option<Cuda<TestDevice>>) {
    let fixture = fixture();
    let Some(Both { mut replaying, mut eager, limits }) = Both::new(device, &fixture) else { return };
    let tokens = &fixture.tokens;
    let mut sequences: Vec<Sequence> = [20, 45, 9]
        .into_iter()
        .zip(targets())
        .enumerate()
        .map(|(i, (computed, target))| Sequence {
            computed,
            pages: prompt::scattered_pages(&limits, i),
            target,
        })
        .collect();
    for Sequence { computed, pages, .. } in &sequences {
        let slice = SequenceSlice { token_ids: &tokens[..*computed], computed_len: 0, pages };
        let prompt = Batch::new(PAGE_SIZE, &[slice]).unwrap();
        replaying.forward(&prompt, None).unwrap();
        eager.forward(&prompt, None).unwrap();
    }
    for (round, count) in [1, 3, 2, 3, 3, 1, 2].into_iter().enumerate() {
        let taking_part = &sequences[..count];
        let replayed = replaying.step(&step(taking_part, tokens)).unwrap();
        // Three are rounded up to four by the one with the shortest context, which writes its cache rows twice here: the same ones.
        let mut padded = taking_part.to_vec();
        if count == 3 {
            padded.push(taking_part.iter().min_by_key(|sequence| sequence.computed).unwrap().clone());
        }
        let mut expected = eager.step(&step(&padded, tokens)).unwrap();
        expected.truncate(count);
        assert_eq!(replayed, expected, "round {round}");
        let rows: Vec<usize> = (0..count).collect();
        assert_eq!(replaying.logits(&rows).unwrap(), eager.logits(&rows).unwrap(), "round {round}");
        // Once more with alternatives, which are reported beside the same tokens.
        let mut scored = step(taking_part, tokens);
        scored.targets.iter_mut().for_each(|target| target.logprobs = Some(3));
        let scored = replaying.step(&scored).unwrap();
        let ids = |sampled: &[Sampled]| sampled.iter().map(|sampled| sampled.token).collect::<Vec<_>>();
        assert_eq!(ids(&scored), ids(&replayed), "round {round}");
        assert!(
            scored
                .iter()
                .all(|sampled| sampled.logprobs.as_ref().is_some_and(|logprobs| logprobs.top.len() == 3))
        );
        sequences[..count].iter_mut().for_each(|sequence| sequence.computed += 1);
    }
}

#[test]
fn a_replayed_step_is_the_eager_one_bit_for_bit() {
    compare(emulated);
    compare(on_gpu);
}

/// The prompt token by token, each a replayed step.
fn by_replay(cuda: Cuda<TestDevice>, fixture: &Fixture, len: usize) -> Run {
    let limits = judge::limits(fixture, PAGE_SIZE);
    let mut rank = judge::load(cuda, fixture, PAGE_SIZE).unwrap();
    let mut one = limits;
    one.max_batch_seqs = 1;
    rank.record_graphs(&one).unwrap();
    let mut sequence = Sequence {
        computed: 0,
        pages: prompt::scattered_pages(&limits, 2),
        target: target(SamplingParams::default()),
    };
    let mut run = Run::default();
    for computed in 0..len {
        sequence.computed = computed;
        rank.step(&step(std::slice::from_ref(&sequence), &fixture.tokens)).unwrap();
        run.logits.extend(rank.logits(&[0]).unwrap());
    }
    run
}

#[test]
fn a_prompt_by_replayed_steps_is_about_as_far_from_hf_as_hf_in_bf16() {
    if let Some(cuda) = emulated() {
        let fixture = fixture();
        let run = by_replay(cuda, &fixture, fixture.tokens.len());
        let distance = Bf16Distance::of(&fixture, "replayed", &run);
        distance.assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, "replayed");
    }
    every_fixture_on_a_gpu(|cuda, fixture| {
        let run = by_replay(cuda, fixture, fixture.tokens.len());
        let distance = Bf16Distance::of(fixture, "replayed", &run);
        distance.assert_within(BF16_BOUND_OF_ONE_PROMPT, &fixture.name, "replayed");
    });
}

/// One request, alone: as many sequences as there are in its bucket.
fn answer(cuda: Cuda<TestDevice>, fixture: &Fixture, graphs: bool) -> Answer {
    let weights: Arc<dyn WeightSource> = Arc::new(Checkpoint::open(&fixture.dir).unwrap());
    let parts = RankParts { kernels: cuda, communicator: Box::new(SingleRank::default()) };
    let limits = StepLimits { max_batch_seqs: 2, ..judge::limits(fixture, PAGE_SIZE) };
    let mut group = RankGroup::load(vec![parts], &weights, limits).unwrap();
    assert!(!graphs || group.record_graphs().unwrap() > 0);
    let engine = Engine::start(Box::new(group), EngineOptions::default());
    let request = Request {
        prompt: fixture.tokens[..28].to_vec(),
        sampling: SamplingParams { top_p: 0.9, presence_penalty: 0.5, seed: 3, ..SamplingParams::default() },
        max_tokens: 8,
        ignore_eos: true,
        logprobs: Some(0),
        ..Request::default()
    };
    let answer = collect(engine.submit(request).unwrap()).unwrap();
    engine.shutdown(Duration::ZERO);
    answer
}

#[test]
fn an_engine_answers_the_same_with_graphs_and_without() {
    let fixture = fixture();
    for device in [emulated, on_gpu] {
        let (Some(with), Some(without)) = (device(), device()) else { continue };
        let (with, without) = (answer(with, &fixture, true), answer(without, &fixture, false));
        assert_eq!(with, without);
        assert_eq!((with.tokens.len(), with.failure), (8, None));
    }
}

#[test]
fn a_backend_without_graphs_records_none() {
    let fixture = fixture();
    let mut rank = judge::load(Cpu::<f32>::new(), &fixture, PAGE_SIZE).unwrap();
    assert_eq!(rank.record_graphs(&judge::limits(&fixture, PAGE_SIZE)).unwrap(), 0);
}

/// A group of two in which nobody answers.
#[derive(Debug)]
struct Deaf;

impl<T> Communicator<T> for Deaf {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        2
    }

    fn all_reduce(&self, _tensor: &mut T) -> Result<()> {
        Err(Error::Communicator { rank: 0, world_size: 2, reason: "nobody answers".into() })
    }

    fn all_gather(&self, _shard: &T, _out: &mut T) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _tensor: &mut T, _root: usize) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn abort(&self, _reason: &str) {}
}

#[test]
fn a_step_that_cannot_be_recorded_says_which_and_what_to_do() {
    let Some(cuda) = emulated() else { return };
    let fixture = Fixture::open(fixture::root().join("cases/int4_asym_g32_tp8")).unwrap();
    let checkpoint = Checkpoint::open(&fixture.dir).unwrap();
    let limits = judge::limits(&fixture, PAGE_SIZE);
    let communicator: Box<dyn Communicator<CudaTensor<TestDevice>>> = Box::new(Deaf);
    let mut rank = Rank::load(cuda, communicator, &checkpoint, &limits, INDEX_LOGITS).unwrap();
    let error = rank.record_graphs(&limits).unwrap_err().to_string();
    let longest = limits.max_model_len;
    for words in [
        &format!("a decode step of 4 sequences with contexts up to {longest} tokens"),
        "nobody answers",
        "--cuda-graphs off",
    ] {
        assert!(error.contains(words), "{error}");
    }
}

/// What allocates or waits is no launch.
#[test]
fn what_cannot_be_recorded_is_refused() {
    let Some(cuda) = emulated() else { return };
    let mut tensor = cuda.alloc(dsa80_reference::DType::Float, &[1]).unwrap();
    let calls = std::cell::Cell::new(0);
    let again = || calls.replace(calls.get() + 1) > 0;
    let error =
        cuda.record(|| if again() { cuda.read(&tensor).map(drop) } else { Ok(()) }).unwrap_err().to_string();
    assert!(error.contains("cannot be read while launches are captured"), "{error}");
    calls.set(0);
    let error = cuda
        .record(|| if again() { cuda.write(&[1.0], &mut tensor) } else { Ok(()) })
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot be written while launches are captured"), "{error}");
    // The device is none the worse for it.
    cuda.write(&[2.0], &mut tensor).unwrap();
    assert_eq!(cuda.read(&tensor).unwrap(), [2.0]);
}
