//! cuBLASLt, NVIDIA's library of matrix products: found and loaded at run time, in whichever version the machine has. Where there is
//! none, our own kernels multiply.
//!
//! cudarc's own binding panics where the library is missing and does not try CUDA 13's name; these functions have not changed since
//! CUDA 11.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdeviceptr;
use dsa80_reference::{Error, Result};
use libloading::Library;

use super::libraries::candidates;
use super::{GpuBuffer, lock, refuse};

type Handle = *mut c_void;
type Status = c_int;

/// What the environment says of it: `0` leaves it out, anything else is the library's path.
const VARIABLE: &str = "DSA80_CUBLASLT";

/// Memory that products may use, in bytes: what NVIDIA recommends for sm_90. Allocated with the first product.
const WORKSPACE: usize = 32 << 20;

// cublasLt.h and library_types.h.
const SUCCESS: Status = 0;
const COMPUTE_32F: c_int = 68;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const DESC_TRANSA: c_int = 3;
const OP_T: i32 = 1;
const PREFERENCE_MAX_WORKSPACE: c_int = 1;
const PREFERENCE_REDUCTION_SCHEMES: c_int = 3;
const PREFERENCE_ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];
/// Parts of a sum are kept in f32 and added up in their order.
const REDUCTION_COMPUTE_TYPE: u32 = 2;
/// What rows and tensors are aligned to, in bytes.
const ALIGNMENT: u32 = 16;

/// The library, and what it chose so far.
#[derive(Debug)]
pub(super) struct CublasLt {
    functions: Functions,
    handle: Handle,
    workspace: GpuBuffer,
    plans: Mutex<HashMap<Shape, Option<Plan>>>,
    // Captured graphs may run its kernels for as long as the process lives.
    _library: ManuallyDrop<Library>,
}

// SAFETY: the library's handle may be used by any thread; descriptors are made under the lock of `plans` and only read afterwards.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

/// `out[t, o] = weight[o] . x[t]`, all rows dense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) columns: usize,
    pub(super) features: usize,
    /// Whether the outputs are f32, not bf16.
    pub(super) floats: bool,
}

/// Where a product's matrices lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pointers {
    pub(super) x: CUdeviceptr,
    pub(super) weight: CUdeviceptr,
    pub(super) out: CUdeviceptr,
}

/// How a shape is multiplied: chosen once, so that every run of it is the same.
#[derive(Debug)]
struct Plan {
    operation: Handle,
    weight: Handle,
    x: Handle,
    out: Handle,
    algorithm: [u64; 8],
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*);)*) => {
        #[derive(Debug)]
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Functions {
            fn bind(library: &Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: the types are those of cublasLt.h; the library is never unloaded.
                unsafe { Ok(Self { $($field: *library.get(concat!($name, "\0").as_bytes())?,)* }) }
            }
        }
    };
}

functions! {
    create = "cublasLtCreate": fn(*mut Handle);
    destroy = "cublasLtDestroy": fn(Handle);
    create_operation = "cublasLtMatmulDescCreate": fn(*mut Handle, c_int, c_int);
    set_operation = "cublasLtMatmulDescSetAttribute": fn(Handle, c_int, *const c_void, usize);
    destroy_operation = "cublasLtMatmulDescDestroy": fn(Handle);
    create_layout = "cublasLtMatrixLayoutCreate": fn(*mut Handle, c_int, u64, u64, i64);
    destroy_layout = "cublasLtMatrixLayoutDestroy": fn(Handle);
    create_preference = "cublasLtMatmulPreferenceCreate": fn(*mut Handle);
    set_preference = "cublasLtMatmulPreferenceSetAttribute": fn(Handle, c_int, *const c_void, usize);
    destroy_preference = "cublasLtMatmulPreferenceDestroy": fn(Handle);
    heuristics = "cublasLtMatmulAlgoGetHeuristic":
        fn(Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int);
    multiply = "cublasLtMatmul":
        fn(Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void, Handle,
           *mut c_void, Handle, *const [u64; 8], *mut c_void, usize, *mut c_void);
}

