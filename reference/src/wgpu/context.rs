//! An adapter that was opened: its device, its limits, the pipelines that were built on it, and what went wrong with it.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::act::ActType;
use super::block_on::block_on;
use super::launch::{Access, PipelineKey};
use super::shader::{Edit, Shader};
use crate::error::{Error, Result};

/// Why an adapter is needed that has none of these, in errors.
const NEXT_STEP: &str = "install a driver with Vulkan (on Debian without a GPU: mesa-vulkan-drivers)";

/// How an adapter is chosen and used.
#[derive(Debug, Clone, Default)]
pub struct WgpuOptions {
    /// Leaves out what not every adapter has: subgroups.
    pub plain: bool,
    /// Leaves out what still fewer have: matrices.
    pub without_matrices: bool,
    /// What activations are.
    pub act: ActType,
    /// Takes a GPU alone: no adapter that is a CPU.
    pub hardware: bool,
    /// The part of the adapter's name to look for; any adapter without it.
    pub adapter: Option<String>,
    /// Bytes of a binding at most, where that is less than the adapter has.
    pub largest_binding: Option<u64>,
    /// Replaced in the shaders: to try a change, or to see that a test notices a fault.
    pub edits: Vec<Edit>,
}

/// An opened adapter, which the backends of several ranks share.
pub struct WgpuContext {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) limits: wgpu::Limits,
    info: wgpu::AdapterInfo,
    subgroups: bool,
    timestamps: bool,
    matrices: bool,
    act: ActType,
    edits: Vec<Edit>,
    modules: Mutex<HashMap<&'static str, wgpu::ShaderModule>>,
    pipelines: Mutex<HashMap<PipelineKey, Arc<Pipeline>>>,
    /// What the device reported outside of any call: that it was lost, or an error that nobody waited for.
    failure: Arc<OnceLock<String>>,
    submissions: AtomicUsize,
    waits: AtomicUsize,
    /// Bytes that were written since the last wait for that.
    written: AtomicUsize,
}

/// Bytes on their way to the device at most, a multiple of a word: until they are there the host has them too.
pub(super) const WRITTEN_AT_ONCE: usize = 64 << 20;

/// How often the host has turned to the device since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostTurns {
    /// Command encoders that were submitted.
    pub submissions: usize,
    /// Waits for all that was submitted.
    pub waits: usize,
}

/// A kernel with its constants fixed.
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

impl std::fmt::Debug for WgpuContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WgpuContext").field("adapter", &self.name()).finish_non_exhaustive()
    }
}

