//! Checkpoints: opened, verified against their config, and read one rank and one layer at a time.
//!
//! A checkpoint is a folder as published on model hubs (`config.json`, and `model.safetensors` or the shards
//! that `model.safetensors.index.json` names), or the same files embedded in the binary. Opening
//! reads the headers alone, through a mapping; weights are read by several threads at once, and of a tensor that ranks share a rank
//! reads its own part.

mod budget;
mod error;
mod files;
pub(crate) mod format;
mod header;
mod index;
mod int4;
pub(crate) mod layout;
mod load;
mod parallel;
mod progress;
pub(crate) mod shard;
pub(crate) mod slices;
mod tensors;
mod verify;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use dsa80_reference::DType;
use sha2::{Digest, Sha256};

pub use budget::Reservation;
pub use error::CheckpointError;
pub use format::{Int4Format, LinearFormat};
pub use progress::{LoadingBar, Progress};
pub use shard::Shard;

use crate::config::{ConfigError, ModelConfig};
use crate::dummy::DummyWeights;
use crate::runner::WeightSource as _;
use crate::weights::{HostEnds, HostLayer};
use budget::HostBudget;
use files::Files;
use layout::Spec;
use tensors::Tensors;

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian and are read without conversion");

const CONFIG: &str = "config.json";

/// A verified checkpoint. Shared by reference between the ranks of a process.
pub struct Checkpoint {
    name: String,
    files: Files,
    config: ModelConfig,
    tensors: Tensors,
    formats: HashMap<String, LinearFormat>,
    valid_tp: OnceLock<Vec<usize>>,
    progress: Arc<dyn Progress>,
    sharded_bytes: AtomicU64,
    replicated_bytes: AtomicU64,
    /// Instead of the tensors.
    dummy: Option<DummyWeights>,
    /// Threads that read a layer.
    readers: usize,
    budget: Arc<HostBudget>,
}

/// Of what is read and not yet on its device; with holes in pinned memory and readers' own buffers it stays below 8 GiB.
const HOST_BYTES: u64 = 6 << 30;

/// Threads that read for one rank at most: beyond that, no disk gets faster.
const MOST_READERS: usize = 16;

/// Bytes copied out of a checkpoint's files, by all ranks that read from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BytesRead {
    /// Of tensors that ranks share.
    pub sharded: u64,
    /// Of tensors that every rank has whole.
    pub replicated: u64,
}

