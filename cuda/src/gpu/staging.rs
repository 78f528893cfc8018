//! Large copies to a GPU through pinned memory: a copy to a slot by a few threads while the device fetches the slot before it.
//!
//! The driver takes pageable memory through slots of its own, by one thread.

use std::sync::Arc;

use cudarc::driver::sys::{CUdeviceptr, CUevent, CUevent_flags, CUstream};
use cudarc::driver::{CudaContext, DriverError, result};

/// Bytes of a slot.
const SLOT: usize = 8 << 20;
/// One that is filled, one that is fetched, and one on either side that may be late.
const SLOTS: usize = 4;
/// Threads that fill a slot.
const THREADS: usize = 4;
/// Less is copied by one thread.
const SMALLEST_SHARE: usize = 256 << 10;

/// Copies of fewer bytes are left to the driver, which takes them at once.
pub(super) const SMALLEST: usize = 64 << 10;

/// Pinned memory in slots, used in turn.
#[derive(Debug)]
pub(super) struct Staging {
    slots: Vec<Slot>,
    next: usize,
    context: Arc<CudaContext>,
}

#[derive(Debug)]
struct Slot {
    pinned: *mut u8,
    /// Reached when the device has fetched the slot.
    fetched: CUevent,
}

// SAFETY: the pointer is to memory that only its slot uses, the event a name that the driver gives out; the driver locks what it stands for.
unsafe impl Send for Slot {}

impl Staging {
    /// Allocates the slots.
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        context.bind_to_thread()?;
        let mut staging = Self { slots: Vec::with_capacity(SLOTS), next: 0, context: Arc::clone(context) };
        for _ in 0..SLOTS {
            let fetched = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            // SAFETY: plain pinned memory, freed once, when the slot is dropped.
            match unsafe { result::malloc_host(SLOT, 0) } {
                Ok(pinned) => staging.slots.push(Slot { pinned: pinned.cast(), fetched }),
                Err(error) => {
                    // SAFETY: created above, and nothing uses it.
                    unsafe { result::event::destroy(fetched) }?;
                    return Err(error);
                }
            }
        }
        Ok(staging)
    }

    /// Copies `bytes` to `destination` in the order of `stream`. When it returns, `bytes` has been read.
    ///
    /// # Safety
    /// `destination` has as many bytes, and is alive until the stream has come to them; the context is current.
    pub(super) unsafe fn copy(
        &mut self,
        mut destination: CUdeviceptr,
        bytes: &[u8],
        stream: CUstream,
    ) -> Result<(), DriverError> {
        for part in bytes.chunks(SLOT) {
            let slot = &self.slots[self.next % SLOTS];
            self.next += 1;
            // SAFETY: the event is alive; one that was never recorded is reached already.
            unsafe { result::event::synchronize(slot.fetched) }?;
            // SAFETY: the slot has SLOT bytes, and nothing else uses them: the device has fetched what was there.
            let pinned = unsafe { std::slice::from_raw_parts_mut(slot.pinned, part.len()) };
            copy_by_threads(part, pinned);
            // SAFETY: the caller's promise of the destination; the source is not written again before the event is reached.
            unsafe {
                result::memcpy_htod_async(destination, pinned, stream)?;
                result::event::record(slot.fetched, stream)?;
            }
            destination += part.len() as CUdeviceptr;
        }
        Ok(())
    }
}

fn copy_by_threads(from: &[u8], to: &mut [u8]) {
    let share = from.len().div_ceil(THREADS).max(SMALLEST_SHARE);
    if from.len() <= share {
        return to.copy_from_slice(from);
    }
    std::thread::scope(|scope| {
        for (from, to) in from.chunks(share).zip(to.chunks_mut(share)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A destructor has nobody to tell; a broken context has said so before.
        if self.context.bind_to_thread().is_err() {
            return;
        }
        for Slot { pinned, fetched } in self.slots.drain(..) {
            // SAFETY: the device is done with the slot, or broken; both are freed once.
            unsafe {
                let _ = result::event::synchronize(fetched);
                let _ = result::event::destroy(fetched);
                let _ = result::free_host(pinned.cast());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_copy_all_of_it() {
        for len in [0, 1, SMALLEST_SHARE, SMALLEST_SHARE + 1, (1 << 20) + 3, SLOT] {
            let from: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
            let mut to = vec![0xff; len];
            copy_by_threads(&from, &mut to);
            assert!(from == to, "{len} bytes");
        }
    }
}
