//! Tensors in device memory.

use dsa80_reference::{DType, DeviceTensor, Error, Result};

use crate::device::Device;

/// A tensor on a [`Device`]: dense, row-major, a fixed allocation with a variable shape.
#[derive(Debug)]
pub struct CudaTensor<D: Device> {
    shape: Vec<usize>,
    dtype: DType,
    capacity: usize,
    buffer: D::Buffer,
}

impl<D: Device> CudaTensor<D> {
    /// Allocates; the contents are unspecified.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, name: &str, dtype: DType, shape: &[usize]) -> Result<Self> {
        let capacity = shape.iter().product();
        let buffer = device.alloc(name, capacity * element_bytes(dtype))?;
        Ok(Self { shape: shape.to_vec(), dtype, capacity, buffer })
    }

    /// The same memory, with a shape of its own.
    pub(crate) fn alias(&self) -> Self {
        let Self { shape, dtype, capacity, buffer } = self;
        Self { shape: shape.clone(), dtype: *dtype, capacity: *capacity, buffer: buffer.clone() }
    }

    /// The memory.
    pub fn buffer(&self) -> &D::Buffer {
        &self.buffer
    }

    /// Elements in use.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether no element is in use.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape as an array, or an error that says how many dimensions were expected.
    pub(crate) fn dims<const N: usize>(
        &self,
        kernel: &'static str,
        tensor: &'static str,
    ) -> Result<[usize; N]> {
        self.shape
            .as_slice()
            .try_into()
            .map_err(|_| self.bad_shape(kernel, tensor, format!("{N} dimensions")))
    }

    /// Fails with the shape unless `ok`.
    pub(crate) fn expect(
        &self,
        kernel: &'static str,
        tensor: &'static str,
        ok: bool,
        expected: impl FnOnce() -> String,
    ) -> Result<()> {
        if ok { Ok(()) } else { Err(self.bad_shape(kernel, tensor, expected())) }
    }

    /// Fails unless the element type is one of `dtypes`, which `expected` names.
    pub(crate) fn expect_dtype(
        &self,
        kernel: &'static str,
        tensor: &'static str,
        dtypes: &[DType],
        expected: &'static str,
    ) -> Result<()> {
        if dtypes.contains(&self.dtype) {
            return Ok(());
        }
        Err(Error::DType { kernel, tensor, expected, found: self.dtype })
    }

    fn bad_shape(&self, kernel: &'static str, tensor: &'static str, expected: String) -> Error {
        Error::Shape { kernel, tensor, expected, found: self.shape.clone() }
    }
}

impl<D: Device> DeviceTensor for CudaTensor<D> {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn set_shape(&mut self, shape: &[usize]) -> Result<()> {
        let elements = shape.iter().product();
        if elements > self.capacity {
            return Err(Error::Capacity { shape: shape.to_vec(), elements, capacity: self.capacity });
        }
        self.shape = shape.to_vec();
        Ok(())
    }
}

/// Bytes of one element on a GPU.
pub(crate) fn element_bytes(dtype: DType) -> usize {
    match dtype {
        DType::Fp8 => 1,
        DType::Act | DType::Bf16 | DType::F16 => 2,
        DType::Float | DType::Index | DType::F32 => 4,
    }
}
