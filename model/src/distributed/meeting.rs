//! Collectives of CPU ranks over TCP: rank 0 takes everybody's part in rank order and hands all of them out.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dsa80_reference::cpu::Meeting;
use dsa80_reference::{Breaker, Error, Result};

use super::fate::Fate;
use super::wire::malformed;

/// Elements of a part at most.
const MAX_ELEMENTS: u64 = 1 << 28;

/// The collectives.
const NAMES: [&str; 4] = ["all_reduce", "all_gather", "broadcast", "barrier"];

/// No rank.
const NOBODY: usize = usize::MAX;

/// A rank's end.
pub struct TcpMeeting {
    rank: usize,
    world_size: usize,
    fate: Arc<Fate>,
    state: Mutex<State>,
    /// Whom this rank waits for.
    waits_for: Arc<AtomicUsize>,
}

struct State {
    /// Of rank 0: to every other rank, in order. Of another rank: to rank 0.
    streams: Vec<TcpStream>,
    /// Collectives so far.
    count: u64,
}

impl TcpMeeting {
    pub(super) fn new(rank: usize, world_size: usize, fate: Arc<Fate>, streams: Vec<TcpStream>) -> Self {
        let waits_for = Arc::new(AtomicUsize::new(NOBODY));
        Self { rank, world_size, fate, state: Mutex::new(State { streams, count: 0 }), waits_for }
    }

    fn exchange(
        &self,
        state: &mut State,
        what: &str,
        own: &Arc<[f32]>,
    ) -> Result<Vec<Arc<[f32]>>, (usize, io::Error)> {
        let State { streams, count } = state;
        *count += 1;
        let head = Head::new(what, *count);
        if self.rank != 0 {
            let [stream] = &streams[..] else { return Err((0, malformed("no connection"))) };
            head.send(stream, own).map_err(|error| (0, error))?;
            let part =
                |rank| if rank == self.rank { Ok(Arc::clone(own)) } else { self.part(head, 0, stream) };
            return (0..self.world_size).map(part).collect();
        }
        let mut parts = vec![Arc::clone(own)];
        for (rank, stream) in (1..).zip(&*streams) {
            parts.push(self.part(head, rank, stream)?);
        }
        for (rank, stream) in (1..).zip(&*streams) {
            let others = (0..).zip(&parts).filter(|(of, _)| *of != rank);
            for (_, part) in others {
                head.send(stream, part).map_err(|error| (rank, error))?;
            }
        }
        Ok(parts)
    }

    fn part(&self, head: Head, from: usize, stream: &TcpStream) -> Result<Arc<[f32]>, (usize, io::Error)> {
        self.waits_for.store(from, Ordering::Relaxed);
        let part = head.receive(stream).map_err(|error| (from, error));
        self.waits_for.store(NOBODY, Ordering::Relaxed);
        part
    }

    fn failed(&self, reason: String) -> Error {
        Error::Communicator { rank: self.rank, world_size: self.world_size, reason }
    }
}

/// In front of a part: which collective it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    /// Its place among [`NAMES`].
    what: u8,
    /// How many there were before it.
    count: u64,
}

const HEAD_BYTES: usize = 17;

impl Head {
    fn new(what: &str, count: u64) -> Self {
        let place = NAMES.iter().position(|name| *name == what).unwrap_or(NAMES.len());
        Self { what: place as u8, count }
    }

    fn send(self, mut stream: &TcpStream, part: &[f32]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + size_of_val(part));
        bytes.push(self.what);
        bytes.extend(self.count.to_le_bytes());
        bytes.extend((part.len() as u64).to_le_bytes());
        bytes.extend(part.iter().flat_map(|value| value.to_le_bytes()));
        stream.write_all(&bytes)
    }

    fn receive(self, mut stream: &TcpStream) -> io::Result<Arc<[f32]>> {
        let mut head = [0; HEAD_BYTES];
        stream.read_exact(&mut head)?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let theirs = Self { what: head[0], count: word(1) };
        if theirs != self {
            let words = |head: Self| {
                let name = NAMES.get(usize::from(head.what)).unwrap_or(&"an unknown one");
                format!("collective {} ({name})", head.count)
            };
            return Err(malformed(format!("a part of {}; expected {}", words(theirs), words(self))));
        }
        let elements = word(9);
        if elements > MAX_ELEMENTS {
            return Err(malformed(format!("a part of {elements} elements; expected at most {MAX_ELEMENTS}")));
        }
        let mut bytes = vec![0; 4 * elements as usize];
        stream.read_exact(&mut bytes)?;
        let (values, _) = bytes.as_chunks::<4>();
        Ok(values.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }
}

