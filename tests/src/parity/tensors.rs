//! Tensors on both sides: the oracle's and the device's.

use dsa80_cuda::{CudaBatch, CudaTensor, Device};
use dsa80_reference::cpu::{CpuBatch, CpuTensor};
use dsa80_reference::{Batch, DType, DeviceTensor, HostData, HostTensor, Kernels, Result};
use half::{bf16, f16};

use super::{TestDevice, oracle};

/// What poisons memory that a kernel must write: a NaN in every float type and in e4m3, and no index.
const POISON: u8 = 0xff;

/// One tensor, twice.
#[derive(Debug)]
pub struct Pair {
    /// The oracle's.
    pub host: CpuTensor<f64>,
    /// The device's.
    pub device: CudaTensor<TestDevice>,
}

/// A weight's elements as they lie in memory.
pub fn weight_bytes(weight: &HostTensor) -> &[u8] {
    match &weight.data {
        HostData::Bf16(data) => bytemuck::cast_slice(data),
        HostData::F16(data) => bytemuck::cast_slice(data),
        HostData::F32(data) => bytemuck::cast_slice(data),
    }
}

impl Pair {
    /// An `Act` or `Float` tensor of `values`, rounded to bf16 or f32 on both sides.
    pub fn new(device: &TestDevice, name: &str, dtype: DType, shape: &[usize], values: &[f64]) -> Self {
        let mut pair = Self::poisoned(device, name, dtype, shape);
        let (rounded, bytes): (Vec<f64>, Vec<u8>) = match dtype {
            DType::Act => {
                let values: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x as f32)).collect();
                (values.iter().map(|x| x.to_f64()).collect(), bytemuck::cast_slice(&values).to_vec())
            }
            DType::Float => {
                let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
                (values.iter().map(|&x| f64::from(x)).collect(), bytemuck::cast_slice(&values).to_vec())
            }
            other => panic!("{name}: a tensor of {other} is not made of numbers"),
        };
        done(oracle().write(&rounded, &mut pair.host));
        done(device.write(pair.device.buffer(), 0, &bytes));
        pair
    }

    /// An `Index` tensor.
    pub fn index(device: &TestDevice, name: &str, shape: &[usize], values: &[i32]) -> Self {
        let mut pair = Self::poisoned(device, name, DType::Index, shape);
        done(oracle().write_index(values, &mut pair.host));
        done(device.write(pair.device.buffer(), 0, bytemuck::cast_slice(values)));
        pair
    }

    /// An 8-bit cache.
    pub fn bytes(device: &TestDevice, name: &str, shape: &[usize], values: &[u8]) -> Self {
        let mut pair = Self::poisoned(device, name, DType::Fp8, shape);
        done(oracle().write_bytes(values, &mut pair.host));
        done(device.write(pair.device.buffer(), 0, values));
        pair
    }

    /// A dense weight of `values`, rounded to `dtype` on both sides.
    pub fn weight(device: &TestDevice, name: &str, dtype: DType, shape: &[usize], values: &[f64]) -> Self {
        let narrow = values.iter().map(|&x| x as f32);
        let data = match dtype {
            DType::Bf16 => HostData::Bf16(narrow.map(bf16::from_f32).collect()),
            DType::F16 => HostData::F16(narrow.map(f16::from_f32).collect()),
            DType::F32 => HostData::F32(narrow.collect()),
            other => panic!("{name}: {other} is no weight type"),
        };
        let tensor = done(CudaTensor::alloc(device, name, dtype, shape));
        let host = HostTensor { shape: shape.to_vec(), data };
        done(device.write(tensor.buffer(), 0, weight_bytes(&host)));
        let host = done(oracle().upload(host));
        Self { host, device: tensor }
    }

    /// An output, full of NaN (indices: -1).
    pub fn poisoned(device: &TestDevice, name: &str, dtype: DType, shape: &[usize]) -> Self {
        Self { host: done(oracle().alloc(dtype, shape)), device: poisoned(device, name, dtype, shape) }
    }
}

/// A device tensor full of NaN (indices: -1).
pub fn poisoned(device: &TestDevice, name: &str, dtype: DType, shape: &[usize]) -> CudaTensor<TestDevice> {
    let tensor = done(CudaTensor::alloc(device, name, dtype, shape));
    done(device.write(tensor.buffer(), 0, &vec![POISON; tensor.len() * width(dtype)]));
    tensor
}

/// The bytes of a device tensor.
pub fn read_bytes(device: &TestDevice, tensor: &CudaTensor<TestDevice>) -> Vec<u8> {
    let mut bytes = vec![0; tensor.len() * width(tensor.dtype())];
    done(device.read(tensor.buffer(), 0, &mut bytes));
    bytes
}

/// The numbers of a device tensor.
pub fn read(device: &TestDevice, tensor: &CudaTensor<TestDevice>) -> Vec<f64> {
    numbers(tensor.dtype(), &read_bytes(device, tensor))
}

/// The numbers that the bytes of a device tensor stand for.
pub fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let halves = || bytes.chunks_exact(2).map(|x| u16::from_le_bytes([x[0], x[1]]));
    match dtype {
        DType::Act | DType::Bf16 => halves().map(|x| bf16::from_bits(x).to_f64()).collect(),
        DType::F16 => halves().map(|x| f16::from_bits(x).to_f64()).collect(),
        DType::Float | DType::F32 => {
            bytes.chunks_exact(4).map(|x| f64::from(f32::from_le_bytes([x[0], x[1], x[2], x[3]]))).collect()
        }
        other => panic!("a tensor of {other} is not made of numbers"),
    }
}

/// The integers of a device tensor.
pub fn read_index(device: &TestDevice, tensor: &CudaTensor<TestDevice>) -> Vec<i32> {
    assert_eq!(tensor.dtype(), DType::Index);
    integers(&read_bytes(device, tensor))
}

/// The integers that bytes of device memory stand for.
pub fn integers(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|x| i32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect()
}

/// A batch on both sides.
pub fn batch(device: &TestDevice, batch: &Batch) -> (CpuBatch, CudaBatch<TestDevice>) {
    let (tokens, seqs, blocks) = (batch.num_tokens(), batch.num_seqs(), batch.max_blocks);
    let mut host = done(oracle().alloc_batch(tokens, seqs, blocks));
    done(oracle().upload_batch(batch, &mut host));
    let mut on_device = done(CudaBatch::alloc(device, tokens, seqs, blocks));
    done(on_device.upload(device, batch));
    (host, on_device)
}

fn width(dtype: DType) -> usize {
    match dtype {
        DType::Fp8 => 1,
        DType::Act | DType::Bf16 | DType::F16 => 2,
        DType::Float | DType::Index | DType::F32 => 4,
    }
}

/// What must work for a test to mean anything.
#[track_caller]
fn done<T>(outcome: Result<T>) -> T {
    outcome.unwrap_or_else(|error| panic!("{error}"))
}
