//! `lm_head` of a rank of eight, for the rows of a decode step.

use super::Case;
use super::linear::{Which, case};

pub(super) fn cases() -> Vec<Case> {
    let vocabulary = 154_880 / 8;
    [1, 8, 32, 64].map(|rows| case("lm_head", [rows, 6144, vocabulary], None, Which::LmHead)).into()
}
