//! Launches that may overlap: neither of two sides may use what the other writes. They run one after the other here, which would hide it.

use std::hash::{DefaultHasher, Hash, Hasher};

use dsa80_cuda::Arg;

use super::EmulatedBuffer;

/// The buffers of a launch aside, and of those beside it.
#[derive(Debug, Default)]
pub(super) struct Beside {
    aside: Vec<Used>,
    is_aside: bool,
}

/// A buffer that is used aside.
#[derive(Debug)]
struct Used {
    buffer: EmulatedBuffer,
    /// Of what it held before.
    hash: u64,
    /// A launch beside uses it, too.
    by_both: bool,
}

impl Beside {
    /// What follows is launched aside; whether it was already.
    pub(super) fn enter(&mut self) -> bool {
        std::mem::replace(&mut self.is_aside, true)
    }

    /// What follows is launched aside as before.
    pub(super) fn leave(&mut self, before: bool) {
        self.is_aside = before;
    }

    pub(super) fn is_aside(&self) -> bool {
        self.is_aside
    }

    /// Takes note of what a launch, which is about to run, may use.
    pub(super) fn note(&mut self, args: &[Arg<'_, EmulatedBuffer>]) {
        for arg in args {
            let Arg::Buffer(buffer) = *arg else { continue };
            let known = self.aside.iter_mut().find(|used| used.buffer.address() == buffer.address());
            match known {
                Some(used) => used.by_both |= !self.is_aside,
                None if self.is_aside => {
                    let (buffer, hash) = (buffer.clone(), hash(buffer));
                    self.aside.push(Used { buffer, hash, by_both: false });
                }
                None => {}
            }
        }
    }

    /// # Errors
    /// Names a buffer that both sides use and one has changed.
    pub(super) fn check(&self) -> Result<(), String> {
        let changed = self.aside.iter().find(|used| used.by_both && hash(&used.buffer) != used.hash);
        changed.map_or(Ok(()), |Used { buffer, .. }| {
            let name = buffer.memory().name();
            Err(format!("`{name}` is used by launches that may overlap, and one of them writes it"))
        })
    }
}

fn hash(buffer: &EmulatedBuffer) -> u64 {
    let mut hasher = DefaultHasher::new();
    buffer.memory().contents().hash(&mut hasher);
    hasher.finish()
}
