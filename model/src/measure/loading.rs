//! Where the time of loading goes: a source of weights that keeps a diary.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::checkpoint::{CheckpointError, Reservation, Shard};
use crate::config::ModelConfig;
use crate::runner::WeightSource;
use crate::weights::{HostEnds, HostLayer};

/// What the thread that reads has done until now. Reading overlaps with the upload of what was read before; what does not is waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadPhases {
    /// Until the first weights were asked for.
    pub before: Duration,
    /// Reading, and bringing tensors into the order that the device wants them in.
    pub reading: Duration,
    /// Until the device had taken what was read.
    pub waiting: Duration,
    /// Since the last layer was read: its upload, and the allocation of workspace and caches.
    pub after: Duration,
}

/// Weights of another source, and when they were asked for.
pub struct TimedSource<'a> {
    source: &'a dyn WeightSource,
    diary: Mutex<Diary>,
}

#[derive(Debug)]
struct Diary {
    started: Instant,
    /// When the last read ended.
    last: Option<Instant>,
    phases: LoadPhases,
}

impl<'a> TimedSource<'a> {
    /// Begins to count.
    pub fn new(source: &'a dyn WeightSource) -> Self {
        let diary = Diary { started: Instant::now(), last: None, phases: LoadPhases::default() };
        Self { source, diary: Mutex::new(diary) }
    }

    /// The phases, together as long as it is since the beginning.
    pub fn phases(&self) -> LoadPhases {
        let diary = self.diary.lock().unwrap_or_else(PoisonError::into_inner);
        let after = diary.last.map_or(Duration::ZERO, |last| last.elapsed());
        LoadPhases { after, ..diary.phases }
    }

    /// What was waited for since the last read counts as waiting; what `read` takes, as reading.
    fn timed<R>(&self, read: impl FnOnce() -> R) -> R {
        let started = Instant::now();
        let result = read();
        let ended = Instant::now();
        let mut diary = self.diary.lock().unwrap_or_else(PoisonError::into_inner);
        match diary.last {
            Some(last) => diary.phases.waiting += started.duration_since(last),
            None => diary.phases.before = started.duration_since(diary.started),
        }
        diary.phases.reading += ended.duration_since(started);
        diary.last = Some(ended);
        result
    }
}

impl WeightSource for TimedSource<'_> {
    fn config(&self) -> &ModelConfig {
        self.source.config()
    }

    fn load_layer(&self, layer: usize, shard: Shard) -> Result<HostLayer, CheckpointError> {
        self.timed(|| self.source.load_layer(layer, shard))
    }

    fn reserve(&self, layer: Option<usize>, shard: Shard) -> Reservation {
        self.source.reserve(layer, shard)
    }

    fn load_ends(&self, shard: Shard) -> Result<HostEnds, CheckpointError> {
        self.timed(|| self.source.load_ends(shard))
    }
}

#[cfg(test)]
mod tests {
    use dsa80_reference::LoneRank;
    use dsa80_reference::cpu::Cpu;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::engine::StepLimits;
    use crate::runner::{INDEX_LOGITS, Rank};

    #[test]
    fn the_phases_of_a_load_are_all_of_it() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/default");
        let checkpoint = Checkpoint::open(std::path::Path::new(dir)).unwrap();
        let limits = StepLimits {
            page_size: 16,
            num_pages: 4,
            cache_dtype: dsa80_reference::DType::Act,
            max_batch_tokens: 16,
            max_batch_seqs: 2,
            max_model_len: 64,
            vocab_size: checkpoint.config().vocab_size,
            max_logprobs: 0,
        };
        let before_all = Instant::now();
        let source = TimedSource::new(&checkpoint);
        let after_new = Instant::now();
        let lone = Box::new(LoneRank::new(0, 1).unwrap());
        let _rank = Rank::load(Cpu::<f32>::new(), lone, &source, &limits, INDEX_LOGITS).unwrap();
        let least = after_new.elapsed();
        let LoadPhases { before, reading, waiting, after } = source.phases();
        let sum = before + reading + waiting + after;
        assert!(least <= sum && sum <= before_all.elapsed(), "{sum:?}, at least {least:?}");
        assert!(reading > Duration::ZERO && after > Duration::ZERO);
    }
}
