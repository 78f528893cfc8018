//! Requests one after the other, or at random moments.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::arrivals::Arrivals;
use super::client::{Answer, Endpoint, Failure};
use super::workload::Workload;

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// At moments of a Poisson process.
    Rate { rate: f64, seed: u64 },
    /// The next when one has been answered, by so many clients.
    Concurrency(usize),
}

/// What came of a request.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) number: usize,
    /// Tokens that the prompt was to have.
    pub(super) input_tokens: usize,
    /// Tokens that were asked for.
    pub(super) output_tokens: usize,
    /// Since the first could be sent.
    pub(super) sent: Duration,
    /// How much later than it should have been, where that is given.
    pub(super) late: Option<Duration>,
    pub(super) ended: Duration,
    pub(super) outcome: Result<Answer, Failure>,
}

struct Run {
    endpoint: Endpoint,
    workload: Workload,
    started: Instant,
}

impl Run {
    async fn request(&self, number: usize, due: Option<Duration>) -> Record {
        let asked = self.workload.request(number);
        if let Some(due) = due {
            sleep_until(self.started + due).await;
        }
        let sent = self.started.elapsed();
        let (input_tokens, output_tokens) = (asked.input_tokens, asked.output_tokens);
        let outcome = self.endpoint.ask(asked).await;
        let late = due.map(|due| sent.saturating_sub(due));
        Record { number, input_tokens, output_tokens, sent, late, ended: self.started.elapsed(), outcome }
    }
}

/// Sends requests `first..first + count` of `workload` and waits for all of them; the records are in their order.
pub(super) async fn drive(
    endpoint: &Endpoint,
    workload: &Workload,
    pace: Pace,
    first: usize,
    count: usize,
) -> Vec<Record> {
    let (endpoint, workload) = (endpoint.clone(), workload.clone());
    let run = Arc::new(Run { endpoint, workload, started: Instant::now() });
    let mut tasks: JoinSet<Vec<Record>> = JoinSet::new();
    match pace {
        Pace::Rate { rate, seed } => {
            for (number, due) in (first..first + count).zip(Arrivals::new(rate, seed)) {
                let run = Arc::clone(&run);
                tasks.spawn(async move { vec![run.request(number, Some(due)).await] });
            }
        }
        Pace::Concurrency(clients) => {
            let next = Arc::new(AtomicUsize::new(first));
            for _ in 0..clients.min(count) {
                let (run, next) = (Arc::clone(&run), Arc::clone(&next));
                tasks.spawn(async move {
                    let mut records = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= first + count {
                            return records;
                        }
                        records.push(run.request(number, None).await);
                    }
                });
            }
        }
    }
    let mut records: Vec<Record> = tasks.join_all().await.into_iter().flatten().collect();
    records.sort_by_key(|record| record.number);
    records
}
