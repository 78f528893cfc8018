//! One body for every backend: a kernel as the contract's method, against the oracle.
//!
//! [`check`] runs it on the CUDA kernels in emulation and on a GPU, and on the WGSL kernels of [`Wgpu`]: with subgroups, without, and with
//! activations in f32. Those are judged by the oracle that does not round, within what the bodies allow for sums, functions and divisions in
//! f32: the same bounds as in bf16, without its rounding.

use std::fmt::Debug;
use std::ops::Deref;
use std::sync::{Arc, Once, OnceLock};

use dsa80_cuda::{Cuda, Device, Tiles};
use dsa80_reference::cpu::{Cpu, CpuBatch, CpuTensor};
use dsa80_reference::wgpu::{ActType, Edit, Wgpu, WgpuContext, WgpuOptions};
use dsa80_reference::{Batch, DType, HostData, HostTensor, Kernels, Result};
use half::{bf16, f16};
use proptest::prelude::*;

use super::compare::half_ulp_bf16;
use super::devices::{self, tell, wanted};
use super::oracle;
use super::runner::{Config, catch, run};
use super::values::Values;

/// A kernel, its cases, and how one of them is judged.
pub trait Contract {
    /// The kernel's name, and the file's of its regressions.
    const NAME: &'static str;
    /// What is drawn.
    type Case: Debug + Clone;

    /// The cases.
    fn cases() -> impl Strategy<Value = Self::Case>;

    /// Panics unless the backend does what the oracle does.
    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Self::Case);

    /// The same of kernels that multiply matrices of halves, of which some lose more.
    fn run_in_halves<K: Kernels>(kernels: &Backend<'_, K>, case: &Self::Case) {
        Self::run(kernels, case);
    }
}

/// A backend, and what its activations are.
#[derive(Debug, Clone, Copy)]
pub struct Backend<'k, K> {
    kernels: &'k K,
    act: ActType,
}

impl<K> Deref for Backend<'_, K> {
    type Target = K;

    fn deref(&self) -> &K {
        self.kernels
    }
}

impl<'k> Backend<'k, Wgpu> {
    fn of(kernels: &'k Wgpu) -> Self {
        Self { kernels, act: kernels.context().act() }
    }
}

impl<K> Backend<'_, K> {
    /// What its activations are.
    pub fn act(&self) -> ActType {
        self.act
    }

    /// Whether what it stores as `dtype` is f32.
    pub fn is_floats(&self, dtype: DType) -> bool {
        dtype == DType::Float || (dtype == DType::Act && self.act == ActType::F32)
    }

    /// Its judge: f64, rounding to bf16 where the contract says so, if this backend does.
    pub fn oracle(&self) -> Cpu<f64> {
        match self.act {
            ActType::Bf16 => oracle(),
            ActType::F32 => Cpu::new(),
        }
    }

    /// What rounding an activation near `value` adds: in f32 nothing that its computation has not.
    pub fn half_ulp(&self, value: f64) -> f64 {
        match self.act {
            ActType::Bf16 => half_ulp_bf16(value),
            ActType::F32 => 0.0,
        }
    }

    /// The relative L2 error of activations made of `values`, most of which in bf16 are rounded as the oracle's `expected` are and are
    /// `in_bf16` off together; where few of them are most of the norm, the largest may be a step of bf16 off besides. In f32 no element is
    /// rounded as the oracle's, and its own bound says all.
    pub fn relative_l2(&self, values: Values, expected: &[f64], in_bf16: f64) -> f64 {
        match self.act {
            ActType::Bf16 if matches!(values, Values::Tiny | Values::Huge) => {
                let largest = expected.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
                let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
                in_bf16 + if norm > 0.0 { largest / norm / 128.0 } else { 0.0 }
            }
            ActType::Bf16 => in_bf16,
            ActType::F32 => f64::INFINITY,
        }
    }
}

/// As the adapter multiplies.
fn run_on<C: Contract>(context: &Arc<WgpuContext>, case: &C::Case) {
    let kernels = Wgpu::new(Arc::clone(context));
    let kernels = &Backend::of(&kernels);
    if context.has_matrices() { C::run_in_halves(kernels, case) } else { C::run(kernels, case) }
}

