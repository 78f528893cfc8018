//! Launches that are recorded and not yet submitted.

use super::context::{WgpuContext, refuse};
use crate::error::Result;

/// Launches in one submission at most: a device that has nothing to do is waiting for the host.
const SUBMITTED_AT_ONCE: usize = 256;

/// Bytes on their way to the device at most: until they are there the host has them too.
const WRITTEN_AT_ONCE: usize = 64 << 20;

/// The command encoder of the launches since the last submission.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    encoder: Option<wgpu::CommandEncoder>,
    launches: usize,
    /// Bytes since the last submission.
    written: usize,
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

    /// Whether nothing waits for the next submission.
    pub(super) fn is_empty(&self) -> bool {
        self.encoder.is_none()
    }

    /// Counts bytes that were written with nothing recorded before them, and waits until they are there when they have become many.
    pub(super) fn has_written(&mut self, context: &WgpuContext, bytes: usize) -> Result<()> {
        self.written += bytes;
        if self.written < WRITTEN_AT_ONCE {
            return Ok(());
        }
        self.written = 0;
        context.queue.submit([]);
        context.wait()
    }

    /// Hands what was recorded to the device; does not wait.
    pub(super) fn submit(&mut self, context: &WgpuContext) -> Result<()> {
        (self.launches, self.written) = (0, 0);
        context.check()?;
        let Some(encoder) = self.encoder.take() else { return Ok(()) };
        context
            .scoped(wgpu::ErrorFilter::Validation, || context.queue.submit([encoder.finish()]))
            .map_err(|message| refuse(format!("a launch was refused: {message}")))?;
        context.count_submission();
        context.check()
    }
}