impl CublasLt {
    /// The library; of several, the one whose major version is `preferred`. None where there is none or the environment leaves it out.
    ///
    /// # Errors
    /// It is there and does not work; memory runs out.
    pub(super) fn load(context: &Arc<CudaContext>, preferred: Option<u32>) -> Result<Option<Self>> {
        if std::env::var_os(VARIABLE).is_some_and(|value| value == "0") {
            return Ok(None);
        }
        for path in candidates(VARIABLE, "cublasLt", preferred) {
            // SAFETY: loading runs the library's initialisers; the names are those of NVIDIA's library alone.
            match unsafe { Library::new(&path) } {
                Ok(library) => return Self::bind(library, &path, context).map(Some),
                Err(error) => tracing::debug!("{}: {error}", path.display()),
            }
        }
        if std::env::var_os(VARIABLE).is_some() {
            return Err(refuse(format!("the library that {VARIABLE} names does not load")));
        }
        tracing::info!("no libcublasLt was found: products of many tokens take the kernels of dsa80");
        Ok(None)
    }

    fn bind(library: Library, path: &Path, context: &Arc<CudaContext>) -> Result<Self> {
        let functions = Functions::bind(&library)
            .map_err(|error| refuse(format!("{} lacks a function: {error}", path.display())))?;
        let library = ManuallyDrop::new(library);
        let mut handle = std::ptr::null_mut();
        // SAFETY: fills the handle.
        check("cublasLtCreate", unsafe { (functions.create)(&raw mut handle) })?;
        let workspace = GpuBuffer::alloc(context, "cuBLASLt workspace", WORKSPACE)?;
        Ok(Self { functions, handle, workspace, plans: Mutex::default(), _library: library })
    }

    /// Queues the product on `stream`; false where the library has nothing for its shape.
    ///
    /// # Errors
    /// The library refuses.
    ///
    /// # Safety
    /// The pointers are to device memory of the shape's sizes, aligned to 16 bytes; so are its rows.
    pub(super) unsafe fn multiply(
        &self,
        shape: Shape,
        pointers: Pointers,
        stream: *mut c_void,
    ) -> Result<bool> {
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(self.plan(shape)?),
        };
        let Some(plan) = plan else { return Ok(false) };
        let (one, zero) = (1.0_f32, 0.0_f32);
        let pointer = |address: CUdeviceptr| address as *mut c_void;
        let out = pointer(pointers.out);
        // SAFETY: the descriptors are the plan's, alive under its lock; alpha and beta are read before the call returns; with beta zero
        // C is not read; the matrices are the caller's word.
        let status = unsafe {
            (self.functions.multiply)(
                self.handle,
                plan.operation,
                (&raw const one).cast(),
                pointer(pointers.weight),
                plan.weight,
                pointer(pointers.x),
                plan.x,
                (&raw const zero).cast(),
                out,
                plan.out,
                out,
                plan.out,
                &raw const plan.algorithm,
                pointer(self.workspace.pointer()),
                self.workspace.bytes(),
                stream,
            )
        };
        check("cublasLtMatmul", status).map(|()| true)
    }

    /// Its matrices lie by columns: `out` is `[features, tokens]`, the product of the transposed weight and x.
    fn plan(&self, Shape { tokens, columns, features, floats }: Shape) -> Result<Option<Plan>> {
        let mut building = Building::new(&self.functions);
        let operation = building.operation()?;
        let weight = building.layout(R_16BF, columns, features)?;
        let x = building.layout(R_16BF, columns, tokens)?;
        let out = building.layout(if floats { R_32F } else { R_16BF }, features, tokens)?;
        let preference = building.preference()?;
        let mut found = Heuristic::default();
        let mut count = 0;
        // SAFETY: everything was just made; fills one result and the count.
        let status = unsafe {
            (self.functions.heuristics)(
                self.handle,
                operation,
                weight,
                x,
                out,
                out,
                preference,
                1,
                &raw mut found,
                &raw mut count,
            )
        };
        if status != SUCCESS || count == 0 || found.state != SUCCESS || found.workspace > WORKSPACE {
            return Ok(None);
        }
        building.keep();
        Ok(Some(Plan { operation, weight, x, out, algorithm: found.algorithm }))
    }
}

