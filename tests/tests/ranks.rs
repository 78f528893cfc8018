//! A rank that fails stops the others with the reason, at load and in the middle of a step: never a hang.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use dsa80_model::checkpoint::{Checkpoint, CheckpointError, Shard};
use dsa80_model::config::ModelConfig;
use dsa80_model::engine::{Engine, EngineOptions, Event, Request, Step, StepModel};
use dsa80_model::runner::{RankGroup, RankParts, WeightSource};
use dsa80_model::weights::{HostEnds, HostLayer};
use dsa80_reference::cpu::{Cpu, CpuTensor, ThreadCommunicator};
use dsa80_reference::{Batch, Breaker, Communicator, HostTensor, Result, SequenceSlice};
use dsa80_tests::{fixture, prompt};

/// A checkpoint of which one rank gets something wrong.
struct Faulty {
    checkpoint: Checkpoint,
    rank: usize,
    fault: Fault,
}

#[derive(Clone, Copy)]
enum Fault {
    /// Layer 1 cannot be read.
    Load,
    /// The norm of layer 1 has a length that its kernel refuses.
    Step,
    /// Reading layer 1 panics.
    Panic,
}

impl WeightSource for Faulty {
    fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    fn load_layer(&self, layer: usize, shard: Shard) -> Result<HostLayer, CheckpointError> {
        let mut weights = self.checkpoint.load_layer(layer, shard)?;
        if (layer, shard.rank) == (1, self.rank) {
            match self.fault {
                Fault::Load => {
                    return Err(CheckpointError::OutOfRange { what: "layer", found: layer, limit: 1 });
                }
                Fault::Step => weights.input_layernorm = HostTensor::f32([3], vec![1.0; 3]),
                Fault::Panic => panic!("planted"),
            }
        }
        Ok(weights)
    }

    fn load_ends(&self, shard: Shard) -> Result<HostEnds, CheckpointError> {
        self.checkpoint.load_ends(shard)
    }
}

/// Loads four ranks and makes a step; returns the first error.
fn first_error(rank: usize, fault: Fault) -> String {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let checkpoint = Checkpoint::open(&fixture::root().join("cases/int4_asym_g32_tp8")).unwrap();
        let limits = prompt::limits(8, 4, checkpoint.config().vocab_size);
        let weights: Arc<dyn WeightSource> = Arc::new(Faulty { checkpoint, rank, fault });
        let ranks = ThreadCommunicator::group(Cpu::<f32>::new(), 4)
            .into_iter()
            .map(|rank| RankParts { kernels: Cpu::new(), communicator: Box::new(rank) })
            .collect();
        let error = match RankGroup::load(ranks, &weights, limits) {
            Err(error) => error.to_string(),
            Ok(mut group) => {
                // The CPU has none, and every rank says so.
                assert_eq!(group.record_graphs().unwrap(), 0);
                let slice = SequenceSlice { token_ids: &[1, 2, 3], computed_len: 0, pages: &[0] };
                let step = Step { batch: Batch::new(4, &[slice]).unwrap(), targets: Vec::new() };
                group.step(Arc::new(step)).unwrap_err().to_string()
            }
        };
        sender.send(error).unwrap();
    });
    receiver.recv_timeout(Duration::from_secs(30)).expect("the ranks hang")
}

#[test]
fn a_rank_that_cannot_load_ends_the_launch_with_its_own_reason() {
    for rank in [0, 3] {
        let error = first_error(rank, Fault::Load);
        let expected = CheckpointError::OutOfRange { what: "layer", found: 1, limit: 1 }.to_string();
        assert_eq!(error, expected);
    }
}

#[test]
fn a_rank_that_panics_while_loading_is_named() {
    let error = first_error(2, Fault::Panic);
    assert!(error.contains("rank 2 of 4 ended while loading"), "{error}");
}

