//! The dsa80 server and command line: text in and out of the engine, over HTTP and on a terminal.

pub mod cli;
mod embedded;
pub mod eval;
pub mod generation;
pub mod http;
pub mod metrics;
pub mod mock;
pub mod openai;
pub mod output;
pub mod record;
pub mod shutdown;
mod submit;
pub mod text;

pub use http::{ServedModel, ServerOptions, ServerState, router};
pub use shutdown::serve;
