//! How the ranks of several processes find each other: rank 0 listens, the others come, and all go on only when everybody is there and
//! agrees with rank 0.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use dsa80_reference::ranks_have;

use super::message::{CHANNELS, Creed, Hello, Welcome};
use super::place::Place;
use super::wire;
use crate::error::LaunchError;

/// Between two looks for what is not there yet.
const RETRY: Duration = Duration::from_millis(50);
/// For a stranger's first message.
const HELLO_PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a first message at most.
const MAX_HELLO: usize = 1 << 20;

/// The connections between rank 0 and another rank.
#[derive(Debug)]
pub(super) struct Connection {
    /// The rank at the other end.
    pub(super) rank: usize,
    pub(super) orders: TcpStream,
    pub(super) watch: TcpStream,
    pub(super) collectives: TcpStream,
}

/// Waits, as rank 0, for all other ranks. In rank order.
pub(super) fn gather(
    place: &Place,
    creed: &Creed,
    patience: Duration,
) -> Result<Vec<Connection>, LaunchError> {
    let failed = |error: io::Error| {
        LaunchError::Ranks(format!(
            "rank 0 cannot listen on {} (MASTER_ADDR:MASTER_PORT): {error}",
            place.address()
        ))
    };
    let listener = listen(place).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let others = place.world_size - 1;
    tracing::info!("rank 0 waits for {others} more on {}", place.address());
    let mut hall = Hall { arrived: (0..others).map(|_| Default::default()).collect(), creed };
    let deadline = Instant::now() + patience;
    let refused = loop {
        // First: strangers that keep coming must not put it off.
        if Instant::now() >= deadline {
            break format!(
                "{} not come to {} within {patience:?}; start all {} ranks, or give them longer with --join-timeout",
                ranks_have(&hall.missing()),
                place.address(),
                place.world_size,
            );
        }
        match listener.accept() {
            Ok((stream, from)) => match hello(&stream) {
                Ok(hello) => match hall.enter(hello, stream) {
                    Ok(()) if hall.is_full() => return hall.open(),
                    Ok(()) => {}
                    Err(reason) => break reason,
                },
                Err(error) if error.kind() == io::ErrorKind::Unsupported => break error.to_string(),
                Err(error) => tracing::warn!("{from} is left out: {error}"),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(RETRY),
            Err(error) => break format!("rank 0 cannot accept connections: {error}"),
        }
    };
    hall.refuse(&refused);
    Err(LaunchError::Ranks(refused))
}

/// On the address that the others are told, or on all where that is another machine's name for this one.
fn listen(place: &Place) -> io::Result<TcpListener> {
    TcpListener::bind((place.master.as_str(), place.port)).or_else(|error| match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
        _ => {
            tracing::info!("{} is no address of this machine ({error}): listening on all", place.master);
            TcpListener::bind(("0.0.0.0", place.port))
        }
    })
}

fn hello(stream: &TcpStream) -> io::Result<Hello> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HELLO_PATIENCE))?;
    let hello = Hello::decode(&wire::receive(stream, MAX_HELLO)?)?;
    stream.set_read_timeout(None)?;
    Ok(hello)
}

/// Who has come.
struct Hall<'a> {
    /// By rank, without rank 0, and by channel.
    arrived: Vec<[Option<TcpStream>; CHANNELS.len()]>,
    creed: &'a Creed,
}

impl Hall<'_> {
    /// Lets a rank in, or says why nobody can go on.
    fn enter(&mut self, Hello { rank, channel, creed }: Hello, stream: TcpStream) -> Result<(), String> {
        let world_size = self.arrived.len() + 1;
        let refused = match self.creed.difference(rank, &creed) {
            Some(difference) => Some(format!("{difference}; all ranks need the same")),
            None => match rank.checked_sub(1).and_then(|index| self.arrived.get_mut(index)) {
                None => {
                    Some(format!("a process says that it is rank {rank}; expected 1 to {}", world_size - 1))
                }
                Some(channels) if channels[channel as usize].is_some() => {
                    Some(format!("two processes say that they are rank {rank} of {world_size}"))
                }
                Some(channels) => {
                    channels[channel as usize] = Some(stream);
                    return Ok(());
                }
            },
        };
        let reason = refused.unwrap_or_default();
        let _ = wire::send(&stream, &Welcome::Refused(reason.clone()).encode());
        Err(reason)
    }

    fn is_full(&self) -> bool {
        self.missing().is_empty()
    }

    fn missing(&self) -> Vec<usize> {
        let missing = |channels: &[Option<TcpStream>; 3]| channels.iter().any(Option::is_none);
        (1..).zip(&self.arrived).filter(|(_, channels)| missing(channels)).map(|(rank, _)| rank).collect()
    }

    fn refuse(&self, reason: &str) {
        let frame = Welcome::Refused(reason.to_owned()).encode();
        for stream in self.arrived.iter().flatten().flatten() {
            // Who is gone needs no reason.
            let _ = wire::send(stream, &frame);
        }
    }

    /// Everybody goes on.
    fn open(self) -> Result<Vec<Connection>, LaunchError> {
        let mut connections = Vec::with_capacity(self.arrived.len());
        for (rank, channels) in (1..).zip(self.arrived) {
            let [Some(orders), Some(watch), Some(collectives)] = channels else { continue };
            for stream in [&orders, &watch, &collectives] {
                wire::send(stream, &Welcome::Come.encode())
                    .map_err(|error| LaunchError::Ranks(format!("rank {rank} has gone again: {error}")))?;
            }
            connections.push(Connection { rank, orders, watch, collectives });
        }
        Ok(connections)
    }
}

