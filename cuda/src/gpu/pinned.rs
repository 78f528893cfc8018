//! Pinned host memory that files are read into: the device copies from it without the processor's help.

use std::sync::Arc;

use cudarc::driver::sys::{CUmemorytype, CUpointer_attribute, cuPointerGetAttribute};
use cudarc::driver::{CudaContext, result, sys};
use dsa80_reference::buffers::{HostBlock, HostMemory};

/// Pinned memory for copies to any GPU of the process.
#[derive(Debug)]
pub(super) struct Pinned(pub(super) Arc<CudaContext>);

impl HostMemory for Pinned {
    fn alloc(&self, bytes: usize) -> Option<Box<dyn HostBlock>> {
        self.0.bind_to_thread().ok()?;
        // SAFETY: plain pinned memory, freed once, when the block is dropped.
        let start = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }.ok()?.cast::<u8>();
        // SAFETY: as many bytes that nothing else uses; a read of bytes that were never written must find some.
        unsafe { start.write_bytes(0, bytes) };
        Some(Box::new(Block { start, bytes, context: Arc::clone(&self.0) }))
    }
}

struct Block {
    start: *mut u8,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: the memory belongs to the block alone, which gives it out by its own borrows.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl HostBlock for Block {
    fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with as many bytes, all written; borrowed as the block is.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // A destructor has nobody to tell; a broken context has said so before.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `alloc`, and freed once; whoever copied from it has waited.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
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
