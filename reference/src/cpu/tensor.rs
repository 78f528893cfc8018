//! Tensors in host memory.

use half::{bf16, f16};

use super::{Cpu, Real};
use crate::error::{Error, Result};
use crate::tensor::{DType, DeviceTensor, HostData, HostTensor};

/// The elements of a [`CpuTensor`].
#[derive(Debug, Clone)]
pub(crate) enum Storage<F> {
    /// Activations (`true`: rounded to bf16 when the oracle rounds) and floats (`false`).
    Real(Vec<F>, bool),
    Index(Vec<i32>),
    Fp8(Vec<u8>),
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
        // Poison: a kernel that leaves an element unwritten must not look right by luck.
        let storage = match dtype {
            DType::Act => Storage::Real(filled(shape, F::nan())?, true),
            DType::Float => Storage::Real(filled(shape, F::nan())?, false),
            DType::Index => Storage::Index(filled(shape, i32::MIN)?),
            // A NaN code.
            DType::Fp8 => Storage::Fp8(filled(shape, 0xff)?),
            DType::Bf16 => Storage::Bf16(filled(shape, bf16::NAN)?),
            DType::F16 => Storage::F16(filled(shape, f16::NAN)?),
            DType::F32 => Storage::F32(filled(shape, f32::NAN)?),
        };
        Ok(Self { shape: shape.to_vec(), capacity: shape.iter().product(), storage })
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
            HostData::Bf16(v) => Storage::Bf16(v.into_vec()),
            HostData::F16(v) => Storage::F16(v.into_vec()),
            HostData::F32(v) => Storage::F32(v.into_vec()),
        };
        Ok(Self { capacity: tensor.shape.iter().product(), shape: tensor.shape, storage })
    }

    pub(super) fn write(&mut self, cpu: &Cpu<F>, values: &[f64]) -> Result<()> {
        self.expect_len("write", values.len())?;
        let is_act = self.dtype() == DType::Act;
        for (element, &value) in self.reals_mut("write", "tensor")?.iter_mut().zip(values) {
            *element = if is_act { cpu.act(F::of(value)) } else { F::of(value) };
        }
        Ok(())
    }

    pub(super) fn write_index(&mut self, values: &[i32]) -> Result<()> {
        self.expect_len("write_index", values.len())?;
        self.indices_mut("write_index", "tensor")?.copy_from_slice(values);
        Ok(())
    }

    pub(super) fn write_bytes(&mut self, values: &[u8]) -> Result<()> {
        self.expect_len("write_bytes", values.len())?;
        self.bytes_mut("write_bytes", "tensor")?.copy_from_slice(values);
        Ok(())
    }

    pub(super) fn read(&self) -> Result<Vec<f64>> {
        let len = self.len();
        match &self.storage {
            Storage::Real(v, _) => Ok(v[..len].iter().map(|x| x.wide()).collect()),
            Storage::Bf16(v) => Ok(v[..len].iter().map(|x| x.to_f64()).collect()),
            Storage::F16(v) => Ok(v[..len].iter().map(|x| x.to_f64()).collect()),
            Storage::F32(v) => Ok(v[..len].iter().map(|&x| f64::from(x)).collect()),
            Storage::Index(_) | Storage::Fp8(_) => {
                Err(self.wrong_dtype("read", "tensor", "activations, floats or weights"))
            }
        }
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

    /// The bytes in use of an `Fp8` tensor.
    pub(crate) fn bytes(&self, kernel: &'static str, tensor: &'static str) -> Result<&[u8]> {
        match &self.storage {
            Storage::Fp8(v) => Ok(&v[..self.len()]),
            _ => Err(self.wrong_dtype(kernel, tensor, "8-bit cache rows")),
        }
    }

    /// [`bytes`](Self::bytes), to write.
    pub(crate) fn bytes_mut(&mut self, kernel: &'static str, tensor: &'static str) -> Result<&mut [u8]> {
        let len = self.len();
        let error = self.wrong_dtype(kernel, tensor, "8-bit cache rows");
        match &mut self.storage {
            Storage::Fp8(v) => Ok(&mut v[..len]),
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
            Storage::Index(_) | Storage::Fp8(_) => Err(self.wrong_dtype(kernel, tensor, "weights")),
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

    fn expect_len(&self, kernel: &'static str, values: usize) -> Result<()> {
        if self.len() == values {
            return Ok(());
        }
        let expected = format!("the dimensions of the {values} values");
        Err(Error::Shape { kernel, tensor: "tensor", expected, found: self.shape.clone() })
    }

    pub(super) fn wrong_dtype(
        &self,
        kernel: &'static str,
        tensor: &'static str,
        expected: &'static str,
    ) -> Error {
        Error::DType { kernel, tensor, expected, found: self.dtype() }
    }
}

/// `shape`'s elements, all `value`, or an error where `vec!` would abort the process.
fn filled<E: Clone>(shape: &[usize], value: E) -> Result<Vec<E>> {
    let refuse = || Error::Backend {
        backend: "cpu",
        message: format!("not enough memory for a tensor of shape {shape:?}; lower the batch or cache size"),
    };
    let len = shape.iter().try_fold(1_usize, |len, &dim| len.checked_mul(dim)).ok_or_else(refuse)?;
    let mut elements = Vec::new();
    elements.try_reserve_exact(len).map_err(|_| refuse())?;
    elements.resize(len, value);
    Ok(elements)
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
            Storage::Fp8(_) => DType::Fp8,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    #[test]
    fn writing_rounds_activations_alone_and_only_when_asked_to() {
        let value = 1.0 + 1.0 / 1024.0;
        for (cpu, dtype, expected) in [
            (Cpu::<f64>::new(), DType::Act, value),
            (Cpu::rounding_to_bf16(), DType::Act, 1.0),
            (Cpu::rounding_to_bf16(), DType::Float, value),
        ] {
            let mut tensor = cpu.alloc(dtype, &[1]).unwrap();
            cpu.write(&[value], &mut tensor).unwrap();
            assert_eq!(cpu.read(&tensor).unwrap(), [expected]);
        }
    }

    #[test]
    fn allocations_are_poisoned_and_absurd_ones_are_errors() {
        let cpu = Cpu::<f32>::new();
        assert!(cpu.read(&cpu.alloc(DType::Act, &[2]).unwrap()).unwrap().iter().all(|x| x.is_nan()));
        assert_eq!(cpu.read_index(&cpu.alloc(DType::Index, &[1]).unwrap()).unwrap(), [i32::MIN]);
        for shape in [[usize::MAX, 2], [1 << 30, 1 << 30]] {
            let error = cpu.alloc(DType::Float, &shape).unwrap_err();
            assert!(matches!(error, Error::Backend { backend: "cpu", .. }), "{error}");
        }
    }

    #[test]
    fn a_smaller_shape_hides_the_rest_and_a_larger_one_is_refused() {
        let cpu = Cpu::<f32>::new();
        let mut tensor = cpu.alloc(DType::Index, &[3, 2]).unwrap();
        cpu.write_index(&[1, 2, 3, 4, 5, 6], &mut tensor).unwrap();
        tensor.set_rows(1).unwrap();
        assert_eq!(cpu.read_index(&tensor).unwrap(), [1, 2]);
        tensor.set_shape(&[6]).unwrap();
        assert_eq!(cpu.read_index(&tensor).unwrap(), [1, 2, 3, 4, 5, 6]);
        assert!(matches!(tensor.set_shape(&[7]), Err(Error::Capacity { capacity: 6, elements: 7, .. })));
    }

    #[test]
    fn reads_and_writes_check_type_and_length() {
        let cpu = Cpu::<f32>::new();
        let mut index = cpu.alloc(DType::Index, &[2]).unwrap();
        let mut float = cpu.alloc(DType::Float, &[2]).unwrap();
        assert!(matches!(cpu.read(&index), Err(Error::DType { kernel: "read", .. })));
        assert!(matches!(cpu.read_index(&float), Err(Error::DType { kernel: "read_index", .. })));
        assert!(matches!(cpu.write(&[0.0; 2], &mut index), Err(Error::DType { kernel: "write", .. })));
        assert!(matches!(cpu.write(&[0.0; 3], &mut float), Err(Error::Shape { kernel: "write", .. })));
        assert!(matches!(cpu.write_index(&[0; 2], &mut float), Err(Error::DType { .. })));
        assert!(matches!(cpu.write_index(&[0], &mut index), Err(Error::Shape { .. })));
        let mut bytes = cpu.alloc(DType::Fp8, &[2]).unwrap();
        assert_eq!(cpu.read_bytes(&bytes).unwrap(), [0xff; 2]);
        cpu.write_bytes(&[1, 2], &mut bytes).unwrap();
        assert_eq!(cpu.read_bytes(&bytes).unwrap(), [1, 2]);
        assert!(matches!(cpu.write_bytes(&[1], &mut bytes), Err(Error::Shape { kernel: "write_bytes", .. })));
        assert!(matches!(cpu.write_bytes(&[1, 2], &mut float), Err(Error::DType { .. })));
        assert!(matches!(cpu.read_bytes(&float), Err(Error::DType { kernel: "read_bytes", .. })));
        assert!(matches!(cpu.read(&bytes), Err(Error::DType { found: DType::Fp8, .. })));
        let short = HostTensor { shape: vec![2, 2], data: HostData::F32(vec![0.0; 3].into()) };
        assert!(matches!(cpu.upload(short), Err(Error::Shape { kernel: "upload", .. })));
    }
}
