//! One body for every backend: a kernel as the contract's method, against the oracle.
//!
//! [`check`] runs it on the CUDA kernels in emulation and on a GPU, and on the WGSL kernels of [`Wgpu`], with subgroups and without.

use std::fmt::Debug;
use std::sync::{Arc, Once, OnceLock};

use dsa80_cuda::{Cuda, Device, Tiles};
use dsa80_reference::cpu::{Cpu, CpuBatch, CpuTensor};
use dsa80_reference::wgpu::{Edit, Wgpu, WgpuContext, WgpuOptions};
use dsa80_reference::{Batch, DType, HostData, HostTensor, Kernels, Result};
use half::{bf16, f16};
use proptest::prelude::*;

use super::devices::{self, tell, wanted};
use super::oracle;
use super::runner::{Config, catch, run};

/// A kernel, its cases, and how one of them is judged.
pub trait Contract {
    /// The kernel's name, and the file's of its regressions.
    const NAME: &'static str;
    /// What is drawn.
    type Case: Debug + Clone;

    /// The cases.
    fn cases() -> impl Strategy<Value = Self::Case>;

    /// Panics unless the backend does what the oracle does.
    fn run<K: Kernels>(kernels: &K, case: &Self::Case);

    /// The same of kernels that multiply matrices of halves, of which some lose more.
    fn run_in_halves<K: Kernels>(kernels: &K, case: &Self::Case) {
        Self::run(kernels, case);
    }
}

/// As the adapter multiplies.
fn run_on<C: Contract>(context: &Arc<WgpuContext>, case: &C::Case) {
    let kernels = Wgpu::new(Arc::clone(context));
    if context.has_matrices() { C::run_in_halves(&kernels, case) } else { C::run(&kernels, case) }
}

/// Runs random cases on every backend there is. `DSA80_PARITY=wgpu`, `=emulator` or `=gpu` leaves the others out.
#[track_caller]
pub fn check<C: Contract>() {
    for (name, context) in adapters() {
        let config = Config { name: C::NAME, on: name, factor: 2 };
        run(&config, &C::cases(), &|case| run_on::<C>(context, &case));
    }
    for device in devices::all() {
        let (on, factor) = (device.to_string(), if device.is_gpu() { 4 } else { 1 });
        let tiles = done(Tiles::for_gpu(&device.limits().name, None));
        let cuda = Cuda::new(device, tiles);
        run(&Config { name: C::NAME, on: &on, factor }, &C::cases(), &|case| C::run(&cuda, &case));
    }
}

/// The ways through the WGSL kernels, the one with subgroups first, if there is one: none where there is no adapter, and tests may leave it
/// out.
pub fn contexts() -> impl DoubleEndedIterator<Item = &'static Arc<WgpuContext>> {
    adapters().iter().map(|(_, context)| context)
}

/// Runs `body` once on every way through the WGSL kernels.
pub fn on_wgpu(body: impl Fn(&Wgpu)) {
    for (_, context) in adapters() {
        body(&Wgpu::new(Arc::clone(context)));
    }
}

/// Runs `body` once where a binding has `bytes` at most.
pub fn with_small_bindings(bytes: u64, body: impl Fn(&Wgpu)) {
    on_wgpu(|wgpu| {
        let options = WgpuOptions { largest_binding: Some(bytes), ..same_adapter(wgpu) };
        body(&Wgpu::new(done(WgpuContext::open(&options))));
    });
}

/// What opens the adapter of `wgpu` again.
pub fn same_adapter(wgpu: &Wgpu) -> WgpuOptions {
    let context = wgpu.context();
    WgpuOptions { plain: !context.has_subgroups(), without_matrices: !context.has_matrices(), ..options() }
}

/// Whether the body sees `edit`, a fault in a shader; one of matrices is seen where the adapter has them.
#[track_caller]
pub fn catches<C: Contract>(edit: Edit) {
    let Some((_, context)) = adapters().first() else { return };
    let of_matrices = edit.shader.ends_with("_matrix");
    if of_matrices && !context.has_matrices() {
        static TOLD: Once = Once::new();
        let name = context.name();
        TOLD.call_once(|| {
            tell(&format!("left out: faults in the shaders of matrices ({name} multiplies none; a GPU may)"));
        });
        return;
    }
    let context = done(WgpuContext::open(&WgpuOptions {
        plain: !context.has_subgroups(),
        without_matrices: !of_matrices,
        edits: vec![edit.clone()],
        ..options()
    }));
    let reason = catch(&C::cases(), &|case| run_on::<C>(&context, &case));
    let Some(reason) = reason else { panic!("nothing sees the fault {edit:?}") };
    for refusal in ["is not once in", "Shader", "validation"] {
        assert!(!reason.contains(refusal), "{edit:?} does not compile: {reason}");
    }
}

