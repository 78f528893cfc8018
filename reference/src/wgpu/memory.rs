//! Buffers, which are used again, and copies between them and the host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};

use super::act::ActType;
use super::context::{WgpuContext, lock, refuse};
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuOptions};
use crate::error::{Error, Result};
use crate::tensor::{DType, HostData, HostTensor};

/// Bytes that are worth a submission of their own.
const LARGE: usize = 1 << 20;

/// Kept for the next of its size, in bytes, all together.
const KEPT: u64 = 1 << 28;

/// Buffers of one backend that are not in use. A backend has its own: in the order of its launches a buffer may be used again at once.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    bytes: u64,
    buffers: HashMap<u64, Vec<wgpu::Buffer>>,
}

impl Pool {
    fn take(&self, size: u64) -> Option<wgpu::Buffer> {
        let mut free = lock(&self.free);
        let buffer = free.buffers.get_mut(&size)?.pop()?;
        free.bytes -= size;
        Some(buffer)
    }

    fn give_back(&self, buffer: wgpu::Buffer) {
        let (mut free, size) = (lock(&self.free), buffer.size());
        if free.bytes + size <= KEPT {
            free.bytes += size;
            free.buffers.entry(size).or_default().push(buffer);
        }
    }
}

/// A buffer that goes back to its pool.
#[derive(Debug)]
pub(super) struct Pooled {
    pub(super) buffer: wgpu::Buffer,
    pool: Arc<Pool>,
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.pool.give_back(self.buffer.clone());
    }
}

impl WgpuContext {
    fn no_room(&self, shape: &[usize]) -> Error {
        let half = self.or_half();
        refuse(format!(
            "not enough memory for a tensor of shape {shape:?}; lower the batch or cache size{half}"
        ))
    }

    /// What else takes less memory.
    pub(super) fn or_half(&self) -> &'static str {
        match self.act() {
            ActType::Bf16 => "",
            ActType::F32 => ", or compute in bf16, whose activations take half",
        }
    }
}

impl Wgpu {
    /// Opens an adapter and a backend on it.
    ///
    /// # Errors
    /// There is no adapter, or none that the kernels run on.
    pub fn open(options: &WgpuOptions) -> Result<Self> {
        WgpuContext::open(options).map(Self::new)
    }

    /// A tensor whose contents are unspecified: a launcher's room for what lies between its launches, too.
    pub(super) fn tensor(&self, dtype: DType, shape: &[usize]) -> Result<WgpuTensor> {
        let elements = shape.iter().try_fold(1_usize, |elements, &dim| elements.checked_mul(dim));
        let width = self.context.act().element_bytes(dtype);
        let bytes = elements.and_then(|elements| elements.checked_mul(width));
        let most = self.context.limits.max_buffer_size;
        let size = bytes.and_then(|bytes| bytes.max(4).checked_next_multiple_of(256)).map(|size| size as u64);
        let size = size.filter(|&size| size <= most).ok_or_else(|| self.context.no_room(shape))?;
        let buffer = match self.pool.take(size) {
            Some(buffer) => buffer,
            None => self.create(size, wgpu::BufferUsages::STORAGE).map_err(|message| {
                refuse(format!(
                    "a tensor of shape {shape:?} was refused: {message}{}",
                    self.context.or_half()
                ))
            })?,
        };
        let pooled = Pooled { buffer, pool: Arc::clone(&self.pool) };
        Ok(WgpuTensor::new(dtype, width, shape, pooled))
    }

    pub(super) fn create(
        &self,
        size: u64,
        usage: wgpu::BufferUsages,
    ) -> std::result::Result<wgpu::Buffer, String> {
        let usage = usage | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        self.context.scoped(wgpu::ErrorFilter::OutOfMemory, || {
            self.context
                .scoped(wgpu::ErrorFilter::Validation, || self.context.device.create_buffer(&descriptor))
        })?
    }

    /// Replaces the first bytes of a tensor, after all that was launched before.
    pub(super) fn write_bytes_to(&self, tensor: &WgpuTensor, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut recorder = self.recorder();
        if !recorder.is_empty() && bytes.len() < LARGE {
            let staging = self.staging(bytes)?;
            return recorder.record(&self.context, |encoder| {
                encoder.copy_buffer_to_buffer(&staging, 0, tensor.buffer(), 0, staging.size());
            });
        }
        // A write goes before what is submitted next.
        recorder.submit(&self.context)?;
        let (words, rest) = bytes.split_at(bytes.len() / 4 * 4);
        let queue = &self.context.queue;
        let written = self.context.scoped(wgpu::ErrorFilter::OutOfMemory, || {
            queue.write_buffer(tensor.buffer(), 0, words);
            if !rest.is_empty() {
                let mut last = [0; 4];
                last[..rest.len()].copy_from_slice(rest);
                queue.write_buffer(tensor.buffer(), words.len() as u64, &last);
            }
        });
        written.map_err(refuse)?;
        self.context.count_written(bytes.len())?;
        self.context.check()
    }

    /// A buffer of the host's with `bytes`, filled up to whole words, to be copied from in its place among the launches.
    fn staging(&self, bytes: &[u8]) -> Result<wgpu::Buffer> {
        let descriptor = wgpu::BufferDescriptor {
            label: Some("write"),
            size: bytes.len().next_multiple_of(4) as u64,
            usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        };
        let device = &self.context.device;
        let staging = self
            .context
            .scoped(wgpu::ErrorFilter::OutOfMemory, || device.create_buffer(&descriptor))
            .map_err(refuse)?;
        let mapped = staging.get_mapped_range_mut(..);
        let mut mapped =
            mapped.map_err(|error| refuse(format!("what the device reads cannot be written: {error}")))?;
        mapped.slice(..bytes.len()).copy_from_slice(bytes);
        drop(mapped);
        staging.unmap();
        Ok(staging)
    }

