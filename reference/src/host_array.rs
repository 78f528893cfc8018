//! Arrays of weights on their way to a device.

use std::fmt;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;

use crate::buffers::Lent;

/// An array in host memory: a vector, or memory that [`buffers`](crate::buffers) lends while a model is loaded and gets back when the array
/// is dropped.
pub struct HostArray<T: Pod>(Memory<T>);

enum Memory<T> {
    Own(Vec<T>),
    Lent(Lent),
}

impl<T: Pod> HostArray<T> {
    pub(crate) fn lent(memory: Lent) -> Self {
        Self(Memory::Lent(memory))
    }

    /// The elements as a vector; those in lent memory are copied.
    pub fn into_vec(self) -> Vec<T> {
        match self.0 {
            Memory::Own(elements) => elements,
            Memory::Lent(memory) => bytemuck::cast_slice(memory.bytes()).to_vec(),
        }
    }
}

impl<T: Pod> Deref for HostArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Memory::Own(elements) => elements,
            Memory::Lent(memory) => bytemuck::cast_slice(memory.bytes()),
        }
    }
}

impl<T: Pod> DerefMut for HostArray<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Memory::Own(elements) => elements,
            Memory::Lent(memory) => bytemuck::cast_slice_mut(memory.bytes_mut()),
        }
    }
}

impl<T: Pod> From<Vec<T>> for HostArray<T> {
    fn from(elements: Vec<T>) -> Self {
        Self(Memory::Own(elements))
    }
}

impl<T: Pod> FromIterator<T> for HostArray<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        Vec::from_iter(elements).into()
    }
}

impl<T: Pod> Clone for HostArray<T> {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl<T: Pod + PartialEq> PartialEq for HostArray<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for HostArray<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}
