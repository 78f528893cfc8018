//! The checkpoints under `fixtures/` and what HF transformers computed from them in float64.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

/// One fixture: a checkpoint and its golden results.
pub struct Fixture {
    /// The folder's name.
    pub name: String,
    /// The checkpoint's folder.
    pub dir: PathBuf,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// `[prompt, vocab]` teacher-forced logits.
    pub logits: Vec<f64>,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// The selection of every full layer.
    pub selections: Vec<Selection>,
    /// Greedy continuation of the first `greedy_prompt_len` tokens.
    pub greedy: Vec<u32>,
    /// Best minus second-best logit of each of them.
    pub greedy_margin: Vec<f64>,
    /// HF's own distances, and the rest of `golden.json`.
    pub scale: Golden,
}

/// What a full layer selects.
pub struct Selection {
    /// The layer.
    pub layer: usize,
    /// Columns of `indices`.
    pub topk: usize,
    /// `[prompt, topk]`, ascending, -1 padded.
    pub indices: Vec<i32>,
    /// k-th minus k+1-th score; infinite where everything visible is selected.
    pub gap: Vec<f64>,
}

/// `golden.json`.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// Prompt tokens before the greedy continuation.
    pub greedy_prompt_len: usize,
    /// HF float32 against HF float64, target token.
    pub f32: Spread,
    /// HF float32 against HF float64, worst token of the vocabulary.
    pub f32_max_over_vocab: Spread,
    /// HF bfloat16 against HF float64, target token.
    pub bf16: Spread,
}

/// A distribution of |delta logprob| over positions.
#[derive(Debug, Deserialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

/// The folder of fixtures: `DSA80_FIXTURES`, or the repository's (for test binaries that run where they were
/// built).
pub fn root() -> PathBuf {
    std::env::var_os("DSA80_FIXTURES")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures")), PathBuf::from)
}

/// Every fixture: all cases, in order, then the default checkpoint.
///
/// # Errors
/// An unreadable folder or file, by name.
pub fn all() -> Result<Vec<Fixture>> {
    let cases = root().join("cases");
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(&cases)
        .with_context(|| format!("reading {}", cases.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    dirs.sort();
    dirs.push(root().join("default"));
    ensure!(dirs.len() > 1, "no cases under {}", cases.display());
    dirs.into_iter().map(Fixture::open).collect()
}

impl Fixture {
    /// Opens the fixture in `dir`.
    ///
    /// # Errors
    /// A missing or malformed file, by name.
    pub fn open(dir: PathBuf) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        let scale: Golden = serde_json::from_slice(&read("golden.json")?)?;
        let bytes = read("golden.safetensors")?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let tokens = as_tokens(&i32s(&tensors, "tokens")?);
        let logits = f32s(&tensors, "logits")?;
        let mut selections = Vec::new();
        for name in tensors.names() {
            let Some(layer) = name.strip_prefix("topk.") else { continue };
            selections.push(Selection {
                layer: layer.parse()?,
                topk: tensors.tensor(name)?.shape()[1],
                indices: i32s(&tensors, name)?,
                gap: f32s(&tensors, &format!("topk_gap.{layer}"))?,
            });
        }
        selections.sort_by_key(|selection| selection.layer);
        ensure!(!selections.is_empty(), "{}: no selections", dir.display());
        Ok(Self {
            name: dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            vocab_size: logits.len() / tokens.len(),
            greedy: as_tokens(&i32s(&tensors, "greedy")?),
            greedy_margin: f32s(&tensors, "greedy_margin")?,
            dir,
            tokens,
            logits,
            selections,
            scale,
        })
    }
}

pub(crate) fn as_tokens(values: &[i32]) -> Vec<u32> {
    values.iter().map(|&value| value as u32).collect()
}

fn words(tensors: &SafeTensors<'_>, name: &str, dtype: Dtype) -> Result<Vec<[u8; 4]>> {
    let tensor = tensors.tensor(name).with_context(|| format!("tensor {name}"))?;
    ensure!(tensor.dtype() == dtype, "tensor {name} is {:?}, expected {dtype:?}", tensor.dtype());
    Ok(tensor.data().chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]).collect())
}

pub(crate) fn i32s(tensors: &SafeTensors<'_>, name: &str) -> Result<Vec<i32>> {
    Ok(words(tensors, name, Dtype::I32)?.into_iter().map(i32::from_le_bytes).collect())
}

pub(crate) fn f32s(tensors: &SafeTensors<'_>, name: &str) -> Result<Vec<f64>> {
    Ok(words(tensors, name, Dtype::F32)?
        .into_iter()
        .map(|word| f64::from(f32::from_le_bytes(word)))
        .collect())
}
