//! Tensor parallelism over the threads of one process: what ranks have is exchanged in the host's memory.

use std::sync::Arc;

use super::Wgpu;
use super::tensor::WgpuTensor;
use crate::communicator::{Breaker, Communicator};
use crate::error::{Error, Result};
use crate::rendezvous::Rendezvous;
use crate::tensor::{DType, DeviceTensor};

/// One rank of a group of threads, each with a backend of its own.
#[derive(Debug)]
pub struct WgpuCommunicator {
    wgpu: Wgpu,
    meeting: Rendezvous<Arc<[f32]>>,
}

impl WgpuCommunicator {
    /// The ranks of a group, in order, of which each launches on its backend; each goes to its own thread.
    pub fn group(backends: &[Wgpu]) -> Vec<Self> {
        let meetings = Rendezvous::group(backends.len());
        meetings
            .into_iter()
            .zip(backends)
            .map(|(meeting, wgpu)| Self { wgpu: wgpu.share(), meeting })
            .collect()
    }

    /// Every rank's elements of `tensor`, as many as there are on this rank.
    fn meet(&self, kernel: &'static str, tensor: &WgpuTensor) -> Result<Vec<Arc<[f32]>>> {
        tensor.expect_dtype(kernel, "tensor", &[DType::Act, DType::Float], "activations or floats")?;
        let values: Arc<[f32]> = self.wgpu.read_numbers(tensor)?.iter().map(|&value| value as f32).collect();
        let parts = self.meeting.exchange(values)?;
        match parts.iter().position(|part| part.len() != tensor.len()) {
            None => Ok(parts),
            Some(rank) => Err(Error::Value {
                kernel,
                name: "tensor",
                expected: format!(
                    "{} elements on every rank, as on rank {}",
                    tensor.len(),
                    self.meeting.rank()
                ),
                found: format!("{} on rank {rank}", parts[rank].len()),
            }),
        }
    }
}

impl Communicator<WgpuTensor> for WgpuCommunicator {
    fn rank(&self) -> usize {
        self.meeting.rank()
    }

    fn world_size(&self) -> usize {
        self.meeting.world_size()
    }

    fn all_reduce(&self, tensor: &mut WgpuTensor) -> Result<()> {
        let parts = self.meet("all_reduce", tensor)?;
        let sum = |i: usize| f64::from(parts.iter().map(|part| part[i]).sum::<f32>());
        let sums: Vec<f64> = (0..tensor.len()).map(sum).collect();
        self.wgpu.write_numbers(&sums, tensor)
    }

    fn all_gather(&self, shard: &WgpuTensor, out: &mut WgpuTensor) -> Result<()> {
        let kernel = "all_gather";
        let (Some((&columns, rows)), world_size) = (shard.shape().split_last(), self.world_size()) else {
            return Err(Error::Shape {
                kernel,
                tensor: "shard",
                expected: "at least one dimension".into(),
                found: Vec::new(),
            });
        };
        out.expect_shape(kernel, "out", &[rows, &[columns * world_size]].concat())?;
        out.expect_dtype(kernel, "out", &[shard.dtype()], "what the shard holds")?;
        let parts = self.meet(kernel, shard)?;
        let rows = rows.iter().product::<usize>();
        let row = |row: usize| parts.iter().flat_map(move |part| &part[row * columns..(row + 1) * columns]);
        let gathered: Vec<f64> = (0..rows).flat_map(row).map(|&value| f64::from(value)).collect();
        self.wgpu.write_numbers(&gathered, out)
    }

    fn broadcast(&self, tensor: &mut WgpuTensor, root: usize) -> Result<()> {
        let world_size = self.world_size();
        if root >= world_size {
            let (expected, found) = (format!("a rank below {world_size}"), root.to_string());
            return Err(Error::Value { kernel: "broadcast", name: "root", expected, found });
        }
        let parts = self.meet("broadcast", tensor)?;
        let values: Vec<f64> = parts[root].iter().map(|&value| f64::from(value)).collect();
        self.wgpu.write_numbers(&values, tensor)
    }

    fn barrier(&self) -> Result<()> {
        self.meeting.exchange(Arc::from([])).map(drop)
    }

    fn abort(&self, reason: &str) {
        self.meeting.break_group(|| format!("rank {}: {reason}", self.meeting.rank()));
    }

    fn breaker(&self) -> Option<Breaker> {
        Some(self.meeting.breaker())
    }
}
