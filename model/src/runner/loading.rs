//! A rank's weights from their source to its device: one part is uploaded while the next is read.

use std::sync::mpsc::sync_channel;

use dsa80_reference::{Kernels, buffers};

use super::draft::Drafter;
use super::source::WeightSource;
use super::weights::{Ends, Layer};
use crate::checkpoint::{CheckpointError, Reservation, Shard};
use crate::error::LaunchError;
use crate::weights::{HostEnds, HostLayer};

/// What a reader hands on.
#[expect(clippy::large_enum_variant, reason = "one a layer, taken apart at once")]
enum Part {
    Ends(Result<HostEnds, CheckpointError>, Reservation),
    Layer(Result<HostLayer, CheckpointError>, Reservation),
}

/// A rank's weights on its device.
pub(super) struct Loaded<K: Kernels> {
    pub(super) ends: Ends<K>,
    /// In order.
    pub(super) layers: Vec<Layer<K>>,
    pub(super) drafter: Option<Drafter<K>>,
}

/// All of them.
pub(super) fn load<K: Kernels>(
    kernels: &K,
    weights: &dyn WeightSource,
    shard: Shard,
) -> Result<Loaded<K>, LaunchError> {
    let count = weights.config().num_hidden_layers;
    // Files are read into what the device copies from.
    let _lending = kernels.host_memory().map(buffers::lend_from);
    let loaded: Result<_, LaunchError> = std::thread::scope(|scope| {
        // One part on its way to the device, one that waits, one that is read.
        let (sender, receiver) = sync_channel(1);
        scope.spawn(move || {
            // Nobody listens any more when an upload has failed.
            let reserved = weights.reserve(None, shard);
            let mut listening = sender.send(Part::Ends(weights.load_ends(shard), reserved)).is_ok();
            for index in 0..count {
                if !listening {
                    return;
                }
                let reserved = weights.reserve(Some(index), shard);
                let layer = weights.load_layer(index, shard);
                let failed = layer.is_err();
                listening = sender.send(Part::Layer(layer, reserved)).is_ok() && !failed;
            }
        });
        let (mut ends, mut layers, mut drafter) = (None, Vec::with_capacity(count), None);
        for part in receiver {
            match part {
                Part::Ends(host, reserved) => {
                    ends = Some(Ends::upload(kernels, host?)?);
                    drop(reserved);
                }
                Part::Layer(host, reserved) => {
                    let mut host = host?;
                    match host.draft.take() {
                        Some(draft) => {
                            let layer = Layer::upload(kernels, host)?;
                            drafter = Some(Drafter::upload(kernels, layer, draft)?);
                        }
                        None => layers.push(Layer::upload(kernels, host)?),
                    }
                    drop(reserved);
                }
            }
        }
        // Only a panic of the reader leaves something out, and the scope passes it on.
        Ok(ends.map(|ends| Loaded { ends, layers, drafter }))
    });
    loaded?.ok_or_else(|| LaunchError::Options("the weights have no embedding".into()))
}
