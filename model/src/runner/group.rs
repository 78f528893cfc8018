//! Tensor parallelism in one process: a thread per rank, stepped together.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use dsa80_reference::{Communicator, Error, Kernels};

use super::rank::{INDEX_LOGITS, Rank};
use super::source::WeightSource;
use crate::engine::{Sampled, Step, StepError, StepLimits, StepModel};
use crate::error::LaunchError;

/// What a rank is made of before it has weights.
pub struct RankParts<K: Kernels> {
    /// Its backend.
    pub kernels: K,
    /// Its place among the ranks.
    pub communicator: Box<dyn Communicator<K::Tensor>>,
}

/// All ranks of a model. Rank 0 runs on the caller's thread, every other on a thread of its own.
pub struct RankGroup<K: Kernels> {
    first: Rank<K>,
    others: Vec<Follower>,
    limits: StepLimits,
}

/// A rank on its own thread. Dropping the sender ends the thread.
struct Follower {
    orders: Sender<Order>,
    results: Receiver<Result<(), LaunchError>>,
    thread: JoinHandle<()>,
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
        let Some(RankParts { kernels, communicator }) = ranks.next() else {
            return Err(LaunchError::Options("a model needs at least one rank".into()));
        };
        let (mut loading, mut bargains) = (Vec::new(), Vec::new());
        for parts in ranks {
            let (settle, (bargain, terms)) = (settle.clone(), bargain());
            loading.push(follow(parts, weights, widest, index_logits, move |kernels| {
                terms.agree(settle(kernels)?)
            }));
            bargains.push(bargain);
        }
        let lost = |rank| LaunchError::RankLost { rank, world_size };
        let agree = |kernels: &K| {
            let mut least = settle(kernels)?;
            for (index, bargain) in bargains.iter().enumerate() {
                let offered = bargain.offered.recv().map_err(|_| lost(index + 1))?;
                least.num_pages = least.num_pages.min(offered.num_pages);
                least.max_model_len = least.max_model_len.min(offered.max_model_len);
            }
            // A rank that is gone is reported below, by its result.
            for bargain in &bargains {
                let _ = bargain.agreed.send(least);
            }
            Ok(least)
        };
        let first = Rank::load_and_settle(kernels, communicator, &**weights, widest, index_logits, agree);
        // Whoever still waits for what is agreed hears that nothing will be.
        drop(bargains);
        let mut loaded: Vec<Result<Follower, LaunchError>> = loading
            .into_iter()
            .enumerate()
            .map(|(index, (loaded, follower))| {
                loaded.recv().unwrap_or_else(|_| Err(lost(index + 1))).map(|()| follower)
            })
            .collect();
        match first {
            Ok((first, limits)) => {
                Ok(Self { first, others: loaded.into_iter().collect::<Result<_, _>>()?, limits })
            }
            // The rank that was missed says why it went.
            Err(LaunchError::RankLost { rank, .. }) => {
                Err(loaded.swap_remove(rank - 1).err().unwrap_or_else(|| lost(rank)))
            }
            Err(error) => Err(error),
        }
    }

    /// Loads a model that is one rank; see [`Rank::load_and_settle`].
    ///
    /// # Errors
    /// As there.
    pub fn load_alone(
        RankParts { kernels, communicator }: RankParts<K>,
        weights: &dyn WeightSource,
        widest: &StepLimits,
        index_logits: usize,
        settle: impl FnOnce(&K) -> Result<StepLimits, LaunchError>,
    ) -> Result<Self, LaunchError> {
        let (first, limits) =
            Rank::load_and_settle(kernels, communicator, weights, widest, index_logits, settle)?;
        Ok(Self { first, others: Vec::new(), limits })
    }

    /// Records decode steps on every rank, and says how many graphs each has; see [`Rank::record_graphs`].
    ///
    /// # Errors
    /// As there, of the first rank in rank order.
    pub fn record_graphs(&mut self) -> Result<usize, LaunchError> {
        let limits = self.limits;
        self.together(|| Order::RecordGraphs, |first| first.record_graphs(&limits))
            .map_err(|(_, error)| error)
    }

    /// Gives every rank the same order; the first obeys by `own`. The error is that of the rank that failed by itself, with its rank.
    fn together<R>(
        &mut self,
        order: impl Fn() -> Order,
        own: impl FnOnce(&mut Rank<K>) -> Result<R, LaunchError>,
    ) -> Result<R, (usize, LaunchError)> {
        for follower in &self.others {
            // A thread that is gone is reported below, by its result.
            let _ = follower.orders.send(order());
        }
        let mut errors = Vec::new();
        let done = own(&mut self.first).map_err(|error| {
            // The others may wait for rank 0 in a collective.
            self.first.abort(&error.to_string());
            errors.push((0, error));
        });
        for (index, follower) in self.others.iter().enumerate() {
            let gone = || Error::Backend { backend: "thread", message: "has ended".into() };
            if let Err(error) = follower.results.recv().unwrap_or_else(|_| Err(gone().into())) {
                errors.push((index + 1, error));
            }
        }
        // A rank's own failure says more than the broken collectives that the others saw because of it.
        let broken = |error: &LaunchError| matches!(error, LaunchError::Kernel(Error::Communicator { .. }));
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
    weights: &Arc<dyn WeightSource>,
    widest: &StepLimits,
    index_logits: usize,
    settle: impl FnOnce(&K) -> Result<StepLimits, LaunchError> + Send + 'static,
) -> (Receiver<Result<(), LaunchError>>, Follower) {
    let (orders, order_receiver) = channel();
    let (result_sender, results) = channel();
    let (loaded_sender, loaded) = channel();
    let (weights, widest) = (Arc::clone(weights), *widest);
    let thread = std::thread::spawn(move || {
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
    (loaded, Follower { orders, results, thread })
}

impl<K: Kernels + 'static> StepModel for RankGroup<K> {
    fn step_while(
        &mut self,
        step: Arc<Step>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<Sampled>, StepError> {
        self.together(|| Order::Step(Arc::clone(&step)), |first| Ok(first.step_while(&step, meanwhile)?))
            .map_err(|(rank, error)| StepError(format!("rank {rank}: {error}")))
    }

    fn limits(&self) -> StepLimits {
        self.limits
    }
}

impl<K: Kernels> Drop for RankGroup<K> {
    fn drop(&mut self) {
        // Dropped in the middle of a step only by a panic: the others must not wait for rank 0.
        self.first.abort("rank 0 has left");
        for Follower { orders, results, thread } in self.others.drain(..) {
            drop((orders, results));
            // A panic in the thread has already been reported as a step's error.
            let _ = thread.join();
        }
    }
}