impl BytesRead {
    /// Both.
    pub fn total(self) -> u64 {
        self.sharded + self.replicated
    }
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `dir` and [verifies](Self::verify) it.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file, and the tensor where there is one.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::new(dir.display().to_string(), Files::Directory(dir.to_owned()))
    }

    /// Opens a checkpoint whose files, by plain name, are in the binary, and verifies it.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn from_static(files: &[(&'static str, &'static [u8])]) -> Result<Self, CheckpointError> {
        Self::new("the embedded checkpoint".to_owned(), Files::Static(files.to_vec()))
    }

    /// A checkpoint in the folder `dir`, of which the config alone is read: weights are random numbers in the formats that it describes.
    ///
    /// # Errors
    /// `config.json` is missing or refused.
    pub fn open_dummy(dir: &Path, seed: u32) -> Result<Self, CheckpointError> {
        Self::new_dummy(dir.display().to_string(), Files::Directory(dir.to_owned()), seed)
    }

    /// [`open_dummy`](Self::open_dummy) for files that are in the binary.
    ///
    /// # Errors
    /// As there.
    pub fn from_static_dummy(
        files: &[(&'static str, &'static [u8])],
        seed: u32,
    ) -> Result<Self, CheckpointError> {
        Self::new_dummy("the embedded checkpoint".to_owned(), Files::Static(files.to_vec()), seed)
    }

    fn new_dummy(name: String, files: Files, seed: u32) -> Result<Self, CheckpointError> {
        let config = read_config(&files)?;
        let linears = layout::all(&config, 1).filter_map(|spec| match spec {
            Spec::Linear(spec) => Some((format::described(&config, &spec), spec.module)),
            Spec::Tensor(_) => None,
        });
        let formats = linears.map(|(format, module)| (module, format)).collect();
        let dummy = Some(DummyWeights::new(config.clone(), seed));
        let tensors = Tensors::none(files.display(CONFIG));
        Ok(Self { dummy, ..Self::with(name, files, config, tensors, formats) })
    }

    fn new(name: String, files: Files) -> Result<Self, CheckpointError> {
        let config = read_config(&files)?;
        let tensors = Tensors::open(&files)?;
        let formats = verify::verify(&tensors, &config)?;
        Ok(Self::with(name, files, config, tensors, formats))
    }

    fn with(
        name: String,
        files: Files,
        config: ModelConfig,
        tensors: Tensors,
        formats: HashMap<String, LinearFormat>,
    ) -> Self {
        Self {
            name,
            files,
            config,
            tensors,
            formats,
            valid_tp: OnceLock::new(),
            progress: Arc::new(()),
            sharded_bytes: AtomicU64::new(0),
            replicated_bytes: AtomicU64::new(0),
            dummy: None,
            readers: std::thread::available_parallelism().map_or(1, |cores| cores.get().min(MOST_READERS)),
            budget: HostBudget::new(HOST_BYTES),
        }
    }

    /// With its first MTP layer as one layer more, which drafts the token after next wherever a prompt is scored: see
    /// [`TokenLogprobs::draft`](crate::engine::TokenLogprobs::draft). The same again where it has none, or where weights are random numbers.
    ///
    /// # Errors
    /// Tensors of that layer are missing, or not as the config says.
    pub fn with_draft_layer(self) -> Result<Self, CheckpointError> {
        let config = self.config.with_draft_layer();
        let prefix = format!("model.layers.{}.", self.config.num_hidden_layers);
        let has_any = self.tensors.iter().any(|tensor| tensor.name.starts_with(&prefix));
        if self.dummy.is_some() || !config.draft_layer || !has_any {
            return Ok(self);
        }
        let formats = verify::verify(&self.tensors, &config)?;
        Ok(Self { config, formats, valid_tp: OnceLock::new(), ..self })
    }

    /// Reports what is read from now on to `progress`.
    #[must_use]
    pub fn with_progress(self, progress: Arc<dyn Progress>) -> Self {
        Self { progress, ..self }
    }

    /// The folder, as it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The validated `config.json`.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The contents of another file of the checkpoint (`tokenizer.json`, `chat_template.jinja`,
    /// `generation_config.json`, ...); `None` if there is no such file.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] when it exists and cannot be read.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        self.files.read(name)
    }

    /// Checks every tensor's name, type and shape against the config: none missing, none left over, packed
    /// layers as `quantization_config` says. Opening has done this once; it reads no weights.
    ///
    /// # Errors
    /// [`CheckpointError`] names file, tensor, what was expected and what was found.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        if self.dummy.is_some() {
            return Ok(());
        }
        verify::verify(&self.tensors, &self.config).map(drop)
    }

    /// Whether the weights are random numbers.
    pub fn is_dummy(&self) -> bool {
        self.dummy.is_some()
    }

    /// How linear layer `module` (a full name without `.weight`) is stored; `None` if the model has no such
    /// layer.
    pub fn linear_format(&self, module: &str) -> Option<LinearFormat> {
        self.formats.get(module).copied()
    }

    /// The type of a float tensor.
    pub(crate) fn tensor_dtype(&self, name: &str) -> Option<DType> {
        self.tensors.get(name)?.float().ok()
    }

    /// What tells this checkpoint's tensors from another's without reading all of them: their names, types and shapes, and the beginnings of
    /// some. What the config says is not in it.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn sample(&self) -> Result<Sha256, CheckpointError> {
        const SAMPLES: usize = 64;
        const BYTES: usize = 4096;
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_unstable_by_key(|tensor| tensor.name);
        let stride = tensors.len().div_ceil(SAMPLES).max(1);
        let (mut hash, mut bytes) = (Sha256::new(), [0; BYTES]);
        for (index, tensor) in tensors.iter().enumerate() {
            hash.update(format!("{:?} {:?} {:?};", tensor.name, tensor.dtype, tensor.shape));
            if index.is_multiple_of(stride) {
                let bytes = &mut bytes[..BYTES.min(tensor.bytes.len())];
                tensor.read(0, bytes)?;
                hash.update(bytes);
            }
        }
        Ok(hash)
    }

    /// Threads that read a layer.
    pub fn readers(&self) -> usize {
        self.readers
    }

    /// Bytes of all weights files, headers included.
    pub fn file_bytes(&self) -> u64 {
        self.tensors.file_bytes()
    }

    /// Reads `shard`'s part of layer `layer`.
    ///
    /// # Errors
    /// A degree that does not divide the model, a rank or a layer that does not exist.
    pub fn load_layer(&self, layer: usize, shard: Shard) -> Result<HostLayer, CheckpointError> {
        if let Some(dummy) = &self.dummy {
            return dummy.load_layer(layer, shard);
        }
        let limit = self.config.num_hidden_layers;
        if layer >= limit {
            return Err(CheckpointError::OutOfRange { what: "layer", found: layer, limit });
        }
        self.check_shard(shard)?;
        load::Reader::new(self, shard).layer(&self.config, layer)
    }

    /// Waits until `shard`'s part of layer `layer`, or of what is not in a layer, has room in host memory, beside what other ranks have under
    /// way.
    pub fn reserve(&self, layer: Option<usize>, shard: Shard) -> Reservation {
        let there = layer.is_none_or(|layer| layer < self.config.num_hidden_layers);
        if self.dummy.is_some() || !there || self.check_shard(shard).is_err() {
            return Reservation::default();
        }
        let bytes = |spec| self.spec_bytes(&spec, shard);
        self.budget.reserve(match layer {
            Some(layer) => layout::layer(&self.config, layer, shard.world_size).into_specs().map(bytes).sum(),
            None => layout::ends(&self.config).into_specs().map(bytes).sum(),
        })
    }

    /// Reads `shard`'s part of what is not in a layer: embedding, final norm, `lm_head`.
    ///
    /// # Errors
    /// As for [`load_layer`](Self::load_layer).
    pub fn load_ends(&self, shard: Shard) -> Result<HostEnds, CheckpointError> {
        if let Some(dummy) = &self.dummy {
            return dummy.load_ends(shard);
        }
        self.check_shard(shard)?;
        load::Reader::new(self, shard).ends(&self.config)
    }

    /// Bytes that `shard` reads when it loads everything, as [`bytes_read`](Self::bytes_read) counts them.
    ///
    /// # Errors
    /// As for [`load_layer`](Self::load_layer).
    pub fn shard_bytes(&self, shard: Shard) -> Result<u64, CheckpointError> {
        self.check_shard(shard)?;
        if self.dummy.is_some() {
            return Ok(0);
        }
        Ok(layout::all(&self.config, shard.world_size).map(|spec| self.spec_bytes(&spec, shard)).sum())
    }

    fn spec_bytes(&self, spec: &Spec, shard: Shard) -> u64 {
        match spec {
            Spec::Tensor(spec) => {
                let whole = self.tensors.get(&spec.name).map_or(0, |view| view.bytes.len() as u64);
                if spec.split == shard::Split::Replicated { whole } else { whole / shard.world_size as u64 }
            }
            Spec::Linear(spec) => {
                self.linear_format(&spec.module).map_or(0, |format| slices::linear_bytes(spec, format, shard))
            }
        }
    }

    /// Bytes copied out of the weights files so far.
    pub fn bytes_read(&self) -> BytesRead {
        BytesRead {
            sharded: self.sharded_bytes.load(Ordering::Relaxed),
            replicated: self.replicated_bytes.load(Ordering::Relaxed),
        }
    }

    fn check_shard(&self, shard: Shard) -> Result<(), CheckpointError> {
        // Asked for every layer, and costly to answer for a model of many experts.
        let valid = self.valid_tp.get_or_init(|| self.config.valid_tp());
        if valid.contains(&shard.world_size) { shard.check_rank() } else { shard.check(&self.config) }
    }
}

fn read_config(files: &Files) -> Result<ModelConfig, CheckpointError> {
    let file = files.display(CONFIG);
    let Some(bytes) = files.read(CONFIG)? else {
        return Err(CheckpointError::MissingFile { file, reason: "a checkpoint starts with it".to_owned() });
    };
    let text = std::str::from_utf8(&bytes).map_err(|e| ConfigError::Json(e.to_string()));
    text.and_then(ModelConfig::from_json).map_err(|source| CheckpointError::Config { file, source })
}
