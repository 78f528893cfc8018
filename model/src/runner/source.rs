//! Where a rank's weights come from.

use crate::checkpoint::{Checkpoint, CheckpointError, Reservation, Shard};
use crate::config::ModelConfig;
use crate::weights::{HostEnds, HostLayer};

/// A model's weights, shard by shard and layer by layer: a checkpoint on disk, or weights made in memory.
pub trait WeightSource: Send + Sync {
    /// The model's configuration.
    fn config(&self) -> &ModelConfig;

    /// One decoder layer's shard.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file and the tensor.
    fn load_layer(&self, layer: usize, shard: Shard) -> Result<HostLayer, CheckpointError>;

    /// Waits until there is room in host memory for [`load_layer`](Self::load_layer), or [`load_ends`](Self::load_ends) where no layer is named,
    /// and holds it for as long as what is loaded is there.
    fn reserve(&self, _layer: Option<usize>, _shard: Shard) -> Reservation {
        Reservation::default()
    }

    /// The shard of embedding, final norm and output projection.
    ///
    /// # Errors
    /// As for [`load_layer`](Self::load_layer).
    fn load_ends(&self, shard: Shard) -> Result<HostEnds, CheckpointError>;
}

impl WeightSource for Checkpoint {
    fn config(&self) -> &ModelConfig {
        self.config()
    }

    fn load_layer(&self, layer: usize, shard: Shard) -> Result<HostLayer, CheckpointError> {
        self.load_layer(layer, shard)
    }

    fn reserve(&self, layer: Option<usize>, shard: Shard) -> Reservation {
        self.reserve(layer, shard)
    }

    fn load_ends(&self, shard: Shard) -> Result<HostEnds, CheckpointError> {
        self.load_ends(shard)
    }
}
