//! The two ends of a group of processes: rank 0 leads, the others are its members.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dsa80_reference::{Breaker, Kernels};

use super::fate::Fate;
use super::join::{self, Connection};
use super::meeting::TcpMeeting;
use super::message::{Answer, Creed, Order, Sign};
use super::place::Place;
use super::watch::{self, Pace, Speaker};
use super::wire;
use crate::engine::{Step, StepLimits};
use crate::error::LaunchError;
use crate::headway::Headway;
use crate::runner::{Follower, Rank, RankParts, WeightSource};

/// Rank 0 of several processes, before it has a model.
pub(crate) struct Leader {
    place: Place,
    headway: Arc<Headway>,
    links: Links,
}

/// Connections that are watched.
struct Links {
    fate: Arc<Fate>,
    speaker: Arc<Speaker>,
    orders: Vec<TcpStream>,
    collectives: Vec<TcpStream>,
}

/// Another rank.
pub(crate) struct Member {
    place: Place,
    headway: Arc<Headway>,
    fate: Arc<Fate>,
    orders: TcpStream,
    collectives: TcpStream,
    /// As long as this rank is there.
    there: Arc<()>,
}

/// Watches the connections of rank `own`, and closes them when the group fails, so that nobody waits at them any more.
fn connect(own: usize, connections: Vec<Connection>, headway: &Arc<Headway>) -> Result<Links, LaunchError> {
    let failed = |error| LaunchError::Ranks(format!("the ranks' connections cannot be watched: {error}"));
    let fate = Arc::new(Fate::default());
    let (mut watches, mut orders, mut collectives, mut waited_at) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for Connection { rank, orders: of_orders, watch, collectives: of_collectives } in connections {
        waited_at.push(of_orders.try_clone().map_err(failed)?);
        waited_at.push(of_collectives.try_clone().map_err(failed)?);
        watches.push((rank, watch));
        orders.push(of_orders);
        collectives.push(of_collectives);
    }
    let speaker = watch::start(&fate, headway, own, watches, Pace::default()).map_err(failed)?;
    // After the reason has been said.
    fate.on_failure(Arc::new(move |_| {
        for stream in &waited_at {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }));
    Ok(Links { fate, speaker, orders, collectives })
}

impl Leader {
    /// Waits for the others.
    pub(crate) fn gather(
        place: Place,
        creed: &Creed,
        patience: Duration,
        headway: &Arc<Headway>,
    ) -> Result<Self, LaunchError> {
        let links = connect(0, join::gather(&place, creed, patience)?, headway)?;
        tracing::info!("all {} ranks are there", place.world_size);
        Ok(Self { place, headway: Arc::clone(headway), links })
    }

    /// Waits until all have opened a `device` of this kind, then lets them join its collectives with what is in `bytes`.
    pub(crate) fn begin(&self, device: &str, bytes: &[u8]) -> Result<(), LaunchError> {
        for (rank, stream) in (1..).zip(&self.links.orders) {
            self.headway.begin(0, format!("waiting for rank {rank} to open its device"));
            match receive_answer(&self.links.fate, rank, stream)? {
                Answer::Opened(other) if other == device => {}
                Answer::Opened(other) => {
                    return Err(LaunchError::Ranks(format!(
                        "rank {rank} runs on {other}, and rank 0 on {device}; give all ranks the same --device, and a GPU each"
                    )));
                }
                other => return Err(unexpected(rank, &other)),
            }
        }
        let frame = Order::Begin(bytes.to_vec()).encode();
        // Who does not hear it is noticed by the watch.
        self.links.orders.iter().for_each(|stream| drop(wire::send(stream, &frame)));
        Ok(())
    }

    pub(crate) fn fate(&self) -> &Arc<Fate> {
        &self.links.fate
    }

    /// Where CPU ranks meet.
    pub(crate) fn meeting(&self) -> Result<TcpMeeting, LaunchError> {
        let streams = self.links.collectives.iter().map(clone).collect::<Result<_, _>>()?;
        Ok(TcpMeeting::new(0, self.place.world_size, Arc::clone(&self.links.fate), streams))
    }

    /// The others, in rank order, as a group of ranks sees them.
    pub(crate) fn followers(self) -> Vec<Box<dyn Follower>> {
        let Links { fate, speaker, orders, .. } = self.links;
        let remote = |(rank, orders)| -> Box<dyn Follower> {
            let (fate, speaker) = (Arc::clone(&fate), Arc::clone(&speaker));
            Box::new(RemoteFollower { rank, fate, speaker, orders })
        };
        (1..).zip(orders).map(remote).collect()
    }
}

fn clone(stream: &TcpStream) -> Result<TcpStream, LaunchError> {
    stream.try_clone().map_err(|error| LaunchError::Ranks(format!("a connection cannot be shared: {error}")))
}

fn unexpected(rank: usize, found: &impl std::fmt::Debug) -> LaunchError {
    LaunchError::Ranks(format!("rank {rank} said {found:?} out of turn"))
}

/// Bytes of an answer at most.
const MAX_ANSWER: usize = 1 << 16;

fn receive_answer(fate: &Fate, rank: usize, stream: &TcpStream) -> Result<Answer, LaunchError> {
    let answer = wire::receive(stream, MAX_ANSWER).and_then(|body| Answer::decode(&body));
    answer.map_err(|error| {
        LaunchError::Ranks(fate.reason_or(|| format!("rank {rank} has closed its connection ({error})")))
    })
}

/// A rank in another process, as rank 0 sees it.
///
/// Steps are not acknowledged: every step has collectives, in which a rank that fell behind is waited for, and one that fails says so.
struct RemoteFollower {
    rank: usize,
    fate: Arc<Fate>,
    speaker: Arc<Speaker>,
    orders: TcpStream,
}

impl RemoteFollower {
    fn answer(&self) -> Result<Answer, LaunchError> {
        receive_answer(&self.fate, self.rank, &self.orders)
    }

    fn send(&self, order: &Order) {
        if let Err(error) = wire::send(&self.orders, &order.encode()) {
            let rank = self.rank;
            self.fate.reason_or(|| format!("rank {rank} cannot be told what to do ({error})"));
        }
    }

    fn still_there(&self) -> Result<(), LaunchError> {
        self.fate.reason().map_or(Ok(()), |reason| Err(LaunchError::Ranks(reason)))
    }
}

impl Follower for RemoteFollower {
    fn offered(&mut self) -> Result<StepLimits, LaunchError> {
        match self.answer()? {
            Answer::Offered(limits) => Ok(limits),
            other => Err(unexpected(self.rank, &other)),
        }
    }

    fn agree(&mut self, limits: StepLimits) {
        self.send(&Order::Agreed(limits));
    }

    fn loaded(&mut self) -> Result<(), LaunchError> {
        match self.answer()? {
            Answer::Loaded => Ok(()),
            other => Err(unexpected(self.rank, &other)),
        }
    }

    fn step(&mut self, step: &Arc<Step>) {
        self.send(&Order::Step(Arc::clone(step)));
    }

    fn stepped(&mut self, _patience: Duration) -> Result<(), LaunchError> {
        self.still_there()
    }

    fn record_graphs(&mut self) {
        self.send(&Order::RecordGraphs);
    }

    fn recorded(&mut self) -> Result<(), LaunchError> {
        match self.answer()? {
            Answer::Recorded => Ok(()),
            other => Err(unexpected(self.rank, &other)),
        }
    }

    fn give_up(&mut self, reason: &str) {
        self.fate.fail(&format!("rank 0: {reason}"));
    }

    fn breaker(&self) -> Option<Breaker> {
        Some(self.fate.breaker())
    }

    fn on_loss(&self, tell: Breaker) {
        self.fate.on_failure(tell);
    }

    fn dismiss(&mut self) {
        if self.fate.reason().is_none() {
            // First, so that nobody takes the connections that close for a failure.
            self.fate.finish();
            self.speaker.say(&Sign::Left);
            let _ = wire::send(&self.orders, &Order::Leave.encode());
        }
    }
}

impl Drop for RemoteFollower {
    fn drop(&mut self) {
        // Who was not dismissed must not take it for the end of all work.
        self.fate.fail("rank 0 has ended before the work was done");
        // The threads that listen end with their connections.
        self.speaker.hang_up();
    }
}

impl Member {
    /// Comes to rank 0.
    pub(crate) fn join(
        place: Place,
        creed: &Creed,
        patience: Duration,
        headway: &Arc<Headway>,
    ) -> Result<Self, LaunchError> {
        let connections = vec![join::come(&place, creed, patience)?];
        let Links { fate, orders, collectives, .. } = connect(place.rank, connections, headway)?;
        let mut streams = orders.into_iter().zip(collectives);
        let Some((orders, collectives)) = streams.next() else {
            return Err(LaunchError::Ranks("the connection to rank 0 was lost".into()));
        };
        Ok(Self { place, headway: Arc::clone(headway), fate, orders, collectives, there: Arc::default() })
    }

    /// Once rank 0 has left, waits no longer than `patience` for its last order, and calls `stuck` if this rank is there for as long again.
    pub(crate) fn end_with_rank_0(&self, patience: Duration, stuck: Breaker) -> Result<(), LaunchError> {
        let (rank, fate, there) = (self.place.rank, Arc::clone(&self.fate), Arc::downgrade(&self.there));
        let orders = clone(&self.orders)?;
        let see_to_it = move || {
            while !fate.is_over() {
                fate.wait(Duration::from_secs(3600));
            }
            if fate.reason().is_some() {
                return;
            }
            thread::sleep(patience);
            let _ = orders.shutdown(Shutdown::Both);
            thread::sleep(patience);
            if there.upgrade().is_some() {
                stuck(&format!(
                    "rank 0 has left, and rank {rank} has not ended within {:?} after it",
                    2 * patience
                ));
            }
        };
        let started = thread::Builder::new().name("dsa80-leave".into()).spawn(see_to_it);
        started
            .map(drop)
            .map_err(|error| LaunchError::Ranks(format!("rank 0's leave cannot be watched: {error}")))
    }

    pub(crate) fn headway(&self) -> &Arc<Headway> {
        &self.headway
    }

    /// Says that this rank has opened a `device` of this kind, and hears what it needs to join rank 0's collectives.
    pub(crate) fn begin(&self, device: &str) -> Result<Vec<u8>, LaunchError> {
        self.answer(&Answer::Opened(device.to_owned()))?;
        match self.order()? {
            Order::Begin(bytes) => Ok(bytes),
            other => Err(unexpected(0, &other)),
        }
    }

    pub(crate) fn fate(&self) -> &Arc<Fate> {
        &self.fate
    }

    /// Where CPU ranks meet.
    pub(crate) fn meeting(&self) -> Result<TcpMeeting, LaunchError> {
        let Place { rank, world_size, .. } = self.place;
        Ok(TcpMeeting::new(rank, world_size, Arc::clone(&self.fate), vec![clone(&self.collectives)?]))
    }

    /// Loads this rank and does what rank 0 says, until there is nothing more to do.
    ///
    /// # Errors
    /// This rank failed, or another: the reason is the first one's.
    pub(crate) fn follow<K: Kernels>(
        &self,
        RankParts { kernels, communicator }: RankParts<K>,
        weights: &dyn WeightSource,
        widest: &StepLimits,
        index_logits: usize,
        settle: impl FnOnce(&K) -> Result<StepLimits, LaunchError>,
    ) -> Result<(), LaunchError> {
        let agree = |kernels: &K| {
            self.answer(&Answer::Offered(settle(kernels)?))?;
            match self.order()? {
                Order::Agreed(limits) => Ok(limits),
                other => Err(unexpected(0, &other)),
            }
        };
        let (mut rank, limits) =
            Rank::load_and_settle(kernels, communicator, weights, widest, index_logits, agree)?;
        self.answer(&Answer::Loaded)?;
        tracing::info!("rank {} of {} is loaded", self.place.rank, self.place.world_size);
        self.headway.begin(self.place.rank, "waiting for rank 0");
        loop {
            match self.order()? {
                Order::Step(step) => {
                    self.headway.begin(self.place.rank, "a step");
                    rank.step(&step)?;
                }
                Order::RecordGraphs => {
                    self.headway.begin(self.place.rank, "recording decode steps");
                    rank.record_graphs(&limits)?;
                    self.answer(&Answer::Recorded)?;
                }
                Order::Leave => return Ok(()),
                other => return Err(unexpected(0, &other)),
            }
        }
    }

    fn order(&self) -> Result<Order, LaunchError> {
        let order = wire::receive(&self.orders, wire::MAX_FRAME).and_then(|body| Order::decode(&body));
        order.or_else(|error| {
            let reason = self.fate.reason_or(|| format!("rank 0 has closed its connection ({error})"));
            // Rank 0 has left, and its last word was lost.
            if self.fate.reason().is_none() { Ok(Order::Leave) } else { Err(LaunchError::Ranks(reason)) }
        })
    }

    fn answer(&self, answer: &Answer) -> Result<(), LaunchError> {
        wire::send(&self.orders, &answer.encode()).map_err(|error| {
            LaunchError::Ranks(self.fate.reason_or(|| format!("rank 0 has closed its connection ({error})")))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    /// Rank 0 and rank 1.
    fn pair() -> (Leader, Member) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let place = |rank| Place { rank, world_size: 2, local_rank: 0, master: "127.0.0.1".into(), port };
        let (creed, headway) = (Creed::default(), Arc::new(Headway::default()));
        thread::scope(|scope| {
            let leader = scope.spawn(|| Leader::gather(place(0), &creed, LONG, &headway).unwrap());
            let member = Member::join(place(1), &creed, LONG, &headway).unwrap();
            (leader.join().unwrap(), member)
        })
    }

    /// What rank 1 takes the end for that `leave` makes of rank 0's work.
    fn end(leave: impl FnOnce(&mut Vec<Box<dyn Follower>>)) -> Option<String> {
        let (leader, member) = pair();
        let mut followers = leader.followers();
        leave(&mut followers);
        drop(followers);
        let ordered = member.order();
        assert_eq!(ordered.is_ok(), member.fate.reason().is_none(), "{ordered:?}");
        member.fate.wait(LONG);
        assert!(member.fate.is_over());
        member.fate.reason()
    }

    #[test]
    fn only_a_rank_0_that_dismisses_the_others_has_left() {
        let dismissed = |followers: &mut Vec<Box<dyn Follower>>| {
            followers.iter_mut().for_each(|follower| follower.dismiss());
        };
        assert_eq!(end(dismissed), None);
        let failed = end(|followers| {
            followers.iter_mut().for_each(|follower| follower.give_up("the engine stopped: token 50"));
            dismissed(followers);
        });
        assert_eq!(failed.unwrap(), "rank 0: the engine stopped: token 50");
        assert_eq!(end(|_| ()).unwrap(), "rank 0 has ended before the work was done");
    }

    #[test]
    fn a_rank_0_that_has_left_and_hangs_is_not_waited_for() {
        const PATIENCE: Duration = Duration::from_millis(300);
        let (leader, member) = pair();
        let ((sender, stuck), started) = (channel::<String>(), Instant::now());
        let tell = move |reason: &str| drop(sender.send(reason.to_owned()));
        member.end_with_rank_0(PATIENCE, Arc::new(tell)).unwrap();
        leader.links.fate.finish();
        leader.links.speaker.say(&Sign::Left);
        assert_eq!(member.order().unwrap(), Order::Leave);
        assert!(started.elapsed() >= PATIENCE && started.elapsed() < LONG);
        // And rank 1 does not end.
        let reason = stuck.recv_timeout(LONG).unwrap();
        assert!(reason.contains("rank 1 has not ended within 600ms"), "{reason}");
    }
}
