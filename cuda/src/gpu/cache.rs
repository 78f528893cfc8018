//! The cubins on disk: compiled once, found by every later process, and never trusted without their checksum.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use dsa80_reference::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::resources::Resources;

/// A compiled program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compiled {
    /// What each entry takes.
    pub resources: Vec<Resources>,
    /// The machine code.
    #[serde(skip)]
    pub cubin: Vec<u8>,
}

impl Compiled {
    /// What the entry takes.
    pub fn resources(&self, entry: &str) -> Option<&Resources> {
        self.resources.iter().find(|resources| resources.entry == entry)
    }
}

/// Everything that a cubin depends on, as one hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key(String);

impl Key {
    /// The order and the borders of `parts` count.
    pub(crate) fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hex(&hash.finalize()))
    }
}

/// A folder of cubins. Where it cannot be written, programs are compiled in every process, and a warning says so once.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    warned: AtomicBool,
}

const MAGIC: &[u8] = b"dsa80 cubin 1\n";
const CHECKSUM_BYTES: usize = 32;
const LENGTH_BYTES: usize = 4;

impl Cache {
    /// `DSA80_CACHE`, or `dsa80` in the user's cache folder, or in the temporary one.
    pub(crate) fn default_folder() -> PathBuf {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        set("DSA80_CACHE").unwrap_or_else(|| {
            set("XDG_CACHE_HOME")
                .or_else(|| set("HOME").map(|home| home.join(".cache")))
                .unwrap_or_else(std::env::temp_dir)
                .join("dsa80")
        })
    }

    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder, warned: AtomicBool::new(false) }
    }

    /// The entry of `key`, or what `build` gives, which is then kept.
    pub(crate) fn get_or_build(
        &self,
        key: &Key,
        build: impl FnOnce() -> Result<Compiled>,
    ) -> Result<Compiled> {
        let path = self.folder.join(format!("{}.cubin", key.0));
        // Without a word on what it takes, an entry is as good as none.
        let found = std::fs::read(&path).ok().and_then(|bytes| decode(key, &bytes));
        if let Some(compiled) = found.filter(|compiled| !compiled.resources.is_empty()) {
            return Ok(compiled);
        }
        let compiled = build()?;
        if let Err(error) = self.store(&path, &encode(key, &compiled))
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            let folder = self.folder.display();
            tracing::warn!(
                "compiled kernels cannot be kept in {folder} ({error}): every process compiles them again; DSA80_CACHE names another"
            );
        }
        Ok(compiled)
    }

    /// Under its own name only when it is whole: a reader sees the old entry, the new one or none.
    fn store(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    }
}

/// Magic, checksum of the rest, length of the head, head (the key and the resources), cubin.
fn encode(key: &Key, compiled: &Compiled) -> Vec<u8> {
    let head = serde_json::to_vec(&(&key.0, compiled)).unwrap_or_default();
    let mut rest = u32::try_from(head.len()).unwrap_or(u32::MAX).to_le_bytes().to_vec();
    rest.extend(&head);
    rest.extend(&compiled.cubin);
    [MAGIC, &Sha256::digest(&rest), &rest].concat()
}

fn decode(key: &Key, bytes: &[u8]) -> Option<Compiled> {
    let bytes = bytes.strip_prefix(MAGIC)?;
    let (checksum, rest) = bytes.split_at_checked(CHECKSUM_BYTES)?;
    if Sha256::digest(rest).as_slice() != checksum {
        return None;
    }
    let (length, rest) = rest.split_at_checked(LENGTH_BYTES)?;
    let length = u32::from_le_bytes(length.try_into().ok()?);
    let (head, cubin) = rest.split_at_checked(length as usize)?;
    let (stored_key, mut compiled): (String, Compiled) = serde_json::from_slice(head).ok()?;
    compiled.cubin = cubin.to_vec();
    (stored_key == key.0).then_some(compiled)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled() -> Compiled {
        let resources = Resources { entry: "top_k".into(), registers: 40, ..Resources::default() };
        Compiled { resources: vec![resources], cubin: vec![0x7f, b'E', b'L', b'F', 0, 1, 2, 3] }
    }

    /// The entry as the cache gives it, and whether it had to be built.
    fn ask(cache: &Cache, key: &Key) -> (Compiled, bool) {
        let mut built = false;
        let found = cache.get_or_build(key, || {
            built = true;
            Ok(compiled())
        });
        (found.unwrap(), built)
    }

    fn only_file(folder: &Path) -> PathBuf {
        let files: Vec<PathBuf> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [file] = &files[..] else { panic!("one entry and no temporary file, found {files:?}") };
        file.clone()
    }

    #[test]
    fn an_entry_that_says_nothing_of_its_resources_is_rebuilt() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, key) = (Cache::new(folder.path().to_owned()), Key::of(["a"]));
        let silent = Compiled { resources: Vec::new(), ..compiled() };
        cache.get_or_build(&key, || Ok(silent)).unwrap();
        assert_eq!(cache.get_or_build(&key, || Ok(compiled())).unwrap(), compiled());
    }

    #[test]
    fn an_entry_is_built_once() {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::of(["source", "sm_80"]);
        let cache = Cache::new(folder.path().join("not/yet/there"));
        assert_eq!(ask(&cache, &key), (compiled(), true));
        assert_eq!(ask(&cache, &key), (compiled(), false));
        assert_eq!(ask(&Cache::new(folder.path().join("not/yet/there")), &key), (compiled(), false));
    }

    #[test]
    fn a_damaged_entry_is_rebuilt_and_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::of(["source"]);
        let cache = Cache::new(folder.path().to_owned());
        ask(&cache, &key);
        let file = only_file(folder.path());
        let whole = std::fs::read(&file).unwrap();
        let flipped = (0..whole.len()).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        });
        let truncated = (0..whole.len()).map(|length| whole[..length].to_vec());
        let longer = [[&whole[..], &[0]].concat()];
        for damaged in flipped.chain(truncated).chain(longer) {
            std::fs::write(&file, &damaged).unwrap();
            assert_eq!(ask(&cache, &key), (compiled(), true));
            assert_eq!(std::fs::read(&file).unwrap(), whole);
        }
    }

    #[test]
    fn an_entry_under_another_key_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned());
        ask(&cache, &Key::of(["one"]));
        let two = Key::of(["two"]);
        std::fs::rename(only_file(folder.path()), folder.path().join(format!("{}.cubin", two.0))).unwrap();
        assert!(ask(&cache, &two).1);
    }

    #[test]
    fn keys_see_the_borders_of_their_parts() {
        let keys =
            [vec!["ab", "c"], vec!["a", "bc"], vec!["abc"], vec!["abc", ""], vec!["c", "ab"]].map(Key::of);
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key));
        }
    }

    #[test]
    fn without_a_folder_programs_are_compiled_every_time() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a file");
        std::fs::write(&file, "").unwrap();
        let cache = Cache::new(file.join("below"));
        for _ in 0..2 {
            assert_eq!(ask(&cache, &Key::of(["source"])), (compiled(), true));
        }
        assert!(cache.warned.load(Ordering::Relaxed));
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().join("cache"));
        let error = dsa80_reference::Error::Backend { backend: "cuda", message: "no".into() };
        assert_eq!(cache.get_or_build(&Key::of(["x"]), || Err(error.clone())), Err(error));
        assert!(!folder.path().join("cache").exists());
    }
}
