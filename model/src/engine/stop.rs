//! When a generation ends, and what must not be chosen before it may.

use std::sync::Arc;

use super::request::{FinishReason, Request};

/// The stop conditions of one request.
#[derive(Debug, Clone)]
pub(super) struct StopConditions {
    max_tokens: usize,
    min_tokens: usize,
    /// Ids that end the generation.
    stop_ids: Vec<u32>,
    /// Ids that may not be chosen before `min_tokens`: end-of-sequence even when it would not stop.
    banned: Arc<[u32]>,
    nothing: Arc<[u32]>,
}

impl StopConditions {
    /// The conditions of `request` on a model with these end-of-sequence ids.
    pub(super) fn new(request: &Request, eos_token_ids: &[u32]) -> Self {
        let eos = if request.ignore_eos { &[][..] } else { eos_token_ids };
        Self {
            max_tokens: request.max_tokens,
            min_tokens: request.min_tokens,
            stop_ids: distinct(&request.stop_token_ids, eos),
            banned: distinct(&request.stop_token_ids, eos_token_ids).into(),
            nothing: Arc::from([]),
        }
    }

    /// Whether only the prompt is to be scored.
    pub(super) fn generates_nothing(&self) -> bool {
        self.max_tokens == 0
    }

    /// What the token after `generated` others must not be.
    pub(super) fn banned(&self, generated: usize) -> Arc<[u32]> {
        Arc::clone(if generated < self.min_tokens { &self.banned } else { &self.nothing })
    }

    /// Nothing is banned: for rows that score the prompt.
    pub(super) fn nothing_banned(&self) -> Arc<[u32]> {
        Arc::clone(&self.nothing)
    }

    /// Whether the `generated`-th token (counted from 1) is the last, whichever it is.
    pub(super) fn is_last(&self, generated: usize) -> bool {
        generated >= self.max_tokens
    }

    /// Whether `token`, the `generated`-th one (counted from 1), was the last. A stop id that is also the
    /// last allowed token counts as a stop.
    pub(super) fn reached(&self, token: u32, generated: usize) -> Option<FinishReason> {
        if self.stop_ids.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.is_last(generated) {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

fn distinct(a: &[u32], b: &[u32]) -> Vec<u32> {
    let mut ids = [a, b].concat();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request { max_tokens: 3, min_tokens: 2, stop_token_ids: vec![7, 5, 7], ..Request::default() }
    }

    #[test]
    fn stop_ids_and_end_of_sequence_stop() {
        let stop = StopConditions::new(&request(), &[1, 2]);
        for token in [1, 2, 5, 7] {
            assert_eq!(stop.reached(token, 1), Some(FinishReason::Stop), "{token}");
        }
        assert_eq!(stop.reached(3, 1), None);
    }

    #[test]
    fn length_stops_at_max_tokens_and_a_stop_id_there_is_a_stop() {
        let stop = StopConditions::new(&request(), &[1]);
        assert_eq!(stop.reached(3, 2), None);
        assert_eq!(stop.reached(3, 3), Some(FinishReason::Length));
        assert_eq!(stop.reached(1, 3), Some(FinishReason::Stop));
    }

    #[test]
    fn ignore_eos_ignores_only_end_of_sequence() {
        let stop = StopConditions::new(&Request { ignore_eos: true, ..request() }, &[1]);
        assert_eq!(stop.reached(1, 1), None);
        assert_eq!(stop.reached(5, 1), Some(FinishReason::Stop));
        assert_eq!(*stop.banned(0), [1, 5, 7], "still not before min_tokens");
    }

    #[test]
    fn bans_end_with_min_tokens() {
        let stop = StopConditions::new(&request(), &[1, 7]);
        assert_eq!(*stop.banned(0), [1, 5, 7]);
        assert_eq!(*stop.banned(1), [1, 5, 7]);
        assert!(stop.banned(2).is_empty());
        assert!(stop.nothing_banned().is_empty());
    }
}
