//! All tensors of a checkpoint, whichever file they are in.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use dsa80_reference::DType;
use safetensors::Dtype;

use super::files::{Bytes, Files};
use super::index::{INDEX, Index, SINGLE};
use super::{CheckpointError, header};

/// The weights files, mapped, and where each tensor lies in them.
#[derive(Debug)]
pub(super) struct Tensors {
    files: Vec<WeightsFile>,
    by_name: HashMap<String, Location>,
    /// The file that lists the tensors: what is missing is missing there.
    listing: String,
}

#[derive(Debug)]
struct WeightsFile {
    name: String,
    bytes: Bytes,
}

#[derive(Debug)]
struct Location {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// One tensor, as it lies in its file.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorView<'a> {
    pub(super) name: &'a str,
    pub(super) file: &'a str,
    pub(super) dtype: Dtype,
    pub(super) shape: &'a [usize],
    pub(super) bytes: &'a [u8],
    contents: &'a Bytes,
    start: usize,
}

impl Tensors {
    /// No tensors; what is missing is missing in `listing`.
    pub(super) fn none(listing: String) -> Self {
        Self { files: Vec::new(), by_name: HashMap::new(), listing }
    }

    /// Opens `model.safetensors`, or the shards that the index names, and checks the headers.
    pub(super) fn open(files: &Files) -> Result<Self, CheckpointError> {
        match files.read(INDEX)? {
            Some(text) => Self::open_shards(files, &text),
            None => {
                let mut all = Self::none(files.display(SINGLE));
                all.add(files, SINGLE, || format!("expected it, or {INDEX} with the shards that it names"))?;
                Ok(all)
            }
        }
    }

    fn open_shards(files: &Files, index: &[u8]) -> Result<Self, CheckpointError> {
        let listing = files.display(INDEX);
        let refused = |reason| CheckpointError::Index { file: listing.clone(), reason };
        let index = Index::parse(index).map_err(refused)?;
        let shards = index.files();
        if !shards.contains(&SINGLE) && files.map(SINGLE)?.is_some() {
            return Err(CheckpointError::UnexpectedFile {
                file: files.display(SINGLE),
                reason: format!(
                    "{INDEX} stands beside it and does not name it; remove the one that is not meant"
                ),
            });
        }
        let mut all = Self::none(listing.clone());
        for shard in &shards {
            all.add(files, shard, || format!("{INDEX} names it"))?;
        }
        for (tensor, shard) in &index.weight_map {
            let found = all.by_name.get(tensor).map(|location| shards[location.file]);
            if found != Some(shard) {
                let expected = format!("it: {INDEX} says so");
                return Err(CheckpointError::Missing {
                    file: files.display(shard),
                    tensor: tensor.clone(),
                    expected,
                });
            }
        }
        let unlisted = all.iter().filter(|view| !index.weight_map.contains_key(view.name));
        if let Some(view) = unlisted.min_by_key(|view| view.name) {
            return Err(view.unexpected(format!("{INDEX} does not list it")));
        }
        Ok(all)
    }

    fn add(
        &mut self,
        files: &Files,
        name: &str,
        reason: impl FnOnce() -> String,
    ) -> Result<(), CheckpointError> {
        let file = files.display(name);
        let Some(bytes) = files.map(name)? else {
            return Err(CheckpointError::MissingFile { file, reason: reason() });
        };
        let entries =
            header::parse(&bytes).map_err(|reason| CheckpointError::Header { file: file.clone(), reason })?;
        let number = self.files.len();
        for entry in entries {
            let location = Location {
                file: number,
                dtype: entry.info.dtype,
                shape: entry.info.shape,
                bytes: entry.bytes,
            };
            if let Some(earlier) = self.by_name.get(&entry.name) {
                let other = self.files[earlier.file].name.clone();
                return Err(CheckpointError::Duplicate { file, tensor: entry.name, other });
            }
            self.by_name.insert(entry.name, location);
        }
        self.files.push(WeightsFile { name: file, bytes });
        Ok(())
    }