/// Runs random cases on every backend there is. `DSA80_PARITY=wgpu`, `=emulator` or `=gpu` leaves the others out.
#[track_caller]
pub fn check<C: Contract>() {
    for (name, context) in adapters() {
        // What differs in f32 is what loads and stores.
        let factor = if context.act() == ActType::F32 { 1 } else { 2 };
        let config = Config { name: C::NAME, on: name, factor };
        run(&config, &C::cases(), &|case| run_on::<C>(context, &case));
    }
    for device in devices::all() {
        let (on, factor) = (device.to_string(), if device.is_gpu() { 4 } else { 1 });
        let tiles = done(Tiles::for_gpu(&device.limits().name, None));
        let cuda = Cuda::new(device, tiles);
        let cuda = Backend { kernels: &cuda, act: ActType::Bf16 };
        run(&Config { name: C::NAME, on: &on, factor }, &C::cases(), &|case| C::run(&cuda, &case));
    }
}

/// The ways through the WGSL kernels with activations of a type, the one with subgroups first, if there is one: none where there is no
/// adapter, and tests may leave it out.
pub fn contexts(act: ActType) -> impl DoubleEndedIterator<Item = &'static Arc<WgpuContext>> {
    adapters().iter().map(|(_, context)| context).filter(move |context| context.act() == act)
}

/// Runs `body` once on every way through the WGSL kernels.
pub fn on_wgpu(body: impl Fn(&Backend<'_, Wgpu>)) {
    for (_, context) in adapters() {
        body(&Backend::of(&Wgpu::new(Arc::clone(context))));
    }
}

/// Runs `body` once on every way, where a binding has `elements` activations at most.
pub fn with_small_bindings(elements: usize, body: impl Fn(&Backend<'_, Wgpu>)) {
    on_wgpu(|wgpu| {
        let largest_binding = Some((elements * wgpu.act().bytes()) as u64);
        let options = WgpuOptions { largest_binding, ..same_adapter(wgpu) };
        body(&Backend::of(&Wgpu::new(done(WgpuContext::open(&options)))));
    });
}

/// What opens the adapter of `wgpu` again.
pub fn same_adapter(wgpu: &Wgpu) -> WgpuOptions {
    let context = wgpu.context();
    WgpuOptions {
        plain: !context.has_subgroups(),
        without_matrices: !context.has_matrices(),
        act: context.act(),
        ..options()
    }
}

/// Whether the body sees `edit`, a fault in a shader; one of matrices is seen where the adapter has them.
#[track_caller]
pub fn catches<C: Contract>(edit: Edit) {
    catches_in::<C>(ActType::Bf16, edit);
}

/// The same with activations in f32.
#[track_caller]
pub fn catches_in_f32<C: Contract>(edit: Edit) {
    catches_in::<C>(ActType::F32, edit);
}

#[track_caller]
fn catches_in<C: Contract>(act: ActType, edit: Edit) {
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
        act,
        edits: vec![edit.clone()],
        ..options()
    }));
    let reason = catch(&C::cases(), &|case| run_on::<C>(&context, &case));
    let Some(reason) = reason else { panic!("nothing sees the fault {edit:?}") };
    for refusal in ["is not once in", "Shader", "validation"] {
        assert!(!reason.contains(refusal), "{edit:?} does not compile: {reason}");
    }
}

