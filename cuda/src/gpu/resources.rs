//! What the assembler says that a kernel takes.

use serde::{Deserialize, Serialize};

/// The resources of one compiled kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// The `KERNEL` function.
    pub entry: String,
    /// 32-bit registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread: arrays that are indexed by more than constants.
    pub stack: u32,
    /// Bytes that a thread stores because registers ran out.
    pub spill_stores: u32,
    /// Bytes that a thread loads back.
    pub spill_loads: u32,
    /// Shared memory that the source declares with a size, in bytes.
    pub static_shared: u32,
}

impl Resources {
    /// Whether a thread touches local memory, which no pinned tile may.
    pub fn uses_local_memory(&self) -> bool {
        self.stack + self.spill_stores + self.spill_loads > 0
    }
}

/// Reads the log of `ptxas -v`: an entry's name, then the figures of it and of what it calls.
pub(crate) fn parse(log: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let entry = rest.split('\'').next().unwrap_or_default().to_owned();
            all.push(Resources { entry, ..Resources::default() });
        }
        let Some(current) = all.last_mut() else { continue };
        current.stack += number_before(line, " bytes stack frame");
        current.spill_stores += number_before(line, " bytes spill stores");
        current.spill_loads += number_before(line, " bytes spill loads");
        current.registers = current.registers.max(number_before(line, " registers"));
        current.static_shared = current.static_shared.max(number_before(line, " bytes smem"));
    }
    all
}

fn number_before(line: &str, words: &str) -> u32 {
    let Some(end) = line.find(words) else { return 0 };
    let digits = line[..end].rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logs_of_both_compilers_are_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'foo' for 'sm_80'\n\
            ptxas info    : Function properties for foo\n\
            ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 18 registers, used 2 barriers, 128 bytes smem, 368 bytes cmem[0]\n\
            ptxas info    : Compile time = 3.376 ms\n\
            ptxas info    : Compiling entry function 'bar' for 'sm_80'\n\
            ptxas info    : Function properties for bar\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 255 registers, 400 bytes cmem[0]\n";
        let [foo, bar] = &parse(log)[..] else { panic!("two entries") };
        let expected = Resources {
            entry: "foo".into(),
            registers: 18,
            stack: 16,
            spill_stores: 8,
            spill_loads: 12,
            static_shared: 128,
        };
        assert_eq!(*foo, expected);
        assert_eq!((bar.entry.as_str(), bar.registers, bar.uses_local_memory()), ("bar", 255, false));
        assert!(foo.uses_local_memory());
    }

    #[test]
    fn a_log_without_entries_has_no_resources() {
        assert_eq!(parse("error: expected a \";\"\n2 errors detected"), []);
    }
}
