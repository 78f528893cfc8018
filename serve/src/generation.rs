//! A choice on its way out of the engine: events in, pieces out, with its clock and its place in the
//! request's record.

use std::sync::Arc;
use std::time::Instant;

use dsa80_model::engine::{Event, EventStream};

use crate::metrics::Metrics;
use crate::output::{Decoder, Piece};
use crate::record::RequestRecord;

/// One choice being generated. Dropping it cancels what the engine still does for it.
#[derive(Debug)]
pub struct Generation {
    /// `None` once the last piece was given: the engine's side is released at once, not when the response
    /// ends.
    events: Option<EventStream>,
    decoder: Decoder,
    metrics: Arc<Metrics>,
    record: Arc<RequestRecord>,
    /// When the newest token came.
    newest: Option<Instant>,
}

impl Generation {
    /// Follows `events`.
    pub fn new(
        events: EventStream,
        decoder: Decoder,
        metrics: Arc<Metrics>,
        record: Arc<RequestRecord>,
    ) -> Self {
        Self { events: Some(events), decoder, metrics, record, newest: None }
    }

    /// The next piece; `None` after the last.
    pub async fn next(&mut self) -> Option<Piece> {
        while let Some(events) = &mut self.events {
            let event = events.next().await;
            self.observe(event.as_ref());
            let piece = self.decoder.event(event);
            if self.decoder.is_finished() {
                self.events = None;
                self.metrics.e2e_latency.record(self.record.started().elapsed());
            }
            if piece.is_some() {
                return piece;
            }
        }
        None
    }

    /// Tokens generated so far.
    pub fn completion_tokens(&self) -> usize {
        self.decoder.completion_tokens()
    }

    /// Prompt tokens found in the prefix cache.
    pub fn cached_tokens(&self) -> usize {
        self.decoder.cached_tokens()
    }

    fn observe(&mut self, event: Option<&Event>) {
        match event {
            Some(Event::Started { .. }) => self.metrics.queue_time.record(self.record.started().elapsed()),
            Some(Event::Token { .. }) => {
                let now = Instant::now();
                match self.newest.replace(now) {
                    None => {
                        let waited = now - self.record.started();
                        self.metrics.time_to_first_token.record(waited);
                        self.record.first_token(waited);
                    }
                    Some(before) => self.metrics.inter_token_latency.record(now - before),
                }
                self.record.add_completion_token();
            }
            _ => {}
        }
    }
}
