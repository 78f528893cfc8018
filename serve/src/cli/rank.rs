//! `dsa80 serve` as another rank than 0 of several processes: no endpoint, only a part of the model.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use dsa80_model::distributed::Place;

use super::args::ModelArgs;
use super::load::follow;
use crate::shutdown;

/// What ends by itself has ended by then.
const GRACE: Duration = Duration::from_secs(5);

/// Follows rank 0 until it leaves. A first signal to stop, which launchers send to all ranks, leaves rank 0 `drain` to let its requests
/// finish.
pub(super) fn run(args: &ModelArgs, place: &Place, drain: Duration) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("dsa80-signals".into()).spawn(move || runtime.block_on(signals(drain)))?;
    let rank = place.rank;
    // This rank may be stuck where nothing reaches it, in a kernel that does not end, say.
    let lost = move |reason: &str| {
        tracing::error!("{reason}");
        end_within(GRACE);
    };
    follow(args, place, Arc::new(lost)).with_context(|| format!("rank {rank} stops"))?;
    tracing::info!("rank 0 has left: rank {rank} ends");
    Ok(ExitCode::SUCCESS)
}

/// Ends the process if it has not ended by itself by then: never a hang. Not by an exit, which would wait for what a driver does at one.
pub(super) fn end_within(patience: Duration) {
    let end = move || {
        thread::sleep(patience);
        tracing::error!("the process does not end by itself: ended after {patience:?}");
        std::process::abort();
    };
    if thread::Builder::new().name("dsa80-end".into()).spawn(end).is_err() {
        std::process::abort();
    }
}

async fn signals(drain: Duration) {
    let Ok(stop) = shutdown::signal() else { return };
    stop.await;
    tracing::info!("waiting at most {drain:?} for rank 0 to leave");
    if let Ok(again) = shutdown::signal() {
        let _ = tokio::time::timeout(drain, again).await;
    }
    tracing::warn!("stopped before rank 0 has left");
    end_within(GRACE);
    std::process::exit(130);
}
