//! Checkpoints that were truncated, flipped or forged: opening one never panics, never allocates more than
//! its files justify, and always says which file is wrong.

#[path = "../../model/tests/support/mod.rs"]
mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use allocation_counter::measure;
use dsa80_model::checkpoint::{Checkpoint, Shard};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use support::{Format, Tiny, Written};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

/// Parsed headers and configs are larger than their text, a name in a map more than a name in a file: heap
/// per byte of file, and what any attempt costs (path names, the message of an error). A size that a header
/// merely *claims* is far beyond both.
const HEAP_PER_FILE_BYTE: u64 = 12;
const HEAP_AT_LEAST: u64 = 32 << 10;

/// One layer, as few tensors as a model can have.
fn small(format: Format) -> Written {
    Tiny {
        heads: 2,
        hidden: 8,
        q_lora: 8,
        v_head: 4,
        intermediate: 16,
        moe_intermediate: 8,
        experts: 1,
        shared_experts: 0,
        layers: vec![(true, true)],
        ..Tiny::new(format)
    }
    .write()
}

fn dense() -> Written {
    small(Format::Dense(Dtype::BF16))
}

fn packed() -> Written {
    let mut written =
        small(Format::CompressedTensors { group_size: Some(8), symmetric: false, scale: Dtype::BF16 });
    // Exact names: without optimisation a pattern takes longer to compile than everything else together.
    let names = json!(["lm_head", "model.layers.0.self_attn.indexer.weights_proj"]);
    written.config["quantization_config"]["ignore"] = names;
    written
}

/// A checkpoint in a folder of its own.
struct Folder(TempDir);

impl Folder {
    fn new(written: &Written) -> Self {
        let folder = Self(tempfile::tempdir().expect("a temporary folder"));
        written.save(folder.0.path());
        folder
    }

