//! Host memory that is used again: while a model is loaded, the arrays of one layer are those of the layer before it. New memory costs the
//! system more than reading a file into memory that is there, and memory that a device reaches costs more still.
//!
//! Between [`lend_from`] and the end of what it returns, [`take`] gives memory that comes back when its array is dropped.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;

use crate::host_array::HostArray;

/// Lent and kept at most, in bytes, as far as what is kept can be freed for it: somewhat more than the layers under way may take.
const LIMIT: usize = 13 << 29;
/// Smaller arrays are cheap to make.
const SMALLEST: usize = 64 << 10;

/// Where a backend's host memory comes from: what a file is read into, and the device copies from.
pub trait HostMemory: Debug + Send + Sync {
    /// As many bytes, with any contents; `None` where there are none left, and ordinary memory has to do.
    fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>>;
}

/// A piece of [`HostMemory`], aligned to 8 bytes.
pub trait HostBlock: Send + Sync {
    /// All of it.
    fn bytes(&self) -> &[u8];

    /// All of it.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Ordinary memory.
struct Words {
    words: Vec<u64>,
    bytes: usize,
}

impl Words {
    fn new(bytes: usize) -> Self {
        Self { words: vec![0; bytes.div_ceil(8)], bytes }
    }
}

impl HostBlock for Words {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.bytes]
    }
}

/// What is kept while models are loaded.
struct Lender {
    source: Arc<dyn HostMemory>,
    loadings: usize,
    kept: HashMap<usize, Kept>,
    /// Lent and kept.
    bytes: usize,
    returns: u64,
}

/// Blocks of one length.
#[derive(Default)]
struct Kept {
    blocks: Vec<Box<dyn HostBlock>>,
    /// Which return was the last of them.
    last: u64,
}

impl Lender {
    fn take(&mut self, bytes: usize) -> Option<Box<dyn HostBlock>> {
        let block = self.kept.get_mut(&bytes).and_then(|kept| kept.blocks.pop());
        if block.is_none() {
            self.bytes += bytes;
        }
        block
    }

    fn give_back(&mut self, block: Box<dyn HostBlock>) {
        self.returns += 1;
        let kept = self.kept.entry(block.bytes().len()).or_default();
        kept.last = self.returns;
        kept.blocks.push(block);
    }

    /// Blocks that are too many: first those whose length has not come back for longest, as of the layers of another kind before these.
    fn surplus(&mut self) -> Vec<Box<dyn HostBlock>> {
        let mut surplus = Vec::new();
        while self.bytes > LIMIT {
            let oldest = self.kept.iter().filter(|(_, kept)| !kept.blocks.is_empty());
            let Some(bytes) = oldest.min_by_key(|(_, kept)| kept.last).map(|(&bytes, _)| bytes) else {
                break;
            };
            surplus.extend(self.kept.get_mut(&bytes).and_then(|kept| kept.blocks.pop()));
            // An array may come back to a later lending than lent it.
            self.bytes = self.bytes.saturating_sub(bytes);
        }
        surplus
    }
}

static LENDER: Mutex<Option<Lender>> = Mutex::new(None);

fn lender() -> MutexGuard<'static, Option<Lender>> {
    // A panic elsewhere leaves blocks that are whole.
    LENDER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps [`buffers`](crate::buffers) lending; what is kept is freed when the last is dropped.
#[derive(Debug)]
#[must_use]
pub struct Lending(());

/// Lends memory of `source` from now on. Where ranks load at the same time they share the first one's.
pub fn lend_from(source: Arc<dyn HostMemory>) -> Lending {
    let none = Lender { source, loadings: 0, kept: HashMap::new(), bytes: 0, returns: 0 };
    lender().get_or_insert(none).loadings += 1;
    Lending(())
}

impl Drop for Lending {
    fn drop(&mut self) {
        let mut lender = lender();
        if let Some(lending) = &mut *lender {
            lending.loadings -= 1;
            if lending.loadings == 0 {
                *lender = None;
            }
        }
    }
}

/// Memory that goes back when it is dropped.
pub(crate) struct Lent(Option<Box<dyn HostBlock>>);

impl Lent {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |block| block.bytes())
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut().map_or(&mut [], |block| block.bytes_mut())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(block) = self.0.take() else { return };
        let surplus = lender().as_mut().map(|lending| {
            lending.give_back(block);
            lending.surplus()
        });
        // Freed without the lock.
        drop(surplus);
    }
}

/// An array of `len` elements with any contents, to be written over.
pub fn take<T: Pod>(len: usize) -> HostArray<T> {
    let bytes = len * size_of::<T>();
    let mut lender = lender();
    let Some(lending) = lender.as_mut().filter(|_| bytes >= SMALLEST) else {
        drop(lender);
        return vec![T::zeroed(); len].into();
    };
    let (kept, surplus) = (lending.take(bytes), lending.surplus());
    let source = Arc::clone(&lending.source);
    drop(lender);
    drop(surplus);
    let block = kept.or_else(|| source.alloc(bytes)).unwrap_or_else(|| Box::new(Words::new(bytes)));
    HostArray::lent(Lent(Some(block)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Has two blocks and no more.
    #[derive(Debug, Default)]
    struct Two(AtomicUsize);

    impl HostMemory for Two {
        fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>> {
            (self.0.fetch_add(1, Ordering::Relaxed) < 2)
                .then(|| Box::new(Words::new(bytes)) as Box<dyn HostBlock>)
        }
    }

    /// One test: who lends belongs to the process.
    #[test]
    fn memory_comes_back_to_the_next_of_its_length() {
        const LEN: usize = SMALLEST / 4 + 1;
        let own = take::<u32>(LEN);
        let (first, own) = (own.as_ptr(), own.into_vec());
        assert_eq!(own.as_ptr(), first, "a vector of its own is not copied");

        let two = Arc::new(Two::default());
        let lending = lend_from(two.clone());
        let mut array = take::<u32>(LEN);
        array.fill(7);
        let address = array.as_ptr();
        drop(array);
        // One of another type has the same bytes.
        let again = take::<f32>(LEN);
        assert_eq!((again.as_ptr().cast(), again[LEN - 1].to_bits()), (address, 7));
        assert_eq!((two.0.load(Ordering::Relaxed), again.len()), (1, LEN));
        // Small ones are not lent; where the source has none left, other memory has to do.
        drop(take::<u32>(10));
        let others = [take::<u32>(LEN), take::<u32>(LEN + 1)];
        assert_eq!((two.0.load(Ordering::Relaxed), &others[1][..2]), (3, &[0, 0][..]));
        assert_eq!(others[1].clone().into_vec(), vec![0; LEN + 1]);

        // What has not come back for longest makes room.
        let mut full =
            Lender { source: two.clone(), loadings: 1, kept: HashMap::new(), bytes: 0, returns: 0 };
        for len in [8, 16, 8, 24] {
            assert!(full.take(len).is_none());
        }
        for len in [8, 16, 8, 24] {
            full.give_back(Box::new(Words::new(len)));
        }
        assert_eq!((full.bytes, full.surplus().len()), (56, 0));
        full.bytes += LIMIT - 55;
        let surplus: Vec<usize> = full.surplus().iter().map(|block| block.bytes().len()).collect();
        assert_eq!((surplus, full.bytes), (vec![16], LIMIT - 15));

        // Until the last who loads is done.
        let second = lend_from(Arc::new(Two::default()));
        drop(lending);
        drop(again);
        assert_eq!(take::<u32>(LEN).as_ptr(), address);
        drop(second);
        drop(others);
        assert!(LENDER.lock().unwrap().is_none());
    }
}
