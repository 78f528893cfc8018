//! A device that computes nothing and counts: how much memory a model takes is known before any of it is allocated.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dsa80_reference::{Error, Result};

use crate::device::{Device, Launch, Limits};

/// What allocations of a GPU are rounded up to.
const GRANULARITY: u64 = 512;

/// Takes the place of a GPU in a rehearsal: allocations are counted, launches do nothing, and all memory reads as zeros.
#[derive(Debug)]
pub struct Counting {
    limits: Limits,
    allocated: Allocated,
}

/// Bytes that are allocated on a [`Counting`] device.
#[derive(Debug, Clone, Default)]
pub struct Allocated(Arc<AtomicU64>);

/// An allocation that holds nothing, counted until its last clone is dropped.
#[derive(Debug, Clone)]
pub struct CountedBuffer(Arc<Counted>);

#[derive(Debug)]
struct Counted {
    name: Box<str>,
    bytes: usize,
    counted: u64,
    allocated: Allocated,
}

impl Counting {
    /// A device that looks like the one with these limits.
    pub fn new(limits: Limits) -> Self {
        Self { limits, allocated: Allocated::default() }
    }

    /// The counter, which outlives the device.
    pub fn allocated(&self) -> Allocated {
        self.allocated.clone()
    }
}

impl Allocated {
    /// Bytes now.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl CountedBuffer {
    fn require(&self, offset: usize, length: usize) -> Result<()> {
        if offset.checked_add(length).is_some_and(|end| end <= self.0.bytes) {
            return Ok(());
        }
        let Counted { name, bytes, .. } = &*self.0;
        let message = format!("`{name}` has {bytes} bytes; {length} from {offset} on were asked for");
        Err(Error::Backend { backend: "counting", message })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.allocated.0.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

impl Device for Counting {
    type Buffer = CountedBuffer;
    type Graph = ();

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<CountedBuffer> {
        let counted = (bytes.max(1) as u64).next_multiple_of(GRANULARITY);
        self.allocated.0.fetch_add(counted, Ordering::Relaxed);
        let allocated = self.allocated.clone();
        Ok(CountedBuffer(Arc::new(Counted { name: name.into(), bytes, counted, allocated })))
    }

    fn write(&self, buffer: &CountedBuffer, offset: usize, bytes: &[u8]) -> Result<()> {
        buffer.require(offset, bytes.len())
    }

    fn read(&self, buffer: &CountedBuffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        buffer.require(offset, bytes.len())?;
        bytes.fill(0);
        Ok(())
    }

    fn launch(&self, _launch: &Launch<'_, CountedBuffer>) -> Result<()> {
        Ok(())
    }

    fn capture(&self, mut launches: impl FnMut() -> Result<()>) -> Result<()> {
        launches()
    }

    fn replay(&self, _graph: &()) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allocated_is_counted_until_it_is_dropped() {
        let device = Counting::new(Limits::a100());
        let allocated = device.allocated();
        let one = device.alloc("one", 1000).unwrap();
        let two = device.alloc("two", 0).unwrap();
        assert_eq!(allocated.bytes(), 1024 + 512);
        let mut bytes = [1; 4];
        device.read(&one, 996, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4]);
        let error = device.write(&one, 997, &bytes).unwrap_err().to_string();
        assert!(error.contains("`one` has 1000 bytes; 4 from 997"), "{error}");
        drop((one, two, device));
        assert_eq!(allocated.bytes(), 0);
    }
}