impl WgpuContext {
    /// Opens an adapter: the first GPU or, unless only hardware will do, a CPU.
    ///
    /// # Errors
    /// There is no such adapter, or none that the kernels run on.
    pub fn open(options: &WgpuOptions) -> Result<Arc<Self>> {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            flags: wgpu::InstanceFlags::empty(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let mut adapters = block_on(instance.enumerate_adapters(wgpu::Backends::all()));
        adapters.sort_by_key(|adapter| rank(adapter.get_info().device_type));
        let mut refused = String::new();
        let wanted = options.adapter.as_deref().unwrap_or_default();
        for adapter in adapters {
            let info = adapter.get_info();
            let reason = if !info.name.contains(wanted) {
                format!("is not called {wanted:?}")
            } else if options.hardware && info.device_type == wgpu::DeviceType::Cpu {
                "is a CPU".into()
            } else {
                match Self::of(&adapter, info.clone(), options) {
                    Ok(context) => return Ok(Arc::new(context)),
                    Err(reason) => reason,
                }
            };
            let _ = write!(refused, "; {} ({}) {reason}", info.name, info.backend);
        }
        Err(refuse(format!("no usable adapter{refused}: {NEXT_STEP}")))
    }

    fn of(
        adapter: &wgpu::Adapter,
        info: wgpu::AdapterInfo,
        options: &WgpuOptions,
    ) -> std::result::Result<Self, String> {
        let (offered, mut limits) = (adapter.features(), adapter.limits());
        if let Some(bytes) = options.largest_binding {
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(bytes);
        }
        if !offered.contains(wgpu::Features::IMMEDIATES) || limits.max_immediate_size < 128 {
            return Err("has no 128 bytes of immediates".into());
        }
        let subgroups = !options.plain && offered.contains(wgpu::Features::SUBGROUP);
        let mut required_features = wgpu::Features::IMMEDIATES;
        required_features.set(wgpu::Features::SUBGROUP, subgroups);
        let clock = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let timestamps = offered.contains(clock);
        required_features.set(clock, timestamps);
        let halves = options.act == ActType::Bf16 && !options.without_matrices;
        let matrices = subgroups && halves && has_matrices(adapter, &info);
        required_features.set(MATRICES, matrices);
        let experimental_features =
            if matrices { experimental() } else { wgpu::ExperimentalFeatures::disabled() };
        let (device, queue) = block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("dsa80"),
            required_features,
            required_limits: limits.clone(),
            experimental_features,
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        }))
        .map_err(|error| format!("does not open ({error})"))?;
        let failure = Arc::new(OnceLock::new());
        let reported = Arc::clone(&failure);
        device.set_device_lost_callback(move |reason, message| lost(&reported, reason, &message));
        let reported = Arc::clone(&failure);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let _ = reported.set(told(&error));
        }));
        Ok(Self {
            device,
            queue,
            limits,
            info,
            subgroups,
            timestamps,
            matrices,
            act: options.act,
            edits: options.edits.clone(),
            modules: Mutex::default(),
            pipelines: Mutex::default(),
            failure,
            submissions: AtomicUsize::default(),
            waits: AtomicUsize::default(),
            written: AtomicUsize::default(),
        })
    }

    /// The adapter's name and how it is reached.
    pub fn name(&self) -> String {
        let Self { info: wgpu::AdapterInfo { name, backend, .. }, subgroups, .. } = self;
        let path = match (subgroups, self.matrices) {
            (true, true) => "subgroups, matrices",
            (true, false) => "subgroups",
            _ => "no subgroups",
        };
        let act = match self.act {
            ActType::Bf16 => "",
            ActType::F32 => ", f32",
        };
        format!("{name} ({backend}, {path}{act})")
    }

    /// Whether the kernels use subgroups.
    pub fn has_subgroups(&self) -> bool {
        self.subgroups
    }

    pub(super) fn has_timestamps(&self) -> bool {
        self.timestamps
    }

    /// What activations are.
    pub fn act(&self) -> ActType {
        self.act
    }

    /// Whether some kernels multiply matrices of 16 by 16 halves by subgroups of 32 lanes.
    pub fn has_matrices(&self) -> bool {
        self.matrices
    }

    /// Whether it is a GPU, not a CPU that stands in for one.
    pub fn is_hardware(&self) -> bool {
        self.info.device_type != wgpu::DeviceType::Cpu
    }

    /// How often the host has turned to the device.
    pub fn turns(&self) -> HostTurns {
        HostTurns {
            submissions: self.submissions.load(Ordering::Relaxed),
            waits: self.waits.load(Ordering::Relaxed),
        }
    }

    pub(super) fn count_submission(&self) {
        self.submissions.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether so much was written by now that it is to be waited for.
    pub(super) fn count_written(&self, bytes: usize) -> bool {
        let much = self.written.fetch_add(bytes, Ordering::Relaxed) + bytes >= WRITTEN_AT_ONCE;
        if much {
            self.written.store(0, Ordering::Relaxed);
        }
        much
    }

    /// Waits for all that was submitted.
    pub(super) fn wait(&self) -> Result<()> {
        self.waits.fetch_add(1, Ordering::Relaxed);
        let waited = self.device.poll(wgpu::PollType::wait_indefinitely());
        self.check()?;
        waited.map(drop).map_err(|error| refuse(format!("waiting for the device failed: {error}")))
    }

    /// Fails with what the device has reported since it was opened.
    pub(super) fn check(&self) -> Result<()> {
        self.failure.get().map_or(Ok(()), |failure| Err(refuse(failure.clone())))
    }

    /// Runs `work` and fails with an error that it raised.
    pub(super) fn scoped<T>(&self, work: impl FnOnce() -> T) -> std::result::Result<T, String> {
        use wgpu::ErrorFilter::{Internal, OutOfMemory, Validation};
        let scopes = [Internal, Validation, OutOfMemory].map(|filter| self.device.push_error_scope(filter));
        let made = work();
        // Scopes end in the order in which they lie on each other.
        let errors = scopes.into_iter().rev().filter_map(|scope| block_on(scope.pop()));
        // All of them end, whatever the first says.
        errors.collect::<Vec<_>>().first().map_or(Ok(made), |error| Err(told(error)))
    }

    /// Builds a pipeline, or finds it.
    pub(super) fn pipeline(
        &self,
        shader: &Shader,
        key: PipelineKey,
    ) -> std::result::Result<Arc<Pipeline>, String> {
        if let Some(pipeline) = lock(&self.pipelines).get(&key) {
            return Ok(Arc::clone(pipeline));
        }
        let module = self.module(shader)?;
        let pipeline = Arc::new(self.build(&module, &key)?);
        lock(&self.pipelines).insert(key, Arc::clone(&pipeline));
        Ok(pipeline)
    }

    fn module(&self, shader: &Shader) -> std::result::Result<wgpu::ShaderModule, String> {
        let mut modules = lock(&self.modules);
        if let Some(module) = modules.get(shader.name) {
            return Ok(module.clone());
        }
        let source = shader.with_prelude(self.act, self.subgroups, &self.edits)?;
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(shader.name),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        };
        let module = self.scoped(|| {
            // What was edited may do anything.
            if self.edits.is_empty() && is_robust(self.info.backend) {
                self.trusted(descriptor)
            } else {
                self.device.create_shader_module(descriptor)
            }
        })?;
        modules.insert(shader.name, module.clone());
        Ok(module)
    }

    /// A module of the kernels' own, without checks at run time: a compiler that meets them leaves loops rolled and their arrays in memory,
    /// and the kernels take twice as long.
    #[expect(unsafe_code, reason = "only the author of the shaders can promise what the checks are for")]
    fn trusted(&self, descriptor: wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule {
        // SAFETY: the sources are this crate's. Their loops are bounded by sizes (and a tile of `sparse_mla_matrix` is worked on three times
        // at most), they index arrays of workgroups and of lanes by constants and by places below the sizes that launchers give, and divide
        // by sizes that launchers refuse to be zero. Accesses to buffers stay robust: where the caller takes this way (`is_robust`), that is
        // the device's, not the module's.
        unsafe {
            self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
        }
    }

    fn build(&self, module: &wgpu::ShaderModule, key: &PipelineKey) -> std::result::Result<Pipeline, String> {
        let entries: Vec<wgpu::BindGroupLayoutEntry> = (0..)
            .zip(&key.accesses)
            .map(|(binding, &access)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: access == Access::Read },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let constants: Vec<(&str, f64)> =
            key.constants.iter().map(|&(name, bits)| (name, f64::from_bits(bits))).collect();
        self.scoped(|| {
            let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                label: None,
                entries: &entries,
            });
            let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&layout)],
                immediate_size: key.immediates,
            });
            let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(key.shader),
                layout: Some(&pipeline_layout),
                module,
                entry_point: Some(key.entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &constants,
                    zero_initialize_workgroup_memory: false,
                },
                cache: None,
            });
            Pipeline { pipeline, layout }
        })
    }
}

