//! GPUs that reach into each other's memory.

use cudarc::driver::sys;
use dsa80_reference::Result;

use super::{Gpu, driver_message, refuse};

impl Gpu {
    /// Lets the kernels of this GPU read and write the memory of `other`.
    ///
    /// # Errors
    /// The two are not connected so.
    pub fn reach(&self, other: &Gpu) -> Result<()> {
        let (own, peer) = (self.context.ordinal(), other.context.ordinal());
        if own == peer {
            return Ok(());
        }
        self.bind()?;
        let mut connected = 0;
        // SAFETY: both are devices of this process; the answer is written to a local.
        let asked = unsafe {
            sys::cuDeviceCanAccessPeer(&mut connected, self.context.cu_device(), other.context.cu_device())
        };
        asked.result().map_err(|error| refuse(driver_message(error)))?;
        if connected == 0 {
            return Err(refuse(format!(
                "GPU {own} cannot reach the memory of GPU {peer} (`nvidia-smi topo -p2p r` shows which can); use --tp 1, or GPUs that are \
                 connected"
            )));
        }
        // SAFETY: this GPU's context is current, and the other's stays as long as the `Gpu` that keeps it.
        match unsafe { sys::cuCtxEnablePeerAccess(other.context.cu_ctx(), 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            enabled => enabled.result().map_err(|error| refuse(driver_message(error))),
        }
    }
}
