//! Device memory that errors can call by its name.

use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaContext, result};
use dsa80_reference::{Error, Result};

use super::{driver_message, refuse};

/// An allocation on a GPU, freed with its last clone.
#[derive(Debug, Clone)]
pub struct GpuBuffer(Arc<Allocation>);

#[derive(Debug)]
struct Allocation {
    pointer: CUdeviceptr,
    bytes: usize,
    name: Box<str>,
    context: Arc<CudaContext>,
}

impl GpuBuffer {
    pub(super) fn alloc(context: &Arc<CudaContext>, name: &str, bytes: usize) -> Result<Self> {
        context.bind_to_thread().map_err(|error| refuse(driver_message(error)))?;
        // SAFETY: the context is current; the driver refuses an allocation of nothing, hence the 1.
        let pointer = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| {
            let free = context.mem_get_info().map_or(String::new(), |(free, total)| {
                format!(" ({} of {} MiB are free)", free >> 20, total >> 20)
            });
            refuse(format!("`{name}` of {bytes} bytes cannot be allocated{free}: {}", driver_message(error)))
        })?;
        Ok(Self(Arc::new(Allocation { pointer, bytes, name: name.into(), context: context.clone() })))
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// The name that was given at allocation.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(super) fn pointer(&self) -> CUdeviceptr {
        self.0.pointer
    }

    /// The address of `offset`, from which `length` bytes lie inside.
    pub(super) fn range(&self, offset: usize, length: usize) -> Result<CUdeviceptr> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.0.bytes);
        if !inside {
            return Err(Error::Backend {
                backend: "cuda",
                message: format!(
                    "`{}` has {} bytes; {length} from {offset} on were asked for",
                    self.0.name, self.0.bytes
                ),
            });
        }
        Ok(self.0.pointer + offset as CUdeviceptr)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // A destructor has nobody to tell; a broken context has said so before.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the pointer came from `malloc_sync` and is freed once; the driver waits for work that uses it.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}
