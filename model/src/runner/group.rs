//! Tensor parallelism: rank 0, and the others that do what it does, as threads of this process or as processes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dsa80_reference::{Breaker, Communicator, Error, Kernels};

use super::rank::{INDEX_LOGITS, Rank};
use super::source::WeightSource;
use crate::engine::{Sampled, Step, StepError, StepLimits, StepModel};
use crate::error::LaunchError;

/// How long rank 0 waits for another's answer to a step that it has made itself: longer than what a first step compiles.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long it waits when it has failed itself: another may have been first, and says why.
const AFTER_FAILURE: Duration = Duration::from_millis(500);
/// How long a rank that has nothing more to do may take to end.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// What a rank is made of before it has weights.
pub struct RankParts<K: Kernels> {
    /// Its backend.
    pub kernels: K,
    /// Its place among the ranks.
    pub communicator: Box<dyn Communicator<K::Tensor>>,
}

/// All ranks of a model. Rank 0 runs on the caller's thread, every other on a thread of its own or in another process.
pub struct RankGroup<K: Kernels> {
    first: Rank<K>,
    others: Vec<Box<dyn Follower>>,
    limits: StepLimits,
    patience: Duration,
}

/// A rank other than 0, as rank 0 sees it.
pub(crate) trait Follower: Send {
    /// The limits that it could have. Waits until its weights are in place.
    fn offered(&mut self) -> Result<StepLimits, LaunchError>;
    /// The limits that hold for all.
    fn agree(&mut self, limits: StepLimits);
    /// Waits until its caches are in place, too.
    fn loaded(&mut self) -> Result<(), LaunchError>;
    /// Lets it make a step.
    fn step(&mut self, step: &Arc<Step>);
    /// How that went, as far as it says; waits no longer than `patience`.
    fn stepped(&mut self, patience: Duration) -> Result<(), LaunchError>;
    /// Lets it record its decode steps.
    fn record_graphs(&mut self);
    /// How that went.
    fn recorded(&mut self) -> Result<(), LaunchError>;
    /// Rank 0 has failed.
    fn give_up(&mut self, reason: &str);
    /// What tells it from any thread that the group is broken, where its communicator does not.
    fn breaker(&self) -> Option<Breaker> {
        None
    }
    /// Calls `tell` when it is lost while it has nothing to do.
    fn on_loss(&self, _tell: Breaker) {}
    /// There is nothing more to do, or it has heard why not. Does not wait.
    fn dismiss(&mut self);
    /// Waits a moment until it has ended, where it would otherwise outlive rank 0.
    fn end(&mut self) {}
}

/// A rank on a thread of this process. Dropping the sender ends the thread.
struct ThreadFollower {
    rank: usize,
    world_size: usize,
    /// None once nothing will be agreed any more.
    bargain: Option<Bargain>,
    loaded: Receiver<Result<(), LaunchError>>,
    orders: Option<Sender<Order>>,
    results: Receiver<Result<(), LaunchError>>,
    thread: Option<JoinHandle<()>>,
}

/// What every rank does together.
enum Order {
    Step(Arc<Step>),
    RecordGraphs,
}

