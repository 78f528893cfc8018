//! Further prompts of a fixture, to judge a bf16 backend by all of them together.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use dsa80_model::runner::Rank;
use dsa80_reference::Kernels;
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::distance::log_softmax;
use crate::fixture::{Fixture, Spread, as_tokens, f32s, i32s};
use crate::judge::{Bf16Distance, limits};
use crate::prompt;

/// The further prompts of one fixture.
pub struct Pool {
    /// The prompts, with HF float64's log-probability of every token but the first.
    prompts: Vec<(Vec<u32>, Vec<f64>)>,
    /// HF bfloat16's own distance.
    scale: Scale,
}

/// `judge.json`.
#[derive(Debug, Deserialize)]
struct Scale {
    /// By how many of the first prompts are pooled.
    bf16: BTreeMap<usize, Spread>,
}

impl Pool {
    /// Opens that of `fixture`.
    ///
    /// # Errors
    /// A missing or malformed file, by name.
    pub fn open(fixture: &Fixture) -> Result<Self> {
        let read = |name: &str| {
            let path = fixture.dir.join(name);
            std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        let scale: Scale = serde_json::from_slice(&read("judge.json")?)?;
        let bytes = read("judge.safetensors")?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let len = fixture.tokens.len();
        let (tokens, logprobs) = (as_tokens(&i32s(&tensors, "tokens")?), f32s(&tensors, "logprobs")?);
        let prompts: Vec<_> = tokens
            .chunks(len)
            .zip(logprobs.chunks(len - 1))
            .map(|(tokens, logprobs)| (tokens.to_vec(), logprobs.to_vec()))
            .collect();
        let whole = tokens.len() == prompts.len() * len && logprobs.len() == prompts.len() * (len - 1);
        ensure!(whole, "{}: judge.safetensors: prompts of another length", fixture.name);
        Ok(Self { prompts, scale })
    }

    /// How many prompts there are.
    pub fn len(&self) -> usize {
        self.prompts.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// |delta logprob| to HF float64 at every position of the first `count` prompts: whole ones and ones in chunks of 64, in turn.
    ///
    /// # Errors
    /// Whatever the rank reports.
    pub fn deltas<K: Kernels>(
        &self,
        rank: &mut Rank<K>,
        fixture: &Fixture,
        count: usize,
    ) -> Result<Vec<f64>> {
        let limits = limits(fixture, PAGE_SIZE);
        let mut deltas = Vec::new();
        for (number, (tokens, logprobs)) in self.prompts.iter().take(count).enumerate() {
            let pages = prompt::scattered_pages(&limits, number % 3);
            let pieces = prompt::pieces(tokens.len(), if number % 2 == 0 { tokens.len() } else { 64 });
            let run = prompt::run(rank, tokens, &pages, PAGE_SIZE, &pieces)?;
            let rows = run.logits.chunks(fixture.vocab_size).zip(&tokens[1..]);
            let found = rows.map(|(row, &next)| log_softmax(row)[next as usize]);
            deltas.extend(found.zip(logprobs).map(|(found, expected)| (found - expected).abs()));
        }
        Ok(deltas)
    }

    /// The distance over the first `count` prompts (one of the counts in `judge.json`), which it prints.
    ///
    /// # Errors
    /// Whatever the rank reports; a count that HF bfloat16's own distance is not stored of.
    pub fn distance<K: Kernels>(
        &self,
        rank: &mut Rank<K>,
        fixture: &Fixture,
        count: usize,
    ) -> Result<Bf16Distance> {
        let scale = self.scale.bf16.get(&count).with_context(|| format!("no scale of {count} prompts"))?;
        let deltas = self.deltas(rank, fixture, count)?;
        Ok(Bf16Distance::new(&fixture.name, &format!("{count} prompts"), &deltas, scale))
    }
}

/// The page size of the caches that the prompts run on.
pub const PAGE_SIZE: usize = 16;
