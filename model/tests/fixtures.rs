//! The checkpoints that HF transformers and compressed-tensors wrote, under `fixtures/`: each opens and
//! loads.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dsa80_model::checkpoint::{Checkpoint, Shard};
use dsa80_model::plan::Plan;

fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let cases = fs::read_dir(root.join("cases")).expect("the repository has fixtures/cases");
    let mut all: Vec<_> = cases.map(|entry| entry.expect("a readable folder").path()).collect();
    all.push(root.join("default"));
    all.sort();
    all
}

/// Every rank at every degree, and what it has read is what was announced.
#[test]
fn open_and_load_at_every_degree() {
    for dir in fixtures() {
        let degrees = Checkpoint::open(&dir).unwrap_or_else(|e| panic!("{e}")).config().valid_tp();
        for world_size in degrees {
            for rank in 0..world_size {
                let checkpoint = Checkpoint::open(&dir).unwrap();
                let shard = Shard { rank, world_size };
                checkpoint.load_ends(shard).unwrap();
                for layer in 0..checkpoint.config().num_hidden_layers {
                    checkpoint.load_layer(layer, shard).unwrap();
                }
                let announced = checkpoint.shard_bytes(shard).unwrap();
                assert_eq!(checkpoint.bytes_read().total(), announced, "{} {shard:?}", dir.display());
            }
            Plan::from_checkpoint(&Checkpoint::open(&dir).unwrap(), world_size).unwrap();
        }
    }
}

/// The server opens the embedded checkpoint at every start.
#[test]
fn the_embedded_checkpoint_opens_at_once() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/trained");
    let start = Instant::now();
    Checkpoint::open(&dir).unwrap();
    // Release builds take a few milliseconds; this one is not optimised and shares its cores with other
    // tests.
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}
