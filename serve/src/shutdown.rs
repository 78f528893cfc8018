//! Serving until told to stop, and stopping without cutting anybody off.

use std::future::{Future, pending};
use std::io;
use std::time::Duration;

use axum::serve::ListenerExt;
use dsa80_model::engine::EngineHandle;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{Instant, interval, timeout, timeout_at};

use crate::http::{ServerState, router};

/// After the last response: time for its bytes to leave and for idle connections to close.
const FLUSH: Duration = Duration::from_secs(5);

/// Serves `state` on `listener` until `shutdown` resolves. Then new requests are turned away with a 503 (the
/// listener stays open, so that `/health` can say "draining"), running ones may finish within the state's
/// `shutdown_timeout`, the engine is stopped, and the connections are closed.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    state: ServerState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (close, closed) = oneshot::channel::<()>();
    // A token is a small packet: it must not wait for the acknowledgement of the one before.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
    });
    let server = axum::serve(listener, router(state.clone())).with_graceful_shutdown(async {
        // An error means that the sender is gone, which ends the server just as well.
        let _ = closed.await;
    });
    let upkeep = {
        let state = state.clone();
        async move {
            let mut ticks = interval(Duration::from_secs(5));
            loop {
                ticks.tick().await;
                state.metrics().upkeep();
            }
        }
    };
    let drain = async {
        shutdown.await;
        drain(&state).await;
        let _ = close.send(());
        // Whatever still hangs on a connection now is dropped with the server.
        tokio::time::sleep(FLUSH).await;
    };
    tokio::select! {
        served = server.into_future() => served,
        () = drain => Ok(()),
        () = upkeep => pending().await,
    }
}

/// Turns new requests away, lets the running ones finish, and stops the engine.
async fn drain(state: &ServerState) {
    let grace = state.options().shutdown_timeout;
    let deadline = Instant::now() + grace;
    let model = state.drain();
    tracing::info!(timeout_s = grace.as_secs_f64(), "draining: no new requests from now on");
    if let Some(model) = model {
        let engine = model.engine.clone();
        // The engine ends requests that take longer; it may need a step for that.
        let stopped = tokio::task::spawn_blocking(move || engine.shutdown(grace));
        if timeout_at(deadline + FLUSH, stopped).await.is_err() {
            tracing::warn!("the engine did not stop in time");
        }
    }
    if timeout(FLUSH, state.idle()).await.is_err() {
        tracing::warn!("some responses were not read to their end in time");
    }
}

/// Resolves when the engine has stopped without being asked to, with the reason.
pub async fn failure(engine: &EngineHandle) -> String {
    let mut ticks = interval(Duration::from_millis(100));
    loop {
        ticks.tick().await;
        if let Some(failure) = engine.failure() {
            return failure;
        }
    }
}

/// Waits, for a moment at most, until the responses of a server whose engine has failed are read.
pub async fn flush(state: &ServerState) {
    let _ = timeout(FLUSH, state.idle()).await;
}

/// Resolves on SIGTERM or Ctrl-C.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn signal() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    #[cfg(unix)]
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    Ok(async move {
        let interrupt = async {
            if tokio::signal::ctrl_c().await.is_err() {
                pending::<()>().await;
            }
        };
        #[cfg(unix)]
        tokio::select! {
            () = interrupt => {}
            _ = terminate.recv() => {}
        }
        #[cfg(not(unix))]
        interrupt.await;
    })
}
