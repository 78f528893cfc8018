//! Pinned host memory that files are read into: the device copies from it without the processor's help.

use std::sync::{Arc, Mutex, PoisonError};

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
    /// The slab that blocks are cut from, and how much of it is given out.
    current: Mutex<Option<(Arc<Slab>, usize)>>,
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
        Self { context, current: Mutex::default() }
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
        // A panic elsewhere leaves a slab that is whole.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let room = current.take().filter(|(slab, used)| slab.bytes - used >= bytes);
        let (slab, offset) = match room {
            Some(room) => room,
            None => (Slab::alloc(&self.context, bytes.max(SLAB))?, 0),
        };
        *current = Some((Arc::clone(&slab), (offset + bytes).next_multiple_of(ALIGNMENT).min(slab.bytes)));
        Some(Box::new(Block { slab, offset, bytes }))
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
