//! Host arrays that are used again: while a model is loaded, the arrays of one layer are those of the layer before it. New memory costs the
//! system more than reading a file into memory that is there.
//!
//! Whoever reads takes its arrays here; a backend that has copied one to its device gives it back. [`clear`] ends the loading.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};

use crate::tensor::{HostData, HostExpert, HostInt4, HostLinear, HostTensor};

/// Kept at most, in bytes: two layers of a rank of eight.
const LIMIT: usize = 3 << 29;
/// Smaller arrays are cheap to make.
const SMALLEST: usize = 64 << 10;

/// Arrays by their lengths.
type ByLength<T> = HashMap<usize, Vec<Vec<T>>>;

#[derive(Debug, Default)]
struct Kept {
    bytes: usize,
    u32: ByLength<u32>,
    bf16: ByLength<bf16>,
    f16: ByLength<f16>,
    f32: ByLength<f32>,
}

static KEPT: Mutex<Option<Kept>> = Mutex::new(None);

fn kept() -> MutexGuard<'static, Option<Kept>> {
    // A panic elsewhere leaves arrays that are whole.
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An element of an array that is used again.
pub trait Element: sealed::Element {}

mod sealed {
    pub trait Element: Copy + Default {
        #[expect(private_interfaces, reason = "a sealed trait is not called from outside")]
        fn arrays(kept: &mut super::Kept) -> &mut super::ByLength<Self>;
    }
}

macro_rules! elements {
    ($($field:ident),*) => {$(
        impl sealed::Element for $field {
            #[expect(private_interfaces, reason = "a sealed trait is not called from outside")]
            fn arrays(kept: &mut Kept) -> &mut ByLength<Self> {
                &mut kept.$field
            }
        }

        impl Element for $field {}
    )*};
}

elements!(u32, bf16, f16, f32);

/// An array of `len` elements with any contents, to be written over.
pub fn take<T: Element>(len: usize) -> Vec<T> {
    let known = kept().as_mut().and_then(|kept| {
        let array = T::arrays(kept).get_mut(&len)?.pop()?;
        kept.bytes -= len * size_of::<T>();
        Some(array)
    });
    known.unwrap_or_else(|| vec![T::default(); len])
}

/// Keeps an array for the next who takes one of its length.
pub fn give_back<T: Element>(array: Vec<T>) {
    let bytes = array.len() * size_of::<T>();
    let mut kept = kept();
    let kept = kept.get_or_insert_default();
    if bytes >= SMALLEST && kept.bytes + bytes <= LIMIT {
        kept.bytes += bytes;
        T::arrays(kept).entry(array.len()).or_default().push(array);
    }
}

/// Frees what is kept.
pub fn clear() {
    *kept() = None;
}

impl HostTensor {
    /// Keeps the elements' array for the next who takes one.
    pub fn give_back(self) {
        match self.data {
            HostData::Bf16(array) => give_back(array),
            HostData::F16(array) => give_back(array),
            HostData::F32(array) => give_back(array),
        }
    }
}

impl HostInt4 {
    /// Keeps the arrays for the next who takes some.
    pub fn give_back(self) {
        give_back(self.weight_packed);
        self.scales.give_back();
        if let Some(zero_points) = self.zero_points {
            give_back(zero_points);
        }
    }
}

impl HostLinear {
    /// Keeps the arrays for the next who takes some.
    pub fn give_back(self) {
        match self {
            HostLinear::Dense(tensor) => tensor.give_back(),
            HostLinear::Int4(weight) => weight.give_back(),
            HostLinear::Random(_) => {}
        }
    }
}

impl HostExpert {
    /// Keeps the arrays for the next who takes some.
    pub fn give_back(self) {
        [self.gate_proj, self.up_proj, self.down_proj].into_iter().for_each(HostLinear::give_back);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test: what is kept belongs to the process.
    #[test]
    fn an_array_comes_back_to_the_next_of_its_length_and_type() {
        const LEN: usize = SMALLEST + 1;
        let mut array = take::<u32>(LEN);
        assert_eq!(array, vec![0; LEN]);
        array.fill(7);
        let address = array.as_ptr();
        give_back(array);
        assert_eq!(take::<f32>(LEN), vec![0.0; LEN]);
        assert_eq!(take::<u32>(LEN - 1), vec![0; LEN - 1]);
        let again = take::<u32>(LEN);
        assert_eq!((again.as_ptr(), again[LEN - 1]), (address, 7));
        assert_eq!(take::<u32>(LEN)[0], 0);
        // Small ones, and more than the limit, are not kept.
        give_back(vec![1_u32; 10]);
        assert_eq!(take::<u32>(10), [0; 10]);
        give_back(again);
        clear();
        assert_eq!(take::<u32>(LEN)[0], 0);
    }
}
