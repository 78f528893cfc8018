//! What ranks are timed at: sums and gatherings of what can be checked.

use dsa80_reference::{DType, HostTensor, Kernels, Result};

use super::collectives::Summed;
use super::sums::{Gathering, Sums};
use crate::runner::RankParts;

const EPS: f64 = 1e-5;

/// What a rank does with the others, again and again.
pub(super) trait Work {
    /// Puts there what is to be checked, or zeros, which stay zeros however often they are summed.
    fn begin(&mut self, zeros: bool) -> Result<()>;
    fn call(&mut self) -> Result<()>;
    /// What came of it.
    fn found(&self) -> Result<Vec<f64>>;
    /// Its largest error, as a share of what rounding explains.
    fn worst(&self, found: &[f64]) -> f64;
    /// Whether the last call was one launch.
    fn fused(&self) -> bool;
}

pub(super) struct Sum<'a, K: Kernels> {
    rank: &'a RankParts<K>,
    summed: Summed,
    sums: Sums,
    x: K::Tensor,
    residual: K::Tensor,
    weight: K::Tensor,
    out: K::Tensor,
    fused: bool,
}

impl<'a, K: Kernels> Sum<'a, K> {
    pub(super) fn new(rank: &'a RankParts<K>, summed: Summed, rows: usize, hidden: usize) -> Result<Self> {
        let sums = Sums { rows, hidden, ranks: rank.communicator.world_size() };
        let (kernels, shape) = (&rank.kernels, [rows, hidden]);
        Ok(Self {
            x: kernels.alloc(DType::Act, &shape)?,
            residual: kernels.alloc(DType::Float, &shape)?,
            weight: kernels.upload(HostTensor::f32([hidden], sums.weight()))?,
            out: kernels.alloc(DType::Act, &shape)?,
            rank,
            summed,
            sums,
            fused: false,
        })
    }
}

impl<K: Kernels> Work for Sum<'_, K> {
    fn begin(&mut self, zeros: bool) -> Result<()> {
        let RankParts { kernels, communicator } = self.rank;
        let nothing = vec![0.0; self.sums.rows * self.sums.hidden];
        let (x, residual) = if zeros {
            (nothing.clone(), nothing.clone())
        } else {
            (self.sums.part(communicator.rank()), self.sums.residual())
        };
        kernels.write(&x, &mut self.x)?;
        kernels.write(&residual, &mut self.residual)?;
        kernels.write(&nothing, &mut self.out)
    }

    fn call(&mut self) -> Result<()> {
        let Self { rank: RankParts { kernels, communicator }, x, residual, weight, out, .. } = self;
        if self.summed == Summed::Alone {
            return communicator.all_reduce(x);
        }
        self.fused = communicator.all_reduce_norm(x, residual, weight, EPS, out)?;
        if self.fused {
            return Ok(());
        }
        communicator.all_reduce(x)?;
        kernels.rms_norm_residual(x, residual, weight, EPS, out)
    }

    fn found(&self) -> Result<Vec<f64>> {
        self.rank.kernels.read(if self.summed == Summed::Alone { &self.x } else { &self.out })
    }

    fn worst(&self, found: &[f64]) -> f64 {
        self.sums.worst(found, (self.summed == Summed::WithNorm).then_some(EPS))
    }

    fn fused(&self) -> bool {
        self.fused
    }
}

pub(super) struct Gather<'a, K: Kernels> {
    rank: &'a RankParts<K>,
    of: Vec<Gathering>,
    shards: Vec<K::Tensor>,
    outs: Vec<K::Tensor>,
}

impl<'a, K: Kernels> Gather<'a, K> {
    pub(super) fn new(rank: &'a RankParts<K>, rows: usize, columns: &[usize]) -> Result<Self> {
        let ranks = rank.communicator.world_size();
        let of: Vec<_> = columns.iter().map(|&columns| Gathering { rows, columns, ranks }).collect();
        let alloc = |columns: &dyn Fn(Gathering) -> usize| {
            of.iter()
                .map(|&of| rank.kernels.alloc(DType::Act, &[rows, columns(of)]))
                .collect::<Result<Vec<_>>>()
        };
        let (shards, outs) = (alloc(&Gathering::share)?, alloc(&|of| of.columns)?);
        Ok(Self { rank, of, shards, outs })
    }
}

impl<K: Kernels> Work for Gather<'_, K> {
    fn begin(&mut self, zeros: bool) -> Result<()> {
        let RankParts { kernels, communicator } = self.rank;
        let scale = if zeros { 0.0 } else { 1.0 };
        for ((of, shard), out) in self.of.iter().zip(&mut self.shards).zip(&mut self.outs) {
            let part: Vec<f64> = of.part(communicator.rank()).into_iter().map(|x| scale * x).collect();
            kernels.write(&part, shard)?;
            kernels.write(&vec![0.0; of.rows * of.columns], out)?;
        }
        Ok(())
    }

    fn call(&mut self) -> Result<()> {
        let shards: Vec<_> = self.shards.iter().collect();
        let mut outs: Vec<_> = self.outs.iter_mut().collect();
        self.rank.communicator.all_gather_each(&shards, &mut outs)
    }

    fn found(&self) -> Result<Vec<f64>> {
        let parts = self.outs.iter().map(|out| self.rank.kernels.read(out)).collect::<Result<Vec<_>>>()?;
        Ok(parts.concat())
    }

    /// Nothing is rounded.
    fn worst(&self, found: &[f64]) -> f64 {
        let whole: Vec<f64> = self.of.iter().flat_map(|of| of.whole()).collect();
        if found == whole { 0.0 } else { f64::INFINITY }
    }

    fn fused(&self) -> bool {
        false
    }
}