    /// The tensor, if the checkpoint has it.
    pub(super) fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, location) = self.by_name.get_key_value(name)?;
        Some(self.view(name, location))
    }

    /// The tensor; `expected` says what should be there if it is not.
    pub(super) fn require(
        &self,
        name: &str,
        expected: impl FnOnce() -> String,
    ) -> Result<TensorView<'_>, CheckpointError> {
        self.get(name).ok_or_else(|| self.missing(name, expected()))
    }

    /// The error that says that `name` should be there.
    pub(super) fn missing(&self, name: &str, expected: String) -> CheckpointError {
        CheckpointError::Missing { file: self.listing.clone(), tensor: name.to_owned(), expected }
    }

    /// All tensors, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.by_name.iter().map(|(name, location)| self.view(name, location))
    }

    /// Bytes of all weights files.
    pub(super) fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes.len() as u64).sum()
    }

    fn view<'a>(&'a self, name: &'a str, location: &'a Location) -> TensorView<'a> {
        let file = &self.files[location.file];
        TensorView {
            name,
            file: &file.name,
            dtype: location.dtype,
            shape: &location.shape,
            bytes: &file.bytes[location.bytes.clone()],
            contents: &file.bytes,
            start: location.bytes.start,
        }
    }
}

impl<'a> TensorView<'a> {
    /// Bytes of a file from `start` on, as a tensor of no shape.
    #[cfg(test)]
    pub(super) fn of_file(contents: &'a Bytes, start: usize) -> Self {
        let bytes = &contents[start..];
        Self { name: "test", file: "test", dtype: Dtype::U8, shape: &[], bytes, contents, start }
    }

    /// Reads the tensor's bytes from `offset` on.
    pub(super) fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), CheckpointError> {
        self.contents.read_at(self.start + offset, out).map_err(|source| {
            let file = self.file.to_owned();
            if source.kind() == io::ErrorKind::UnexpectedEof {
                let reason =
                    format!("it ends before tensor `{}` does: it was cut off after it was opened", self.name);
                CheckpointError::Header { file, reason }
            } else {
                CheckpointError::Io { file, source }
            }
        })
    }

    /// The element type of a weight or scale.
    pub(super) fn float(&self) -> Result<DType, CheckpointError> {
        match self.dtype {
            Dtype::BF16 => Ok(DType::Bf16),
            Dtype::F16 => Ok(DType::F16),
            Dtype::F32 => Ok(DType::F32),
            _ => Err(self.wrong_dtype("BF16, F16 or F32")),
        }
    }

    /// Checks for packed words.
    pub(super) fn expect_words(&self) -> Result<(), CheckpointError> {
        if self.dtype == Dtype::I32 { Ok(()) } else { Err(self.wrong_dtype("I32")) }
    }

    pub(super) fn wrong_dtype(&self, expected: &'static str) -> CheckpointError {
        CheckpointError::Dtype {
            file: self.file.to_owned(),
            tensor: self.name.to_owned(),
            found: self.dtype.to_string(),
            expected,
        }
    }

    /// Checks the shape; `reason` says where `expected` comes from.
    pub(super) fn expect_shape(
        &self,
        expected: &[usize],
        reason: impl FnOnce() -> String,
    ) -> Result<(), CheckpointError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            file: self.file.to_owned(),
            tensor: self.name.to_owned(),
            found: self.shape.into(),
            expected: expected.into(),
            reason: reason(),
        })
    }

    pub(super) fn unexpected(&self, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Unexpected {
            file: self.file.to_owned(),
            tensor: self.name.to_owned(),
            reason: reason.into(),
        }
    }

    pub(super) fn wrong_contents(
        &self,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> CheckpointError {
        CheckpointError::Contents {
            file: self.file.to_owned(),
            tensor: self.name.to_owned(),
            found: found.into(),
            expected: expected.into(),
        }
    }

    /// The elements of an integer tensor, widened.
    pub(super) fn integers(&self) -> Result<Vec<i64>, CheckpointError> {
        match self.dtype {
            Dtype::I32 => {
                let (words, _) = self.bytes.as_chunks();
                Ok(words.iter().map(|word| i64::from(i32::from_le_bytes(*word))).collect())
            }
            Dtype::I64 => {
                let (words, _) = self.bytes.as_chunks();
                Ok(words.iter().map(|word| i64::from_le_bytes(*word)).collect())
            }
            _ => Err(self.wrong_dtype("I64 or I32")),
        }
    }
}
