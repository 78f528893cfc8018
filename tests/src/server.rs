//! The server over the default checkpoint, in this process, on a port of the system's choice.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use dsa80_model::engine::EngineHandle;
use dsa80_model::launch::{LaunchOptions, launch};
use dsa80_serve::text::{TextFiles, TextModel};
use dsa80_serve::{ServedModel, ServerState, serve};
use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::sync::oneshot;

use crate::engine::default_checkpoint;

/// How a server is started.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The engine's side.
    pub launch: LaunchOptions,
    /// The HTTP side.
    pub http: dsa80_serve::ServerOptions,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { launch: crate::engine::options(), http: dsa80_serve::ServerOptions::default() }
    }
}

impl ServerOptions {
    /// A server that asks for `key`.
    #[must_use]
    pub fn with_key(mut self, key: &str) -> Self {
        self.http.api_keys.push(key.into());
        self
    }
}

/// A running server. Dropping it shuts it down, and waits for that.
pub struct TestServer {
    address: SocketAddr,
    engine: EngineHandle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    /// Loads the default checkpoint and serves it, on a runtime of its own.
    ///
    /// # Errors
    /// Whatever the launch, the tokenizer or the socket reports.
    pub fn start(options: ServerOptions) -> Result<Self> {
        let checkpoint = default_checkpoint()?;
        let text = TextModel::load(&TextFiles::from_checkpoint(&checkpoint)?)?;
        let engine = launch(&checkpoint, &options.launch)?;
        let model = ServedModel { text: Arc::new(text), engine: engine.clone() };
        let state = ServerState::ready_with(options.http, model);
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        // Not through the runtime: the caller may be on one of its own, where nothing may block on another.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("binding")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let served = runtime.block_on(async {
                // The sender says its word by being dropped.
                serve(TcpListener::from_std(listener)?, state, async { stopped.await.unwrap_or_default() })
                    .await
            });
            if let Err(error) = served {
                eprintln!("the server failed: {error}");
            }
        });
        Ok(Self { address, engine, stop: Some(stop), thread: Some(thread) })
    }

    /// The address of `path`, which begins with a slash.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The engine behind it.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the server's thread has been printed, and its requests have failed.
            let _ = thread.join();
        }
    }
}
