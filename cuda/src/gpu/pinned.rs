//! Pinned host memory that files are read into: the device copies from it without the processor's help.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use cudarc::driver::sys::{CUmemorytype, CUpointer_attribute, cuPointerGetAttribute};
use cudarc::driver::{CudaContext, result, sys};
use dsa80_reference::buffers::{HostBlock, HostMemory};

/// What the driver is asked for at a time: pinning costs as much for a page as for many.
const SLAB: usize = 128 << 20;
/// Where blocks begin: what a disk reads to, and no two blocks share.
const ALIGNMENT: usize = 4096;

/// Pinned memory for copies to any GPU of the process.
#[derive(Debug)]
pub(super) struct Pinned {
    context: Arc<CudaContext>,
    slabs: Mutex<Slabs>,
}

#[derive(Debug, Default)]
struct Slabs {
    /// The slab that blocks are cut from, and how much of it is given out.
    current: Option<(Arc<Slab>, usize)>,
    /// The one after it, on its way: whoever reads a file does not wait for pages to be pinned.
    next: Option<JoinHandle<Option<Arc<Slab>>>>,
}

/// Memory of the driver, freed with the last of its blocks.
#[derive(Debug)]
struct Slab {
    start: *mut u8,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: the memory is plain, and each part of it belongs to one block.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Pinned {
    pub(super) fn new(context: Arc<CudaContext>) -> Self {
        Self { context, slabs: Mutex::default() }
    }
}

impl Slab {
    fn alloc(context: &Arc<CudaContext>, bytes: usize) -> Option<Arc<Self>> {
        context.bind_to_thread().ok()?;
        // SAFETY: plain pinned memory, freed once, when the slab is dropped.
        let start = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }.ok()?.cast::<u8>();
        // SAFETY: as many bytes that nothing else uses yet; whoever reads what was never written finds zeros.
        unsafe { start.write_bytes(0, bytes) };
        Some(Arc::new(Self { start, bytes, context: Arc::clone(context) }))
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

impl HostMemory for Pinned {
    fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>> {
        if bytes > SLAB {
            let slab = Slab::alloc(&self.context, bytes)?;
            return Some(Box::new(Block { slab, offset: 0, bytes }));
        }
        // A panic elsewhere leaves slabs that are whole.
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let room = slabs.current.take().filter(|(slab, used)| slab.bytes - used >= bytes);
        let (slab, offset) = match room {
            Some(room) => room,
            None => (slabs.next(&self.context)?, 0),
        };
        let used = (offset + bytes).next_multiple_of(ALIGNMENT).min(slab.bytes);
        slabs.current = Some((Arc::clone(&slab), used));
        Some(Box::new(Block { slab, offset, bytes }))
    }
}

impl Slabs {
    /// A new slab; the one after it is begun.
    fn next(&mut self, context: &Arc<CudaContext>) -> Option<Arc<Slab>> {
        let begun = self.next.take().and_then(|slab| slab.join().ok()).flatten();
        let slab = begun.or_else(|| Slab::alloc(context, SLAB))?;
        let context = Arc::clone(context);
        self.next = Some(std::thread::spawn(move || Slab::alloc(&context, SLAB)));
        Some(slab)
    }
}

struct Block {
    slab: Arc<Slab>,
    offset: usize,
    bytes: usize,
}

impl HostBlock for Block {
    fn bytes(&self) -> &[u8] {
        // SAFETY: a part of the slab that is this block's alone, all written; borrowed as the block is.
        unsafe { std::slice::from_raw_parts(self.slab.start.add(self.offset), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.slab.start.add(self.offset), self.bytes) }
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
