//! One dispatch of a kernel: what it binds, how large it is.

use super::Wgpu;
use super::tensor::WgpuTensor;
use crate::error::{Error, Result};

use super::shader::Shader;

/// What a kernel does with a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Access {
    Read,
    /// And reads, if it likes.
    Write,
}

/// A range of a buffer, for `@group(0) @binding(i)`, `i` its place among the launch's bindings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Binding<'a> {
    pub(super) buffer: &'a wgpu::Buffer,
    /// In bytes; a multiple of what [`Wgpu::windows`] aligns to.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) size: u64,
    pub(super) access: Access,
}

/// What a pipeline is built from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PipelineKey {
    pub(super) shader: &'static str,
    pub(super) entry: &'static str,
    /// Names, and the bits of the values.
    pub(super) constants: Vec<(&'static str, u64)>,
    pub(super) accesses: Vec<Access>,
    pub(super) immediates: u32,
}

/// One launch.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    /// Who launches, for errors.
    pub(super) kernel: &'static str,
    pub(super) shader: &'a Shader,
    /// The `@compute` function.
    pub(super) entry: &'static str,
    /// Override constants; true is 1.
    pub(super) constants: &'a [(&'static str, f64)],
    pub(super) bindings: &'a [Binding<'a>],
    /// The words of `var<immediate> params`, at most 32.
    pub(super) params: &'a [u32],
    /// Workgroups: [`Wgpu::fold`] of a number, or a grid.
    pub(super) groups: [u32; 3],
    /// The shape in words, for errors.
    pub(super) shape: String,
}

impl Binding<'_> {
    /// Bound as if it were written, which it is not: what a kernel reads of it, no compiler moves behind a barrier.
    pub(super) fn in_order(self) -> Self {
        Self { access: Access::Write, ..self }
    }
}

/// Bytes of the largest vector that a kernel reads or writes at once: eight floats.
const VECTOR: usize = 32;

impl WgpuTensor {
    /// The elements in use, to read.
    pub(super) fn reads(&self) -> Binding<'_> {
        self.binding(Access::Read)
    }

    /// The elements in use, to write.
    pub(super) fn writes(&mut self) -> Binding<'_> {
        self.binding(Access::Write)
    }

    /// The elements `elements` alone, to read: a range of [`Wgpu::windows`].
    pub(super) fn reads_window(&self, elements: std::ops::Range<usize>) -> Binding<'_> {
        self.window(elements, Access::Read)
    }

    /// [`reads_window`](Self::reads_window), to write.
    pub(super) fn writes_window(&mut self, elements: std::ops::Range<usize>) -> Binding<'_> {
        self.window(elements, Access::Write)
    }

    /// In place of a buffer that a variant of a kernel does not touch, where the kernel would write.
    pub(super) fn unused(&self) -> Binding<'_> {
        self.binding(Access::Write)
    }

    fn binding(&self, access: Access) -> Binding<'_> {
        self.window(0..self.len(), access)
    }

    fn window(&self, elements: std::ops::Range<usize>, access: Access) -> Binding<'_> {
        let width = self.width;
        // Whole vectors, of four words or of eight activations: the buffer is that large.
        let size = (elements.len() * width).next_multiple_of(VECTOR).max(VECTOR) as u64;
        Binding { buffer: self.buffer(), offset: (elements.start * width) as u64, size, access }
    }
}

impl Wgpu {
    /// The largest power of two of lanes that a workgroup may have, up to `wanted`.
    pub(super) fn workgroup(&self, wanted: usize) -> u32 {
        let limits = &self.context.limits;
        let most = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
        let wanted = u32::try_from(wanted.next_power_of_two()).unwrap_or(u32::MAX);
        // A power of two below `wanted` where `wanted` is too much.
        wanted.min(1 << most.max(1).ilog2())
    }

    /// `groups` workgroups as a grid, of which the kernel takes the number by `flat` and leaves the surplus.
    pub(super) fn fold(&self, groups: usize) -> [u32; 3] {
        let most = self.context.limits.max_compute_workgroups_per_dimension as usize;
        let y = groups.div_ceil(most).max(1);
        [groups.div_ceil(y), y.min(most), y.div_ceil(most)]
            .map(|groups| u32::try_from(groups).unwrap_or(u32::MAX))
    }

