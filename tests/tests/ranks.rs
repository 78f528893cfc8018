//! A rank that fails stops the others with the reason, at load and in the middle of a step: never a hang.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use dsa80_model::checkpoint::{Checkpoint, CheckpointError, Shard};
use dsa80_model::config::ModelConfig;
use dsa80_model::engine::{Step, StepModel};
use dsa80_model::runner::{RankGroup, RankParts, WeightSource};
use dsa80_model::weights::{HostEnds, HostLayer};
use dsa80_reference::cpu::{Cpu, ThreadCommunicator};
use dsa80_reference::{Batch, HostTensor, SequenceSlice};
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