/// Whether accesses out of a buffer are the device's to catch, with or without a module's own checks. Metal has no such thing.
fn is_robust(backend: wgpu::Backend) -> bool {
    matches!(backend, wgpu::Backend::Vulkan | wgpu::Backend::Dx12)
}

/// What `*_matrix.wgsl` have in a workgroup's memory at most: no more, or a multiprocessor has one workgroup in place of two.
const MATRICES_SHARED: u32 = 24 << 10;

/// What `*_matrix.wgsl` need.
const MATRICES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16);

/// Whether subgroups of 32 lanes multiply matrices of 16 by 16 halves and add them up in floats.
fn has_matrices(adapter: &wgpu::Adapter, info: &wgpu::AdapterInfo) -> bool {
    use wgpu::CooperativeScalarType::{F16, F32};
    adapter.features().contains(MATRICES)
        && adapter.limits().max_compute_workgroup_storage_size >= MATRICES_SHARED
        && (info.subgroup_min_size, info.subgroup_max_size) == (32, 32)
        && adapter.cooperative_matrix_properties().iter().any(|of| {
            (of.m_size, of.n_size, of.k_size) == (16, 16, 16) && (of.ab_type, of.cr_type) == (F16, F32)
        })
}

#[expect(unsafe_code, reason = "wgpu asks for a promise that experiments are wanted")]
fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: matrices alone are used of what is experimental, and tests compare what they give on every adapter that has them.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// Reports that the device was lost, unless it was let go.
fn lost(failure: &OnceLock<String>, reason: wgpu::DeviceLostReason, message: &str) {
    if reason != wgpu::DeviceLostReason::Destroyed {
        // What the device runs out of by itself, in a submission, it is lost by.
        let next = if message.to_lowercase().contains("memory") {
            "with a lower batch or cache size"
        } else {
            "and look for the driver's messages in the system's log"
        };
        // The first is the cause.
        let _ = failure.set(format!("the device was lost ({message}); restart the process, {next}"));
    }
}

