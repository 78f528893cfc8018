//! What a workgroup may have of its adapter.

use super::Wgpu;
use crate::error::{Error, Result};

impl Wgpu {
    /// Fails unless `bytes` of memory fit a workgroup: what a row of `columns` columns takes.
    pub(super) fn expect_shared(
        &self,
        kernel: &'static str,
        name: &'static str,
        bytes: usize,
        columns: usize,
    ) -> Result<()> {
        let most = self.context().limits.max_compute_workgroup_storage_size as usize;
        if bytes <= most {
            return Ok(());
        }
        Err(Error::Value {
            kernel,
            name,
            expected: format!(
                "so few columns that a workgroup's {bytes} bytes are at most the adapter's {most}"
            ),
            found: columns.to_string(),
        })
    }

    /// Fails unless a workgroup may have `lanes` lanes.
    pub(super) fn expect_lanes(&self, kernel: &'static str, lanes: u32) -> Result<()> {
        let limits = &self.context().limits;
        let most = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
        if lanes <= most {
            return Ok(());
        }
        Err(Error::Value {
            kernel,
            name: "workgroup",
            expected: format!("an adapter with {lanes} lanes; use cuda or cpu"),
            found: most.to_string(),
        })
    }
}
