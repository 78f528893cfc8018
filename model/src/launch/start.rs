//! A start is waited for as long as it gets on.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::checkpoint::{Checkpoint, CheckpointError, Reservation, Shard};
use crate::config::ModelConfig;
use crate::error::LaunchError;
use crate::headway::Headway;
use crate::runner::WeightSource;
use crate::weights::{HostEnds, HostLayer};

/// From breaking ranks off to leaving them behind: time for them to say whom they waited for.
const GRACE: Duration = Duration::from_secs(2);

/// What `load` gives, on a thread of its own, which is left behind when no rank has got on for `patience`: it may be stuck where nothing
/// reaches it, in a file system or a driver, say.
///
/// # Errors
/// `load` fails, or does not get on: then with what every rank was last known to do.
pub(super) fn watched<T: Send + 'static>(
    headway: &Headway,
    patience: Duration,
    load: impl FnOnce() -> Result<T, LaunchError> + Send + 'static,
) -> Result<T, LaunchError> {
    let (sender, loaded) = channel();
    let load = move || {
        // Nobody listens any more where it was left behind.
        let _ = sender.send(load());
    };
    let thread = thread::Builder::new().name("dsa80-launch".into()).spawn(load).map_err(|error| {
        LaunchError::Options(format!("a thread to load in could not be started: {error}"))
    })?;
    let tick = (patience / 20).clamp(Duration::from_millis(5), Duration::from_millis(500));
    let (mut total, mut since) = (headway.total(), Instant::now());
    while since.elapsed() < patience {
        match loaded.recv_timeout(tick) {
            Ok(loaded) => return loaded,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => resume_unwind(panic),
                Ok(()) => return Err(LaunchError::Options("the thread that loads has ended".into())),
            },
        }
        let now = headway.total();
        if now != total {
            (total, since) = (now, Instant::now());
        }
    }
    let reason = format!(
        "no rank has got on for {patience:?} while the model was started; last known of {}; see what keeps it, or give a slow start longer \
         with --start-timeout",
        headway.last_known()
    );
    headway.break_off(&reason);
    match loaded.recv_timeout(GRACE) {
        Ok(Err(error)) => Err(error),
        _ => Err(LaunchError::Ranks(reason)),
    }
}

/// A checkpoint whose readers say how far they are.
pub(super) fn told(checkpoint: &Arc<Checkpoint>, headway: &Arc<Headway>) -> Arc<dyn WeightSource> {
    Arc::new(Told { checkpoint: Arc::clone(checkpoint), headway: Arc::clone(headway) })
}

struct Told {
    checkpoint: Arc<Checkpoint>,
    headway: Arc<Headway>,
}

impl WeightSource for Told {
    fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    fn load_layer(&self, layer: usize, shard: Shard) -> Result<HostLayer, CheckpointError> {
        let layers = self.config().num_hidden_layers;
        self.headway.begin(shard.rank, format!("loading layer {} of {layers}", layer + 1));
        self.checkpoint.load_layer(layer, shard)
    }

    fn reserve(&self, layer: Option<usize>, shard: Shard) -> Reservation {
        self.checkpoint.reserve(layer, shard)
    }

    fn load_ends(&self, shard: Shard) -> Result<HostEnds, CheckpointError> {
        self.headway.begin(shard.rank, "loading the embedding and the output");
        self.checkpoint.load_ends(shard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(200);

    fn hang() {
        thread::sleep(Duration::from_secs(3600));
    }

    #[test]
    fn a_start_that_does_not_get_on_ends_with_what_ranks_did() {
        let headway = Arc::new(Headway::default());
        let (begun, started) = (Arc::clone(&headway), Instant::now());
        let error = watched(&headway, PATIENCE, move || {
            begun.begin(0, "loading layer 3 of 78");
            hang();
            Ok(())
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("no rank has got on for 200ms"), "{error}");
        assert!(
            error.contains("rank 0: loading layer 3 of 78;") && error.contains("--start-timeout"),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    }

    #[test]
    fn ranks_that_are_broken_off_say_whom_they_waited_for() {
        let headway = Arc::new(Headway::default());
        let (sender, broken) = channel::<String>();
        headway.break_with(Arc::new(move |reason: &str| drop(sender.send(reason.to_owned()))));
        let error = watched(&headway, PATIENCE, move || -> Result<(), _> {
            Err(LaunchError::Ranks(format!("rank 1 has not come: {}", broken.recv().unwrap())))
        });
        assert!(error.unwrap_err().to_string().starts_with("rank 1 has not come: no rank has got on"));
    }

    #[test]
    fn a_start_that_gets_on_may_take_any_time() {
        let headway = Arc::new(Headway::default());
        let (begun, started) = (Arc::clone(&headway), Instant::now());
        let layers = watched(&headway, 5 * PATIENCE, move || {
            for layer in 0..12 {
                begun.begin(0, format!("loading layer {layer} of 12"));
                thread::sleep(PATIENCE);
            }
            Ok(12)
        });
        assert_eq!(layers.unwrap(), 12);
        assert!(started.elapsed() > 10 * PATIENCE);
    }

    #[test]
    #[should_panic(expected = "planted")]
    fn a_panic_is_passed_on() {
        let _ = watched(&Headway::default(), 100 * PATIENCE, || -> Result<(), _> { panic!("planted") });
    }
}