/// What a plan is made of, destroyed unless it is kept.
struct Building<'a> {
    functions: &'a Functions,
    operation: Option<Handle>,
    layouts: Vec<Handle>,
    preference: Option<Handle>,
}

impl<'a> Building<'a> {
    fn new(functions: &'a Functions) -> Self {
        Self { functions, operation: None, layouts: Vec::new(), preference: None }
    }

    fn operation(&mut self) -> Result<Handle> {
        let mut operation = std::ptr::null_mut();
        // SAFETY: fills the handle.
        let status = unsafe { (self.functions.create_operation)(&raw mut operation, COMPUTE_32F, R_32F) };
        check("cublasLtMatmulDescCreate", status)?;
        self.operation = Some(operation);
        // SAFETY: the operation was just made; the attribute is as long.
        let status = unsafe {
            (self.functions.set_operation)(
                operation,
                DESC_TRANSA,
                std::ptr::from_ref(&OP_T).cast(),
                size_of::<i32>(),
            )
        };
        check("cublasLtMatmulDescSetAttribute", status)?;
        Ok(operation)
    }

    fn layout(&mut self, kind: c_int, rows: usize, columns: usize) -> Result<Handle> {
        let mut layout = std::ptr::null_mut();
        // SAFETY: fills the handle.
        let status = unsafe {
            (self.functions.create_layout)(&raw mut layout, kind, rows as u64, columns as u64, rows as i64)
        };
        check("cublasLtMatrixLayoutCreate", status)?;
        self.layouts.push(layout);
        Ok(layout)
    }

    fn preference(&mut self) -> Result<Handle> {
        let mut preference = std::ptr::null_mut();
        // SAFETY: fills the handle.
        check("cublasLtMatmulPreferenceCreate", unsafe {
            (self.functions.create_preference)(&raw mut preference)
        })?;
        self.preference = Some(preference);
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the preference was just made; the attribute is as long.
            check("cublasLtMatmulPreferenceSetAttribute", unsafe {
                (self.functions.set_preference)(preference, attribute, value, bytes)
            })
        };
        set(PREFERENCE_MAX_WORKSPACE, std::ptr::from_ref(&WORKSPACE).cast(), size_of::<usize>())?;
        set(
            PREFERENCE_REDUCTION_SCHEMES,
            std::ptr::from_ref(&REDUCTION_COMPUTE_TYPE).cast(),
            size_of::<u32>(),
        )?;
        for attribute in PREFERENCE_ALIGNMENTS {
            set(attribute, std::ptr::from_ref(&ALIGNMENT).cast(), size_of::<u32>())?;
        }
        Ok(preference)
    }

    /// Leaves operation and layouts to the plan.
    fn keep(&mut self) {
        self.operation = None;
        self.layouts.clear();
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        // SAFETY: each was made and is destroyed once.
        unsafe {
            if let Some(operation) = self.operation {
                (self.functions.destroy_operation)(operation);
            }
            for &layout in &self.layouts {
                (self.functions.destroy_layout)(layout);
            }
            if let Some(preference) = self.preference {
                (self.functions.destroy_preference)(preference);
            }
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        for plan in lock(&self.plans).drain().filter_map(|(_, plan)| plan) {
            // Destroys them.
            drop(Building {
                functions: &self.functions,
                operation: Some(plan.operation),
                layouts: vec![plan.weight, plan.x, plan.out],
                preference: None,
            });
        }
        // SAFETY: created once, destroyed once. A destructor has nobody to tell.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}

fn check(function: &str, status: Status) -> Result<(), Error> {
    if status == SUCCESS { Ok(()) } else { Err(refuse(format!("{function} failed with status {status}"))) }
}
