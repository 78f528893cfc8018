//! How the ranks of several processes find each other: rank 0 listens, the others come, and all go on only when everybody is there and
//! agrees with rank 0.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::{Duration, Instant};

use dsa80_reference::ranks_have;

use super::message::{CHANNELS, Channel, Creed, Hello, Sign};
use super::place::Place;
use super::wire;
use crate::error::LaunchError;

/// Between two looks for what is not there yet.
const RETRY: Duration = Duration::from_millis(50);
/// For the whole of a stranger's first message.
const HELLO_PATIENCE: Duration = Duration::from_secs(2);
/// For an address that does not answer, before the next is tried.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a first message at most, and of the answer to it.
const MAX_HELLO: usize = 1 << 16;

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
            Ok((stream, from)) => match hello(&stream, deadline) {
                Ok(hello) => match hall.enter(hello, stream) {
                    Ok(()) if hall.is_full() => return hall.open(),
                    Ok(()) => {}
                    Err(reason) => break reason,
                },
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    refuse([&stream], &error.to_string());
                    break error.to_string();
                }
                Err(error) => tracing::warn!("{from} is left out: {error}"),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Some(rank) = hall.gone() {
                    break gone_again(rank, &"its connection is closed");
                }
                sleep(RETRY);
            }
            Err(error) => break format!("rank 0 cannot accept connections: {error}"),
        }
    };
    refuse(hall.arrived.iter().flatten().flatten(), &refused);
    Err(LaunchError::Ranks(refused))
}

/// On the address that the others are told, or on all where that is another machine's name for this one, or leads others astray.
fn listen(place: &Place) -> io::Result<TcpListener> {
    let addresses: Vec<SocketAddr> =
        (place.master.as_str(), place.port).to_socket_addrs().map(Iterator::collect).unwrap_or_default();
    let on_all = |why: &str| {
        tracing::info!("{} {why}: listening on all addresses of this machine", place.master);
        let only_v6 = !addresses.is_empty() && addresses.iter().all(SocketAddr::is_ipv6);
        let all: IpAddr = if only_v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        TcpListener::bind((all, place.port))
    };
    if leads_nowhere_else(&place.master, &addresses) {
        return on_all("leads to this machine's loopback, where no other comes");
    }
    TcpListener::bind(&addresses[..]).or_else(|error| match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
        _ => on_all(&format!("is no address of this machine ({error})")),
    })
}

/// Whether `master` is this machine's name that leads to its loopback: Debian, for one, writes 127.0.1.1 into /etc/hosts.
fn leads_nowhere_else(master: &str, addresses: &[SocketAddr]) -> bool {
    let meant = master == "localhost" || master.parse::<IpAddr>().is_ok();
    !meant && addresses.iter().any(|address| address.ip().is_loopback())
}

fn hello(stream: &TcpStream, deadline: Instant) -> io::Result<Hello> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let deadline = deadline.min(Instant::now() + HELLO_PATIENCE);
    Hello::decode(&wire::receive_until(stream, MAX_HELLO, deadline)?)
}

fn refuse<'a>(streams: impl IntoIterator<Item = &'a TcpStream>, reason: &str) {
    let frame = Sign::Failed(reason.to_owned()).encode();
    for stream in streams {
        // Who is gone needs no reason.
        let _ = wire::send(stream, &frame);
    }
}

fn gone_again(rank: usize, why: &dyn std::fmt::Display) -> String {
    format!("rank {rank} came and has gone again ({why}): its process has ended, and its own log says why")
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
        refuse([&stream], &reason);
        Err(reason)
    }

    fn is_full(&self) -> bool {
        self.missing().is_empty()
    }

    fn missing(&self) -> Vec<usize> {
        let missing = |channels: &[Option<TcpStream>; 3]| channels.iter().any(Option::is_none);
        (1..).zip(&self.arrived).filter(|(_, channels)| missing(channels)).map(|(rank, _)| rank).collect()
    }

    /// A rank that has come and does not wait any more.
    fn gone(&self) -> Option<usize> {
        let gone = |channels: &[Option<TcpStream>; 3]| channels.iter().flatten().any(is_closed);
        (1..).zip(&self.arrived).find(|(_, channels)| gone(channels)).map(|(rank, _)| rank)
    }

    /// Everybody goes on.
    fn open(self) -> Result<Vec<Connection>, LaunchError> {
        let frame = Sign::Come.encode();
        for (index, channels) in self.arrived.iter().enumerate() {
            let sent = channels.iter().flatten().try_for_each(|stream| wire::send(stream, &frame));
            if let Err(error) = sent {
                let reason = gone_again(index + 1, &error);
                let (welcomed, others) = self.arrived.split_at(index);
                // Those who are in hear of it as of any failure.
                refuse(welcomed.iter().filter_map(|of| of[Channel::Watch as usize].as_ref()), &reason);
                refuse(others.iter().flatten().flatten(), &reason);
                return Err(LaunchError::Ranks(reason));
            }
        }
        let connection = |(rank, channels): (usize, [Option<TcpStream>; 3])| match channels {
            [Some(orders), Some(watch), Some(collectives)] => {
                Some(Connection { rank, orders, watch, collectives })
            }
            _ => None,
        };
        Ok((1..).zip(self.arrived).filter_map(connection).collect())
    }
}

