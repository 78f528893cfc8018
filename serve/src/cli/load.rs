//! From the options to a model that answers.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use dsa80_model::checkpoint::{Checkpoint, LoadingBar, Shard};
use dsa80_model::distributed::Place;
use dsa80_model::launch::{self, LaunchOptions, LoadFormat, launch, launch_leader};
use dsa80_reference::Breaker;

use super::args::ModelArgs;
use crate::embedded;
use crate::http::ServedModel;
use crate::text::{TextFiles, TextModel};

/// Opens the checkpoint in `dir`, or the one in the binary.
pub(super) fn open(dir: Option<&Path>) -> anyhow::Result<Checkpoint> {
    Ok(match dir {
        Some(dir) => Checkpoint::open(dir)?,
        None => Checkpoint::from_static(embedded::FILES)?,
    })
}

/// The same, of which the config alone is read.
fn open_dummy(dir: Option<&Path>) -> anyhow::Result<Checkpoint> {
    const SEED: u32 = 0;
    Ok(match dir {
        Some(dir) => Checkpoint::open_dummy(dir, SEED)?,
        None => Checkpoint::from_static_dummy(embedded::FILES, SEED)?,
    })
}

/// Loads the model and starts its engine. It takes as long as reading the weights takes. Rank 0 of several processes waits for the others.
pub(super) fn load(args: &ModelArgs, place: Option<&Place>) -> anyhow::Result<ServedModel> {
    load_checkpoint(args, open_for(args)?, place)
}

/// [`load`] of a checkpoint that is open.
pub(super) fn load_checkpoint(
    args: &ModelArgs,
    checkpoint: Checkpoint,
    place: Option<&Place>,
) -> anyhow::Result<ServedModel> {
    let started = Instant::now();
    let options = args.launch_options_at(place)?;
    let name = checkpoint.name().to_owned();
    let files = TextFiles::from_checkpoint(&checkpoint)?;
    let text = TextModel::load(&files).with_context(|| format!("in {name}"))?;
    let checkpoint = Arc::new(with_bar(checkpoint, &options, place));
    let engine = match place {
        None => launch(&checkpoint, &options)?,
        Some(place) => launch_leader(&checkpoint, &options, place)?,
    };
    tracing::info!(
        model = name,
        max_model_len = engine.max_model_len(),
        elapsed_ms = started.elapsed().as_millis() as u64,
        "the model is loaded"
    );
    Ok(ServedModel { text: Arc::new(text), engine })
}

/// Loads another rank than 0, which then does what rank 0 says; returns when rank 0 has left. `lost` is called when the ranks fail.
pub(super) fn follow(args: &ModelArgs, place: &Place, lost: Breaker) -> anyhow::Result<()> {
    let options = args.launch_options_at(Some(place))?;
    let checkpoint = Arc::new(with_bar(open_for(args)?, &options, Some(place)));
    Ok(launch::follow(&checkpoint, &options, place, lost)?)
}

/// Opens the checkpoint that is named, or the one in the binary, for what is to be read of it.
pub(super) fn open_for(args: &ModelArgs) -> anyhow::Result<Checkpoint> {
    let checkpoint = match args.load_format {
        LoadFormat::Auto | LoadFormat::Safetensors => open(args.model.as_deref())?,
        LoadFormat::Dummy => open_dummy(args.model.as_deref())?,
    };
    if checkpoint.is_dummy() {
        tracing::warn!("--load-format dummy: the weights are random numbers, and so are the answers");
    }
    Ok(checkpoint)
}

/// With a bar that counts what this process reads: the shard of its rank, or all of them.
fn with_bar(checkpoint: Checkpoint, options: &LaunchOptions, place: Option<&Place>) -> Checkpoint {
    let (rank, ranks) = place.map_or((0, options.tp), |place| (place.rank, 1));
    // A degree that does not divide the model is for `launch` to refuse.
    let bytes = checkpoint.shard_bytes(Shard { rank, world_size: options.tp }).unwrap_or(0);
    let bar = LoadingBar::new(bytes.saturating_mul(ranks as u64));
    checkpoint.with_progress(Arc::new(bar))
}
