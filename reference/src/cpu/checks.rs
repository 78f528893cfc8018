//! What every kernel asks of its arguments before it computes.

use super::{CpuTensor, Real};
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::tensor::{DType, DeviceTensor};

/// A kernel's name, which every error of its arguments carries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Check(pub(crate) &'static str);

impl Check {
    /// The elements of an `Act` tensor.
    pub(crate) fn act<'a, F: Real>(self, name: &'static str, tensor: &'a CpuTensor<F>) -> Result<&'a [F]> {
        self.dtype(name, tensor, DType::Act, "activations")?;
        tensor.reals(self.0, name)
    }

    /// [`act`](Self::act), to write.
    pub(crate) fn act_mut<'a, F: Real>(
        self,
        name: &'static str,
        tensor: &'a mut CpuTensor<F>,
    ) -> Result<&'a mut [F]> {
        self.dtype(name, tensor, DType::Act, "activations")?;
        tensor.reals_mut(self.0, name)
    }

    /// The elements of a `Float` tensor.
    pub(crate) fn float<'a, F: Real>(self, name: &'static str, tensor: &'a CpuTensor<F>) -> Result<&'a [F]> {
        self.dtype(name, tensor, DType::Float, "floats")?;
        tensor.reals(self.0, name)
    }

    /// [`float`](Self::float), to write.
    pub(crate) fn float_mut<'a, F: Real>(
        self,
        name: &'static str,
        tensor: &'a mut CpuTensor<F>,
    ) -> Result<&'a mut [F]> {
        self.dtype(name, tensor, DType::Float, "floats")?;
        tensor.reals_mut(self.0, name)
    }

    fn dtype<F: Real>(
        self,
        name: &'static str,
        tensor: &CpuTensor<F>,
        dtype: DType,
        expected: &'static str,
    ) -> Result<()> {
        if tensor.dtype() == dtype {
            return Ok(());
        }
        Err(Error::DType { kernel: self.0, tensor: name, expected, found: tensor.dtype() })
    }

    /// Fails with the tensor's shape unless `ok`.
    pub(crate) fn shape<F: Real>(
        self,
        name: &'static str,
        tensor: &CpuTensor<F>,
        ok: bool,
        expected: impl FnOnce() -> String,
    ) -> Result<()> {
        if ok { Ok(()) } else { Err(self.bad_shape(name, tensor, expected())) }
    }

    /// The error of a tensor whose shape is not `expected`.
    pub(crate) fn bad_shape<F: Real>(
        self,
        name: &'static str,
        tensor: &CpuTensor<F>,
        expected: String,
    ) -> Error {
        Error::Shape { kernel: self.0, tensor: name, expected, found: tensor.shape().to_vec() }
    }

    /// Fails with `found` unless `ok`.
    pub(crate) fn value(
        self,
        name: &'static str,
        ok: bool,
        expected: impl FnOnce() -> String,
        found: impl ToString,
    ) -> Result<()> {
        if ok { Ok(()) } else { Err(self.bad_value(name, expected(), found)) }
    }

    /// The error of a value that is not `expected`.
    pub(crate) fn bad_value(self, name: &'static str, expected: String, found: impl ToString) -> Error {
        Error::Value { kernel: self.0, name, expected, found: found.to_string() }
    }

    /// Fails unless the arrays of `batch` agree with each other, so that a kernel may index by them.
    ///
    /// [`Batch::new`] makes only such batches; its fields are public.
    pub(crate) fn batch(self, batch: &Batch) -> Result<()> {
        let (tokens, seqs) = (batch.num_tokens(), batch.num_seqs());
        self.value(
            "positions",
            batch.positions.len() == tokens,
            || format!("{tokens} of them"),
            batch.positions.len(),
        )?;
        self.value(
            "seq_ids",
            batch.seq_ids.len() == tokens,
            || format!("{tokens} of them"),
            batch.seq_ids.len(),
        )?;
        self.value(
            "slot_mapping",
            batch.slot_mapping.len() == tokens,
            || format!("{tokens} slots"),
            batch.slot_mapping.len(),
        )?;
        self.value(
            "block_table",
            batch.block_table.len() == seqs * batch.max_blocks,
            || format!("{seqs} rows of {} pages", batch.max_blocks),
            batch.block_table.len(),
        )?;
        for (&seq, &position) in batch.seq_ids.iter().zip(&batch.positions) {
            let context_len = usize::try_from(seq).ok().and_then(|seq| batch.context_lens.get(seq));
            let Some(&context_len) = context_len else {
                return Err(self.bad_value("seq_ids", format!("a sequence below {seqs}"), seq));
            };
            self.value(
                "positions",
                (0..context_len).contains(&position),
                || format!("a position inside the context of {context_len} tokens"),
                position,
            )?;
        }
        Ok(())
    }

    /// Fails unless `range` lies inside the step's token rows.
    pub(crate) fn rows(self, rows: &std::ops::Range<usize>, batch: &Batch) -> Result<()> {
        self.value(
            "rows",
            rows.start <= rows.end && rows.end <= batch.num_tokens(),
            || format!("a range inside 0..{}", batch.num_tokens()),
            format!("{rows:?}"),
        )
    }
}
