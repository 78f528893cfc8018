//! Tensors between host and device: conversions, and the same refusals as the oracle's.

use dsa80_reference::{DType, DeviceTensor, Error, HostData, HostTensor, Result};
use half::{bf16, f16};

use crate::device::Device;
use crate::tensor::{CudaTensor, element_bytes};

const NUMBERS: &[DType] = &[DType::Act, DType::Float];

pub(crate) fn alloc<D: Device>(device: &D, dtype: DType, shape: &[usize]) -> Result<CudaTensor<D>> {
    let bytes = shape.iter().try_fold(element_bytes(dtype), |bytes, &dim| bytes.checked_mul(dim));
    // Beyond this an address does not reach, whatever the device.
    if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Error::Backend {
            backend: "cuda",
            message: format!(
                "not enough memory for a tensor of shape {shape:?}; lower the batch or cache size"
            ),
        });
    }
    CudaTensor::alloc(device, &format!("{dtype} {shape:?}"), dtype, shape)
}

pub(crate) fn upload<D: Device>(device: &D, tensor: &HostTensor) -> Result<CudaTensor<D>> {
    if tensor.len() != tensor.shape.iter().product::<usize>() {
        return Err(Error::Shape {
            kernel: "upload",
            tensor: "tensor",
            expected: format!("the dimensions of {} elements", tensor.len()),
            found: tensor.shape.clone(),
        });
    }
    let uploaded = alloc(device, tensor.dtype(), &tensor.shape)?;
    device.write(uploaded.buffer(), 0, bytes(&tensor.data))?;
    Ok(uploaded)
}

fn bytes(data: &HostData) -> &[u8] {
    match data {
        HostData::Bf16(values) => bytemuck::cast_slice(values),
        HostData::F16(values) => bytemuck::cast_slice(values),
        HostData::F32(values) => bytemuck::cast_slice(values),
    }
}

pub(super) fn write<D: Device>(device: &D, values: &[f64], tensor: &CudaTensor<D>) -> Result<()> {
    expect_len(tensor, "write", values.len())?;
    tensor.expect_dtype("write", "tensor", NUMBERS, "activations or floats")?;
    if tensor.dtype() == DType::Act {
        let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f64(value)).collect();
        device.write(tensor.buffer(), 0, bytemuck::cast_slice(&rounded))
    } else {
        let rounded: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        device.write(tensor.buffer(), 0, bytemuck::cast_slice(&rounded))
    }
}

pub(super) fn write_index<D: Device>(device: &D, values: &[i32], tensor: &CudaTensor<D>) -> Result<()> {
    expect_len(tensor, "write_index", values.len())?;
    tensor.expect_dtype("write_index", "tensor", &[DType::Index], "indices (i32)")?;
    device.write(tensor.buffer(), 0, bytemuck::cast_slice(values))
}

pub(super) fn write_bytes<D: Device>(device: &D, values: &[u8], tensor: &CudaTensor<D>) -> Result<()> {
    expect_len(tensor, "write_bytes", values.len())?;
    tensor.expect_dtype("write_bytes", "tensor", &[DType::Fp8], "8-bit cache rows")?;
    device.write(tensor.buffer(), 0, values)
}

pub(super) fn read<D: Device>(device: &D, tensor: &CudaTensor<D>) -> Result<Vec<f64>> {
    match tensor.dtype() {
        DType::Act | DType::Bf16 => elements(device, tensor, |x: bf16| x.to_f64()),
        DType::F16 => elements(device, tensor, |x: f16| x.to_f64()),
        DType::Float | DType::F32 => elements(device, tensor, |x: f32| f64::from(x)),
        DType::Index | DType::Fp8 => Err(Error::DType {
            kernel: "read",
            tensor: "tensor",
            expected: "activations, floats or weights",
            found: tensor.dtype(),
        }),
    }
}

pub(super) fn read_index<D: Device>(device: &D, tensor: &CudaTensor<D>) -> Result<Vec<i32>> {
    tensor.expect_dtype("read_index", "tensor", &[DType::Index], "indices (i32)")?;
    elements(device, tensor, |x: i32| x)
}

pub(super) fn read_bytes<D: Device>(device: &D, tensor: &CudaTensor<D>) -> Result<Vec<u8>> {
    tensor.expect_dtype("read_bytes", "tensor", &[DType::Fp8], "8-bit cache rows")?;
    elements(device, tensor, |x: u8| x)
}

fn elements<D: Device, E: bytemuck::Pod, R>(
    device: &D,
    tensor: &CudaTensor<D>,
    widen: impl Fn(E) -> R,
) -> Result<Vec<R>> {
    let mut elements = vec![E::zeroed(); tensor.len()];
    device.read(tensor.buffer(), 0, bytemuck::cast_slice_mut(&mut elements))?;
    Ok(elements.into_iter().map(widen).collect())
}

fn expect_len<D: Device>(tensor: &CudaTensor<D>, kernel: &'static str, values: usize) -> Result<()> {
    tensor
        .expect(kernel, "tensor", tensor.len() == values, || format!("the dimensions of the {values} values"))
}
