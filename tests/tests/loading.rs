//! Loading at size: a layer of GLM-5.2, a gigabyte with the ends, read by two ranks and compared with the file; and how fast that is.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use dsa80_model::checkpoint::{Checkpoint, Shard};
use dsa80_model::weights::HostMlp;
use dsa80_reference::buffers::{self, HostBlock, HostMemory};
use dsa80_reference::{HostData, HostLinear, HostTensor};
use dsa80_tests::plain_read::plain_read;
use dsa80_tests::skeleton::{Scheme, Skeleton};
use half::bf16;
use safetensors::SafeTensors;

const VOCAB: usize = 8192;
const RANKS: usize = 2;

/// A bf16 tensor of the only shard that has any.
fn stored(dir: &Path, name: &str) -> Vec<u16> {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = std::fs::read(path).unwrap();
            if let Ok(tensor) = SafeTensors::deserialize(&bytes).unwrap().tensor(name) {
                return tensor.data().as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
            }
        }
    }
    panic!("no tensor {name}")
}

fn bits(tensor: &HostTensor) -> Vec<u16> {
    let HostData::Bf16(values) = &tensor.data else { panic!("bf16 was written") };
    values.iter().map(|value| bf16::to_bits(*value)).collect()
}

fn dense(weight: &HostLinear) -> &HostTensor {
    let HostLinear::Dense(tensor) = weight else { panic!("dense layers are not packed") };
    tensor
}

/// As of a backend that copies from any memory and has as much as is asked for.
#[derive(Debug)]
struct Plenty;

struct Words(Vec<u64>, usize);

impl HostMemory for Plenty {
    fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>> {
        Some(Box::new(Words(vec![0; bytes.div_ceil(8)], bytes)))
    }
}

impl HostBlock for Words {
    fn size(&self) -> usize {
        self.1
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.0)[..self.1]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[..self.1]
    }
}

#[test]
fn ranks_read_their_bytes_and_as_fast_as_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let skeleton = Skeleton::new(Scheme::EXPERTS, 1, 8, VOCAB);
    skeleton.save(dir.path(), true).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();

    let prefix = "model.layers.0";
    let o_proj = stored(dir.path(), &format!("{prefix}.self_attn.o_proj.weight"));
    let down = stored(dir.path(), &format!("{prefix}.mlp.down_proj.weight"));
    let embedding = stored(dir.path(), "model.embed_tokens.weight");
    for rank in 0..RANKS {
        let shard = Shard { rank, world_size: RANKS };
        let layer = checkpoint.load_layer(0, shard).unwrap();
        let HostMlp::Dense(mlp) = &layer.mlp else { panic!("layer 0 is dense") };
        for (found, whole) in [(&layer.attention.o_proj, &o_proj), (&mlp.down_proj, &down)] {
            let columns = whole.len() / 6144;
            let part = rank * columns / RANKS..(rank + 1) * columns / RANKS;
            let expected: Vec<u16> =
                whole.chunks(columns).flat_map(|row| row[part.clone()].iter().copied()).collect();
            assert!(bits(dense(found)) == expected, "rank {rank}: {columns} columns");
        }
        let ends = checkpoint.load_ends(shard).unwrap();
        let share = embedding.len() / RANKS;
        assert!(bits(&ends.embed_tokens) == embedding[rank * share..(rank + 1) * share], "rank {rank}");
        let read = checkpoint.bytes_read().total();
        assert_eq!(read, (rank as u64 + 1) * checkpoint.shard_bytes(shard).unwrap());
    }

    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    // The second reading is into the memory of the first.
    let _lending = buffers::lend_from(Arc::new(Plenty));
    let load = || {
        let started = Instant::now();
        let layer = checkpoint.load_layer(0, Shard::WHOLE).unwrap();
        let ends = checkpoint.load_ends(Shard::WHOLE).unwrap();
        let seconds = started.elapsed().as_secs_f64();
        drop((layer, ends));
        seconds
    };
    let plain = (0..3).map(|_| plain_read(dir.path(), threads).unwrap()).fold(f64::INFINITY, f64::min);
    let loaded = (0..3).map(|_| load()).fold(f64::INFINITY, f64::min);
    let bytes = checkpoint.file_bytes() as f64 / 1e9;
    println!(
        "{bytes:.2} GB from the system's cache: a plain read {:.1} GB/s, loaded at {:.1} GB/s",
        bytes / plain,
        bytes / loaded
    );
    // Both are as fast as memory is; what a busy machine may take away of either is not known.
    assert!(plain / loaded > 0.25, "{plain} and {loaded}");
}
