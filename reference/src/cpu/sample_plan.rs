//! What the rows of a `sample_plan` ask for.

use super::sample::check_row;
use crate::error::{Error, Result};
use crate::sampling::{SampleRow, SamplingParams};

/// The rows that were given last, until others are.
#[derive(Debug)]
pub struct CpuSamplePlan {
    max_rows: usize,
    vocab_size: usize,
    rows: Vec<Row>,
}

/// A [`SampleRow`] that owns what it is about.
#[derive(Debug)]
struct Row {
    params: SamplingParams,
    prompt: Vec<u32>,
    output: Vec<u32>,
    banned: Vec<u32>,
    position: u32,
    forced: Option<u32>,
}

impl CpuSamplePlan {
    pub(super) fn new(max_rows: usize, vocab_size: usize) -> Self {
        Self { max_rows, vocab_size, rows: Vec::new() }
    }

    pub(super) fn replace(&mut self, rows: &[SampleRow<'_>]) -> Result<()> {
        if rows.len() > self.max_rows {
            let (shape, elements) = (vec![rows.len()], rows.len());
            return Err(Error::Capacity { shape, elements, capacity: self.max_rows });
        }
        rows.iter().try_for_each(|row| check_row(row, self.vocab_size))?;
        let own = |row: &SampleRow<'_>| Row {
            params: row.params.clone(),
            prompt: row.prompt.to_vec(),
            output: row.output.to_vec(),
            banned: row.banned.to_vec(),
            position: row.position,
            forced: row.forced,
        };
        self.rows = rows.iter().map(own).collect();
        Ok(())
    }

    pub(super) fn rows(&self) -> Vec<SampleRow<'_>> {
        self.rows.iter().map(Row::lend).collect()
    }
}

impl Row {
    fn lend(&self) -> SampleRow<'_> {
        SampleRow {
            params: &self.params,
            prompt: &self.prompt,
            output: &self.output,
            banned: &self.banned,
            position: self.position,
            forced: self.forced,
        }
    }
}
