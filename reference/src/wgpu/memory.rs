//! Buffers, which are used again, and copies between them and the host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};

use super::act::ActType;
use super::context::{WRITTEN_AT_ONCE, WgpuContext, lock, refuse};
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
        self.context.scoped(|| self.context.device.create_buffer(&descriptor))
    }

    /// Replaces the first bytes of a tensor, after all that was launched before.
    pub(super) fn write_bytes_to(&self, tensor: &WgpuTensor, bytes: &[u8]) -> Result<()> {
        let mut recorder = self.recorder();
        let mut offset = 0;
        // Through buffers of our own: where there is no memory for one the queue's own write loses the device.
        for piece in bytes.chunks(WRITTEN_AT_ONCE) {
            let staging = self.staging(piece)?;
            recorder.record(&self.context, |encoder| {
                encoder.copy_buffer_to_buffer(&staging, 0, tensor.buffer(), offset, staging.size());
            })?;
            offset += staging.size();
            let much = self.context.count_written(piece.len());
            if much || bytes.len() >= LARGE {
                recorder.submit(&self.context)?;
            }
            if much {
                self.context.wait()?;
            }
        }
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
        let staging = self.context.scoped(|| device.create_buffer(&descriptor)).map_err(refuse)?;
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
        let staging = self.context.scoped(|| device.create_buffer(&descriptor)).map_err(refuse)?;
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
    use std::io::Write as _;

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

    /// In the child of the test below.
    const CHILD: &str = "DSA80_TEST_WITHOUT_MEMORY";
    /// Bytes of the tensors that it takes until there is no memory for another.
    const SIZES: [usize; 2] = [1 << 30, 1 << 26];

    /// An adapter that is a CPU has the memory that the process may have.
    #[test]
    fn what_there_is_no_memory_for_is_an_error_and_the_rest_goes_on() {
        if std::env::var_os(CHILD).is_some() {
            return runs_out_of_memory();
        }
        let Some(context) = WgpuContext::of_tests() else { return };
        // What a GPU has no process's limit bounds, and other systems have none that a shell sets.
        if context.is_hardware() || cfg!(not(target_os = "linux")) {
            let name = context.name();
            let _ = writeln!(
                std::io::stderr(),
                "left out: running out of memory ({name}: it takes Linux and an adapter that is a CPU)"
            );
            return;
        }
        let child = std::process::Command::new("sh")
            .args(["-c", "ulimit -v 8000000 && exec \"$0\" --exact --nocapture --test-threads 1 \"$1\""])
            .arg(std::env::current_exe().unwrap())
            .arg("wgpu::memory::tests::what_there_is_no_memory_for_is_an_error_and_the_rest_goes_on")
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains("went on"), "{child:?}");
    }

    fn runs_out_of_memory() {
        let wgpu = Wgpu::new(WgpuContext::of_tests().unwrap());
        let filled = |value: f64| {
            let mut tensor = wgpu.tensor(DType::Act, &[2, 8]).unwrap();
            wgpu.write(&[value; 16], &mut tensor).unwrap();
            tensor
        };
        let (gate, up, mut out) = (filled(10.0), filled(2.0), filled(0.0));
        let (bytes, mut taken) = (vec![1; SIZES[1]], Vec::new());
        for size in SIZES {
            let error = loop {
                assert!(taken.len() < 1000, "the address space is not limited");
                match wgpu.tensor(DType::Fp8, &[size]) {
                    Ok(tensor) => taken.push(tensor),
                    Err(error) => break error.to_string(),
                }
            };
            for part in [&format!("[{size}] was refused"), "Out of Memory", "lower the batch or cache size"] {
                assert!(error.contains(part), "{error:?} lacks {part:?}");
            }
        }
        // The host's side of a copy has no room either.
        let last = taken.last().unwrap();
        for error in [wgpu.read_bytes_of(last).unwrap_err(), wgpu.write_bytes_to(last, &bytes).unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("lower the batch or cache size"), "{text}");
        }
        wgpu.silu_mul(&gate, &up, &mut out).unwrap();
        assert!(wgpu.read(&out).unwrap().iter().all(|&x| x == 20.0));
        println!("went on");
    }
}
