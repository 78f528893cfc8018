//! Kernel sources to shared libraries, by the host's C++ compiler, kept from run to run.

use std::borrow::Cow;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use dsa80_cuda::Program;
use dsa80_reference::Result;
use sha2::{Digest, Sha256};

macro_rules! emulation {
    ($($name:literal),*) => { &[$(($name, include_str!(concat!("../../emulation/", $name)))),*] };
}

const KERNEL_FILES: &[(&str, &str)] = emulation!["codes.h", "emulation.h"];

const RUNTIME_FILES: &[(&str, &str)] = emulation![
    "codes.h",
    "runtime.cpp",
    "runtime/barriers.h",
    "runtime/collectives.h",
    "runtime/copies.h",
    "runtime/failing.h",
    "runtime/hooks.h",
    "runtime/instructions.h",
    "runtime/matrices.h",
    "runtime/memory.h",
    "runtime/scheduling.h",
    "runtime/stacks.h",
    "runtime/state.h",
    "runtime/waiting.h"
];

/// What both the runtime and the kernels are compiled with.
const COMMON: &[&str] = &[
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-stack-protector",
];

const RUNTIME_ONLY: &[&str] = &["-O3", "-fvisibility=hidden", "-pthread", "-ldl"];

/// Loads, stores, array indices and integer arithmetic call the runtime; the compiler may not make calls of its own out of loops, which
/// would not.
const KERNELS_ONLY: &[&str] = &[
    "-O1",
    "-w",
    "-g",
    "-gdwarf-4",
    "-nostdlib",
    "-fno-optimize-sibling-calls",
    "-fno-builtin",
    "-DDSA80_EMULATION",
    "-I.",
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,signed-integer-overflow,shift-exponent,integer-divide-by-zero",
];

const GCC_ONLY: &[&str] = &[
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-loop-distribute-patterns",
    "-gno-statement-frontiers",
];
const CLANG_ONLY: &[&str] = &["-mllvm", "-tsan-instrument-func-entry-exit=0"];

/// One library to make: its sources by name, and what to compile them with.
pub(super) struct Unit {
    files: BTreeMap<String, Cow<'static, str>>,
    main: &'static str,
    flags: Vec<String>,
}

impl Unit {
    /// The library of one entry of a program; `read` gives its sources.
    pub(super) fn new(
        program: &Program,
        entry: &str,
        read: impl Fn(&str) -> Result<Cow<'static, str>>,
    ) -> Result<Self> {
        let main = format!("#include \"{}\"\nEMULATION_ENTRY({entry})\n", program.source);
        let mut files = embedded(KERNEL_FILES);
        let mut wanted = included(&main);
        while let Some(name) = wanted.pop() {
            if let Entry::Vacant(place) = files.entry(name) {
                let text = read(place.key())?;
                wanted.extend(included(&text));
                place.insert(text);
            }
        }
        files.insert("entry.cpp".to_owned(), Cow::Owned(main));
        let mut flags: Vec<String> = KERNELS_ONLY.iter().map(|&flag| flag.to_owned()).collect();
        flags.extend(program.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        Ok(Self { files, main: "entry.cpp", flags })
    }

    /// What all of them call.
    pub(super) fn runtime() -> Self {
        Self {
            files: embedded(RUNTIME_FILES),
            main: "runtime.cpp",
            flags: RUNTIME_ONLY.iter().map(|&flag| flag.to_owned()).collect(),
        }
    }

    /// The library's path; compiles it unless that has been done.
    pub(super) fn compiled(&self) -> Result<PathBuf, String> {
        let compiler = compiler()?;
        let mut flags: Vec<&str> = COMMON.to_vec();
        flags.extend(self.flags.iter().map(String::as_str));
        if self.main == "entry.cpp" {
            flags.extend(if compiler.version.contains("clang") { CLANG_ONLY } else { GCC_ONLY });
        }
        let folder = cache()?.join(self.key(&compiler.version, &flags));
        let library = folder.join("library.so");
        // One compiler at a time for each library; other processes may do the same work, and one result wins.
        let lock = lock_of(&folder);
        let _held = lock.lock().unwrap_or_else(PoisonError::into_inner);
        if library.is_file() {
            return Ok(library);
        }
        let making = tempfile::Builder::new()
            .prefix("making-")
            .tempdir_in(cache()?)
            .map_err(|error| error.to_string())?;
        std::fs::create_dir(making.path().join("runtime")).map_err(|error| error.to_string())?;
        for (name, text) in &self.files {
            std::fs::write(making.path().join(name), text.as_bytes())
                .map_err(|error| format!("{name}: {error}"))?;
        }
        // For who wants to look into a kernel.
        let _ = std::fs::write(making.path().join("flags"), flags.join(" "));
        compile(compiler, making.path(), self.main, &flags)?;
        let made = making.keep();
        if std::fs::rename(&made, &folder).is_err() {
            let _ = std::fs::remove_dir_all(&made);
            if !library.is_file() {
                return Err(format!("{}: the compiled kernel could not be put there", folder.display()));
            }
        }
        Ok(library)
    }

    fn key(&self, version: &str, flags: &[&str]) -> String {
        let mut hash = Sha256::new();
        let mut part = |text: &str| {
            hash.update(text.len().to_le_bytes());
            hash.update(text);
        };
        part(version);
        flags.iter().for_each(|flag| part(flag));
        for (name, text) in &self.files {
            part(name);
            part(text);
        }
        hash.finalize().iter().take(16).fold(String::new(), |mut key, byte| {
            let _ = write!(key, "{byte:02x}");
            key
        })
    }
}

fn embedded(files: &'static [(&'static str, &'static str)]) -> BTreeMap<String, Cow<'static, str>> {
    files.iter().map(|&(name, text)| (name.to_owned(), Cow::Borrowed(text))).collect()
}

/// The files that a text includes.
fn included(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix("#include \"")?.split('"').next())
        .map(str::to_owned)
        .collect()
}

struct Compiler {
    command: OsString,
    version: String,
}

/// `$CXX`, or the first compiler that there is.
fn compiler() -> Result<&'static Compiler, String> {
    static COMPILER: OnceLock<Result<Compiler, String>> = OnceLock::new();
    COMPILER
        .get_or_init(|| {
            let chosen = std::env::var_os("CXX");
            let named: Vec<OsString> = match chosen {
                Some(command) => vec![command],
                None => ["c++", "g++", "clang++"].map(OsString::from).to_vec(),
            };
            for command in named {
                let Ok(output) = Command::new(&command).arg("--version").output() else { continue };
                if output.status.success() {
                    return Ok(Compiler {
                        command,
                        version: String::from_utf8_lossy(&output.stdout).into_owned(),
                    });
                }
            }
            Err("no C++ compiler; install g++, or name one in CXX".to_owned())
        })
        .as_ref()
        .map_err(Clone::clone)
}

