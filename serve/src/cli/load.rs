//! From the options to a model that answers.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use dsa80_model::checkpoint::{Checkpoint, LoadingBar, Shard};
use dsa80_model::launch::{LoadFormat, launch};

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

/// Loads the model and starts its engine. It takes as long as reading the weights takes.
pub(super) fn load(args: &ModelArgs) -> anyhow::Result<ServedModel> {
    let started = Instant::now();
    let checkpoint = match args.load_format {
        LoadFormat::Auto | LoadFormat::Safetensors => open(args.model.as_deref())?,
        LoadFormat::Dummy => open_dummy(args.model.as_deref())?,
    };
    if checkpoint.is_dummy() {
        tracing::warn!("--load-format dummy: the weights are random numbers, and so are the answers");
    }
    let name = checkpoint.name().to_owned();
    let files = TextFiles::from_checkpoint(&checkpoint)?;
    let text = TextModel::load(&files).with_context(|| format!("in {name}"))?;
    let options = args.launch_options();
    // A degree that does not divide the model is for `launch` to refuse.
    let bytes = checkpoint.shard_bytes(Shard { rank: 0, world_size: options.tp }).unwrap_or(0);
    let bar = LoadingBar::new(bytes.saturating_mul(options.tp as u64));
    let checkpoint = Arc::new(checkpoint.with_progress(Arc::new(bar)));
    let engine = launch(&checkpoint, &options)?;
    tracing::info!(
        model = name,
        max_model_len = engine.max_model_len(),
        elapsed_ms = started.elapsed().as_millis() as u64,
        "the model is loaded"
    );
    Ok(ServedModel { text: Arc::new(text), engine })
}
