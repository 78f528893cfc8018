//! One step's ragged batch, described once and read by every kernel.

use crate::error::{Error, Result};

/// One sequence's share of a step: `query_len` new tokens at the end of a context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSlice<'a> {
    /// The new tokens, in order.
    pub token_ids: &'a [u32],
    /// Tokens already in the caches, which is also the position of the first new token.
    pub computed_len: usize,
    /// The sequence's pages, in order; at least enough for `computed_len + token_ids.len()` tokens.
    pub pages: &'a [u32],
}

/// A ragged batch of prefill chunks and decodes.
///
/// `T` is the number of new tokens over all sequences, `S` the number of sequences, `B` the widest block
/// table. Sequences lie one after the other; the tokens of sequence `s` are rows
/// `cu_seqlens[s]..cu_seqlens[s + 1]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Tokens a page holds.
    pub page_size: usize,
    /// `[T]` new token ids.
    pub token_ids: Vec<i32>,
    /// `[T]` position of each new token in its sequence; it sees the cache rows of positions `0..=position`.
    pub positions: Vec<i32>,
    /// `[T]` the sequence of each new token.
    pub seq_ids: Vec<i32>,
    /// `[T]` where each new token's cache rows go: `page * page_size + offset`. 64 bits: caches outgrow i32.
    pub slot_mapping: Vec<i64>,
    /// `[S + 1]` offsets of the sequences' first rows.
    pub cu_seqlens: Vec<i32>,
    /// `[S]` tokens in each sequence's context, the new ones included.
    pub context_lens: Vec<i32>,
    /// `[S, B]` the pages of each sequence, padded with -1.
    pub block_table: Vec<i32>,
    /// `B`.
    pub max_blocks: usize,
    /// The largest of `context_lens`, 0 for an empty batch.
    pub max_context_len: usize,
}

impl Batch {
    /// Builds the description of one step.
    ///
    /// # Errors
    /// [`Error::Value`] when a sequence has too few pages, is longer than i32 counts, or `page_size` is 0.
    pub fn new(page_size: usize, sequences: &[SequenceSlice<'_>]) -> Result<Self> {
        let refuse = |name, expected: String, found: String| {
            Err(Error::Value { kernel: "batch", name, expected, found })
        };
        if page_size == 0 {
            return refuse("page_size", "at least 1".into(), "0".into());
        }
        let mut batch = Batch {
            page_size,
            cu_seqlens: vec![0],
            max_blocks: sequences.iter().map(|s| s.pages.len()).max().unwrap_or(0),
            ..Default::default()
        };
        for (seq_id, seq) in sequences.iter().enumerate() {
            let context_len = seq.computed_len + seq.token_ids.len();
            if i32::try_from(context_len).is_err() {
                return refuse("context_lens", "at most 2^31 - 1".into(), context_len.to_string());
            }
            if seq.pages.len() * page_size < context_len {
                return refuse(
                    "block_table",
                    format!("pages for {context_len} tokens of sequence {seq_id}"),
                    format!("{} pages of {page_size}", seq.pages.len()),
                );
            }
            for (offset, &token) in seq.token_ids.iter().enumerate() {
                let position = seq.computed_len + offset;
                let page = seq.pages[position / page_size] as i64;
                batch.token_ids.push(token as i32);
                batch.positions.push(position as i32);
                batch.seq_ids.push(seq_id as i32);
                batch.slot_mapping.push(page * page_size as i64 + (position % page_size) as i64);
            }
            batch.cu_seqlens.push(batch.token_ids.len() as i32);
            batch.context_lens.push(context_len as i32);
            batch.block_table.extend(seq.pages.iter().map(|&page| page as i32));
            batch.block_table.extend(std::iter::repeat_n(-1, batch.max_blocks - seq.pages.len()));
            batch.max_context_len = batch.max_context_len.max(context_len);
        }
        Ok(batch)
    }

    /// `T`: new tokens in the step.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// `S`: sequences in the step.
    pub fn num_seqs(&self) -> usize {
        self.context_lens.len()
    }

    /// Cache rows that token row `t` sees: its position plus one.
    pub fn visible(&self, t: usize) -> usize {
        self.positions[t] as usize + 1
    }

    /// The cache slot of position `position` of the sequence that token row `t` belongs to.
    pub fn slot(&self, t: usize, position: usize) -> usize {
        let seq = self.seq_ids[t] as usize;
        let page = self.block_table[seq * self.max_blocks + position / self.page_size];
        page as usize * self.page_size + position % self.page_size
    }
}
