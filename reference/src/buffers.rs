//! Host memory that is used again: while a model is loaded, the arrays of one layer are those of the layer before it. New memory costs the
//! system more than reading a file into memory that is there, and memory that a device reaches costs more still.
//!
//! Between [`lend_from`] and the end of what it returns, [`take`] gives memory that comes back when its array is dropped.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;

use crate::host_array::HostArray;

/// Smaller arrays are cheap to make.
const SMALLEST: usize = 64 << 10;

/// Where a backend's host memory comes from: what a file is read into, and the device copies from.
pub trait HostMemory: Debug + Send + Sync {
    /// As many bytes, with any contents; `None` where there are none left: until blocks are dropped, and then ordinary memory has to do.
    fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>>;
}

/// A piece of [`HostMemory`], aligned to 8 bytes.
pub trait HostBlock: Send + Sync {
    /// How many bytes it has.
    fn size(&self) -> usize;

    /// Whether it is worth keeping.
    fn is_kept(&self) -> bool {
        true
    }

    /// All of it.
    fn bytes(&self) -> &[u8];

    /// All of it.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Ordinary memory, where a source has none left: it is not kept, so that there is never more of it than is in use.
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
    fn size(&self) -> usize {
        self.bytes
    }

    fn is_kept(&self) -> bool {
        false
    }

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
    fn new(source: Arc<dyn HostMemory>) -> Self {
        Self { source, loadings: 0, kept: HashMap::new(), returns: 0 }
    }

    fn take(&mut self, bytes: usize) -> Option<Box<dyn HostBlock>> {
        self.kept.get_mut(&bytes).and_then(|kept| kept.blocks.pop())
    }

    fn give_back(&mut self, block: Box<dyn HostBlock>) {
        self.returns += 1;
        let kept = self.kept.entry(block.size()).or_default();
        kept.last = self.returns;
        kept.blocks.push(block);
    }

    /// A block that makes room: of those whose length has not come back for longest, as of the layers of another kind before these.
    fn surplus(&mut self) -> Option<Box<dyn HostBlock>> {
        let oldest = self.kept.values_mut().filter(|kept| !kept.blocks.is_empty());
        oldest.min_by_key(|kept| kept.last).and_then(|kept| kept.blocks.pop())
    }
}

/// Who lends, if anybody does.
#[derive(Default)]
struct Lenders(Mutex<Option<Lender>>);

impl Lenders {
    fn lock(&self) -> MutexGuard<'_, Option<Lender>> {
        // A panic elsewhere leaves blocks that are whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of so many bytes: one that is kept, or of the source, for which what is kept makes room; then ordinary memory. None where
    /// nobody lends.
    fn take(&self, bytes: usize) -> Option<Box<dyn HostBlock>> {
        let (kept, source) = {
            let mut lender = self.lock();
            let lending = lender.as_mut()?;
            (lending.take(bytes), Arc::clone(&lending.source))
        };
        if kept.is_some() {
            return kept;
        }
        loop {
            // Without the lock: it may take a while.
            if let Some(block) = source.alloc(bytes) {
                return Some(block);
            }
            let surplus = self.lock().as_mut().and_then(Lender::surplus);
            match surplus {
                Some(surplus) => drop(surplus),
                None => return Some(Box::new(Words::new(bytes))),
            }
        }
    }

    fn give_back(&self, block: Box<dyn HostBlock>) {
        match &mut *self.lock() {
            Some(lending) if block.is_kept() => lending.give_back(block),
            _ => (),
        }
    }
}

static LENDERS: Lenders = Lenders(Mutex::new(None));

/// Keeps [`buffers`](crate::buffers) lending; what is kept is freed when the last is dropped.
#[derive(Debug)]
#[must_use]
pub struct Lending(());

/// Lends memory of `source` from now on. Where ranks load at the same time they share the first one's.
pub fn lend_from(source: Arc<dyn HostMemory>) -> Lending {
    LENDERS.lock().get_or_insert(Lender::new(source)).loadings += 1;
    Lending(())
}

impl Drop for Lending {
    fn drop(&mut self) {
        let mut lender = LENDERS.lock();
        let last = lender.take_if(|lending| {
            lending.loadings -= 1;
            lending.loadings == 0
        });
        // Freed without the lock.
        drop(lender);
        drop(last);
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
        if let Some(block) = self.0.take() {
            LENDERS.give_back(block);
        }
    }
}

