//! Streams of server-sent events, as OpenAI's clients read them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{SelectAll, Stream, StreamExt, select_all, unfold};

use crate::generation::Generation;
use crate::openai::{ApiError, Usage};
use crate::output::Piece;

/// Writes the chunks of one kind of stream, each as a line of JSON.
pub(super) trait ChunkWriter: Send + 'static {
    /// The chunks of a piece of choice `index`.
    fn piece(&mut self, index: usize, piece: Piece, usage: Option<Option<Usage>>) -> Vec<String>;

    /// The chunk without choices that carries the counts.
    fn usage(&mut self, usage: Usage) -> String;
}

/// How a stream reports its token counts.
#[derive(Debug, Clone)]
pub(super) struct UsagePlan {
    /// Tokens of all prompts, each once.
    pub(super) prompt_tokens: usize,
    /// Choices for each prompt.
    pub(super) n: usize,
    /// A last chunk with the counts, and null in the others.
    pub(super) include: bool,
    /// The counts in every chunk.
    pub(super) continuous: bool,
}

type Pieces = Pin<Box<dyn Stream<Item = (usize, Piece, usize, usize)> + Send>>;

/// A response that streams all `generations` at once.
pub(super) fn stream(
    generations: Vec<Generation>,
    writer: impl ChunkWriter,
    plan: UsagePlan,
    keep_alive: Duration,
) -> Response {
    let choices = generations.len();
    let merged = Merged {
        pieces: select_all(
            generations.into_iter().enumerate().map(|(index, generation)| pieces(index, generation)),
        ),
        writer,
        plan,
        completion: vec![0; choices],
        cached: vec![0; choices],
        ready: VecDeque::new(),
        done: false,
    };
    let events = unfold(merged, |mut merged| async move {
        let data = merged.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), merged))
    });
    let sse = Sse::new(events).keep_alive(KeepAlive::new().interval(keep_alive).text("ping"));
    let mut response = sse.into_response();
    // Buffering proxies would turn a stream into one late answer.
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

fn pieces(index: usize, generation: Generation) -> Pieces {
    Box::pin(unfold(generation, move |mut generation| async move {
        let piece = generation.next().await?;
        let counts = (generation.completion_tokens(), generation.cached_tokens());
        Some(((index, piece, counts.0, counts.1), generation))
    }))
}

struct Merged<W> {
    pieces: SelectAll<Pieces>,
    writer: W,
    plan: UsagePlan,
    /// Tokens generated, by choice.
    completion: Vec<usize>,
    /// Cached prompt tokens, by choice.
    cached: Vec<usize>,
    ready: VecDeque<String>,
    done: bool,
}

impl<W: ChunkWriter> Merged<W> {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            if self.done {
                return None;
            }
            match self.pieces.next().await {
                Some((_, Piece::Failed(message), ..)) => {
                    // The other choices are cancelled: the client has no use for them.
                    self.pieces.clear();
                    let error = ApiError::internal(message).body();
                    self.ready.push_back(serde_json::to_string(&error).unwrap_or_default());
                    self.finish();
                }
                Some((index, piece, completion, cached)) => {
                    self.completion[index] = completion;
                    self.cached[index] = cached;
                    let usage = match (self.plan.continuous, self.plan.include) {
                        (true, _) => Some(Some(self.usage())),
                        (false, true) => Some(None),
                        (false, false) => None,
                    };
                    self.ready.extend(self.writer.piece(index, piece, usage));
                }
                None => {
                    if self.plan.include {
                        let usage = self.usage();
                        self.ready.push_back(self.writer.usage(usage));
                    }
                    self.finish();
                }
            }
        }
    }

    fn finish(&mut self) {
        self.ready.push_back("[DONE]".to_owned());
        self.done = true;
    }

    fn usage(&self) -> Usage {
        let cached = self.cached.iter().step_by(self.plan.n).sum();
        Usage::new(self.plan.prompt_tokens, self.completion.iter().sum(), cached)
    }
}
