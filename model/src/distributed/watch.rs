//! Signs of life between rank 0 and the others: a process that is killed is noticed by its connection that closes, a machine that is gone
//! by its silence, and a failure is told to all with its reason.

use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::fate::Fate;
use super::message::Sign;
use super::wire;
use crate::headway::Headway;

/// How often ranks give signs of life.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) interval: Duration,
    /// A rank that was silent for so long is lost.
    pub(super) silence: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), silence: Duration::from_secs(20) }
    }
}

/// A sign that a peer does not take within this time is not waited for.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of a sign at most.
const MAX_SIGN: usize = 1 << 20;

/// Says signs to all peers.
#[derive(Debug)]
pub(super) struct Speaker {
    streams: Mutex<Vec<TcpStream>>,
}

impl Speaker {
    /// Who does not hear it notices the silence, or the end of the connection.
    pub(super) fn say(&self, sign: &Sign) {
        let frame = sign.encode();
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = wire::send(stream, &frame);
        }
    }

    /// Ends the connections, and with them the threads that listen.
    pub(super) fn hang_up(&self) {
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Listens to `peers`, by rank, and gives them signs of life of rank `own` until the group's fate is known.
pub(super) fn start(
    fate: &Arc<Fate>,
    headway: &Arc<Headway>,
    own: usize,
    peers: Vec<(usize, TcpStream)>,
    pace: Pace,
) -> io::Result<Arc<Speaker>> {
    let mut streams = Vec::new();
    for (rank, stream) in peers {
        stream.set_read_timeout(Some(pace.silence))?;
        stream.set_write_timeout(Some(WRITE_PATIENCE))?;
        streams.push(stream.try_clone()?);
        let fate = Arc::clone(fate);
        // Rank 0 alone judges whether a start gets on.
        let headway = (own == 0).then(|| Arc::clone(headway));
        thread::Builder::new()
            .name(format!("dsa80-watch-{rank}"))
            .spawn(move || listen(&fate, headway.as_deref(), rank, &stream, pace.silence))?;
    }
    let speaker = Arc::new(Speaker { streams: Mutex::new(streams) });
    let (of_failure, of_life) = (Arc::clone(&speaker), Arc::clone(&speaker));
    fate.on_failure(Arc::new(move |reason| of_failure.say(&Sign::Failed(reason.to_owned()))));
    let (fate, headway) = (Arc::clone(fate), Arc::clone(headway));
    thread::Builder::new().name("dsa80-alive".into()).spawn(move || {
        while !fate.is_over() {
            let (count, doing) = headway.sign(own);
            of_life.say(&Sign::Alive { count, doing });
            fate.wait(pace.interval);
        }
    })?;
    Ok(speaker)
}

/// Until the peer leaves or fails.
fn listen(fate: &Fate, headway: Option<&Headway>, rank: usize, stream: &TcpStream, silence: Duration) {
    loop {
        match wire::receive(stream, MAX_SIGN).and_then(|body| Sign::decode(&body)) {
            Ok(Sign::Alive { count, doing }) => {
                if let Some(headway) = headway {
                    headway.hear(rank, count, doing);
                }
            }
            Ok(Sign::Come) => {
                return fate.fail(&format!("rank {rank} welcomes ranks that are there already"));
            }
            Ok(Sign::Failed(reason)) => return fate.fail(&reason),
            Ok(Sign::Left) => return fate.finish(),
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
                return fate.fail(&format!(
                    "rank {rank} has given no sign of life for {silence:?}: its machine or the network is gone, or it is stopped"
                ));
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                return fate.fail(&format!("rank {rank} sent {error}"));
            }
            Err(_) => {
                return fate.fail(&format!("rank {rank} has closed its connection: its process has ended"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (stream, listener.accept().unwrap().0)
    }

    const PACE: Pace = Pace { interval: Duration::from_millis(20), silence: Duration::from_millis(400) };

    /// The fate of rank 0 that watches rank 1, who does `instead` of giving signs of life.
    fn end(instead: impl FnOnce(TcpStream)) -> Option<String> {
        let (fate, (own, other)) = (Arc::new(Fate::default()), pair());
        start(&fate, &Arc::default(), 0, vec![(1, own)], PACE).unwrap();
        instead(other);
        fate.wait(Duration::from_secs(10));
        assert!(fate.is_over(), "nothing was noticed");
        fate.reason()
    }

    #[test]
    fn ranks_that_live_are_left_in_peace_and_a_failure_is_told_with_its_reason() {
        let fates = [Arc::new(Fate::default()), Arc::new(Fate::default())];
        let ((a, b), headways) = (pair(), [Arc::new(Headway::default()), Arc::new(Headway::default())]);
        start(&fates[0], &headways[0], 0, vec![(1, a)], PACE).unwrap();
        start(&fates[1], &headways[1], 1, vec![(0, b)], PACE).unwrap();
        headways[1].begin(1, "loading layer 7 of 78");
        fates[0].wait(3 * PACE.silence);
        assert!(!fates[0].is_over() && !fates[1].is_over());
        // Rank 0 knows how far the other is, and hears no more than that.
        assert_eq!(headways[0].last_known(), "rank 1: loading layer 7 of 78");
        let total = headways[0].total();
        fates[0].wait(PACE.silence);
        assert_eq!((headways[0].total(), headways[1].total()), (total, 1));
        fates[1].fail("rank 1: out of pages");
        fates[0].wait(Duration::from_secs(10));
        assert_eq!(fates[0].reason().unwrap(), "rank 1: out of pages");
    }

    #[test]
    fn a_rank_that_closes_falls_silent_or_talks_nonsense_is_lost() {
        let started = Instant::now();
        assert!(end(drop).unwrap().contains("rank 1 has closed its connection"));
        assert!(started.elapsed() < PACE.silence, "a closed connection is noticed at once");
        let mut kept = None;
        assert!(end(|stream| kept = Some(stream)).unwrap().contains("no sign of life for 400ms"));
        let nonsense = end(|stream| wire::send(&stream, &[1, 0, 0, 0, 9]).unwrap());
        assert!(nonsense.unwrap().contains("rank 1 sent an unknown sign"));
        assert_eq!(end(|stream| wire::send(&stream, &Sign::Left.encode()).unwrap()), None);
    }
}
