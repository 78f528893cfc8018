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
    pub(crate) fn new(max_rows: usize, vocab_size: usize) -> Self {
        Self { max_rows, vocab_size, rows: Vec::new() }
    }

    pub(crate) fn replace(&mut self, rows: &[SampleRow<'_>]) -> Result<()> {
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

    pub(crate) fn rows(&self) -> Vec<SampleRow<'_>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use crate::kernels::{Kernels, SampleOutput};
    use crate::tensor::DType;

    #[test]
    fn a_plan_samples_what_was_uploaded_last() {
        let cpu = Cpu::<f32>::new();
        let mut logits = cpu.alloc(DType::Float, &[2, 3]).unwrap();
        cpu.write(&[0.0, 2.0, 1.0, 5.0, 4.0, 3.0], &mut logits).unwrap();
        let mut out = SampleOutput {
            token_ids: cpu.alloc(DType::Index, &[2]).unwrap(),
            logprobs: cpu.alloc(DType::Float, &[2]).unwrap(),
            top_ids: cpu.alloc(DType::Index, &[2, 0]).unwrap(),
            top_logprobs: cpu.alloc(DType::Float, &[2, 0]).unwrap(),
        };
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let row =
            SampleRow { params: &greedy, prompt: &[], output: &[], banned: &[], position: 0, forced: None };
        let mut plan = cpu.alloc_sample_plan(2, 3).unwrap();
        assert!(cpu.upload_sample_plan(&[row, row], &mut plan).unwrap());
        let banned = SampleRow { banned: &[1], ..row };
        assert!(cpu.upload_sample_plan(&[banned, SampleRow { forced: Some(2), ..row }], &mut plan).unwrap());
        // What is refused leaves it as it was.
        assert!(matches!(cpu.upload_sample_plan(&[row; 3], &mut plan), Err(Error::Capacity { .. })));
        let outside = SampleRow { forced: Some(3), ..row };
        assert!(matches!(cpu.upload_sample_plan(&[outside], &mut plan), Err(Error::Value { .. })));
        cpu.sample_plan(&logits, &plan, &mut out).unwrap();
        assert_eq!(cpu.read_index(&out.token_ids).unwrap(), [2, 2]);
    }
}
