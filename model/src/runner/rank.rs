//! One rank of the model: its weights, its caches, and a step from tokens to sampled tokens.

use std::sync::Arc;

use dsa80_reference::{
    Batch, Breaker, Communicator, Kernels, RecordedKernel, Result, SampleRow, SamplingParams,
};

use super::cache::Caches;
use super::draft::{Drafter, following};
use super::forward::{Forward, LogitRows, lm_head};
use super::graphs::{Bucket, DecodeGraphs, cannot_record};
use super::loading::{Loaded, load};
use super::probe::Probe;
use super::shape::RankShape;
use super::source::WeightSource;
use super::weights::{Ends, Layer};
use super::workspace::{LOGIT_ROWS, Workspace};
use crate::checkpoint::Shard;
use crate::config::ModelConfig;
use crate::engine::{SampleTarget, Sampled, Step, StepLimits, TokenLogprobs};
use crate::error::LaunchError;

/// Scores in the indexer's workspace, 16 MiB of f32: chunks of rows large enough to keep a GPU's selection busy.
pub const INDEX_LOGITS: usize = 4 << 20;

/// One rank of a tensor-parallel model on one backend.
pub struct Rank<K: Kernels> {
    kernels: K,
    communicator: Box<dyn Communicator<K::Tensor>>,
    config: Arc<ModelConfig>,
    shape: RankShape,
    ends: Ends<K>,
    layers: Vec<Layer<K>>,
    drafter: Option<Drafter<K>>,
    caches: Caches<K>,
    workspace: Workspace<K>,
    device_batch: K::Batch,
    sample_plan: K::SamplePlan,
    graphs: DecodeGraphs<K>,
}

/// A step that was recorded to be timed.
#[derive(Debug)]
pub struct RecordedStep<G> {
    /// All of it.
    pub whole: G,
    /// The launches of each of its kernels.
    pub kernels: Vec<RecordedKernel<G>>,
}

impl<K: Kernels> Rank<K> {
    /// Loads this rank's shard of `weights`, layer by layer, and allocates caches and workspace for `limits`.
    ///
    /// # Errors
    /// A damaged checkpoint, or a backend out of memory.
    pub fn load(
        kernels: K,
        communicator: Box<dyn Communicator<K::Tensor>>,
        weights: &dyn WeightSource,
        limits: &StepLimits,
        index_logits: usize,
    ) -> Result<Self, LaunchError> {
        let settle = |_: &K| Ok(*limits);
        Self::load_and_settle(kernels, communicator, weights, limits, index_logits, settle)
            .map(|(rank, _)| rank)
    }

    /// [`load`](Self::load), with limits that `settle` chooses, within the `widest`, when all but the caches is in memory: so that they can
    /// take what is left.
    ///
    /// # Errors
    /// As for [`load`](Self::load), and what `settle` reports.
    pub fn load_and_settle(
        kernels: K,
        communicator: Box<dyn Communicator<K::Tensor>>,
        weights: &dyn WeightSource,
        widest: &StepLimits,
        index_logits: usize,
        settle: impl FnOnce(&K) -> Result<StepLimits, LaunchError>,
    ) -> Result<(Self, StepLimits), LaunchError> {
        let config = Arc::new(weights.config().clone());
        let shard = Shard { rank: communicator.rank(), world_size: communicator.world_size() };
        let shape = RankShape::new(&config, shard.world_size);
        let Loaded { ends, layers, drafter } = load(&kernels, weights, shard)?;
        let max_blocks = widest.max_model_len.div_ceil(widest.page_size);
        let index_logits = index_logits
            .clamp(widest.max_model_len, widest.max_model_len.saturating_mul(widest.max_batch_tokens));
        let workspace = Workspace::alloc(&kernels, &shape, widest.max_batch_tokens, index_logits)?;
        let device_batch = kernels.alloc_batch(widest.max_batch_tokens, widest.max_batch_seqs, max_blocks)?;
        let sample_plan = kernels.alloc_sample_plan(LOGIT_ROWS, shape.vocab_size)?;
        let limits = settle(&kernels)?;
        let caches = Caches::alloc(&kernels, &config, &limits)?;
        let rank = Self {
            kernels,
            communicator,
            config,
            shape,
            ends,
            layers,
            drafter,
            caches,
            workspace,
            device_batch,
            sample_plan,
            graphs: DecodeGraphs::default(),
        };
        Ok((rank, limits))
    }

    /// Puts numbers where the columns that other ranks multiply go, which a [lone rank](dsa80_reference::LoneRank) never gathers: as large as
    /// a trained model's, so that what norms, caches and selections do with them takes as long.
    ///
    /// # Errors
    /// The device failed.
    pub fn stand_in_for_others(&mut self) -> Result<()> {
        let Workspace { q_a, kv_a, .. } = &mut self.workspace;
        [q_a, kv_a].into_iter().try_for_each(|gathered| gathered.fill(&self.kernels))
    }