impl<K> RankGroup<K>
where
    K: Kernels + 'static,
{
    /// Loads every rank of `ranks`, which are in rank order, all at once.
    ///
    /// # Errors
    /// The first rank's error, in rank order. The others are told by their communicator and end.
    pub fn load(
        ranks: Vec<RankParts<K>>,
        weights: &Arc<dyn WeightSource>,
        limits: StepLimits,
    ) -> Result<Self, LaunchError> {
        Self::load_and_settle(ranks, weights, &limits, INDEX_LOGITS, move |_| Ok(limits))
    }

    /// [`load`](Self::load), with limits within the `widest` that `settle` chooses on every rank when all but its caches is in memory:
    /// the least of them hold for all.
    ///
    /// # Errors
    /// As for [`load`](Self::load), and what `settle` reports.
    pub fn load_and_settle(
        ranks: Vec<RankParts<K>>,
        weights: &Arc<dyn WeightSource>,
        widest: &StepLimits,
        index_logits: usize,
        settle: impl Fn(&K) -> Result<StepLimits, LaunchError> + Clone + Send + 'static,
    ) -> Result<Self, LaunchError> {
        let world_size = ranks.len();
        let mut ranks = ranks.into_iter();
        let Some(first) = ranks.next() else {
            return Err(LaunchError::Options("a model needs at least one rank".into()));
        };
        let others = (1..).zip(ranks).map(|(rank, parts)| -> Box<dyn Follower> {
            Box::new(follow(parts, [rank, world_size], weights, widest, index_logits, settle.clone()))
        });
        let others = others.collect();
        Self::lead(first, others, &**weights, widest, index_logits, settle)
    }

    /// Loads a model that is one rank; see [`Rank::load_and_settle`].
    ///
    /// # Errors
    /// As there.
    pub fn load_alone(
        parts: RankParts<K>,
        weights: &dyn WeightSource,
        widest: &StepLimits,
        index_logits: usize,
        settle: impl FnOnce(&K) -> Result<StepLimits, LaunchError>,
    ) -> Result<Self, LaunchError> {
        Self::lead(parts, Vec::new(), weights, widest, index_logits, settle)
    }

    /// Loads rank 0 while the `others` load; the least of their limits hold for all.
    pub(crate) fn lead(
        RankParts { kernels, communicator }: RankParts<K>,
        mut others: Vec<Box<dyn Follower>>,
        weights: &dyn WeightSource,
        widest: &StepLimits,
        index_logits: usize,
        settle: impl FnOnce(&K) -> Result<StepLimits, LaunchError>,
    ) -> Result<Self, LaunchError> {
        let agree = |kernels: &K| {
            let mut least = settle(kernels)?;
            for other in &mut others {
                let offered = other.offered()?;
                least.num_pages = least.num_pages.min(offered.num_pages);
                least.max_model_len = least.max_model_len.min(offered.max_model_len);
            }
            others.iter_mut().for_each(|other| other.agree(least));
            Ok(least)
        };
        let first = Rank::load_and_settle(kernels, communicator, weights, widest, index_logits, agree);
        if let Err(error) = &first {
            // Whoever still waits for what is agreed hears that nothing will be.
            let reason = error.to_string();
            others.iter_mut().for_each(|other| other.give_up(&reason));
        }
        let mut loaded: Vec<_> = others.iter_mut().map(|other| other.loaded()).collect();
        match first {
            Ok((first, limits)) => {
                let loaded: Result<(), _> = loaded.into_iter().collect();
                let mut group = Self { first, others, limits, patience: PATIENCE };
                match loaded {
                    Ok(()) => Ok(group),
                    Err(error) => {
                        group.give_up(&error.to_string());
                        Err(error)
                    }
                }
            }
            // The rank that was missed says why it went.
            Err(LaunchError::RankLost { rank, world_size }) => {
                let lost = LaunchError::RankLost { rank, world_size };
                Err(loaded.swap_remove(rank - 1).err().unwrap_or(lost))
            }
            Err(error) => Err(error),
        }
    }

    /// From now on rank 0 waits no longer than so for another's answer to a step that it has made itself.
    pub fn set_step_timeout(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Records decode steps on every rank, and says how many graphs each has; see [`Rank::record_graphs`].
    ///
    /// # Errors
    /// As there, of the first rank in rank order.
    pub fn record_graphs(&mut self) -> Result<usize, LaunchError> {
        let limits = self.limits;
        self.others.iter_mut().for_each(|other| other.record_graphs());
        let done = self.first.record_graphs(&limits);
        self.together(done, |other| other.recorded()).map_err(|(_, error)| error)
    }

    /// Tells all ranks that rank 0 goes no further.
    fn tell(&mut self, reason: &str) {
        self.first.abort(reason);
        self.others.iter_mut().for_each(|other| other.give_up(reason));
    }

    /// What rank 0 has `done`, and the others as `result` says. The error is that of the rank that failed by itself, with its rank.
    fn together<R>(
        &mut self,
        done: Result<R, LaunchError>,
        result: impl Fn(&mut dyn Follower) -> Result<(), LaunchError>,
    ) -> Result<R, (usize, LaunchError)> {
        let mut errors = Vec::new();
        let done = done.map_err(|error| {
            // The others may wait for rank 0 in a collective.
            self.tell(&error.to_string());
            errors.push((0, error));
        });
        for (index, other) in self.others.iter_mut().enumerate() {
            if let Err(error) = result(&mut **other) {
                errors.push((index + 1, error));
            }
        }
        // A rank's own failure says more than the broken collectives that the others saw because of it.
        let broken = |error: &LaunchError| {
            matches!(error, LaunchError::Kernel(Error::Communicator { .. }) | LaunchError::Ranks(_))
        };
        let cause = errors.iter().position(|(_, error)| !broken(error)).unwrap_or(0);
        match done {
            Ok(done) if errors.is_empty() => Ok(done),
            _ => Err(errors.swap_remove(cause)),
        }
    }
}

/// How ranks come to the same limits: each offers its own and is told the least.
struct Bargain {
    offered: Receiver<StepLimits>,
    agreed: Sender<StepLimits>,
}

/// The other end of a [`Bargain`].
struct Terms {
    offer: Sender<StepLimits>,
    agreed: Receiver<StepLimits>,
}

fn bargain() -> (Bargain, Terms) {
    let ((offer, offered), (agree, agreed)) = (channel(), channel());
    (Bargain { offered, agreed: agree }, Terms { offer, agreed })
}

impl Terms {
    fn agree(self, own: StepLimits) -> Result<StepLimits, LaunchError> {
        // Rank 0 drops its end when another rank has failed, whose reason is then the one that is reported.
        let ended = || LaunchError::Options("another rank could not be loaded".into());
        self.offer.send(own).map_err(|_| ended())?;
        self.agreed.recv().map_err(|_| ended())
    }
}

/// Starts the thread of a rank other than 0: it loads, says how that went, then makes steps until its sender
/// is gone.
fn follow<K: Kernels + 'static>(
    RankParts { kernels, communicator }: RankParts<K>,
    [rank, world_size]: [usize; 2],
    weights: &Arc<dyn WeightSource>,
    widest: &StepLimits,
    index_logits: usize,
    settle: impl FnOnce(&K) -> Result<StepLimits, LaunchError> + Send + 'static,
) -> ThreadFollower {
    let (orders, order_receiver) = channel();
    let (result_sender, results) = channel();
    let (loaded_sender, loaded) = channel();
    let (bargain, terms) = bargain();
    let (weights, widest) = (Arc::clone(weights), *widest);
    let thread = std::thread::spawn(move || {
        let settle = move |kernels: &K| terms.agree(settle(kernels)?);
        let loaded = Rank::load_and_settle(kernels, communicator, &*weights, &widest, index_logits, settle);
        let (mut rank, limits) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                // Nobody listens any more when rank 0 has failed first.
                let _ = loaded_sender.send(Err(error));
                return;
            }
        };
        drop(weights);
        if loaded_sender.send(Ok(())).is_err() {
            return;
        }
        for order in order_receiver {
            let result = match order {
                Order::Step(step) => rank.step(&step).map(drop).map_err(LaunchError::from),
                Order::RecordGraphs => rank.record_graphs(&limits).map(drop),
            };
            let failed = result.is_err();
            // A failed rank leaves; its communicator tells the others why they cannot go on.
            if result_sender.send(result).is_err() || failed {
                return;
            }
        }
    });
    ThreadFollower {
        rank,
        world_size,
        bargain: Some(bargain),
        loaded,
        orders: Some(orders),
        results,
        thread: Some(thread),
    }
}

