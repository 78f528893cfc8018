//! Ways of running a prompt through a rank: in pieces, on scattered pages, beside other sequences.

use std::collections::BTreeMap;
use std::ops::Range;

use dsa80_model::engine::StepLimits;
use dsa80_model::runner::{Probe, Rank};
use dsa80_reference::{Batch, DType, Kernels, Result, SequenceSlice};

/// What came out of a prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Run {
    /// `[prompt, vocab]`.
    pub logits: Vec<f64>,
    /// By full layer: `[prompt, topk]`, each row as the backend left it.
    pub selections: BTreeMap<usize, Vec<i32>>,
}

/// Limits for a test with contexts of up to `max_model_len` tokens in a few sequences.
pub fn limits(max_model_len: usize, page_size: usize, vocab_size: usize) -> StepLimits {
    StepLimits {
        page_size,
        num_pages: 3 * max_model_len.div_ceil(page_size),
        cache_dtype: DType::Act,
        max_batch_tokens: 2 * max_model_len,
        max_batch_seqs: 4,
        max_model_len,
        vocab_size,
        max_logprobs: 20,
    }
}

/// The pages of one of up to three sequences: every third of the cache, from the end, so that no two
/// neighbours touch.
pub fn scattered_pages(limits: &StepLimits, sequence: usize) -> Vec<u32> {
    let count = limits.max_model_len.div_ceil(limits.page_size);
    (0..count).rev().map(|page| (page * 3 + sequence) as u32).collect()
}

/// Cuts `0..len` into pieces of at most `size`.
pub fn pieces(len: usize, size: usize) -> Vec<Range<usize>> {
    (0..len).step_by(size).map(|start| start..(start + size).min(len)).collect()
}

/// Keeps the selections of one step.
struct Recorder<'a>(&'a mut BTreeMap<usize, Vec<i32>>);

impl Probe for Recorder<'_> {
    fn topk_indices(&mut self, layer: usize, indices: &mut [i32]) -> bool {
        self.0.insert(layer, indices.to_vec());
        false
    }
}

/// Runs `tokens` through `rank` in `pieces` on `pages`, and collects logits and selections of every position.
///
/// # Errors
/// Whatever the rank reports.
pub fn run<K: Kernels>(
    rank: &mut Rank<K>,
    tokens: &[u32],
    pages: &[u32],
    page_size: usize,
    pieces: &[Range<usize>],
) -> Result<Run> {
    let mut run = Run::default();
    for piece in pieces {
        let slice = SequenceSlice { token_ids: &tokens[piece.clone()], computed_len: piece.start, pages };
        step(rank, page_size, &[slice], 0, &mut run)?;
    }
    Ok(run)
}

/// Makes one step over `slices`, and adds what came out of the one at index `watched` to `run`.
///
/// # Errors
/// Whatever the rank reports.
pub fn step<K: Kernels>(
    rank: &mut Rank<K>,
    page_size: usize,
    slices: &[SequenceSlice<'_>],
    watched: usize,
    run: &mut Run,
) -> Result<()> {
    let start: usize = slices[..watched].iter().map(|slice| slice.token_ids.len()).sum();
    let rows = start..start + slices[watched].token_ids.len();
    let total: usize = slices.iter().map(|slice| slice.token_ids.len()).sum();
    let batch = Batch::new(page_size, slices)?;
    let mut recorded = BTreeMap::new();
    rank.forward(&batch, Some(&mut Recorder(&mut recorded)))?;
    for (layer, indices) in recorded {
        let columns = indices.len() / total;
        let watched = &indices[rows.start * columns..rows.end * columns];
        run.selections.entry(layer).or_default().extend_from_slice(watched);
    }
    run.logits.extend(rank.logits(&rows.collect::<Vec<_>>())?);
    Ok(())
}