/// The adapter of the tests, with matrices and with subgroups where it has them, and without.
fn adapters() -> &'static [(String, Arc<WgpuContext>)] {
    static OPENED: OnceLock<Vec<(String, Arc<WgpuContext>)>> = OnceLock::new();
    static TOLD: Once = Once::new();
    if !wanted("wgpu") {
        return &[];
    }
    OPENED.get_or_init(|| {
        let mut opened = Vec::new();
        for (plain, without_matrices) in [(false, false), (false, true), (true, true)] {
            match WgpuContext::open(&WgpuOptions { plain, without_matrices, ..options() }) {
                Ok(context) => opened.push((context.name(), context)),
                Err(reason) => {
                    let message = format!("left out: the kernels in WGSL ({reason})");
                    assert!(std::env::var_os("DSA80_REQUIRE_ALL").is_none(), "{message}");
                    TOLD.call_once(|| tell(&message));
                }
            }
        }
        opened.dedup_by(|a, b| a.0 == b.0);
        opened
    })
}

/// `DSA80_WGPU_ADAPTER` is a part of the adapter's name.
fn options() -> WgpuOptions {
    WgpuOptions { adapter: std::env::var("DSA80_WGPU_ADAPTER").ok(), ..WgpuOptions::default() }
}

/// An `Act` or `Float` tensor of `values` on both sides, rounded to bf16 or f32.
pub fn numbers<K: Kernels>(
    kernels: &K,
    dtype: DType,
    shape: &[usize],
    values: &[f64],
) -> (CpuTensor<f64>, K::Tensor) {
    let round =
        |x: f64| if dtype == DType::Act { bf16::from_f32(x as f32).to_f64() } else { f64::from(x as f32) };
    let rounded: Vec<f64> = values.iter().map(|&x| round(x)).collect();
    both(
        kernels,
        dtype,
        shape,
        |host| oracle().write(&rounded, host),
        |device| kernels.write(&rounded, device),
    )
}

/// An `Index` tensor on both sides.
pub fn index<K: Kernels>(kernels: &K, shape: &[usize], values: &[i32]) -> (CpuTensor<f64>, K::Tensor) {
    let write = |host: &mut CpuTensor<f64>| oracle().write_index(values, host);
    both(kernels, DType::Index, shape, write, |device| kernels.write_index(values, device))
}

/// An 8-bit cache on both sides.
pub fn bytes<K: Kernels>(kernels: &K, shape: &[usize], values: &[u8]) -> (CpuTensor<f64>, K::Tensor) {
    let write = |host: &mut CpuTensor<f64>| oracle().write_bytes(values, host);
    both(kernels, DType::Fp8, shape, write, |device| kernels.write_bytes(values, device))
}

fn both<K: Kernels>(
    kernels: &K,
    dtype: DType,
    shape: &[usize],
    write_host: impl FnOnce(&mut CpuTensor<f64>) -> Result<()>,
    write_device: impl FnOnce(&mut K::Tensor) -> Result<()>,
) -> (CpuTensor<f64>, K::Tensor) {
    let (mut host, mut device) = (done(oracle().alloc(dtype, shape)), done(kernels.alloc(dtype, shape)));
    done(write_host(&mut host));
    done(write_device(&mut device));
    (host, device)
}

/// A dense weight of `values` on both sides, rounded to `dtype`.
pub fn weight<K: Kernels>(
    kernels: &K,
    dtype: DType,
    shape: &[usize],
    values: &[f64],
) -> (CpuTensor<f64>, K::Tensor) {
    let host = host_weight(dtype, shape, values);
    (done(oracle().upload(host.clone())), done(kernels.upload(host)))
}

/// A dense weight of `values`, rounded to `dtype`, before any backend has it.
pub fn host_weight(dtype: DType, shape: &[usize], values: &[f64]) -> HostTensor {
    let narrow = values.iter().map(|&x| x as f32);
    let data = match dtype {
        DType::Bf16 => HostData::Bf16(narrow.map(bf16::from_f32).collect()),
        DType::F16 => HostData::F16(narrow.map(f16::from_f32).collect()),
        DType::F32 => HostData::F32(narrow.collect()),
        other => panic!("{other} is no weight type"),
    };
    HostTensor { shape: shape.to_vec(), data }
}

/// An output on both sides; the device's is full of NaN (indices: -1, bytes: a NaN of e4m3).
pub fn output<K: Kernels>(kernels: &K, dtype: DType, shape: &[usize]) -> (CpuTensor<f64>, K::Tensor) {
    let (host, mut device) = (done(oracle().alloc(dtype, shape)), done(kernels.alloc(dtype, shape)));
    let elements = shape.iter().product();
    done(match dtype {
        DType::Index => kernels.write_index(&vec![-1; elements], &mut device),
        DType::Fp8 => kernels.write_bytes(&vec![0xff; elements], &mut device),
        _ => kernels.write(&vec![f64::NAN; elements], &mut device),
    });
    (host, device)
}

/// A batch on both sides.
pub fn batch<K: Kernels>(kernels: &K, batch: &Batch) -> (CpuBatch, K::Batch) {
    fn on<K: Kernels>(kernels: &K, batch: &Batch) -> K::Batch {
        let mut device = done(kernels.alloc_batch(batch.num_tokens(), batch.num_seqs(), batch.max_blocks));
        done(kernels.upload_batch(batch, &mut device));
        device
    }
    (on::<Cpu<f64>>(&oracle(), batch), on(kernels, batch))
}

/// What must work for a test to mean anything.
#[track_caller]
pub fn done<T>(outcome: Result<T>) -> T {
    outcome.unwrap_or_else(|error| panic!("{error}"))
}