impl ThreadFollower {
    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // A thread that is gone is reported by its result.
            let _ = orders.send(order);
        }
    }

    fn gone() -> LaunchError {
        Error::Backend { backend: "thread", message: "has ended".into() }.into()
    }

    fn lost(&self) -> LaunchError {
        LaunchError::RankLost { rank: self.rank, world_size: self.world_size }
    }
}

impl Follower for ThreadFollower {
    fn offered(&mut self) -> Result<StepLimits, LaunchError> {
        let offered = self.bargain.as_ref().and_then(|bargain| bargain.offered.recv().ok());
        offered.ok_or_else(|| self.lost())
    }

    fn agree(&mut self, limits: StepLimits) {
        if let Some(bargain) = self.bargain.take() {
            // A rank that is gone is reported by its result.
            let _ = bargain.agreed.send(limits);
        }
    }

    fn loaded(&mut self) -> Result<(), LaunchError> {
        self.loaded.recv().unwrap_or_else(|_| Err(self.lost()))
    }

    fn step(&mut self, step: &Arc<Step>) {
        self.order(Order::Step(Arc::clone(step)));
    }

    fn stepped(&mut self, patience: Duration) -> Result<(), LaunchError> {
        match self.results.recv_timeout(patience) {
            Ok(result) => result,
            Err(RecvTimeoutError::Disconnected) => Err(Self::gone()),
            Err(RecvTimeoutError::Timeout) => Err(LaunchError::Ranks(format!(
                "rank {} of {} has not finished a step within {patience:?} after rank 0",
                self.rank, self.world_size
            ))),
        }
    }

