//! What every rank needs whole, and makes a part of.

use dsa80_reference::{Communicator, DType, DeviceTensor, Kernels, RandomTensor, Result};

/// Of the numbers that stand in for other ranks': a deviation of about 1.
const SPREAD: f32 = 1.75;
const SEED: u32 = 1;

/// Outputs of a projection that ranks share.
pub(crate) struct Gathered<K: Kernels> {
    /// This rank's columns; none where it makes all of them.
    shard: Option<K::Tensor>,
    /// All columns.
    pub(crate) whole: K::Tensor,
}

impl<K: Kernels> Gathered<K> {
    /// Of so many columns, `shard` of them this rank's; `act` allocates a tensor of so many.
    pub(crate) fn alloc(
        act: impl Fn(usize) -> Result<K::Tensor>,
        shard: usize,
        columns: usize,
    ) -> Result<Self> {
        let part = (shard < columns).then(|| act(shard)).transpose()?;
        Ok(Self { shard: part, whole: act(columns)? })
    }

    /// What this rank writes.
    pub(crate) fn own(&mut self) -> &mut K::Tensor {
        self.shard.as_mut().unwrap_or(&mut self.whole)
    }

    /// Fills what others make, where they do, with random numbers.
    pub(crate) fn fill(&mut self, kernels: &K) -> Result<()> {
        if self.shard.is_none() {
            return Ok(());
        }
        let most = self.whole.capacity() / self.whole.shape()[1].max(1);
        self.whole.set_rows(most)?;
        let numbers = RandomTensor::new(self.whole.shape(), DType::F32, 0.0, SPREAD, SEED).make().to_f32();
        kernels.write(&numbers.into_iter().map(f64::from).collect::<Vec<_>>(), &mut self.whole)
    }

    pub(crate) fn set_rows(&mut self, rows: usize) -> Result<()> {
        self.shard.as_mut().map_or(Ok(()), |shard| shard.set_rows(rows))?;
        self.whole.set_rows(rows)
    }
}

/// Makes whole what this rank wrote its part of.
pub(crate) fn gather<K: Kernels>(
    communicator: &dyn Communicator<K::Tensor>,
    parts: [&mut Gathered<K>; 2],
) -> Result<()> {
    let shared = parts.into_iter().filter_map(|part| part.shard.as_ref().zip(Some(&mut part.whole)));
    let (shards, mut wholes): (Vec<_>, Vec<_>) = shared.unzip();
    if shards.is_empty() { Ok(()) } else { communicator.all_gather_each(&shards, &mut wholes) }
}
