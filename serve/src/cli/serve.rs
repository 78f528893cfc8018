//! `dsa80 serve`

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Args;
use dsa80_model::distributed::Place;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::args::{ModelArgs, YEAR};
use super::load::load;
use super::{rank, size};
use crate::embedded;
use crate::http::{ServerOptions, ServerState};
use crate::shutdown;

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// The address to listen on; 0.0.0.0 lets other machines in.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,

    /// The port; 0 takes a free one.
    #[arg(long, short, default_value_t = 8000)]
    port: u16,

    /// The name that requests call the model by; may be repeated. Default: the folder's name.
    #[arg(long, value_name = "NAME")]
    served_model_name: Vec<String>,

    /// A key that requests must bring, on every route but /health; may be repeated.
    #[arg(long, value_name = "KEY", env = "DSA80_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,

    /// A web origin that browsers may call from, or `*`; may be repeated.
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,

    /// The longest request body.
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "32M")]
    max_body_bytes: usize,

    /// Seconds that running requests may take after the signal to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(..=YEAR))]
    shutdown_timeout: u64,

    /// Seconds of silence on a stream after which a comment is sent, lest proxies close it.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    sse_keep_alive: u64,
}

/// What rank 0 needs beside `--shutdown-timeout` to leave.
const DRAIN_MARGIN: Duration = Duration::from_secs(20);

pub(super) fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let place = Place::from_env()?;
    if let Some(place) = place.as_ref().filter(|place| place.rank > 0) {
        return rank::run(&args.model, place, Duration::from_secs(args.shutdown_timeout) + DRAIN_MARGIN);
    }
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let result = runtime.block_on(serve(args, place));
    if result.is_err() {
        // A rank may be stuck in its device, which then does not let the process go.
        rank::end_within(Duration::from_secs(10));
    }
    // A loader that was interrupted still reads; nobody waits for it.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve(args: ServeArgs, place: Option<Place>) -> anyhow::Result<()> {
    let options = args.server_options();
    let stop = shutdown::signal().context("cannot listen for signals")?;
    let listener = TcpListener::bind((args.host.as_str(), args.port))
        .await
        .with_context(|| format!("cannot listen on {}:{}", args.host, args.port))?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && options.api_keys.is_empty() {
        tracing::warn!("listening on {address} without --api-key: whoever reaches it may use it");
    }
    let names = options.model_names.join(", ");
    let state = ServerState::new(options);
    tracing::info!("listening on http://{address}, loading {names}");

    let (loaded, ready) = oneshot::channel();
    std::thread::spawn(move || {
        // Nobody waits any more if the signal to stop came first.
        let _ = loaded.send(load(&args.model, place.as_ref()));
    });
    let serving = shutdown::serve(listener, state.clone(), async move {
        stop.await;
        tokio::spawn(second_signal());
    });
    let loading = async {
        let model = ready.await.context("the loader ended without a word")??;
        let engine = model.engine.clone();
        state.set_ready(model);
        tracing::info!("ready: http://{address}/v1 serves {names}");
        let failure = shutdown::failure(&engine).await;
        // Every request has been told; the responses need a moment to be read.
        state.set_failed(&failure);
        shutdown::flush(&state).await;
        Err(anyhow!(failure))
    };
    tokio::select! {
        served = serving => served.context("the server failed"),
        failed = loading => failed,
    }
}

/// Whoever asks twice does not want to wait.
async fn second_signal() {
    if let Ok(again) = shutdown::signal() {
        again.await;
        tracing::warn!("stopped at once, as asked for a second time");
        std::process::exit(130);
    }
}

impl ServeArgs {
    fn server_options(&self) -> ServerOptions {
        let names = if self.served_model_name.is_empty() {
            vec![default_name(self.model.model.as_deref())]
        } else {
            self.served_model_name.clone()
        };
        ServerOptions {
            model_names: names,
            api_keys: self.api_key.iter().filter(|key| !key.is_empty()).cloned().collect(),
            cors_origins: self.cors_origin.clone(),
            max_body_bytes: self.max_body_bytes,
            shutdown_timeout: Duration::from_secs(self.shutdown_timeout),
            sse_keep_alive: Duration::from_secs(self.sse_keep_alive),
        }
    }
}

/// The last part of the folder's path.
fn default_name(dir: Option<&Path>) -> String {
    match dir {
        None => embedded::NAME.to_owned(),
        Some(dir) => {
            let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
            whole
                .file_name()
                .map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned())
        }
    }
}
