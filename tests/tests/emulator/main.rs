//! The emulator itself: right programs give right results, wrong ones the error that names what is wrong.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod asynchronous;
mod barriers;
mod collectives;
mod device;
mod memory;
mod races;
mod snippet;
mod values;
mod waiting;
