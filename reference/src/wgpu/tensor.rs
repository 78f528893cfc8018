//! Tensors in device memory, and what launchers ask of them.

use super::memory::Pooled;
use crate::error::{Error, Result};
use crate::tensor::{DType, DeviceTensor};

/// The types of dense weights, in the order of their numbers in `prelude.wgsl`.
pub(super) const WEIGHTS: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

/// A tensor of `Wgpu`: dense, row-major, a fixed allocation with a variable shape. `Act` is bf16, two in a word, or f32.
#[derive(Debug)]
pub struct WgpuTensor {
    shape: Vec<usize>,
    pub(super) dtype: DType,
    /// Of an element, in bytes.
    pub(super) width: usize,
    capacity: usize,
    memory: Pooled,
}

impl WgpuTensor {
    pub(super) fn new(dtype: DType, width: usize, shape: &[usize], memory: Pooled) -> Self {
        Self { shape: shape.to_vec(), dtype, width, capacity: shape.iter().product(), memory }
    }

    pub(super) fn buffer(&self) -> &wgpu::Buffer {
        &self.memory.buffer
    }

    /// Elements in use.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether these are f32, floats or activations.
    pub(super) fn is_floats(&self) -> bool {
        self.dtype == DType::Float || (self.dtype == DType::Act && self.width == 4)
    }

    /// The number of a weight's type in `prelude.wgsl`, as a constant.
    pub(super) fn weight_type(&self) -> f64 {
        WEIGHTS.iter().position(|&dtype| dtype == self.dtype).unwrap_or_default() as f64
    }

    /// The shape as an array, or an error that says how many dimensions were expected.
    pub(super) fn dims<const N: usize>(
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
    pub(super) fn expect(
        &self,
        kernel: &'static str,
        tensor: &'static str,
        ok: bool,
        expected: impl FnOnce() -> String,
    ) -> Result<()> {
        if ok { Ok(()) } else { Err(self.bad_shape(kernel, tensor, expected())) }
    }

    /// Fails unless the shape is exactly `expected`.
    pub(super) fn expect_shape(
        &self,
        kernel: &'static str,
        tensor: &'static str,
        expected: &[usize],
    ) -> Result<()> {
        self.expect(kernel, tensor, self.shape == expected, || format!("{expected:?}"))
    }

    /// Fails unless there are as many elements as `values`.
    pub(super) fn expect_len(&self, kernel: &'static str, values: usize) -> Result<()> {
        self.expect(kernel, "tensor", self.len() == values, || {
            format!("the dimensions of the {values} values")
        })
    }

    /// Fails unless the element type is one of `dtypes`, which `expected` names.
    pub(super) fn expect_dtype(
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

    /// Fails unless this is an `Act` tensor.
    pub(super) fn expect_act(&self, kernel: &'static str, tensor: &'static str) -> Result<()> {
        self.expect_dtype(kernel, tensor, &[DType::Act], "activations")
    }

    /// Fails unless this is a `Float` tensor.
    pub(super) fn expect_float(&self, kernel: &'static str, tensor: &'static str) -> Result<()> {
        self.expect_dtype(kernel, tensor, &[DType::Float], "floats")
    }

    /// Fails unless this is an `Index` tensor.
    pub(super) fn expect_index(&self, kernel: &'static str, tensor: &'static str) -> Result<()> {
        self.expect_dtype(kernel, tensor, &[DType::Index], "indices (i32)")
    }

    /// Fails unless this is a dense weight.
    pub(super) fn expect_weight(&self, kernel: &'static str, tensor: &'static str) -> Result<()> {
        self.expect_dtype(kernel, tensor, &WEIGHTS, "weights")
    }

    /// Fails unless rows of activations are whole words: the last dimension is even.
    pub(super) fn expect_even(&self, kernel: &'static str, tensor: &'static str) -> Result<()> {
        let even = self.shape.last().is_none_or(|columns| columns.is_multiple_of(2));
        self.expect(kernel, tensor, even, || "an even last dimension, whose rows are whole words".into())
    }

    fn bad_shape(&self, kernel: &'static str, tensor: &'static str, expected: String) -> Error {
        Error::Shape { kernel, tensor, expected, found: self.shape.clone() }
    }
}

impl DeviceTensor for WgpuTensor {
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