impl Meeting<f32> for TcpMeeting {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn meet(&self, what: &'static str, part: &[f32]) -> Result<Vec<Arc<[f32]>>> {
        if let Some(reason) = self.fate.reason() {
            return Err(self.failed(reason));
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.exchange(&mut state, what, &part.into()).map_err(|(rank, error)| {
            let own = || match error.kind() {
                io::ErrorKind::InvalidData => format!("rank {rank} sent {error}"),
                _ => format!("rank {rank} has closed its connection ({error})"),
            };
            self.failed(self.fate.reason_or(own))
        })
    }

    fn break_group(&self, reason: &str) {
        self.fate.fail(reason);
    }

    fn breaker(&self) -> Breaker {
        let (fate, waits_for) = (Arc::clone(&self.fate), Arc::clone(&self.waits_for));
        Arc::new(move |reason| match waits_for.load(Ordering::Relaxed) {
            NOBODY => fate.fail(reason),
            rank => fate.fail(&format!("{reason}; rank {rank} has not come to a collective")),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Rank 0 and the others, connected.
    fn meetings(world_size: usize) -> Vec<TcpMeeting> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = |_| {
            let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (listener.accept().unwrap().0, other)
        };
        let (own, others): (Vec<_>, Vec<_>) = (1..world_size).map(pair).unzip();
        let meeting = |rank, streams| TcpMeeting::new(rank, world_size, Arc::default(), streams);
        let first = meeting(0, own);
        std::iter::once(first)
            .chain((1..).zip(others).map(|(rank, other)| meeting(rank, vec![other])))
            .collect()
    }

    fn on_ranks<R: Send>(world_size: usize, body: impl Fn(TcpMeeting) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let body = &body;
            let threads: Vec<_> =
                meetings(world_size).into_iter().map(|meeting| scope.spawn(move || body(meeting))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_rank_gets_every_part_in_rank_order() {
        for parts in on_ranks(4, |meeting| {
            let own = vec![meeting.rank() as f32; meeting.rank() + 1];
            meeting.meet("barrier", &[]).unwrap();
            meeting.meet("all_reduce", &own).unwrap()
        }) {
            let parts: Vec<&[f32]> = parts.iter().map(|part| &**part).collect();
            assert_eq!(parts, [&[0.0][..], &[1.0; 2], &[2.0; 3], &[3.0; 4]]);
        }
    }

    #[test]
    fn ranks_in_different_collectives_are_told() {
        let errors = on_ranks(2, |meeting| {
            let what = if meeting.rank() == 0 { "all_reduce" } else { "broadcast" };
            meeting.meet(what, &[1.0]).unwrap_err().to_string()
        });
        assert!(
            errors[0].contains(
                "rank 1 sent a part of collective 1 (broadcast); expected collective 1 (all_reduce)"
            ),
            "{errors:?}"
        );
    }

    #[test]
    fn a_broken_group_meets_no_more_and_names_whom_it_waited_for() {
        let errors = on_ranks(2, |meeting| {
            if meeting.rank() == 1 {
                std::thread::sleep(std::time::Duration::from_millis(300));
                return String::new();
            }
            let breaker = meeting.breaker();
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(50));
                breaker("too late");
            });
            let first = meeting.meet("all_reduce", &[1.0]).unwrap_err();
            assert_eq!(meeting.meet("all_reduce", &[1.0]).unwrap_err(), first);
            first.to_string()
        });
        assert!(errors[0].contains("too late; rank 1 has not come to a collective"), "{errors:?}");
    }
}