/// Comes to rank 0 as another rank, and waits until all have come.
pub(super) fn come(place: &Place, creed: &Creed, patience: Duration) -> Result<Connection, LaunchError> {
    let deadline = Instant::now() + patience;
    tracing::info!("rank {} of {} goes to rank 0 at {}", place.rank, place.world_size, place.address());
    let mut streams = Vec::new();
    for channel in CHANNELS {
        let stream = connect(place, deadline, patience)?;
        let hello = Hello { rank: place.rank, channel, creed: creed.clone() };
        wire::send(&stream, &hello.encode()).map_err(|error| closed(place, &error))?;
        streams.push(stream);
    }
    for stream in &streams {
        // Rank 0 says itself who is missing, at its own deadline.
        let left = deadline.saturating_duration_since(Instant::now()) + 2 * HELLO_PATIENCE;
        stream.set_read_timeout(Some(left)).map_err(|error| closed(place, &error))?;
        let welcome = wire::receive(stream, MAX_HELLO).and_then(|body| Welcome::decode(&body));
        match welcome.map_err(|error| closed(place, &error))? {
            Welcome::Come => {}
            Welcome::Refused(reason) => return Err(LaunchError::Ranks(reason)),
        }
        stream.set_read_timeout(None).map_err(|error| closed(place, &error))?;
    }
    match <[TcpStream; CHANNELS.len()]>::try_from(streams) {
        Ok([orders, watch, collectives]) => Ok(Connection { rank: 0, orders, watch, collectives }),
        Err(_) => Err(LaunchError::Ranks("a connection was lost".into())),
    }
}

fn connect(place: &Place, deadline: Instant, patience: Duration) -> Result<TcpStream, LaunchError> {
    loop {
        let error = match TcpStream::connect((place.master.as_str(), place.port)) {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(|error| closed(place, &error))?;
                return Ok(stream);
            }
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            return Err(LaunchError::Ranks(format!(
                "rank {} could not reach rank 0 at {} (MASTER_ADDR:MASTER_PORT) within {patience:?}: {error}; start rank 0, or give it \
                 longer with --join-timeout",
                place.rank,
                place.address(),
            )));
        }
        sleep(RETRY);
    }
}

fn closed(place: &Place, error: &io::Error) -> LaunchError {
    LaunchError::Ranks(format!(
        "rank 0 at {} has closed the connection of rank {} before all ranks were there ({error}): it has ended, or is no rank of this \
         version of dsa80",
        place.address(),
        place.rank,
    ))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn creed(value: &str) -> Creed {
        Creed(vec![("--page-size".into(), value.into())])
    }

    /// A port that is free, as long as nobody else takes it.
    fn places(ranks: &[usize], world_size: usize) -> Vec<Place> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let place =
            |&rank: &usize| Place { rank, world_size, local_rank: 0, master: "127.0.0.1".into(), port };
        ranks.iter().map(place).collect()
    }

    /// What each of `ranks` hears, rank 0 first.
    fn join(
        ranks: &[(usize, &str)],
        world_size: usize,
        patience: Duration,
    ) -> Vec<Result<Vec<usize>, String>> {
        let all: Vec<usize> = ranks.iter().map(|(rank, _)| *rank).collect();
        let places = places(&all, world_size);
        std::thread::scope(|scope| {
            let threads: Vec<_> = places
                .iter()
                .zip(ranks)
                .map(|(place, (rank, value))| {
                    scope.spawn(move || match rank {
                        0 => gather(place, &creed(value), patience).map(|connections| {
                            connections.iter().map(|connection| connection.rank).collect()
                        }),
                        _ => come(place, &creed(value), patience).map(|connection| vec![connection.rank]),
                    })
                })
                .collect();
            let ended = threads.into_iter().map(|thread| thread.join().unwrap());
            ended.map(|result| result.map_err(|error| error.to_string())).collect()
        })
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn ranks_find_each_other_in_any_order() {
        let joined = join(&[(0, "16"), (3, "16"), (1, "16"), (2, "16")], 4, LONG);
        assert_eq!(joined, [Ok(vec![1, 2, 3]), Ok(vec![0]), Ok(vec![0]), Ok(vec![0])]);
    }

    #[test]
    fn who_is_missing_twice_or_of_another_mind_is_named_to_all() {
        let short = Duration::from_millis(500);
        for error in join(&[(0, "16"), (2, "16")], 4, short) {
            let error = error.unwrap_err();
            assert!(error.contains("ranks 1, 3 have not come to 127.0.0.1:"), "{error}");
        }
        let errors = join(&[(0, "16"), (1, "16"), (1, "16")], 3, LONG);
        assert!(
            errors[0].as_ref().unwrap_err().contains("two processes say that they are rank 1 of 3"),
            "{errors:?}"
        );
        for error in join(&[(0, "16"), (1, "32")], 2, LONG) {
            let error = error.unwrap_err();
            assert!(error.contains("--page-size is 32 on rank 1, and 16 on rank 0"), "{error}");
        }
        let errors = join(&[(0, "16"), (5, "16")], 2, LONG);
        assert!(
            errors[0].as_ref().unwrap_err().contains("says that it is rank 5; expected 1 to 1"),
            "{errors:?}"
        );
        let alone = join(&[(1, "16")], 2, short).remove(0).unwrap_err();
        assert!(alone.contains("rank 1 could not reach rank 0 at 127.0.0.1:"), "{alone}");
    }

    #[test]
    fn strangers_are_left_out() {
        let places = places(&[0, 1], 2);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| gather(&places[0], &creed("16"), LONG));
            let mut stranger = connect(&places[1], Instant::now() + LONG, LONG).unwrap();
            stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            come(&places[1], &creed("16"), LONG).unwrap();
            assert_eq!(first.join().unwrap().unwrap().len(), 1);
        });
    }
}
