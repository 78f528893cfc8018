//! What the rows of a captured `sample` ask for.

use dsa80_reference::{DType, DeviceTensor, Error, Result, SampleOutput, SampleRow};

use crate::device::Device;
use crate::sample::{SampleStep, SampleTile, SampleWorkspace, launch, upload_all};
use crate::tensor::CudaTensor;

const KERNEL: &str = "sample_plan";

/// The requests of a launch's rows, at an address that does not change, and what its kernels tell each other.
#[derive(Debug)]
pub struct SamplePlan<D: Device> {
    tile: SampleTile,
    workspace: SampleWorkspace<D>,
    vocab: usize,
    step: Option<SampleStep>,
}

impl<D: Device> SamplePlan<D> {
    /// For up to `max_rows` rows of `vocab` logits; the memory of a [`SampleWorkspace`] that reports no alternatives.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, tile: SampleTile, max_rows: usize, vocab: usize) -> Result<Self> {
        let workspace = SampleWorkspace::alloc(device, &tile, max_rows, vocab, 0)?;
        Ok(Self { tile, workspace, vocab, step: None })
    }

    /// Replaces what is asked for; whether it fits.
    ///
    /// # Errors
    /// More rows than there is room for; a parameter that means nothing; the device.
    pub fn upload(&mut self, device: &D, rows: &[SampleRow<'_>]) -> Result<bool> {
        let step = upload_all(device, &self.workspace, self.vocab, rows)?;
        self.step = step.or(self.step);
        Ok(step.is_some())
    }

    /// The kernel of the contract's [`sample_plan`](dsa80_reference::Kernels::sample_plan).
    ///
    /// # Errors
    /// A shape or element type that does not fit what was uploaded last; the device.
    pub fn launch(
        &self,
        device: &D,
        logits: &CudaTensor<D>,
        out: &mut SampleOutput<CudaTensor<D>>,
    ) -> Result<()> {
        let Some(step) = self.step else {
            let expected = "what its rows ask for, uploaded before".into();
            return Err(Error::Value { kernel: KERNEL, name: "plan", expected, found: "nothing".into() });
        };
        let (rows, vocab) = (step.rows(), self.vocab);
        let floats = [DType::Float].as_slice();
        let indices = [DType::Index].as_slice();
        for (name, tensor, shape, dtypes) in [
            ("logits", logits, [rows, vocab].as_slice(), floats),
            ("token_ids", &out.token_ids, &[rows], indices),
            ("logprobs", &out.logprobs, &[rows], floats),
            ("top_ids", &out.top_ids, &[rows, 0], indices),
            ("top_logprobs", &out.top_logprobs, &[rows, 0], floats),
        ] {
            tensor.expect(KERNEL, name, tensor.shape() == shape, || format!("{shape:?}"))?;
            tensor.expect_dtype(KERNEL, name, dtypes, if dtypes == floats { "floats" } else { "indices" })?;
        }
        launch(device, &self.tile, &self.workspace, logits, step, out)
    }
}