    /// `rows` rows of `row_bytes` bytes in as few ranges as bindings take: each starts where a binding may.
    pub(super) fn windows(
        &self,
        kernel: &'static str,
        tensor: &'static str,
        rows: usize,
        row_bytes: usize,
    ) -> Result<Vec<std::ops::Range<usize>>> {
        self.windows_of(kernel, tensor, 1, rows, row_bytes)
    }

    /// [`windows`](Self::windows) that start at a multiple of `multiple` rows, a power of two.
    pub(super) fn windows_of(
        &self,
        kernel: &'static str,
        tensor: &'static str,
        multiple: usize,
        rows: usize,
        row_bytes: usize,
    ) -> Result<Vec<std::ops::Range<usize>>> {
        let limits = &self.context.limits;
        let most = usize::try_from(limits.max_storage_buffer_binding_size).unwrap_or(usize::MAX);
        if rows * row_bytes <= most {
            return Ok(std::iter::once(0..rows).collect());
        }
        let step = step_of_windows(limits, row_bytes).max(multiple);
        let window = most / row_bytes / step * step;
        if window == 0 {
            return Err(Error::Shape {
                kernel,
                tensor,
                expected: format!(
                    "{step} rows that fit {most} bytes, which is what the adapter binds at most"
                ),
                found: vec![rows, row_bytes],
            });
        }
        Ok((0..rows).step_by(window).map(|start| start..rows.min(start + window)).collect())
    }

    /// Records the launch; it runs when something waits for it.
    pub(super) fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let refuse =
            |message: String| Error::Launch { kernel: launch.kernel, shape: launch.shape.clone(), message };
        let most = self.context.limits.max_storage_buffer_binding_size;
        for (place, binding) in launch.bindings.iter().enumerate() {
            if binding.size > most {
                return Err(refuse(format!(
                    "binding {place} has {} bytes, and the adapter binds at most {most}; lower the batch or cache size, \
                     or use more ranks{}",
                    binding.size,
                    self.context.or_half()
                )));
            }
        }
        let most = self.context.limits.max_compute_workgroups_per_dimension;
        if let Some(groups) = launch.groups.into_iter().find(|&groups| groups > most) {
            return Err(refuse(format!(
                "{groups} workgroups in a dimension, and the adapter has at most {most}; send fewer tokens at once"
            )));
        }
        let key = PipelineKey {
            shader: launch.shader.name,
            entry: launch.entry,
            constants: launch.constants.iter().map(|&(name, value)| (name, value.to_bits())).collect(),
            accesses: launch.bindings.iter().map(|binding| binding.access).collect(),
            immediates: 4 * launch.params.len() as u32,
        };
        let pipeline = self.context.pipeline(launch.shader, key).map_err(refuse)?;
        let entries: Vec<wgpu::BindGroupEntry<'_>> = (0..)
            .zip(launch.bindings)
            .map(|(binding, bound)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: bound.buffer,
                    offset: bound.offset,
                    size: wgpu::BufferSize::new(bound.size),
                }),
            })
            .collect();
        let group = self
            .context
            .scoped(|| {
                self.context.device.create_bind_group(&wgpu::BindGroupDescriptor {
                    label: Some(launch.kernel),
                    layout: &pipeline.layout,
                    entries: &entries,
                })
            })
            .map_err(refuse)?;
        self.recorder().launch(&self.context, |pass| {
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &group, &[]);
            if !launch.params.is_empty() {
                pass.set_immediates(0, bytemuck::cast_slice(launch.params));
            }
            let [x, y, z] = launch.groups;
            pass.dispatch_workgroups(x, y, z);
        })
    }
}

/// Windows have a multiple of so many rows, which is a multiple of the alignment and of vectors, and an even number, so that no word has outputs of two
/// ranges.
pub(super) fn step_of_windows(limits: &wgpu::Limits, row_bytes: usize) -> usize {
    let alignment = limits.min_storage_buffer_offset_alignment.max(VECTOR as u32) as usize;
    (alignment / greatest_common_divisor(alignment, row_bytes)).max(2)
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
