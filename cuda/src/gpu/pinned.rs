//! Pinned host memory that files are read into: the device copies from it without the processor's help.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use cudarc::driver::sys::{CUmemorytype, CUpointer_attribute, cuPointerGetAttribute};
use cudarc::driver::{CudaContext, result, sys};
use dsa80_reference::buffers::{HostBlock, HostMemory};
use dsa80_reference::slabs::{Place, Slabs};

/// What the driver is asked for at a time: pinning costs as much for a page as for many.
const SLAB: usize = 128 << 20;

/// Of a process at most, as it lies in slabs, holes included: somewhat more than the layers under way may take.
const MOST: usize = 13 << 29;

/// Pinned memory for copies to any GPU of the process. Parts that come back are given out again, and a slab goes back to the driver with the
/// last of its parts.
#[derive(Debug)]
pub(super) struct Pinned {
    context: Arc<CudaContext>,
    cut: Arc<Mutex<Cut>>,
}

/// The slabs and what is cut from them.
#[derive(Debug)]
struct Cut {
    slabs: Slabs,
    memory: HashMap<usize, Slab>,
    /// A further one on its way: whoever reads a file does not wait for pages to be pinned.
    next: Option<JoinHandle<Option<Slab>>>,
}

/// Memory of the driver.
#[derive(Debug)]
struct Slab {
    start: *mut u8,
    context: Arc<CudaContext>,
}

// SAFETY: the memory is plain, and each part of it belongs to one block.
unsafe impl Send for Slab {}

impl Pinned {
    pub(super) fn new(context: Arc<CudaContext>) -> Self {
        let cut = Cut { slabs: Slabs::new(MOST), memory: HashMap::new(), next: None };
        Self { context, cut: Arc::new(Mutex::new(cut)) }
    }
}

impl Slab {
    fn alloc(context: &Arc<CudaContext>, bytes: usize) -> Option<Self> {
        context.bind_to_thread().ok()?;
        // SAFETY: plain pinned memory, freed once, when the slab is dropped.
        let start = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }.ok()?.cast::<u8>();
        // SAFETY: as many bytes that nothing else uses yet; whoever reads what was never written finds zeros.
        unsafe { start.write_bytes(0, bytes) };
        Some(Self { start, context: Arc::clone(context) })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // A destructor has nobody to tell; a broken context has said so before.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `alloc`, and freed once; whoever copied from it has waited.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

fn lock(cut: &Mutex<Cut>) -> MutexGuard<'_, Cut> {
    // A panic elsewhere leaves slabs that are whole.
    cut.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostMemory for Pinned {
    fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>> {
        let mut cut = lock(&self.cut);
        let place = match cut.slabs.take(bytes) {
            Some(place) => place,
            None => {
                cut.add(&self.context, bytes)?;
                cut.slabs.take(bytes)?
            }
        };
        // SAFETY: the place lies within its slab.
        let start = unsafe { cut.memory.get(&place.slab)?.start.add(place.offset) };
        Some(Box::new(Block { start, bytes, place, cut: Arc::clone(&self.cut) }))
    }
}

impl Cut {
    /// A slab that has room for so many bytes, within the limit; the one after it is begun, as far as there will be room for it.
    fn add(&mut self, context: &Arc<CudaContext>, bytes: usize) -> Option<()> {
        let begun = self.next.take().and_then(|slab| slab.join().ok()).flatten();
        let length = Slabs::taken_by(bytes)?.max(SLAB);
        let slab = match begun.filter(|_| length == SLAB) {
            Some(begun) => begun,
            // One that was begun and is too small has gone back by now.
            None if self.slabs.has_room(length) => Slab::alloc(context, length)?,
            None => return None,
        };
        let number = self.slabs.add(length);
        self.memory.insert(number, slab);
        if self.slabs.has_room(SLAB) {
            let context = Arc::clone(context);
            self.next = Some(std::thread::spawn(move || Slab::alloc(&context, SLAB)));
        }
        Some(())
    }
}

struct Block {
    start: *mut u8,
    bytes: usize,
    place: Place,
    cut: Arc<Mutex<Cut>>,
}

// SAFETY: a part of a slab that is this block's alone.
unsafe impl Send for Block {}
// SAFETY: as above; whoever writes has the block alone.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        let mut cut = lock(&self.cut);
        let empty = if cut.slabs.give_back(self.place) { cut.memory.remove(&self.place.slab) } else { None };
        drop(cut);
        // Freed without the lock.
        drop(empty);
    }
}

impl HostBlock for Block {
    fn size(&self) -> usize {
        self.bytes
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: a part of the slab that is this block's alone, all written; borrowed as the block is.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

/// Whether all of `bytes` can be copied without the processor's help. A context is current.
pub(super) fn is_pinned(bytes: &[u8]) -> bool {
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    [first, last].into_iter().all(|byte| {
        let mut kind = 0_u32;
        // SAFETY: the attribute is a 32-bit number; an address that the driver does not know is an error, not undefined.
        let asked = unsafe {
            cuPointerGetAttribute(
                std::ptr::from_mut(&mut kind).cast(),
                CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                std::ptr::from_ref(byte) as sys::CUdeviceptr,
            )
        };
        asked.result().is_ok() && kind == CUmemorytype::CU_MEMORYTYPE_HOST as u32
    })
}