    fn sharded(written: &Written) -> Self {
        let folder = Self(tempfile::tempdir().expect("a temporary folder"));
        written.save_sharded(folder.0.path(), 2);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn writable(&self, name: &str) -> File {
        OpenOptions::new().write(true).open(self.path(name)).expect("a file of the checkpoint")
    }

    /// Opens what is there, and loads it if it opens. `Err` is the message, which has been seen to name a
    /// file.
    fn probe(&self) -> Result<(), String> {
        let dir = self.0.path();
        let mut result = Ok(());
        let heap = measure(|| result = open_and_load(dir));
        let files = fs::read_dir(dir).expect("the folder").map(|file| file.and_then(|f| f.metadata()));
        let bytes: u64 = files.map(|meta| meta.expect("a readable file").len()).sum();
        let limit = HEAP_AT_LEAST + HEAP_PER_FILE_BYTE * bytes;
        assert!(
            heap.bytes_max <= limit,
            "{} bytes of heap for {bytes} bytes of files: {result:?}",
            heap.bytes_max
        );
        if let Err(message) = &result {
            let named = format!("{}/", dir.display());
            assert!(message.starts_with(&named), "which file? {message}");
        }
        result
    }
}

fn open_and_load(dir: &Path) -> Result<(), String> {
    let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
    // What opens can be loaded, on any rank.
    let world_size = checkpoint.config().valid_tp().pop().unwrap_or(1);
    for shard in [Shard::WHOLE, Shard { rank: world_size - 1, world_size }] {
        checkpoint.load_ends(shard).map_err(|e| format!("it opened, but: {e}"))?;
        for layer in 0..checkpoint.config().num_hidden_layers {
            checkpoint.load_layer(layer, shard).map_err(|e| format!("it opened, but: {e}"))?;
        }
    }
    Ok(())
}

/// A weights file: header and data.
fn split(file: &[u8]) -> (&str, &[u8]) {
    let (length, rest) = file.split_first_chunk().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (std::str::from_utf8(header).expect("JSON"), data)
}

fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// What opens here must also open for the `safetensors` crate: this loader is never the more lenient one.
fn judge_weights(folder: &Folder, file: &[u8]) {
    fs::write(folder.path(WEIGHTS), file).expect("a writable folder");
    match folder.probe() {
        Ok(()) => assert!(SafeTensors::deserialize(file).is_ok(), "safetensors refuses what was loaded"),
        Err(message) => assert!(message.contains(WEIGHTS) || message.contains(CONFIG), "{message}"),
    }
}

#[test]
fn truncated_at_every_length() {
    for written in [dense(), packed()] {
        let folder = Folder::new(&written);
        folder.probe().unwrap();
        for name in [WEIGHTS, CONFIG] {
            let sound = fs::read(folder.path(name)).unwrap();
            let file = folder.writable(name);
            for length in (0..sound.len() as u64).rev() {
                file.set_len(length).unwrap();
                let message = folder.probe().unwrap_err();
                assert!(message.contains(&format!("/{name}: ")), "{name} cut to {length} bytes: {message}");
            }
            fs::write(folder.path(name), sound).unwrap();
        }
    }
}

#[test]
fn a_truncated_index_or_shard() {
    let folder = Folder::sharded(&dense());
    folder.probe().unwrap();
    for name in [INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let sound = fs::read(folder.path(name)).unwrap();
        let file = folder.writable(name);
        for length in (0..sound.len() as u64).rev() {
            file.set_len(length).unwrap();
            let message = folder.probe().unwrap_err();
            assert!(message.contains(&format!("/{name}: ")), "{name} cut to {length} bytes: {message}");
        }
        fs::write(folder.path(name), sound).unwrap();
    }
}

/// Every bit of the length and of the header, and of the data as far as the loader reads meaning into it.
#[test]
fn every_bit_flipped_in_the_weights() {
    flip(&Folder::new(&dense()), WEIGHTS, 8);
}

/// Every byte of the other files has a bit flipped, each time another one: some flips make another sound
/// checkpoint (an epsilon, a field that nothing reads).
#[test]
fn every_byte_spoiled_elsewhere() {
    flip(&Folder::new(&packed()), WEIGHTS, 1);
    let folder = Folder::sharded(&packed());
    flip(&folder, CONFIG, 1);
    flip(&folder, INDEX, 1);
}

fn flip(folder: &Folder, name: &str, bits: usize) {
    let sound = fs::read(folder.path(name)).expect("it has just been written");
    let until = match name {
        // Integers come first in the data: `weight_shape` lies right behind the header.
        WEIGHTS => (8 + split(&sound).0.len() + 256).min(sound.len()),
        _ => sound.len(),
    };
    let mut file = folder.writable(name);
    let mut put = |at: usize, byte: u8| {
        file.seek(SeekFrom::Start(at as u64)).expect("a place inside the file");
        file.write_all(&[byte]).expect("a writable file");
    };
    for (at, byte) in sound[..until].iter().enumerate() {
        for bit in (0..bits).map(|bit| (at + bit) % 8) {
            put(at, byte ^ (1 << bit));
            if folder.probe().is_ok() && name == WEIGHTS {
                let flipped = fs::read(folder.path(name)).expect("it has just been written");
                assert!(SafeTensors::deserialize(&flipped).is_ok());
            }
        }
        put(at, *byte);
    }
    assert_eq!(folder.probe(), Ok(()));
}

#[test]
fn forged_headers() {
    let folder = Folder::new(&dense());
    let sound = fs::read(folder.path(WEIGHTS)).unwrap();
    let (header, data) = split(&sound);
    let entry = |shape: &str, offsets: &str| {
        format!(r#"{{"lm_head.weight":{{"dtype":"BF16","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let end = data.len();
    let headers = [
        entry("[18446744073709551615]", &format!("[0,{end}]")),
        entry("[9223372036854775808,2]", &format!("[0,{end}]")),
        entry("[4294967296,4294967296,4294967296]", &format!("[0,{end}]")),
        entry("[1000000000000]", "[0,2000000000000]"),
        entry("[1000000000000]", &format!("[0,{end}]")),
        entry("[1]", "[18446744073709551614,18446744073709551615]"),
        entry("[0]", "[18446744073709551615,18446744073709551615]"),
        entry("[18446744073709551616]", "[0,2]"),
        entry("[-1]", "[0,2]"),
        entry("[1e3]", "[0,2000]"),
        // Ten thousand dimensions of one element.
        entry(&format!("[{}1]", "1,".repeat(10_000)), "[0,2]"),
        // The same bytes for two tensors; a tensor twice; a gap.
        header.replacen("data_offsets\":[", "data_offsets\":[0", 1),
        header.replacen('{', r#"{"model.norm.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},"#, 1),
        header.replacen('{', r#"{"__metadata__":{"a":1},"#, 1),
        "{}".to_owned(),
        "null".to_owned(),
        "[".repeat(50_000),
        "{\"a\":".repeat(50_000),
        "\"".repeat(2),
        " ".repeat(50_000),
    ];
    for forged in headers {
        fs::write(folder.path(WEIGHTS), join(forged.as_bytes(), data)).unwrap();
        let message = folder.probe().unwrap_err();
        assert!(message.contains("/model.safetensors: "), "{message}");
    }
    for length in
        [0, 1, 7, 100_000_000, 100_000_001, u64::from(u32::MAX), i64::MAX as u64, u64::MAX - 7, u64::MAX]
    {
        fs::write(folder.path(WEIGHTS), [&length.to_le_bytes(), &sound[8..]].concat()).unwrap();
        let message = folder.probe().unwrap_err();
        assert!(message.contains("/model.safetensors: "), "{message}");
    }
}

/// A config that claims a gigantic model is refused for what the files lack, without making room for it.
#[test]
fn forged_sizes_in_the_config() {
    let huge =
        [i32::MAX.to_string(), "65536".to_owned(), "4096".to_owned(), "18446744073709551615".to_owned()];
    for written in [dense(), packed()] {
        for field in written.config.as_object().unwrap().keys() {
            for size in &huge {
                let mut forged = written.clone();
                forged.config[field] = serde_json::from_str(size).unwrap();
                let folder = Folder::new(&forged);
                // Positions and `index_topk` may be anything: they size no weight.
                if let Err(message) = folder.probe() {
                    assert!(message.contains(CONFIG) || message.contains(WEIGHTS), "{message}");
                }
            }
        }
    }
}

/// Numbers at which arithmetic goes wrong.
fn numbers() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<u64>().prop_map(|n| n.to_string()),
        (0_u64..1 << 12).prop_map(|n| n.to_string()),
        any::<i64>().prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|x| x.to_string()),
        (0_u32..64).prop_map(|bit| (1_u64 << bit).to_string()),
        (0_u32..64).prop_map(|bit| (u64::MAX >> bit).to_string()),
    ]
}

/// The spans of digits in a text.
fn digits(text: &str) -> Vec<std::ops::Range<usize>> {
    let mut spans: Vec<std::ops::Range<usize>> = Vec::new();
    for (at, byte) in text.bytes().enumerate().filter(|(_, byte)| byte.is_ascii_digit()) {
        match spans.last_mut() {
            Some(span) if span.end == at => span.end = at + 1,
            _ => spans.push(at..at + 1),
        }
        debug_assert!(byte.is_ascii_digit());
    }
    spans
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Any number of the header (in a shape, an offset, a name) becomes another.
    #[test]
    fn other_numbers_in_the_header(
        int4 in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), numbers()), 1..4),
    ) {
        let folder = Folder::new(&if int4 { packed() } else { dense() });
        let sound = fs::read(folder.path(WEIGHTS)).expect("it has just been written");
        let (header, data) = split(&sound);
        let mut header = header.to_owned();
        for (which, number) in changes {
            let spans = digits(&header);
            header.replace_range(spans[which.index(spans.len())].clone(), &number);
        }
        judge_weights(&folder, &join(header.as_bytes(), data));
    }

    /// Any stretch of the file is replaced by any bytes, of the same length or not.
    #[test]
    fn other_bytes_anywhere(
        int4 in any::<bool>(),
        at in any::<prop::sample::Index>(),
        gone in 0_usize..64,
        bytes in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let folder = Folder::new(&if int4 { packed() } else { dense() });
        let mut file = fs::read(folder.path(WEIGHTS)).expect("it has just been written");
        let at = at.index(file.len());
        let end = (at + gone).min(file.len());
        file.splice(at..end, bytes);
        judge_weights(&folder, &file);
    }

    /// Nothing but noise.
    #[test]
    fn noise(length in 0_u64..64, bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let folder = Folder::new(&dense());
        judge_weights(&folder, &bytes);
        judge_weights(&folder, &[&length.to_le_bytes(), bytes.as_slice()].concat());
    }
}