    /// The bytes of the elements in use. Waits for the device.
    pub(super) fn read_bytes_of(&self, tensor: &WgpuTensor) -> Result<Vec<u8>> {
        let bytes = tensor.len() * tensor.width;
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let size = bytes.next_multiple_of(4) as u64;
        let descriptor = wgpu::BufferDescriptor {
            label: Some("read"),
            size,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let device = &self.context.device;
        let staging = self
            .context
            .scoped(wgpu::ErrorFilter::OutOfMemory, || device.create_buffer(&descriptor))
            .map_err(refuse)?;
        let mut recorder = self.recorder();
        recorder.record(&self.context, |encoder| {
            encoder.copy_buffer_to_buffer(tensor.buffer(), 0, &staging, 0, size);
        })?;
        recorder.submit(&self.context)?;
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        self.context.wait()?;
        let view = staging.get_mapped_range(..);
        let view =
            view.map_err(|error| refuse(format!("what the device has written cannot be read: {error}")))?;
        Ok(view[..bytes].to_vec())
    }

    /// Uploads a dense weight.
    pub(super) fn upload_host(&self, host: &HostTensor) -> Result<WgpuTensor> {
        if host.len() != host.shape.iter().product::<usize>() {
            return Err(Error::Shape {
                kernel: "upload",
                tensor: "tensor",
                expected: format!("the dimensions of {} elements", host.len()),
                found: host.shape.clone(),
            });
        }
        let tensor = self.tensor(host.dtype(), &host.shape)?;
        let bytes: &[u8] = match &host.data {
            HostData::Bf16(values) => bytemuck::cast_slice(values),
            HostData::F16(values) => bytemuck::cast_slice(values),
            HostData::F32(values) => bytemuck::cast_slice(values),
        };
        self.write_bytes_to(&tensor, bytes)?;
        Ok(tensor)
    }

    /// Uploads words, as an `Index` tensor.
    pub(super) fn upload_words(&self, shape: &[usize], words: &[u32]) -> Result<WgpuTensor> {
        let tensor = self.tensor(DType::Index, shape)?;
        tensor.expect_len("upload", words.len())?;
        self.write_bytes_to(&tensor, bytemuck::cast_slice(words))?;
        Ok(tensor)
    }

    pub(super) fn write_numbers(&self, values: &[f64], tensor: &WgpuTensor) -> Result<()> {
        tensor.expect_len("write", values.len())?;
        tensor.expect_dtype("write", "tensor", &[DType::Act, DType::Float], "activations or floats")?;
        if !tensor.is_floats() {
            let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f64(value)).collect();
            return self.write_bytes_to(tensor, bytemuck::cast_slice(&rounded));
        }
        let rounded: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        self.write_bytes_to(tensor, bytemuck::cast_slice(&rounded))
    }

    pub(super) fn read_numbers(&self, tensor: &WgpuTensor) -> Result<Vec<f64>> {
        match tensor.dtype {
            DType::Act if tensor.is_floats() => self.elements(tensor, |x: f32| f64::from(x)),
            DType::Act | DType::Bf16 => self.elements(tensor, |x: bf16| x.to_f64()),
            DType::F16 => self.elements(tensor, |x: f16| x.to_f64()),
            DType::Float | DType::F32 => self.elements(tensor, |x: f32| f64::from(x)),
            DType::Index | DType::Fp8 => Err(Error::DType {
                kernel: "read",
                tensor: "tensor",
                expected: "activations, floats or weights",
                found: tensor.dtype,
            }),
        }
    }

    pub(super) fn elements<E: bytemuck::Pod, R>(
        &self,
        tensor: &WgpuTensor,
        widen: impl Fn(E) -> R,
    ) -> Result<Vec<R>> {
        let bytes = self.read_bytes_of(tensor)?;
        let elements = bytes.chunks_exact(size_of::<E>());
        Ok(elements.map(|bytes| widen(bytemuck::pod_read_unaligned(bytes))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    /// Few bytes are recorded, many submitted: either way launches before a write have what was there, and those after it what was written.
    #[test]
    fn a_write_has_its_place_among_the_launches() {
        let Some(context) = WgpuContext::of_tests() else { return };
        let wgpu = Wgpu::new(context);
        for columns in [6, LARGE] {
            let filled = |value| {
                let mut tensor = wgpu.tensor(DType::Act, &[1, columns]).unwrap();
                wgpu.write(&vec![value; columns], &mut tensor).unwrap();
                tensor
            };
            let (gate, mut up) = (filled(10.0), filled(1.0));
            let [mut before, mut after] = [0.0, 0.0].map(filled);
            let turns = wgpu.context().turns();
            wgpu.silu_mul(&gate, &up, &mut before).unwrap();
            wgpu.write(&vec![2.0; columns], &mut up).unwrap();
            wgpu.silu_mul(&gate, &up, &mut after).unwrap();
            let submitted = wgpu.context().turns().submissions > turns.submissions;
            assert_eq!(submitted, columns == LARGE, "{columns} columns");
            for (out, expected) in [(&before, 10.0), (&after, 20.0)] {
                assert!(wgpu.read(out).unwrap().iter().all(|&x| x == expected), "{columns} columns");
            }
        }
    }
}
