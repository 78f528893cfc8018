//! Why a checkpoint is refused.

use std::io;

use crate::config::ConfigError;

/// A checkpoint that cannot be loaded. Every message names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file that cannot be read.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What the system says.
        source: io::Error,
    },
    /// A file that should be there.
    #[error("{file}: no such file; {reason}")]
    MissingFile {
        /// The file.
        file: String,
        /// Who needs it.
        reason: String,
    },
    /// A file that is there and should not be.
    #[error("{file}: {reason}")]
    UnexpectedFile {
        /// The file.
        file: String,
        /// Why not.
        reason: String,
    },
    /// `config.json` was refused.
    #[error("{file}: {source}")]
    Config {
        /// The file.
        file: String,
        /// Which field, and why.
        source: ConfigError,
    },
    /// `model.safetensors.index.json` is malformed or contradicts the shards.
    #[error("{file}: {reason}")]
    Index {
        /// The file.
        file: String,
        /// What is wrong, expected and found.
        reason: String,
    },
    /// A safetensors header that is malformed, truncated or contradicts the file's length.
    #[error("{file}: not a sound safetensors file: {reason}")]
    Header {
        /// The file.
        file: String,
        /// What is wrong, expected and found.
        reason: String,
    },
    /// The same tensor in two shards.
    #[error("{file}: tensor `{tensor}` is also in {other}; expected it once")]
    Duplicate {
        /// One file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The other file.
        other: String,
    },
    /// A tensor that the config calls for.
    #[error("{file}: tensor `{tensor}` is missing; expected {expected}")]
    Missing {
        /// The file, or the index of the files.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape, or what asks for it.
        expected: String,
    },
    /// A tensor that the config has no place for.
    #[error("{file}: tensor `{tensor}` was not expected: {reason}")]
    Unexpected {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Why not.
        reason: String,
    },
    /// A tensor of the wrong element type.
    #[error("{file}: tensor `{tensor}` has type {found}; expected {expected}")]
    Dtype {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
        /// The types that are read.
        expected: &'static str,
    },
    /// A tensor of the wrong shape.
    #[error("{file}: tensor `{tensor}` has shape {found:?}; expected {expected:?} ({reason})")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Box<[usize]>,
        /// The shape that the config calls for.
        expected: Box<[usize]>,
        /// Where that comes from.
        reason: String,
    },
    /// A tensor whose contents are not what this loader can honour.
    #[error("{file}: tensor `{tensor}` holds {found}; expected {expected}")]
    Contents {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What it holds.
        found: String,
        /// What it should.
        expected: String,
    },
    /// A layer that is packed against the config's word, or not packed against it.
    #[error("{file}: module `{module}` has {found}, but `quantization_config` in config.json {expected}")]
    Quantization {
        /// The file.
        file: String,
        /// The module.
        module: String,
        /// The tensors that it has.
        found: String,
        /// What the config says.
        expected: String,
    },
    /// A tensor-parallel degree that does not divide the model.
    #[error(transparent)]
    TensorParallel(ConfigError),
    /// A rank outside its group, or a layer outside the model.
    #[error("{what} = {found}; expected less than {limit}")]
    OutOfRange {
        /// The number.
        what: &'static str,
        /// Its value.
        found: usize,
        /// The bound.
        limit: usize,
    },
}