/// The adapter of the tests, with matrices and with subgroups where it has them, and without; and in f32.
fn adapters() -> &'static [(String, Arc<WgpuContext>)] {
    static OPENED: OnceLock<Vec<(String, Arc<WgpuContext>)>> = OnceLock::new();
    static TOLD: Once = Once::new();
    if !wanted("wgpu") {
        return &[];
    }
    OPENED.get_or_init(|| {
        let mut opened = Vec::new();
        for (plain, without_matrices, act) in [
            (false, false, ActType::Bf16),
            (false, true, ActType::Bf16),
            (true, true, ActType::Bf16),
            (false, true, ActType::F32),
        ] {
            match WgpuContext::open(&WgpuOptions { plain, without_matrices, act, ..options() }) {
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

/// Values are numbers of bf16; with so much more they are numbers of f32 alone.
const NOT_BF16: f64 = 1.0 + 1.0 / 1000.0;

/// An `Act` or `Float` tensor of `values` on both sides, rounded to bf16 or f32.
///
/// Activations in f32 are a thousandth more, so that a kernel that rounds them to bf16 does not go unnoticed.
pub fn numbers<K: Kernels>(
    kernels: &Backend<'_, K>,
    dtype: DType,
    shape: &[usize],
    values: &[f64],
) -> (CpuTensor<f64>, K::Tensor) {
    let round = |x: f64| match (dtype, kernels.act()) {
        (DType::Act, ActType::Bf16) => bf16::from_f32(x as f32).to_f64(),
        (DType::Act, ActType::F32) => f64::from((x * NOT_BF16) as f32),
        _ => f64::from(x as f32),
    };
    let rounded: Vec<f64> = values.iter().map(|&x| round(x)).collect();
    both(
        kernels,
        dtype,
        shape,
        |host| kernels.oracle().write(&rounded, host),
        |device| kernels.write(&rounded, device),
    )
}

/// An `Index` tensor on both sides.
pub fn index<K: Kernels>(
    kernels: &Backend<'_, K>,
    shape: &[usize],
    values: &[i32],
) -> (CpuTensor<f64>, K::Tensor) {
    let write = |host: &mut CpuTensor<f64>| kernels.oracle().write_index(values, host);
    both(kernels, DType::Index, shape, write, |device| kernels.write_index(values, device))
}

/// An 8-bit cache on both sides.
pub fn bytes<K: Kernels>(
    kernels: &Backend<'_, K>,
    shape: &[usize],
    values: &[u8],
) -> (CpuTensor<f64>, K::Tensor) {
    let write = |host: &mut CpuTensor<f64>| kernels.oracle().write_bytes(values, host);
    both(kernels, DType::Fp8, shape, write, |device| kernels.write_bytes(values, device))
}

fn both<K: Kernels>(
    kernels: &Backend<'_, K>,
    dtype: DType,
    shape: &[usize],
    write_host: impl FnOnce(&mut CpuTensor<f64>) -> Result<()>,
    write_device: impl FnOnce(&mut K::Tensor) -> Result<()>,
) -> (CpuTensor<f64>, K::Tensor) {
    let (mut host, mut device) =
        (done(kernels.oracle().alloc(dtype, shape)), done(kernels.alloc(dtype, shape)));
    done(write_host(&mut host));
    done(write_device(&mut device));
    (host, device)
}

/// A dense weight of `values` on both sides, rounded to `dtype`.
pub fn weight<K: Kernels>(
    kernels: &Backend<'_, K>,
    dtype: DType,
    shape: &[usize],
    values: &[f64],
) -> (CpuTensor<f64>, K::Tensor) {
    let host = host_weight(dtype, shape, values);
    (done(kernels.oracle().upload(host.clone())), done(kernels.upload(host)))
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
pub fn output<K: Kernels>(
    kernels: &Backend<'_, K>,
    dtype: DType,
    shape: &[usize],
) -> (CpuTensor<f64>, K::Tensor) {
    let (host, mut device) = (done(kernels.oracle().alloc(dtype, shape)), done(kernels.alloc(dtype, shape)));
    let elements = shape.iter().product();
    done(match dtype {
        DType::Index => kernels.write_index(&vec![-1; elements], &mut device),
        DType::Fp8 => kernels.write_bytes(&vec![0xff; elements], &mut device),
        _ => kernels.write(&vec![f64::NAN; elements], &mut device),
    });
    (host, device)
}

/// A batch on both sides.
pub fn batch<K: Kernels>(kernels: &Backend<'_, K>, batch: &Batch) -> (CpuBatch, K::Batch) {
    fn on<K: Kernels>(kernels: &K, batch: &Batch) -> K::Batch {
        let mut device = done(kernels.alloc_batch(batch.num_tokens(), batch.num_seqs(), batch.max_blocks));
        done(kernels.upload_batch(batch, &mut device));
        device
    }
    (on::<Cpu<f64>>(&kernels.oracle(), batch), on(&**kernels, batch))
}

/// What must work for a test to mean anything.
#[track_caller]
pub fn done<T>(outcome: Result<T>) -> T {
    outcome.unwrap_or_else(|error| panic!("{error}"))
}
