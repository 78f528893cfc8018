//! One rank of the model: its weights, its caches, and a step from tokens to sampled tokens.

use std::sync::Arc;

use dsa80_reference::{Batch, Communicator, Kernels, Result, SampleRow};

use super::cache::Caches;
use super::forward::Forward;
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
    caches: Caches<K>,
    workspace: Workspace<K>,
    device_batch: K::Batch,
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
        let ends = Ends::upload(&kernels, weights.load_ends(shard)?)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Ok(Layer::upload(&kernels, weights.load_layer(index, shard)?)?))
            .collect::<Result<_, LaunchError>>()?;
        let max_blocks = widest.max_model_len.div_ceil(widest.page_size);
        let index_logits = index_logits
            .clamp(widest.max_model_len, widest.max_model_len.saturating_mul(widest.max_batch_tokens));
        let workspace = Workspace::alloc(&kernels, &shape, widest.max_batch_tokens, index_logits)?;
        let device_batch = kernels.alloc_batch(widest.max_batch_tokens, widest.max_batch_seqs, max_blocks)?;
        let limits = settle(&kernels)?;
        let caches = Caches::alloc(&kernels, &config, limits.num_pages, limits.page_size)?;
        let rank =
            Self { kernels, communicator, config, shape, ends, layers, caches, workspace, device_batch };
        Ok((rank, limits))
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
        if self.communicator.world_size() == 1 {
            self.kernels.lm_head(&ws.normed, &ws.logit_rows, &self.ends.lm_head, &mut ws.logits)
        } else {
            self.kernels.lm_head(&ws.normed, &ws.logit_rows, &self.ends.lm_head, &mut ws.logits_shard)?;
            self.communicator.all_gather(&ws.logits_shard, &mut ws.logits)
        }
    }

    /// One step: forward, then a token for every target. All ranks compute the logits; only rank 0 chooses.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn step(&mut self, step: &Step) -> Result<Vec<Sampled>> {
        self.forward(&step.batch, None)?;
        let mut sampled = Vec::with_capacity(step.targets.len());
        for targets in step.targets.chunks(LOGIT_ROWS) {
            let rows: Vec<usize> = targets.iter().map(|target| target.row).collect();
            let top = targets.iter().filter_map(|target| target.logprobs).max().unwrap_or(0);
            self.project(&rows, top)?;
            if self.communicator.rank() == 0 {
                self.sample(targets, top, &mut sampled)?;
            }
        }
        Ok(sampled)
    }

    /// Breaks the group of ranks: every rank that waits in a collective fails with `reason`.
    pub fn abort(&self, reason: &str) {
        self.communicator.abort(reason);
    }

    fn sample(&mut self, targets: &[SampleTarget], top: usize, sampled: &mut Vec<Sampled>) -> Result<()> {
        let rows: Vec<SampleRow<'_>> = targets.iter().map(sample_row).collect();
        let ws = &mut self.workspace;
        self.kernels.sample(&ws.logits, &rows, &mut ws.sampled)?;
        let tokens = self.kernels.read_index(&ws.sampled.token_ids)?;
        let logprobs = self.kernels.read(&ws.sampled.logprobs)?;
        let top_ids = self.kernels.read_index(&ws.sampled.top_ids)?;
        let top_logprobs = self.kernels.read(&ws.sampled.top_logprobs)?;
        for (i, target) in targets.iter().enumerate() {
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
                logprobs: target
                    .logprobs
                    .map(|wanted| TokenLogprobs { logprob: logprobs[i] as f32, top: alternatives(wanted) }),
            });
        }
        Ok(())
    }
}

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
