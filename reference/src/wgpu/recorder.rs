//! Launches that are recorded and not yet submitted.

use super::context::{WgpuContext, refuse};
use crate::error::Result;

/// Launches in one submission at most: a device that has nothing to do is waiting for the host.
const SUBMITTED_AT_ONCE: usize = 256;

/// The command encoder of the launches since the last submission.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    encoder: Option<wgpu::CommandEncoder>,
    launches: usize,
}

impl Recorder {
    /// Adds to the commands.
    pub(super) fn record(
        &mut self,
        context: &WgpuContext,
        commands: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> Result<()> {
        let encoder =
            self.encoder.get_or_insert_with(|| context.device.create_command_encoder(&Default::default()));
        commands(encoder);
        self.launches += 1;
        if self.launches < SUBMITTED_AT_ONCE { Ok(()) } else { self.submit(context) }
    }

    /// Hands what was recorded to the device; does not wait.
    pub(super) fn submit(&mut self, context: &WgpuContext) -> Result<()> {
        self.launches = 0;
        context.check()?;
        let Some(encoder) = self.encoder.take() else { return Ok(()) };
        context
            .scoped(wgpu::ErrorFilter::Validation, || context.queue.submit([encoder.finish()]))
            .map_err(|message| refuse(format!("a launch was refused: {message}")))?;
        context.check()
    }
}
