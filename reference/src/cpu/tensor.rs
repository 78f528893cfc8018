//! Tensors in host memory.

use half::{bf16, f16};

use super::Real;
use crate::error::{Error, Result};
use crate::tensor::{DType, DeviceTensor, HostData, HostTensor};

/// The elements of a [`CpuTensor`].
#[derive(Debug, Clone)]
pub(crate) enum Storage<F> {
    /// Activations (`true`: rounded to bf16 when the oracle rounds) and floats (`false`).
    Real(Vec<F>, bool),
    Index(Vec<i32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
}

/// A tensor of the oracle: activations and floats in `F`, weights in the checkpoint's own type.
#[derive(Debug, Clone)]
pub struct CpuTensor<F> {
    shape: Vec<usize>,
    capacity: usize,
    pub(crate) storage: Storage<F>,
}

impl<F: Real> CpuTensor<F> {
    pub(crate) fn alloc(dtype: DType, shape: &[usize]) -> Result<Self> {
        let len = shape.iter().product();
        // Poison: a kernel that leaves an element unwritten must not look right by luck.
        let storage = match dtype {
            DType::Act => Storage::Real(vec![F::nan(); len], true),
            DType::Float => Storage::Real(vec![F::nan(); len], false),
            DType::Index => Storage::Index(vec![i32::MIN; len]),
            DType::Bf16 => Storage::Bf16(vec![bf16::NAN; len]),
            DType::F16 => Storage::F16(vec![f16::NAN; len]),
            DType::F32 => Storage::F32(vec![f32::NAN; len]),
        };
        Ok(Self { shape: shape.to_vec(), capacity: len, storage })
    }

    pub(crate) fn from_host(tensor: HostTensor) -> Result<Self> {
        if tensor.len() != tensor.shape.iter().product::<usize>() {
            return Err(Error::Shape {
                kernel: "upload",
                tensor: "tensor",
                expected: format!("the dimensions of {} elements", tensor.len()),
                found: tensor.shape,
            });
        }
        let storage = match tensor.data {
            HostData::Bf16(v) => Storage::Bf16(v),
            HostData::F16(v) => Storage::F16(v),
            HostData::F32(v) => Storage::F32(v),
        };
        Ok(Self { capacity: tensor.shape.iter().product(), shape: tensor.shape, storage })
    }

    /// Elements in use (the capacity may be larger).
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements in use of an `Act` or `Float` tensor.
    pub(crate) fn reals(&self, kernel: &'static str, tensor: &'static str) -> Result<&[F]> {
        match &self.storage {
            Storage::Real(v, _) => Ok(&v[..self.len()]),
            _ => Err(self.wrong_dtype(kernel, tensor, "activations or floats")),
        }
    }

    /// [`reals`](Self::reals), to write.
    pub(crate) fn reals_mut(&mut self, kernel: &'static str, tensor: &'static str) -> Result<&mut [F]> {
        let len = self.len();
        let error = self.wrong_dtype(kernel, tensor, "activations or floats");
        match &mut self.storage {
            Storage::Real(v, _) => Ok(&mut v[..len]),
            _ => Err(error),
        }
    }

    /// The elements in use of an `Index` tensor.
    pub(crate) fn indices(&self, kernel: &'static str, tensor: &'static str) -> Result<&[i32]> {
        match &self.storage {
            Storage::Index(v) => Ok(&v[..self.len()]),
            _ => Err(self.wrong_dtype(kernel, tensor, "indices (i32)")),
        }
    }

    /// [`indices`](Self::indices), to write.
    pub(crate) fn indices_mut(&mut self, kernel: &'static str, tensor: &'static str) -> Result<&mut [i32]> {
        let len = self.len();
        let error = self.wrong_dtype(kernel, tensor, "indices (i32)");
        match &mut self.storage {
            Storage::Index(v) => Ok(&mut v[..len]),
            _ => Err(error),
        }
    }

    /// A small weight (a norm's, a bias) widened to `F`.
    pub(crate) fn weights(&self, kernel: &'static str, tensor: &'static str) -> Result<Vec<F>> {
        let len = self.len();
        match &self.storage {
            Storage::Real(v, _) => Ok(v[..len].to_vec()),
            Storage::Bf16(v) => Ok(v[..len].iter().map(|&x| F::of_bf16(x)).collect()),
            Storage::F16(v) => Ok(v[..len].iter().map(|&x| F::of_f16(x)).collect()),
            Storage::F32(v) => Ok(v[..len].iter().map(|&x| F::of_f32(x)).collect()),
            Storage::Index(_) => Err(self.wrong_dtype(kernel, tensor, "weights")),
        }
    }

    /// Fails unless the shape is exactly `expected`.
    pub(crate) fn expect_shape(
        &self,
        kernel: &'static str,
        tensor: &'static str,
        expected: &[usize],
    ) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::Shape { kernel, tensor, expected: format!("{expected:?}"), found: self.shape.clone() })
    }

    /// The shape as an array, or an error that says how many dimensions were expected.
    pub(crate) fn dims<const N: usize>(
        &self,
        kernel: &'static str,
        tensor: &'static str,
    ) -> Result<[usize; N]> {
        self.shape.as_slice().try_into().map_err(|_| Error::Shape {
            kernel,
            tensor,
            expected: format!("{N} dimensions"),
            found: self.shape.clone(),
        })
    }

    fn wrong_dtype(&self, kernel: &'static str, tensor: &'static str, expected: &'static str) -> Error {
        Error::DType { kernel, tensor, expected, found: self.dtype() }
    }
}

impl<F: Real> DeviceTensor for CpuTensor<F> {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> DType {
        match self.storage {
            Storage::Real(_, true) => DType::Act,
            Storage::Real(_, false) => DType::Float,
            Storage::Index(_) => DType::Index,
            Storage::Bf16(_) => DType::Bf16,
            Storage::F16(_) => DType::F16,
            Storage::F32(_) => DType::F32,
        }
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
