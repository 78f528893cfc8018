//! NVRTC, CUDA's run-time compiler: found and loaded at run time, in whichever version the machine has.
//!
//! cudarc's own binding panics where the library is missing and does not try CUDA 13's name; these seven functions have not
//! changed since CUDA 11.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

use dsa80_reference::{Error, Result};
use libloading::Library;

use super::libraries::candidates;

type Program = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;

/// The compiler.
#[derive(Debug)]
pub(crate) struct Nvrtc {
    version: (i32, i32),
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    // The functions live in it.
    _library: Library,
}

/// A source file or header.
pub(crate) struct File<'a> {
    pub(crate) name: &'a str,
    pub(crate) text: &'a str,
}

/// What the compiler gave: a cubin, or nothing and the reason in the log.
pub(crate) struct Output {
    pub(crate) cubin: Option<Vec<u8>>,
    pub(crate) log: String,
}

impl Nvrtc {
    /// Loads the library; of several, the one whose major version is `preferred`, which a driver of that version surely runs.
    pub(crate) fn load(preferred: Option<u32>) -> Result<Self> {
        let mut failures = Vec::new();
        for candidate in candidates("DSA80_NVRTC", "nvrtc", preferred) {
            // SAFETY: loading runs the library's initialisers; the names are those of NVIDIA's compiler alone.
            match unsafe { Library::new(&candidate) } {
                Ok(library) => return Self::bind(library, &candidate),
                Err(error) => failures.push((candidate, error.to_string())),
            }
        }
        // A library that is there but does not load says more than those that are not.
        let found = failures.iter().find(|(path, _)| path.is_absolute() && path.exists());
        let detail = found.map_or_else(
            || "no libnvrtc was found".to_owned(),
            |(path, error)| format!("{} does not load: {error}", path.display()),
        );
        Err(missing(&detail))
    }

    fn bind(library: Library, path: &Path) -> Result<Self> {
        let incomplete = |error: libloading::Error| missing(&format!("{}: {error}", path.display()));
        // SAFETY: the types are those of nvrtc.h; the pointers are kept no longer than the library, which is a field beside them.
        let mut nvrtc = unsafe {
            Self {
                version: (0, 0),
                create: *library.get(b"nvrtcCreateProgram\0").map_err(incomplete)?,
                compile: *library.get(b"nvrtcCompileProgram\0").map_err(incomplete)?,
                destroy: *library.get(b"nvrtcDestroyProgram\0").map_err(incomplete)?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0").map_err(incomplete)?,
                log: *library.get(b"nvrtcGetProgramLog\0").map_err(incomplete)?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0").map_err(incomplete)?,
                cubin: *library.get(b"nvrtcGetCUBIN\0").map_err(incomplete)?,
                _library: library,
            }
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: nvrtcVersion fills two ints.
        unsafe {
            type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status;
            let version: libloading::Symbol<'_, Version> =
                nvrtc._library.get(b"nvrtcVersion\0").map_err(incomplete)?;
            version(&raw mut major, &raw mut minor);
        }
        nvrtc.version = (major, minor);
        Ok(nvrtc)
    }

    /// Its version, `(12, 8)`.
    pub(crate) fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles one source, which may include any of `headers`.
    pub(crate) fn compile(
        &self,
        source: &File<'_>,
        headers: &[File<'_>],
        options: &[String],
    ) -> Result<Output> {
        let text = c_string(source.text)?;
        let name = c_string(source.name)?;
        let header_texts = headers.iter().map(|header| c_string(header.text)).collect::<Result<Vec<_>>>()?;
        let header_names = headers.iter().map(|header| c_string(header.name)).collect::<Result<Vec<_>>>()?;
        let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>>>()?;
        let mut program = Owned { nvrtc: self, program: std::ptr::null_mut() };
        // SAFETY: every pointer is to a NUL-terminated string that lives to the end of this function; the counts are the arrays' lengths.
        let status = unsafe {
            (self.create)(
                &raw mut program.program,
                text.as_ptr(),
                name.as_ptr(),
                count(&header_texts),
                pointers(&header_texts).as_ptr(),
                pointers(&header_names).as_ptr(),
            )
        };
        if status != SUCCESS {
            return Err(failed("nvrtcCreateProgram", status));
        }
        // SAFETY: as above; the program was created.
        let compiled =
            unsafe { (self.compile)(program.program, count(&options), pointers(&options).as_ptr()) };
        let log = program.bytes(self.log_size, self.log, "nvrtcGetProgramLog")?;
        let log = CStr::from_bytes_until_nul(&log).map_or(String::new(), |log| log.to_string_lossy().into());
        let cubin = match compiled {
            SUCCESS => Some(program.bytes(self.cubin_size, self.cubin, "nvrtcGetCUBIN")?),
            _ if log.trim().is_empty() => return Err(failed("nvrtcCompileProgram", compiled)),
            _ => None,
        };
        Ok(Output { cubin, log })
    }
}

struct Owned<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Owned<'_> {
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        read: unsafe extern "C" fn(Program, *mut c_char) -> Status,
        function: &str,
    ) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program was created; `size` fills one size_t.
        let status = unsafe { size(self.program, &raw mut bytes) };
        if status != SUCCESS {
            return Err(failed(function, status));
        }
        let mut out = vec![0_u8; bytes];
        // SAFETY: `read` fills as many bytes as `size` said.
        let status = unsafe { read(self.program, out.as_mut_ptr().cast()) };
        if status == SUCCESS { Ok(out) } else { Err(failed(function, status)) }
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: the program was created and is destroyed once.
            unsafe { (self.nvrtc.destroy)(&raw mut self.program) };
        }
    }
}

fn missing(detail: &str) -> Error {
    refuse(format!(
        "no CUDA run-time compiler: {detail}; `pip install -r cuda/requirements.txt` brings one (put the folder of libnvrtc.so \
         into LD_LIBRARY_PATH, or its path into DSA80_NVRTC), and so does the CUDA toolkit"
    ))
}

fn failed(function: &str, status: Status) -> Error {
    refuse(format!("{function} failed with status {status}"))
}

fn refuse(message: String) -> Error {
    Error::Backend { backend: "cuda", message }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| refuse("a source or an option holds a NUL byte".into()))
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

fn count(strings: &[CString]) -> c_int {
    c_int::try_from(strings.len()).unwrap_or(c_int::MAX)
}