/// An array of `len` elements with any contents, to be written over.
pub fn take<T: Pod>(len: usize) -> HostArray<T> {
    let bytes = len * size_of::<T>();
    match if bytes < SMALLEST { None } else { LENDERS.take(bytes) } {
        Some(block) => HostArray::lent(Lent(Some(block))),
        None => vec![T::zeroed(); len].into(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::random;
    use crate::slabs::{Place, Slabs};

    /// Has two blocks at a time, and has given so many.
    #[derive(Debug, Default)]
    struct Two {
        given: AtomicUsize,
        there: Arc<AtomicUsize>,
    }

    struct OfTwo(Words, Arc<AtomicUsize>);

    impl HostMemory for Two {
        fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>> {
            if self.there.fetch_add(1, Ordering::Relaxed) >= 2 {
                self.there.fetch_sub(1, Ordering::Relaxed);
                return None;
            }
            self.given.fetch_add(1, Ordering::Relaxed);
            Some(Box::new(OfTwo(Words::new(bytes), Arc::clone(&self.there))))
        }
    }

    impl Drop for OfTwo {
        fn drop(&mut self) {
            assert!(LENDERS.0.try_lock().is_ok(), "freed while others wait");
            self.1.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl HostBlock for OfTwo {
        fn size(&self) -> usize {
            self.0.size()
        }

        fn bytes(&self) -> &[u8] {
            self.0.bytes()
        }

        fn bytes_mut(&mut self) -> &mut [u8] {
            self.0.bytes_mut()
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
        assert_eq!((two.given.load(Ordering::Relaxed), again.len()), (1, LEN));
        // Small ones are not lent; where the source has none left, other memory has to do, and is not kept.
        drop(take::<u32>(10));
        let others = [take::<u32>(LEN), take::<u32>(LEN + 1)];
        assert_eq!((two.given.load(Ordering::Relaxed), &others[1][..2]), (2, &[0, 0][..]));
        assert_eq!(others[1].clone().into_vec(), vec![0; LEN + 1]);
        let [own, ordinary] = others;
        drop(ordinary);
        assert!(LENDERS.lock().as_ref().unwrap().kept.values().all(|kept| kept.blocks.is_empty()));
        // What is kept makes room for another length.
        drop(own);
        let other = take::<u32>(LEN + 2);
        assert_eq!((two.given.load(Ordering::Relaxed), two.there.load(Ordering::Relaxed)), (3, 2));

        // First what has not come back for longest.
        let mut full = Lender::new(two.clone());
        for len in [8, 16, 8, 24] {
            full.give_back(Box::new(Words::new(len)));
        }
        let surplus: Vec<usize> = std::iter::from_fn(|| full.surplus()).map(|block| block.size()).collect();
        assert_eq!(surplus, [16, 8, 8, 24]);

        // Until the last who loads is done.
        let second = lend_from(Arc::new(Two::default()));
        drop(lending);
        drop(again);
        assert_eq!(take::<u32>(LEN).as_ptr(), address);
        drop(second);
        drop(other);
        assert!(LENDERS.lock().is_none() && two.there.load(Ordering::Relaxed) == 0);
    }

    /// What a GPU's pinned memory is cut from, without the memory, and how much ordinary memory stands in for it.
    #[derive(Debug, Default)]
    struct Counted {
        ordinary: usize,
        pinned: Option<Slabs>,
        slabs: usize,
    }

    #[derive(Debug, Clone)]
    struct Pinned(Arc<Mutex<Counted>>);

    struct OfSlab(Pinned, Place, usize);

    const SLAB: usize = 128 << 20;
    const GIB: usize = 1 << 30;

    impl HostMemory for Pinned {
        fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>> {
            let mut counted = self.0.lock().unwrap();
            let slabs = counted.pinned.as_mut().unwrap();
            let place = match slabs.take(bytes) {
                Some(place) => place,
                None => {
                    let length = Slabs::taken_by(bytes)?.max(SLAB);
                    if !slabs.has_room(length) {
                        return None;
                    }
                    slabs.add(length);
                    let place = slabs.take(bytes).unwrap();
                    counted.slabs += 1;
                    place
                }
            };
            Some(Box::new(OfSlab(self.clone(), place, bytes)))
        }
    }

    impl Drop for OfSlab {
        fn drop(&mut self) {
            self.0.0.lock().unwrap().pinned.as_mut().unwrap().give_back(self.1);
        }
    }

    impl HostBlock for OfSlab {
        fn size(&self) -> usize {
            self.2
        }

        fn bytes(&self) -> &[u8] {
            &[]
        }

        fn bytes_mut(&mut self) -> &mut [u8] {
            &mut []
        }
    }

    /// The arrays of a rank of eight of GLM-5.2 with INT4 experts in asymmetric groups of 32, in bytes: of the ends, or of a layer.
    fn arrays(layer: Option<usize>) -> Vec<usize> {
        let bf16 = |rows: usize, columns: usize| 2 * rows * columns;
        let Some(layer) = layer else { return vec![bf16(19_360, 6144); 2] };
        let attention = [(2048, 6144), (2048, 2048), (576, 6144), (3584, 512), (6144, 2048)];
        let mut arrays: Vec<usize> = attention.map(|(rows, columns)| bf16(rows, columns)).into();
        if layer < 3 || layer % 4 == 2 {
            arrays.extend([bf16(4096, 2048), bf16(128, 6144), bf16(32, 6144)]);
        }
        if layer < 3 {
            arrays.extend([bf16(1536, 6144); 3]);
            return arrays;
        }
        arrays.extend([bf16(256, 6144); 4]);
        // Packed, scales and zero points of gate, up and down.
        let expert = [256 * 6144 / 2, 256 * 192 * 2, 256 * 192 / 2];
        arrays.extend(std::iter::repeat_n(expert, 3 * 256).flatten());
        arrays
    }

    /// Eight ranks that load layers in any order among each other, each with a layer on its way to the device, one that waits and one that is
    /// read, all of them together within 6 GiB, as [`HostMemory`] of a GPU gives and gets them back.
    #[test]
    fn eight_ranks_load_within_8_gib_of_host_memory_holes_included() {
        const LAYERS: usize = 16;
        const MOST: usize = 13 << 29;
        let counted = Arc::new(Mutex::new(Counted { pinned: Some(Slabs::new(MOST)), ..Counted::default() }));
        let lenders = Lenders(Mutex::new(Some(Lender::new(Arc::new(Pinned(counted.clone()))))));
        struct Rank {
            next: usize,
            reading: Vec<usize>,
            parts: std::collections::VecDeque<Vec<Lent>>,
            bytes: std::collections::VecDeque<usize>,
        }
        /// Goes back to these lenders, as an array does to the process's.
        struct Lent(Option<Box<dyn HostBlock>>);
        let part = |index: usize| arrays(index.checked_sub(1));
        let mut ranks: Vec<Rank> = (0..8)
            .map(|_| Rank {
                next: 0,
                reading: Vec::new(),
                parts: Default::default(),
                bytes: Default::default(),
            })
            .collect();
        let (mut under_way, mut peak, mut peak_pinned, mut draw) = (0, 0, 0, 0);
        while ranks.iter().any(|rank| rank.next <= LAYERS || !rank.parts.is_empty()) {
            draw += 1;
            let rank = &mut ranks[random::word(draw, 5) as usize % 8];
            // Some arrays at a time.
            for _ in 0..64 {
                if let Some(bytes) = rank.reading.pop() {
                    if bytes < SMALLEST {
                        continue;
                    }
                    let block = lenders.take(bytes).unwrap();
                    if !block.is_kept() {
                        counted.lock().unwrap().ordinary += bytes;
                    }
                    rank.parts.back_mut().unwrap().push(Lent(Some(block)));
                } else if rank.next <= LAYERS
                    && rank.parts.len() < 3
                    && random::word(draw, 6).is_multiple_of(2)
                {
                    let arrays = part(rank.next);
                    let bytes: usize = arrays.iter().sum();
                    if under_way > 0 && under_way + bytes > 6 * GIB {
                        break;
                    }
                    under_way += bytes;
                    rank.next += 1;
                    rank.reading = arrays;
                    rank.parts.push_back(Vec::new());
                    rank.bytes.push_back(bytes);
                } else {
                    // What is uploaded goes back; a part that is still read does not.
                    let Some(first) = rank.parts.front_mut() else { break };
                    match first.pop() {
                        Some(Lent(Some(block))) => {
                            if !block.is_kept() {
                                counted.lock().unwrap().ordinary -= block.size();
                            }
                            lenders.give_back(block);
                        }
                        _ => {
                            rank.parts.pop_front();
                            under_way -= rank.bytes.pop_front().unwrap();
                        }
                    }
                }
            }
            let counted = counted.lock().unwrap();
            let pinned = counted.pinned.as_ref().unwrap().bytes();
            (peak, peak_pinned) = (peak.max(pinned + counted.ordinary), peak_pinned.max(pinned));
        }
        assert!(peak_pinned <= MOST && peak < 8 * GIB, "{peak_pinned} {peak}");
        // It was tight, and slabs were not asked for anew all the time.
        assert!(peak > 5 * GIB, "{peak}");
        let slabs = counted.lock().unwrap().slabs;
        assert!(slabs < 4 * MOST / SLAB, "{slabs}");
        drop(lenders);
        let counted = counted.lock().unwrap();
        assert_eq!((counted.pinned.as_ref().unwrap().bytes(), counted.ordinary), (0, 0));
    }
}
