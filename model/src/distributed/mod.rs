//! Ranks that are processes, on one machine or on several.
//!
//! `place` is which rank a process is, as launchers say it; `join` how the ranks find each other; `group` what rank 0 tells the others to
//! do, in the words of `message`, which go over the connections of `wire`. `watch` notices ranks that end, fail or fall silent, and `fate`
//! is what is known of that. `meeting` is where CPU ranks exchange their parts of a collective; GPUs have a library of their own for that.

mod fate;
mod group;
mod join;
mod meeting;
mod message;
mod place;
mod watch;
mod wire;

pub(crate) use group::{Leader, Member};
pub use meeting::TcpMeeting;
pub use message::Creed;
pub use place::Place;
