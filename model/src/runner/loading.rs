//! A rank's layers from their source to its device: one is uploaded while the next is read.

use std::sync::mpsc::sync_channel;

use dsa80_reference::{Kernels, buffers};

use super::source::WeightSource;
use super::weights::Layer;
use crate::checkpoint::Shard;
use crate::error::LaunchError;

/// Every layer, in order.
pub(super) fn load_layers<K: Kernels>(
    kernels: &K,
    weights: &dyn WeightSource,
    shard: Shard,
) -> Result<Vec<Layer<K>>, LaunchError> {
    let count = weights.config().num_hidden_layers;
    let layers = std::thread::scope(|scope| {
        // Without room: a layer waits until the one before it is on the device.
        let (sender, receiver) = sync_channel(0);
        scope.spawn(move || {
            for index in 0..count {
                let reserved = weights.reserve(index, shard);
                let layer = weights.load_layer(index, shard);
                let failed = layer.is_err();
                // Nobody listens any more when an upload has failed.
                if sender.send((layer, reserved)).is_err() || failed {
                    return;
                }
            }
        });
        let upload = |(layer, reserved)| {
            let layer: Result<_, crate::checkpoint::CheckpointError> = layer;
            let uploaded = Layer::upload(kernels, layer?)?;
            drop::<crate::checkpoint::Reservation>(reserved);
            Ok(uploaded)
        };
        receiver.into_iter().map(upload).collect()
    });
    buffers::clear();
    layers
}
