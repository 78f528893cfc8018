//! Where a checkpoint's files come from: a directory, or the binary itself.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::CheckpointError;

/// The files of a checkpoint, by plain name.
#[derive(Debug)]
pub(super) enum Files {
    Directory(PathBuf),
    Static(Vec<(&'static str, &'static [u8])>),
}

/// The contents of a weights file.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped { map: Mmap, file: File },
    Static(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped { map, .. } => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

impl Bytes {
    /// Copies the bytes from `offset` on. Of a file, they are read and not taken from the mapping: that is what a disk does fastest, and
    /// where one fails or the file has been cut off, it is an error and not a signal.
    pub(super) fn read_at(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        match self {
            #[cfg(unix)]
            Bytes::Mapped { file, .. } => std::os::unix::fs::FileExt::read_exact_at(file, out, offset as u64),
            _ => {
                let end = offset.checked_add(out.len());
                let bytes = end.and_then(|end| self.get(offset..end)).ok_or(io::ErrorKind::UnexpectedEof)?;
                out.copy_from_slice(bytes);
                Ok(())
            }
        }
    }
}

impl Files {
    /// How messages call `name`: with the directory, where there is one.
    pub(super) fn display(&self, name: &str) -> String {
        match self {
            Files::Directory(dir) => dir.join(name).display().to_string(),
            Files::Static(_) => format!("{name} (embedded)"),
        }
    }

    /// The whole contents of a small file; `None` if there is no such file, or if `name` is not a plain file
    /// name.
    pub(super) fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        let Some(path) = self.path(name) else { return Ok(self.embedded(name).map(Cow::Borrowed)) };
        match regular_file(&path).and_then(|_| fs::read(&path)) {
            Ok(contents) => Ok(Some(Cow::Owned(contents))),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CheckpointError::Io { file: self.display(name), source }),
        }
    }

    /// A weights file, mapped into memory; `None` as for [`read`](Self::read).
    pub(super) fn map(&self, name: &str) -> Result<Option<Bytes>, CheckpointError> {
        let Some(path) = self.path(name) else { return Ok(self.embedded(name).map(Bytes::Static)) };
        let opened = regular_file(&path).and_then(|_| File::open(&path));
        match opened.and_then(|file| Ok(Bytes::Mapped { map: map(&file)?, file })) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CheckpointError::Io { file: self.display(name), source }),
        }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        match self {
            Files::Directory(dir) if is_plain_name(name) => Some(dir.join(name)),
            _ => None,
        }
    }

    fn embedded(&self, name: &str) -> Option<&'static [u8]> {
        match self {
            Files::Directory(_) => None,
            Files::Static(files) => files.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes),
        }
    }
}

/// Whether `name` is the name of a file right in the checkpoint's directory.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.contains(['/', '\\', '\0']) && !matches!(name, "" | "." | "..")
}

/// Opening anything else could block (a pipe) or fail obscurely (a directory).
fn regular_file(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.is_file() { Ok(()) } else { Err(io::Error::other("not a regular file")) }
}

#[expect(unsafe_code, reason = "memory-mapping a file has no safe form")]
fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is private and read-only, and its bytes are only ever copied out as plain integers.
    // That no other process truncates or rewrites a checkpoint while it is being loaded cannot be enforced
    // and is asked of the operator, as by every other reader of safetensors.
    unsafe { Mmap::map(file) }
}