/// Whether the other end has closed. Nothing is said before all are there.
fn is_closed(stream: &TcpStream) -> bool {
    peek(stream) == Some(0)
}

/// What can be read at once: no bytes where the other end has closed, `None` where it has said nothing yet.
fn peek(stream: &TcpStream) -> Option<usize> {
    let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let there = match peeked {
        Ok(bytes) => Some(bytes),
        Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => None,
        Err(_) => Some(0),
    };
    if stream.set_nonblocking(false).is_err() { Some(0) } else { there }
}

/// Comes to rank 0 as another rank, and waits until all have come.
pub(super) fn come(place: &Place, creed: &Creed, patience: Duration) -> Result<Connection, LaunchError> {
    let deadline = Instant::now() + patience;
    tracing::info!("rank {} of {} goes to rank 0 at {}", place.rank, place.world_size, place.address());
    let mut streams = Vec::new();
    for channel in CHANNELS {
        let Some(stream) = connect(place, deadline, patience, &streams)? else { break };
        let hello = Hello { rank: place.rank, channel, creed: creed.clone() };
        match wire::send(&stream, &hello.encode()) {
            Ok(()) => streams.push(stream),
            Err(error) if streams.is_empty() => return Err(closed(place, &error)),
            // Where it had let one in, it says why there.
            Err(_) => break,
        }
    }
    for stream in &streams {
        // Rank 0 says itself who is missing, at its own deadline.
        let welcome = wire::receive_until(stream, MAX_HELLO, deadline + 2 * HELLO_PATIENCE)
            .and_then(|body| Sign::decode(&body));
        match welcome.map_err(|error| closed(place, &error))? {
            Sign::Come => {}
            Sign::Failed(reason) => return Err(LaunchError::Ranks(reason)),
            other => return Err(LaunchError::Ranks(format!("rank 0 said {other:?} out of turn"))),
        }
    }
    match <[TcpStream; CHANNELS.len()]>::try_from(streams) {
        Ok([orders, watch, collectives]) => Ok(Connection { rank: 0, orders, watch, collectives }),
        Err(_) => Err(LaunchError::Ranks("a connection was lost".into())),
    }
}