fn compile(compiler: &Compiler, folder: &Path, main: &str, flags: &[&str]) -> Result<(), String> {
    let output = Command::new(&compiler.command)
        .current_dir(folder)
        .arg(main)
        .args(flags)
        .args(["-o", "library.so"])
        .output()
        .map_err(|error| format!("{}: {error}", compiler.command.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("the host's C++ compiler refused the kernel:\n{}", String::from_utf8_lossy(&output.stderr)))
}

/// Beside cargo's own output, or where temporary files go.
fn cache() -> Result<&'static Path, String> {
    static CACHE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    CACHE
        .get_or_init(|| {
            let exe = std::env::current_exe().map_err(|error| error.to_string())?;
            let profile = exe.ancestors().find(|folder| folder.ends_with("deps")).and_then(Path::parent);
            let folder = profile.map_or_else(
                || std::env::temp_dir().join("dsa80-emulation"),
                |folder| folder.join("emulation"),
            );
            std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
            Ok(folder)
        })
        .as_ref()
        .map(PathBuf::as_path)
        .map_err(Clone::clone)
}

fn lock_of(folder: &Path) -> Arc<Mutex<()>> {
    static LOCKS: Mutex<Option<HashMap<PathBuf, Arc<Mutex<()>>>>> = Mutex::new(None);
    let mut locks = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(locks.get_or_insert_default().entry(folder.to_owned()).or_default())
}

/// Replaces `{address}` in a message by the line of source that it stands for.
pub(super) fn with_lines(message: &str, library: &Path) -> String {
    let mut out = String::new();
    let mut rest = message;
    while let Some((before, after)) = rest.split_once('{') {
        out.push_str(before);
        let Some((address, tail)) = after.split_once('}') else {
            out.push('{');
            rest = after;
            continue;
        };
        out.push_str(&line_of(library, address).unwrap_or_else(|| format!("library.so+0x{address}")));
        rest = tail;
    }
    out + rest
}

/// `file:line` of the kernel: the innermost one that is not a primitive.
fn line_of(library: &Path, address: &str) -> Option<String> {
    let output = Command::new("addr2line")
        .args(["-i", "-s", "-e"])
        .arg(library)
        .arg(format!("0x{address}"))
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let lines: Vec<&str> =
        text.lines().map(|line| line.split(" (discriminator").next().unwrap_or(line)).collect();
    let primitive =
        |line: &str| line.starts_with("emulation.h") || line.starts_with("ptx.cuh") || line.contains('?');
    lines.iter().find(|line| !primitive(line)).or(lines.first()).map(|&line| line.to_owned())
}
