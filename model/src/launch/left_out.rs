//! In place of backends that are not in this build: they are nowhere.

use std::convert::Infallible;
use std::sync::Arc;

use super::options::LaunchOptions;
use crate::checkpoint::Checkpoint;
use crate::engine::StepModel;
use crate::error::LaunchError;
use crate::headway::Headway;

type Opened = Infallible;

pub(in crate::launch) fn load(
    opened: Opened,
    _checkpoint: &Arc<Checkpoint>,
    _options: &LaunchOptions,
    _headway: &Arc<Headway>,
) -> Result<Box<dyn StepModel>, LaunchError> {
    match opened {}
}

#[cfg(not(feature = "cuda"))]
pub(super) mod cuda {
    pub(in crate::launch) use super::load;
    use super::{LaunchOptions, Opened};

    pub(in crate::launch) const NOT_BUILT: &str = "it is not in this build, whose feature `cuda` is off";

    pub(in crate::launch) fn open(_options: &LaunchOptions) -> Result<Opened, String> {
        Err(NOT_BUILT.into())
    }
}

#[cfg(not(feature = "wgpu"))]
pub(super) mod wgpu {
    pub(in crate::launch) use super::load;
    use crate::launch::Hardware;

    use super::{LaunchOptions, Opened};

    pub(in crate::launch) const NOT_BUILT: &str = "it is not in this build, whose feature `wgpu` is off";

    pub(in crate::launch) fn open(_hardware: Hardware, _options: &LaunchOptions) -> Result<Opened, String> {
        Err(NOT_BUILT.into())
    }
}
