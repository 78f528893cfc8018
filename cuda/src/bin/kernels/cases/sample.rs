//! `sample` over the whole vocabulary.

use dsa80_cuda::sample::{self, SampleStep, SampleTile, SampleWorkspace};
use dsa80_cuda::{Cost, CudaTensor, Gpu, Tile};
use dsa80_reference::{DType, Kernels, Result, SampleOutput, SampleRow, SamplingParams};

use super::{Case, Run, copies, typed};
use crate::inputs;
use crate::oracle::{self, Accuracy, oracle, spread};

const VOCAB: usize = 154_880;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Greedy,
    Temperature,
    TopK,
    TopP,
    MinP,
    /// Top-p of logits that are all equal.
    Equal,
}

impl Kind {
    /// As far apart as a model's: the best of so many stands 13 above the mean.
    fn spread(self) -> f32 {
        if matches!(self, Kind::Equal) { 0.0 } else { 3.0 }
    }

    fn params(self, seed: u64) -> SamplingParams {
        let plain = SamplingParams { seed, ..SamplingParams::default() };
        match self {
            Kind::Greedy => SamplingParams { temperature: 0.0, ..plain },
            Kind::Temperature => plain,
            Kind::TopK => SamplingParams { top_k: 50, top_p: 0.95, ..plain },
            Kind::TopP | Kind::Equal => SamplingParams { top_p: 0.95, ..plain },
            Kind::MinP => SamplingParams { min_p: 0.05, ..plain },
        }
    }
}

struct Rows {
    tile: SampleTile,
    workspace: SampleWorkspace<Gpu>,
    step: SampleStep,
    params: Vec<SamplingParams>,
    top: usize,
    sets: Vec<Set>,
}

struct Set {
    logits: CudaTensor<Gpu>,
    out: SampleOutput<CudaTensor<Gpu>>,
}

pub(super) fn cases() -> Vec<Case> {
    let kinds = [
        (Kind::Greedy, 0, "greedy"),
        (Kind::Temperature, 0, "temperature 1"),
        (Kind::Temperature, 20, "temperature 1, 20 reported"),
        (Kind::TopK, 0, "top-k 50, top-p 0.95"),
        (Kind::TopP, 0, "top-p 0.95"),
        (Kind::MinP, 0, "min-p 0.05"),
        (Kind::Equal, 0, "top-p 0.95, all equal"),
    ];
    let shapes = [1, 32].into_iter().flat_map(|rows| kinds.map(|kind| (rows, kind)));
    let case = |(rows, (kind, top, words))| Case {
        kernel: SampleTile::KERNEL,
        name: format!("{rows} x {VOCAB}, {words}"),
        class: "any",
        goal_us: None,
        check: true,
        make: Box::new(
            move |gpu: &Gpu, _: &_| Ok(Box::new(Rows::new(gpu, rows, kind, top)?) as Box<dyn Run>),
        ),
    };
    shapes.map(case).collect()
}

fn row(params: &SamplingParams) -> SampleRow<'_> {
    SampleRow { params, prompt: &[], output: &[], banned: &[], position: 77, forced: None }
}

impl Rows {
    fn new(gpu: &Gpu, rows: usize, kind: Kind, top: usize) -> Result<Self> {
        let bytes = sample::cost(rows, VOCAB, top).bytes;
        let sets = (0..copies(gpu, bytes) as u64)
            .map(|seed| {
                let alloc = |name, dtype, shape: &[usize]| CudaTensor::alloc(gpu, name, dtype, shape);
                Ok(Set {
                    logits: inputs::normal(gpu, "logits", DType::Float, &[rows, VOCAB], seed, kind.spread())?,
                    out: SampleOutput {
                        token_ids: alloc("token_ids", DType::Index, &[rows])?,
                        logprobs: alloc("logprobs", DType::Float, &[rows])?,
                        top_ids: alloc("top_ids", DType::Index, &[rows, top])?,
                        top_logprobs: alloc("top_logprobs", DType::Float, &[rows, top])?,
                    },
                })
            })
            .collect::<Result<_>>()?;
        let params: Vec<_> = (0..rows as u64).map(|seed| kind.params(seed)).collect();
        let tile = SampleTile::safe(());
        let (workspace, step) = prepared(gpu, &tile, &params, top)?;
        Ok(Self { tile, workspace, step, params, top, sets })
    }
}

/// A workspace in which the rows' parameters lie: what a graph replays writes nothing from the host.
fn prepared(
    gpu: &Gpu,
    tile: &SampleTile,
    params: &[SamplingParams],
    top: usize,
) -> Result<(SampleWorkspace<Gpu>, SampleStep)> {
    let workspace = SampleWorkspace::alloc(gpu, tile, params.len(), VOCAB, top)?;
    let rows: Vec<SampleRow<'_>> = params.iter().map(row).collect();
    let step = sample::upload(gpu, &workspace, VOCAB, &rows, 0)?;
    Ok((workspace, step))
}

impl Run for Rows {
    fn set_tile(&mut self, gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        (self.workspace, self.step) = prepared(gpu, &self.tile, &self.params, self.top)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        sample::cost(self.params.len(), VOCAB, self.top)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let Set { logits, out } = &mut self.sets[copy];
        sample::launch(gpu, &self.tile, &self.workspace, logits, self.step, out)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|Set { out, .. }| {
            [&out.token_ids, &out.logprobs, &out.top_ids, &out.top_logprobs]
                .into_iter()
                .try_for_each(|tensor| gpu.fill(tensor.buffer(), 0xff))
        })
    }

    /// The same tokens; log-probabilities to 1e-5.
    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let Set { logits, out } = &self.sets[copy];
        let rows = spread(4, self.params.len());
        let logits = oracle::rows(gpu, logits, &rows)?;
        let host = |dtype, shape: &[usize]| oracle().alloc(dtype, shape);
        let (count, top) = (rows.len(), self.top);
        let mut expected = SampleOutput {
            token_ids: host(DType::Index, &[count])?,
            logprobs: host(DType::Float, &[count])?,
            top_ids: host(DType::Index, &[count, top])?,
            top_logprobs: host(DType::Float, &[count, top])?,
        };
        let asked: Vec<SampleRow<'_>> = rows.iter().map(|&i| row(&self.params[i])).collect();
        oracle().sample(&logits, &asked, &mut expected)?;
        let mut accuracy: Option<Accuracy> = None;
        for (found, expected) in [(&out.token_ids, &expected.token_ids), (&out.top_ids, &expected.top_ids)] {
            let expected: Vec<f64> = oracle().read_index(expected)?.into_iter().map(f64::from).collect();
            let found = oracle::row_numbers(gpu, found, &rows)?;
            let ids = Accuracy::of(count, 1e-5, &found, &expected, |_| 0.5);
            accuracy = Some(accuracy.map_or(ids, |so_far| so_far.and(ids)));
        }
        for (found, expected) in
            [(&out.logprobs, &expected.logprobs), (&out.top_logprobs, &expected.top_logprobs)]
        {
            let (found, expected) = (oracle::row_numbers(gpu, found, &rows)?, oracle().read(expected)?);
            let logprobs = Accuracy::of(count, 1e-5, &found, &expected, |i| 1e-5 * (1.0 + expected[i].abs()));
            accuracy = Some(accuracy.map_or(logprobs, |so_far| so_far.and(logprobs)));
        }
        Ok(accuracy.unwrap_or_else(|| Accuracy::of(0, 0.0, &[], &[], |_| 0.0)))
    }
}
