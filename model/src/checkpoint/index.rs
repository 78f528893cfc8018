//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::files::is_plain_name;

/// The index's name.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The weights of a checkpoint without an index.
pub(super) const SINGLE: &str = "model.safetensors";

/// Tensor name to shard file.
#[derive(Debug, Deserialize)]
pub(super) struct Index {
    #[serde(deserialize_with = "unique")]
    pub(super) weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Parses the index; the error is the reason alone.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let index: Index = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        match index.weight_map.iter().find(|(_, file)| !is_plain_name(file)) {
            None => Ok(index),
            Some((tensor, file)) => Err(format!(
                "tensor `{tensor}` is said to be in {file:?}; expected the name of a file in the same folder"
            )),
        }
    }

    /// The shards, each once, in order of name.
    pub(super) fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        files.sort_unstable();
        files.dedup();
        files
    }
}

/// A map in which no key comes twice.
fn unique<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Unique;

    impl<'de> Visitor<'de> for Unique {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object from tensor names to file names")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut all = BTreeMap::new();
            while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                if all.contains_key(&tensor) {
                    return Err(A::Error::custom(format_args!("tensor `{tensor}` is listed twice")));
                }
                all.insert(tensor, file);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_map(Unique)
}