/// `None` where rank 0 has answered one of the `earlier` connections: it does not listen any more, and has said there why.
fn connect(
    place: &Place,
    deadline: Instant,
    patience: Duration,
    earlier: &[TcpStream],
) -> Result<Option<TcpStream>, LaunchError> {
    loop {
        let error = match connect_once(place, deadline) {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(|error| closed(place, &error))?;
                return Ok(Some(stream));
            }
            Err(error) => error,
        };
        if earlier.iter().any(|stream| peek(stream).is_some()) {
            return Ok(None);
        }
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

/// Tries every address that rank 0's name leads to.
fn connect_once(place: &Place, deadline: Instant) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name leads to no address");
    for address in (place.master.as_str(), place.port).to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now()).clamp(RETRY, CONNECT_PATIENCE);
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
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

    fn stranger(place: &Place) -> TcpStream {
        connect(place, Instant::now() + LONG, LONG, &[]).unwrap().unwrap()
    }

    /// Rank 0 may have refused the first connection, and be gone, before the second is tried.
    #[test]
    fn who_is_refused_while_still_coming_hears_why() {
        let place = places(&[1], 2).remove(0);
        let listener = TcpListener::bind((place.master.as_str(), place.port)).unwrap();
        let first = stranger(&place);
        let (taken, _) = listener.accept().unwrap();
        drop(listener);
        refuse([&taken], "another mind");
        let started = Instant::now();
        assert!(connect(&place, started + LONG, LONG, std::slice::from_ref(&first)).unwrap().is_none());
        assert!(started.elapsed() < LONG / 2, "{:?}", started.elapsed());

        let place = places(&[1], 2).remove(0);
        let listener = TcpListener::bind((place.master.as_str(), place.port)).unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| come(&place, &creed("16"), LONG).unwrap_err().to_string());
            let (taken, _) = listener.accept().unwrap();
            drop(listener);
            hello(&taken, Instant::now() + LONG).unwrap();
            refuse([&taken], "another mind");
            let error = second.join().unwrap();
            assert!(error.contains("another mind"), "{error}");
        });
        assert!(started.elapsed() < LONG / 2, "{:?}", started.elapsed());
    }

    #[test]
    fn strangers_are_left_out() {
        let places = places(&[0, 1], 2);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| gather(&places[0], &creed("16"), LONG));
            let mut stranger = stranger(&places[1]);
            stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            come(&places[1], &creed("16"), LONG).unwrap();
            assert_eq!(first.join().unwrap().unwrap().len(), 1);
        });
    }

    #[test]
    fn a_stranger_that_dribbles_does_not_hold_the_door() {
        let places = places(&[0, 1], 2);
        let (patience, started) = (Duration::from_millis(500), Instant::now());
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                let error = gather(&places[0], &creed("16"), patience).unwrap_err().to_string();
                assert!(error.contains("rank 1 has not come to 127.0.0.1:"), "{error}");
                started.elapsed()
            });
            let mut stranger = stranger(&places[1]);
            stranger.write_all(&[200, 0, 0, 0]).unwrap();
            while !first.is_finished() && started.elapsed() < LONG {
                let _ = stranger.write_all(&[0]);
                sleep(Duration::from_millis(100));
            }
            let took = first.join().unwrap();
            assert!(took < Duration::from_secs(5), "{took:?}");
        });
    }

    #[test]
    fn an_address_that_does_not_answer_is_not_waited_for() {
        // For documentation: nobody is there, and where there is a way to it, nobody says so.
        let place = Place { rank: 1, world_size: 2, local_rank: 0, master: "192.0.2.1".into(), port: 29500 };
        let started = Instant::now();
        let error = come(&place, &creed("16"), Duration::from_secs(1)).unwrap_err().to_string();
        assert!(error.contains("rank 1 could not reach rank 0 at 192.0.2.1:29500"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }

    #[test]
    fn a_rank_that_has_gone_again_is_named_to_all_at_once() {
        let places = places(&[0, 1, 2], 3);
        let started = Instant::now();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| gather(&places[0], &creed("16"), LONG).unwrap_err().to_string());
            let second = scope.spawn(|| come(&places[1], &creed("16"), LONG).unwrap_err().to_string());
            let mut third = stranger(&places[2]);
            let hello = Hello { rank: 2, channel: Channel::Orders, creed: creed("16") };
            third.write_all(&hello.encode()).unwrap();
            sleep(Duration::from_millis(300));
            drop(third);
            for error in [first.join().unwrap(), second.join().unwrap()] {
                assert!(error.contains("rank 2 came and has gone again"), "{error}");
            }
        });
        assert!(started.elapsed() < LONG / 2, "{:?}", started.elapsed());
    }

    #[test]
    fn a_rank_that_goes_while_all_are_let_in_is_named_to_all() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = |_| {
            let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (listener.accept().unwrap().0, other)
        };
        let (own, others): (Vec<_>, Vec<_>) = (0..9).map(pair).unzip();
        let own: Vec<_> = own.into_iter().map(Some).collect();
        let (arrived, _) = own.as_chunks::<3>();
        let arrived = arrived
            .iter()
            .map(|of| std::array::from_fn(|i| of[i].as_ref().map(|stream| stream.try_clone().unwrap())));
        let (creed, arrived) = (creed("16"), arrived.collect());
        let hall = Hall { arrived, creed: &creed };
        // Rank 2's watch cannot be written to any more.
        own[4].as_ref().unwrap().shutdown(std::net::Shutdown::Write).unwrap();
        let error = hall.open().unwrap_err().to_string();
        assert!(error.contains("rank 2 came and has gone again"), "{error}");
        let next = |stream: &TcpStream| {
            let body = wire::receive_until(stream, MAX_HELLO, Instant::now() + LONG).unwrap();
            Sign::decode(&body).unwrap()
        };
        // Rank 1 was let in, and listens to its watch; rank 3 was not.
        assert_eq!(next(&others[1]), Sign::Come);
        for stream in [&others[1], &others[6], &others[7], &others[8]] {
            assert_eq!(next(stream), Sign::Failed(error.clone()));
        }
    }

    #[test]
    fn a_name_for_the_loopback_is_listened_to_everywhere() {
        let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 29500);
        assert!(leads_nowhere_else("node0", &[at("127.0.1.1")]));
        assert!(leads_nowhere_else("node0", &[at("::1"), at("10.0.0.1")]));
        assert!(!leads_nowhere_else("node0", &[at("10.0.0.1")]) && !leads_nowhere_else("node0", &[]));
        for meant in ["localhost", "127.0.0.1", "127.0.0.2", "::1"] {
            assert!(!leads_nowhere_else(meant, &[at("127.0.0.1")]), "{meant}");
        }
    }
}