/// GPUs first.
fn rank(device_type: wgpu::DeviceType) -> u32 {
    match device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

/// An error of the backend as such.
pub(super) fn refuse(message: String) -> Error {
    Error::Backend { backend: "wgpu", message }
}

/// An error with its causes, and what to do where that is known.
fn told(error: &wgpu::Error) -> String {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            let _ = write!(message, ": {text}");
        }
        cause = error.source();
    }
    if matches!(error, wgpu::Error::OutOfMemory { .. }) {
        message += "; lower the batch or cache size, or use another device";
    }
    message
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole after a panic elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
impl WgpuContext {
    /// The first adapter; `None`, which is said, where there is none and tests may leave it out.
    pub(super) fn of_tests() -> Option<Arc<Self>> {
        Self::of_tests_in(ActType::Bf16)
    }

    /// The same, with activations of a type.
    pub(super) fn of_tests_in(act: ActType) -> Option<Arc<Self>> {
        use std::io::Write as _;

        match Self::open(&WgpuOptions { act, ..WgpuOptions::default() }) {
            Ok(context) => Some(context),
            Err(reason) => {
                assert!(std::env::var_os("DSA80_REQUIRE_ALL").is_none(), "{reason}");
                let _ = writeln!(std::io::stderr(), "left out: a test on an adapter ({reason})");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;
    use crate::tensor::DType;
    use crate::wgpu::Wgpu;

    #[test]
    fn modules_keep_their_checks_where_nothing_else_has_any() {
        assert!(is_robust(wgpu::Backend::Vulkan) && is_robust(wgpu::Backend::Dx12));
        assert!(!is_robust(wgpu::Backend::Metal) && !is_robust(wgpu::Backend::Gl));
    }

    #[test]
    fn a_lost_device_is_an_error_of_all_that_follows() {
        let Some(context) = WgpuContext::of_tests() else { return };
        let wgpu = Wgpu::new(Arc::clone(&context));
        let (gate, mut out) =
            (wgpu.alloc(DType::Act, &[2, 4]).unwrap(), wgpu.alloc(DType::Act, &[2, 4]).unwrap());
        lost(&context.failure, wgpu::DeviceLostReason::Destroyed, "let go");
        wgpu.write(&[1.0; 8], &mut out).unwrap();
        lost(&context.failure, wgpu::DeviceLostReason::Unknown, "fell off the bus");
        lost(&context.failure, wgpu::DeviceLostReason::Unknown, "and then something else");
        let up = wgpu.alloc(DType::Act, &[2, 4]).unwrap();
        let _ = wgpu.silu_mul(&gate, &up, &mut out);
        for error in [wgpu.read(&out).unwrap_err(), wgpu.write(&[1.0; 8], &mut out).unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("lost (fell off the bus); restart the process"), "{text}");
        }
    }

    #[test]
    fn a_device_that_is_gone_answers_with_an_error() {
        let Some(context) = WgpuContext::of_tests() else { return };
        let wgpu = Wgpu::new(Arc::clone(&context));
        let mut tensor = wgpu.alloc(DType::Act, &[2, 4]).unwrap();
        wgpu.write(&[1.0; 8], &mut tensor).unwrap();
        context.device.destroy();
        wgpu.read(&tensor).unwrap_err();
    }
}