    /// Records the decode steps within `limits` as graphs, which [`step`](Self::step) replays from then on, and says how many there are: none
    /// on a backend that has no graphs, or where a step also drafts. All ranks record together, as they step together.
    ///
    /// # Errors
    /// A step that cannot be recorded, with what to do about it.
    pub fn record_graphs(&mut self, limits: &StepLimits) -> Result<usize, LaunchError> {
        self.graphs = DecodeGraphs::default();
        if self.drafter.is_some() {
            return Ok(0);
        }
        for bucket in Bucket::all(limits, self.shape.index_topk) {
            match self.record(bucket, limits).map_err(|error| cannot_record(bucket, &error))? {
                Some(graph) => self.graphs.push(bucket, graph),
                None => break,
            }
        }
        Ok(self.graphs.len())
    }

    fn record(&mut self, bucket: Bucket, limits: &StepLimits) -> Result<Option<K::Graph>> {
        let batch = bucket.widest(limits);
        self.kernels.upload_batch(&batch, &mut self.device_batch)?;
        self.kernels.upload_sample_plan(&vec![UNASKED; bucket.sequences], &mut self.sample_plan)?;
        self.workspace.set_logit_rows(bucket.sequences, 0)?;
        let kernels = &self.kernels;
        let mut forward = Forward {
            kernels,
            communicator: &*self.communicator,
            config: &self.config,
            shape: &self.shape,
            caches: &mut self.caches,
            workspace: &mut self.workspace,
            batch: &batch,
            device_batch: &self.device_batch,
            tokens: bucket.sequences,
        };
        kernels.record(|| {
            forward.run(&self.ends, &self.layers, None)?;
            let (communicator, ws) = (forward.communicator, &mut *forward.workspace);
            lm_head(kernels, communicator, &self.ends, ws, LogitRows::Every)?;
            match communicator.rank() {
                0 => kernels.sample_plan(&ws.logits, &self.sample_plan, &mut ws.sampled),
                _ => Ok(()),
            }
        })
    }

