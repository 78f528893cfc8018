//! Launches that are recorded and not yet submitted.

use super::context::{WgpuContext, refuse};
use crate::error::Result;

/// Launches in one submission at most: a device that has nothing to do is waiting for the host.
const SUBMITTED_AT_ONCE: usize = 256;

/// The commands since the last submission.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    /// Launches follow each other in one pass: between passes a device idles for longer than a small kernel takes.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    commands: usize,
}

impl Recorder {
    /// Adds a launch.
    pub(super) fn launch(
        &mut self,
        context: &WgpuContext,
        launch: impl FnOnce(&mut wgpu::ComputePass<'static>),
    ) -> Result<()> {
        let pass = match self.pass.take() {
            Some(pass) => pass,
            None => self.encoder(context).begin_compute_pass(&Default::default()).forget_lifetime(),
        };
        launch(self.pass.insert(pass));
        self.count(context)
    }

    /// Adds other commands.
    pub(super) fn record(
        &mut self,
        context: &WgpuContext,
        commands: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> Result<()> {
        self.pass = None;
        commands(self.encoder(context));
        self.count(context)
    }

    fn encoder(&mut self, context: &WgpuContext) -> &mut wgpu::CommandEncoder {
        self.encoder.get_or_insert_with(|| context.device.create_command_encoder(&Default::default()))
    }

    fn count(&mut self, context: &WgpuContext) -> Result<()> {
        self.commands += 1;
        if self.commands < SUBMITTED_AT_ONCE { Ok(()) } else { self.submit(context) }
    }

    /// Hands what was recorded to the device; does not wait.
    pub(super) fn submit(&mut self, context: &WgpuContext) -> Result<()> {
        self.commands = 0;
        self.pass = None;
        let encoder = self.encoder.take();
        context.check()?;
        let Some(encoder) = encoder else { return Ok(()) };
        context
            .scoped(|| context.queue.submit([encoder.finish()]))
            .map_err(|message| refuse(format!("a launch was refused: {message}")))?;
        context.count_submission();
        context.check()
    }
}
