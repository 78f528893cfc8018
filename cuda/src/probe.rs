//! What the CUDA driver of this machine offers, without ever panicking where there is none.

use cudarc::driver::{CudaContext, sys};

/// A GPU that the driver lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice {
    /// Ordinal.
    pub ordinal: usize,
    /// Marketing name.
    pub name: String,
    /// Compute capability, `(8, 0)` for an A100.
    pub compute_capability: (i32, i32),
}

/// Why no device could be listed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// There is no driver library to load.
    #[error("no CUDA driver: libcuda could not be loaded; install the NVIDIA driver")]
    NoDriver,
    /// The driver answered with an error.
    #[error("the CUDA driver answered: {0}")]
    Driver(String),
}

/// Lists the GPUs of this machine.
///
/// # Errors
/// [`ProbeError`] says whether the driver is missing or unwell.
pub fn devices() -> Result<Vec<CudaDevice>, ProbeError> {
    // SAFETY: only tries to load the driver's library; the crate asks for `unsafe` because loading runs the library's
    // initialisers, which for the system's own libcuda is what every CUDA program does.
    if !unsafe { sys::is_culib_present() } {
        return Err(ProbeError::NoDriver);
    }
    let driver = |error: cudarc::driver::DriverError| ProbeError::Driver(error.to_string());
    let count = CudaContext::device_count().map_err(driver)?;
    (0..count.unsigned_abs() as usize)
        .map(|ordinal| {
            let context = CudaContext::new(ordinal).map_err(driver)?;
            Ok(CudaDevice {
                ordinal,
                name: context.name().map_err(driver)?,
                compute_capability: context.compute_capability().map_err(driver)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_gets_an_error_and_not_a_panic() {
        match devices() {
            Ok(devices) => assert!(devices.iter().all(|device| !device.name.is_empty()), "{devices:?}"),
            Err(error) => assert!(error.to_string().contains("CUDA driver"), "{error}"),
        }
    }
}
