//! What times are measured by: a copy, which says what the memory gives, and the device's clock.

use super::Wgpu;
use super::context::refuse;
use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("copy");

impl Wgpu {
    /// Bytes that a kernel reads or writes of one tensor at most.
    pub fn largest_binding(&self) -> usize {
        usize::try_from(self.context.limits.max_storage_buffer_binding_size).unwrap_or(usize::MAX)
    }

    /// Copies a tensor into another of its shape and type, by a kernel.
    ///
    /// # Errors
    /// Their shapes or types differ, or the launch fails.
    pub fn copy(&self, from: &WgpuTensor, to: &mut WgpuTensor) -> Result<()> {
        let kernel = "copy";
        to.expect_shape(kernel, "to", from.shape())?;
        to.expect_dtype(kernel, "to", &[from.dtype()], "what is copied")?;
        let vectors = (from.len() * from.width).div_ceil(16);
        if vectors == 0 {
            return Ok(());
        }
        let lanes = self.workgroup(256);
        self.launch(&Launch {
            kernel,
            shader: &SHADER,
            entry: "main",
            constants: &[("WORKGROUP", lanes.into())],
            bindings: &[from.reads(), to.writes()],
            params: &[vectors as u32],
            groups: self.fold(vectors.div_ceil(lanes as usize)),
            shape: format!("{:?}, {}", from.shape(), from.dtype()),
        })
    }

    /// Seconds that the device takes for what `work` launches, by its own clock; `None` without timestamps.
    ///
    /// # Errors
    /// As `work` fails.
    pub fn device_seconds(&self, work: impl FnOnce() -> Result<()>) -> Result<Option<f64>> {
        let context = &self.context;
        if !context.has_timestamps() {
            return Ok(None);
        }
        let set = context.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count: 2,
        });
        let resolved = self
            .create(16, wgpu::BufferUsages::QUERY_RESOLVE)
            .map_err(|message| refuse(format!("a buffer for timestamps was refused: {message}")))?;
        let ticks = self.tensor(DType::Index, &[4])?;
        // What was launched before has ended: nothing of it is measured.
        self.read_bytes_of(&ticks)?;
        self.recorder().record(context, |encoder| encoder.write_timestamp(&set, 0))?;
        work()?;
        self.recorder().record(context, |encoder| {
            encoder.write_timestamp(&set, 1);
            encoder.resolve_query_set(&set, 0..2, &resolved, 0);
            encoder.copy_buffer_to_buffer(&resolved, 0, ticks.buffer(), 0, 16);
        })?;
        let ticks = self.elements(&ticks, |ticks: u64| ticks)?;
        let period = f64::from(context.queue.get_timestamp_period());
        Ok(Some(ticks[1].wrapping_sub(ticks[0]) as f64 * period * 1e-9))
    }
}
