//! The emulator itself: right programs give right results, wrong ones the error that names what is wrong.

mod support;
mod values;
