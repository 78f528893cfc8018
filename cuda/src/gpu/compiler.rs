//! From a [`Program`] to machine code: NVRTC behind the cache.

use std::path::PathBuf;

use dsa80_reference::{Error, Result};

use super::cache::{Cache, Compiled, Key};
use super::nvrtc::{File, Nvrtc};
use super::resources;
use crate::device::Program;
use crate::sources::Sources;

/// Compiles programs for one architecture; needs no GPU.
#[derive(Debug)]
pub struct Compiler {
    nvrtc: Nvrtc,
    cache: Cache,
    headers: Vec<(String, String)>,
    sources: Sources,
    arch: String,
}

impl Compiler {
    /// A compiler for the compute capability, `(8, 0)` for an A100. `cuda_major` is the driver's version where there is one: NVRTC of
    /// the same version is preferred. Cubins are kept in `cache`, or in `DSA80_CACHE`, or in the user's cache folder.
    ///
    /// # Errors
    /// There is no NVRTC, and what to install; the sources cannot be read.
    pub fn new(
        sources: Sources,
        compute_capability: (u32, u32),
        cuda_major: Option<u32>,
        cache: Option<PathBuf>,
    ) -> Result<Self> {
        let headers = sources.headers()?.into_iter().map(|(name, text)| (name, text.into_owned())).collect();
        Ok(Self {
            nvrtc: Nvrtc::load(cuda_major)?,
            cache: Cache::new(cache.unwrap_or_else(Cache::default_folder)),
            headers,
            sources,
            arch: format!("sm_{}{}", compute_capability.0, compute_capability.1),
        })
    }

    /// `"sm_80"`.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// NVRTC's version, `"12.8"`.
    pub fn nvrtc_version(&self) -> String {
        let (major, minor) = self.nvrtc.version();
        format!("{major}.{minor}")
    }

    /// Compiles, or finds in the cache.
    ///
    /// # Errors
    /// [`Error::Launch`] with NVRTC's log: the file, the line and what is wrong with it.
    pub fn compile(&self, program: &Program) -> Result<Compiled> {
        let text = self.sources.read(program.source)?;
        let options = self.options(program);
        let version = self.nvrtc_version();
        let headers = self.headers.iter().flat_map(|(name, text)| [name.as_str(), text.as_str()]);
        let parts = [version.as_str(), program.source, &text].into_iter().chain(headers);
        let key = Key::of(parts.chain(options.iter().map(String::as_str)));
        self.cache.get_or_build(&key, || self.build(program, &text, &options))
    }

    fn build(&self, program: &Program, text: &str, options: &[String]) -> Result<Compiled> {
        let source = File { name: program.source, text };
        let headers: Vec<File<'_>> = self.headers.iter().map(|(name, text)| File { name, text }).collect();
        let output = self.nvrtc.compile(&source, &headers, options)?;
        match output.cubin {
            Some(cubin) => Ok(Compiled { resources: resources::parse(&output.log), cubin }),
            None => Err(Error::Launch {
                kernel: program.kernel(),
                shape: program.defines_in_words(),
                message: format!("does not compile for {}:\n{}", self.arch, output.log.trim()),
            }),
        }
    }

    fn options(&self, program: &Program) -> Vec<String> {
        let fixed = [
            &format!("--gpu-architecture={}", self.arch),
            "--std=c++17",
            "--device-as-default-execution-space",
            "--generate-line-info",
            "--ptxas-options=-v",
        ];
        // NVRTC has a cache of its own since 12.9. What comes out of it has no log, and the log says what a kernel takes.
        let uncached = (self.nvrtc.version() >= (12, 9)).then_some("--no-cache");
        let defines = program.defines.iter().map(|(name, value)| format!("--define-macro={name}={value}"));
        fixed.into_iter().chain(uncached).map(str::to_owned).chain(defines).collect()
    }
}
