//! The model on a backend: weights, caches, the forward pass, and the ranks that run it.

mod attention;
mod cache;
mod draft;
mod forward;
mod gathered;
mod graphs;
mod group;
mod loading;
mod mlp;
mod probe;
mod rank;
mod shape;
mod source;
mod weights;
mod workspace;

pub(crate) use cache::CacheWidths;
pub use graphs::decode_graphs;
pub(crate) use group::Follower;
pub use group::{RankGroup, RankParts};
pub use probe::Probe;
pub use rank::{INDEX_LOGITS, Rank, RecordedStep};
#[cfg(feature = "wgpu")]
pub(crate) use shape::RankShape;
pub use source::WeightSource;
pub(crate) use workspace::MAX_LOGPROBS;