#[test]
fn a_rank_that_fails_in_a_step_ends_the_step_with_its_own_reason() {
    for rank in [0, 1, 3] {
        let error = first_error(rank, Fault::Step);
        assert!(error.contains(&format!("rank {rank}: rms_norm")), "{error}");
    }
}

/// A rank that falls asleep in a step.
struct Sleepy {
    inner: ThreadCommunicator<f32>,
    /// Before the first collective of the step, or after the last.
    before: bool,
    sleep: Duration,
}

impl Communicator<CpuTensor<f32>> for Sleepy {
    fn rank(&self) -> usize {
        Communicator::rank(&self.inner)
    }

    fn world_size(&self) -> usize {
        Communicator::world_size(&self.inner)
    }

    fn all_reduce(&self, tensor: &mut CpuTensor<f32>) -> Result<()> {
        if self.before {
            std::thread::sleep(self.sleep);
        }
        self.inner.all_reduce(tensor)
    }

    fn all_gather(&self, shard: &CpuTensor<f32>, out: &mut CpuTensor<f32>) -> Result<()> {
        let gathered = self.inner.all_gather(shard, out);
        if !self.before {
            std::thread::sleep(self.sleep);
        }
        gathered
    }

    fn all_gather_each(&self, shards: &[&CpuTensor<f32>], outs: &mut [&mut CpuTensor<f32>]) -> Result<()> {
        self.inner.all_gather_each(shards, outs)
    }

    fn broadcast(&self, tensor: &mut CpuTensor<f32>, root: usize) -> Result<()> {
        self.inner.broadcast(tensor, root)
    }

    fn barrier(&self) -> Result<()> {
        self.inner.barrier()
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }

    fn breaker(&self) -> Option<Breaker> {
        self.inner.breaker()
    }
}

/// How a request ends when rank 1 of two sleeps for longer than a step may take, and how long that took.
fn slept(before: bool) -> (Option<Event>, Duration) {
    let checkpoint = Checkpoint::open(&fixture::root().join("cases/int4_asym_g32_tp8")).unwrap();
    let limits = prompt::limits(8, 4, checkpoint.config().vocab_size);
    let weights: Arc<dyn WeightSource> = Arc::new(checkpoint);
    let ranks = ThreadCommunicator::group(Cpu::<f32>::new(), 2).into_iter().map(|inner| {
        let sleep = Duration::from_secs(60 * Communicator::rank(&inner) as u64);
        RankParts { kernels: Cpu::new(), communicator: Box::new(Sleepy { inner, before, sleep }) as _ }
    });
    let mut group = RankGroup::load(ranks.collect(), &weights, limits).unwrap();
    let step_timeout = Duration::from_secs(1);
    group.set_step_timeout(step_timeout);
    let engine = Engine::start(Box::new(group), EngineOptions { step_timeout, ..EngineOptions::default() });
    let started = std::time::Instant::now();
    let request = Request { prompt: vec![1, 2, 3], max_tokens: 4, ..Request::default() };
    let mut events = engine.submit(request).unwrap();
    let last = std::iter::from_fn(|| events.next_blocking()).last();
    engine.shutdown(Duration::ZERO);
    assert!(engine.failure().is_some());
    (last, started.elapsed())
}

#[test]
fn a_rank_that_sleeps_past_the_deadline_is_named_and_not_waited_for() {
    let (ended, took) = slept(true);
    let Some(Event::Failed(reason)) = ended else { panic!("{ended:?}") };
    assert!(reason.contains("a step has not finished within 1s (--step-timeout)"), "{reason}");
    assert!(reason.contains("rank 1 has not come to a collective"), "{reason}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    // Rank 0 is through with its own part.
    let (ended, took) = slept(false);
    let Some(Event::Failed(reason)) = ended else { panic!("{ended:?}") };
    assert!(reason.contains("rank 1 of 2 has not finished a step within 1s after rank 0"), "{reason}");
    assert!(took < Duration::from_secs(20), "{took:?}");
}