    /// Runs `step` and records it just as it is, as a whole and, if `apart`, kernel by kernel, to be timed; [`step`](Self::step) replays none of
    /// it. Of its targets, 64 at most, each row's best token is chosen. `None` on a backend that has no graphs.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn record_step(&mut self, step: &Step, apart: bool) -> Result<Option<RecordedStep<K::Graph>>> {
        let Step { batch, targets } = step;
        let rows: Vec<i32> = targets.iter().map(|target| target.row as i32).collect();
        let kernels = &self.kernels;
        kernels.upload_batch(batch, &mut self.device_batch)?;
        kernels.upload_sample_plan(&vec![UNASKED; rows.len()], &mut self.sample_plan)?;
        self.workspace.set_logit_rows(rows.len(), 0)?;
        kernels.write_index(&rows, &mut self.workspace.logit_rows)?;
        let mut forward = Forward {
            kernels,
            communicator: &*self.communicator,
            config: &self.config,
            shape: &self.shape,
            caches: &mut self.caches,
            workspace: &mut self.workspace,
            batch,
            device_batch: &self.device_batch,
            tokens: batch.num_tokens(),
        };
        let mut launches = || {
            forward.run(&self.ends, &self.layers, None)?;
            let (communicator, ws) = (forward.communicator, &mut *forward.workspace);
            if rows.is_empty() {
                return Ok(());
            }
            lm_head(kernels, communicator, &self.ends, ws, LogitRows::Listed)?;
            match communicator.rank() {
                0 => kernels.sample_plan(&ws.logits, &self.sample_plan, &mut ws.sampled),
                _ => Ok(()),
            }
        };
        let Some(whole) = kernels.record(&mut launches)? else { return Ok(None) };
        let kernels = if apart { kernels.record_kernels(launches)? } else { Vec::new() };
        Ok(Some(RecordedStep { whole, kernels }))
    }

    /// The backend.
    pub fn kernels(&self) -> &K {
        &self.kernels
    }

    /// Runs `batch` through all layers and writes its cache rows.
    ///
    /// # Errors
    /// A batch larger than the limits given to [`load`](Self::load), or whatever a kernel or a collective
    /// reports.
    pub fn forward(&mut self, batch: &Batch, probe: Option<&mut dyn Probe>) -> Result<()> {
        self.kernels.upload_batch(batch, &mut self.device_batch)?;
        Forward {
            kernels: &self.kernels,
            communicator: &*self.communicator,
            config: &self.config,
            shape: &self.shape,
            caches: &mut self.caches,
            workspace: &mut self.workspace,
            batch,
            device_batch: &self.device_batch,
            tokens: batch.num_tokens(),
        }
        .run(&self.ends, &self.layers, probe)
    }

    /// The logits `[rows, vocab_size]` of token rows of the batch that [`forward`](Self::forward) ran last.
    ///
    /// # Errors
    /// A row outside that batch, or whatever a kernel or a collective reports.
    pub fn logits(&mut self, rows: &[usize]) -> Result<Vec<f64>> {
        let mut logits = Vec::with_capacity(rows.len() * self.shape.vocab_size);
        for rows in rows.chunks(LOGIT_ROWS) {
            self.project(rows, 0)?;
            logits.extend(self.kernels.read(&self.workspace.logits)?);
        }
        Ok(logits)
    }

    /// Leaves the logits of `rows`, at most [`LOGIT_ROWS`], in the workspace.
    fn project(&mut self, rows: &[usize], top: usize) -> Result<()> {
        let ws = &mut self.workspace;
        ws.set_logit_rows(rows.len(), top)?;
        let indices: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        self.kernels.write_index(&indices, &mut ws.logit_rows)?;
        lm_head(&self.kernels, &*self.communicator, &self.ends, ws, LogitRows::Listed)
    }

    /// One step: forward, then a token for every target. All ranks compute the logits; only rank 0 chooses. A rank that fails breaks the
    /// group with its reason.
    ///
    /// A decode step for which a graph was recorded is its replay: rounded up to as many sequences, which changes in what order a sequence's
    /// sums are taken as other sequences beside it do, and nothing else.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn step(&mut self, step: &Step) -> Result<Vec<Sampled>> {
        self.step_while(step, &mut || ())
    }

    /// [`step`](Self::step), with what there is to do while it runs: called once, when a recorded step is on its way, or before any other.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn step_while(&mut self, step: &Step, meanwhile: &mut dyn FnMut()) -> Result<Vec<Sampled>> {
        let sampled = self
            .sampled_while(step, meanwhile)
            .and_then(|sampled| self.communicator.check().map(|()| sampled));
        if let Err(error) = &sampled {
            self.abort(&error.to_string());
        }
        sampled
    }

    fn sampled_while(&mut self, step: &Step, meanwhile: &mut dyn FnMut()) -> Result<Vec<Sampled>> {
        if self.start_replay(step)? {
            meanwhile();
            return self.replayed(step);
        }
        meanwhile();
        self.forward(&step.batch, None)?;
        let mut sampled = Vec::with_capacity(step.targets.len());
        for targets in step.targets.chunks(LOGIT_ROWS) {
            let rows: Vec<usize> = targets.iter().map(|target| target.row).collect();
            let top = most_alternatives(targets);
            self.project(&rows, top)?;
            if self.communicator.rank() == 0 {
                let rows: Vec<SampleRow<'_>> = targets.iter().map(sample_row).collect();
                let ws = &mut self.workspace;
                self.kernels.sample(&ws.logits, &rows, &mut ws.sampled)?;
                self.read_sampled(targets, top, |index| index, &mut sampled)?;
            }
        }
        self.draft(step, &mut sampled)?;
        Ok(sampled)
    }

    /// Lets the MTP layer, where there is one, guess behind every token that [`forward`](Self::forward) ran last and `step` says.
    fn draft(&mut self, step: &Step, sampled: &mut [Sampled]) -> Result<()> {
        let Some(drafter) = &self.drafter else { return Ok(()) };
        let batch = following(step);
        self.kernels.upload_batch(&batch, &mut self.device_batch)?;
        Forward {
            kernels: &self.kernels,
            communicator: &*self.communicator,
            config: &self.config,
            shape: &self.shape,
            caches: &mut self.caches,
            workspace: &mut self.workspace,
            batch: &batch,
            device_batch: &self.device_batch,
            tokens: batch.num_tokens(),
        }
        .draft(&self.ends, drafter, self.layers.len())?;
        for (chunk, targets) in step.targets.chunks(LOGIT_ROWS).enumerate() {
            let rows: Vec<usize> = targets.iter().map(|target| target.row).collect();
            self.project(&rows, 0)?;
            if self.communicator.rank() != 0 {
                continue;
            }
            let ws = &mut self.workspace;
            self.kernels.sample(&ws.logits, &vec![UNASKED; rows.len()], &mut ws.sampled)?;
            let drafts = self.kernels.read_index(&ws.sampled.token_ids)?;
            let scored = sampled[chunk * LOGIT_ROWS..].iter_mut().map(|sampled| &mut sampled.logprobs);
            for ((scored, draft), target) in scored.zip(drafts).zip(targets) {
                // Behind a token that was drawn just now the layer would have needed that token.
                if let Some(scored) = scored.as_mut().filter(|_| target.forced.is_some()) {
                    scored.draft = Some(draft as u32);
                }
            }
        }
        Ok(())
    }

    /// Starts a step that was recorded; whether it was.
    fn start_replay(&mut self, step: &Step) -> Result<bool> {
        let Step { batch, targets } = step;
        let Some((bucket, graph)) = self.graphs.of(step) else { return Ok(false) };
        let ws = &mut self.workspace;
        self.kernels.upload_batch(&bucket.pad(batch), &mut self.device_batch)?;
        ws.set_tokens(&self.shape, bucket.sequences)?;
        if self.communicator.rank() != 0 {
            return self.kernels.replay(graph).map(|()| true);
        }
        let mut rows = vec![UNASKED; bucket.sequences];
        targets.iter().for_each(|target| rows[target.row] = sample_row(target));
        let chosen = self.kernels.upload_sample_plan(&rows, &mut self.sample_plan)?;
        self.kernels.replay(graph)?;
        let top = most_alternatives(targets);
        ws.set_logit_rows(batch.num_seqs(), top)?;
        // What a plan has no room for, and alternatives: the same choice again, and more.
        if !chosen || top > 0 {
            self.kernels.sample(&ws.logits, &rows[..batch.num_seqs()], &mut ws.sampled)?;
        }
        Ok(true)
    }

    /// What came out of a step that was replayed. Waits for it.
    fn replayed(&self, Step { targets, .. }: &Step) -> Result<Vec<Sampled>> {
        let mut sampled = Vec::with_capacity(targets.len());
        if self.communicator.rank() == 0 {
            self.read_sampled(targets, most_alternatives(targets), |index| targets[index].row, &mut sampled)?;
        }
        Ok(sampled)
    }

    /// Breaks the group of ranks: every rank that waits in a collective fails with `reason`.
    pub fn abort(&self, reason: &str) {
        self.communicator.abort(reason);
    }

    /// [`abort`](Self::abort) for another thread, while this rank may be waiting.
    pub fn breaker(&self) -> Option<Breaker> {
        self.communicator.breaker()
    }

    /// Appends what was sampled for every target; `row_of` says at which of the sampled rows the target of an index is. Waits for the device.
    fn read_sampled(
        &self,
        targets: &[SampleTarget],
        top: usize,
        row_of: impl Fn(usize) -> usize,
        sampled: &mut Vec<Sampled>,
    ) -> Result<()> {
        if targets.is_empty() {
            return Ok(());
        }
        let out = &self.workspace.sampled;
        let tokens = self.kernels.read_index(&out.token_ids)?;
        // Every read waits once more: only for what is asked for.
        let scored = targets.iter().any(|target| target.logprobs.is_some());
        let logprobs = if scored { self.kernels.read(&out.logprobs)? } else { Vec::new() };
        let (top_ids, top_logprobs) = match top {
            0 => (Vec::new(), Vec::new()),
            _ => (self.kernels.read_index(&out.top_ids)?, self.kernels.read(&out.top_logprobs)?),
        };
        for (index, target) in targets.iter().enumerate() {
            let i = row_of(index);
            let alternatives = |wanted: usize| {
                let row = i * top..i * top + wanted;
                top_ids[row.clone()]
                    .iter()
                    .zip(&top_logprobs[row])
                    .filter(|(id, _)| **id >= 0)
                    .map(|(&id, &logprob)| (id as u32, logprob as f32))
                    .collect()
            };
            sampled.push(Sampled {
                token: tokens[i] as u32,
                logprobs: target.logprobs.map(|wanted| TokenLogprobs {
                    logprob: logprobs[i] as f32,
                    top: alternatives(wanted),
                    draft: None,
                }),
            });
        }
        Ok(())
    }
}

/// The most alternatives that any of `targets` wants reported.
fn most_alternatives(targets: &[SampleTarget]) -> usize {
    targets.iter().filter_map(|target| target.logprobs).max().unwrap_or(0)
}

/// What nobody asks of a row.
const UNASKED: SampleRow<'static> =
    SampleRow { params: &GREEDY, prompt: &[], output: &[], banned: &[], position: 0, forced: None };

static GREEDY: SamplingParams = SamplingParams {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    frequency_penalty: 0.0,
    presence_penalty: 0.0,
    logit_bias: Vec::new(),
    seed: 0,
};

fn sample_row(target: &SampleTarget) -> SampleRow<'_> {
    SampleRow {
        params: &target.params,
        prompt: &target.prompt,
        output: &target.output,
        banned: &target.banned,
        position: target.position,
        forced: target.forced,
    }
}