    fn record_graphs(&mut self) {
        self.order(Order::RecordGraphs);
    }

    fn recorded(&mut self) -> Result<(), LaunchError> {
        self.results.recv().unwrap_or_else(|_| Err(Self::gone()))
    }

    fn give_up(&mut self, _reason: &str) {
        self.bargain = None;
    }

    fn dismiss(&mut self) {
        self.orders = None;
    }

    fn end(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + LEAVE_PATIENCE;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                // Not joined: it would be waited for without end.
                return tracing::error!("rank {} does not end; its thread is left behind", self.rank);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // A panic in the thread has already been reported as a step's error.
        let _ = thread.join();
    }
}

impl<K: Kernels + 'static> StepModel for RankGroup<K> {
    fn step_while(
        &mut self,
        step: Arc<Step>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<Sampled>, StepError> {
        self.others.iter_mut().for_each(|other| other.step(&step));
        let done = self.first.step_while(&step, meanwhile).map_err(LaunchError::from);
        // Who has not answered by the time that rank 0 has failed does not count.
        let patience = if done.is_ok() { self.patience } else { AFTER_FAILURE };
        self.together(done, |other| other.stepped(patience))
            .map_err(|(rank, error)| StepError(format!("rank {rank}: {error}")))
    }

    fn limits(&self) -> StepLimits {
        self.limits
    }

    fn breaker(&self) -> Option<Breaker> {
        let others = self.others.first().and_then(|other| other.breaker());
        let breakers: Vec<Breaker> = self.first.breaker().into_iter().chain(others).collect();
        let all = move |reason: &str| breakers.iter().for_each(|breaker| breaker(reason));
        if self.others.is_empty() { None } else { Some(Arc::new(all)) }
    }

    fn give_up(&mut self, reason: &str) {
        self.tell(reason);
    }

    fn on_loss(&mut self, tell: Breaker) {
        // Processes share one fate: whichever is asked tells of all.
        if let Some(other) = self.others.first() {
            other.on_loss(tell);
        }
    }
}

impl<K: Kernels> Drop for RankGroup<K> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.others.iter_mut().for_each(|other| other.give_up("it panicked"));
        }
        self.others.iter_mut().for_each(|other| other.dismiss());
        // Dropped in the middle of a step only by a panic: the others must not wait for rank 0.
        self.first.abort("rank 0 has left");
        self.others.iter_mut().for_each(|other| other.end());
    }
}
