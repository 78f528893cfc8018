//! `all_reduce`: the sum over ranks.

use dsa80_reference::{DType, Result};
use serde::{Deserialize, Serialize};

use crate::all_reduce_norm::AllReduceNormTiles;
use crate::crossover::Crossover;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::exchange::{Exchange, ExchangeDims, SUMMED, deal, expect_alike, vector};
use crate::tensor::{CudaTensor, element_bytes};
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "all_reduce";

/// How a rank's elements are laid over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllReduceTile {
    /// Threads of a block.
    pub threads: usize,
    /// Blocks of a rank at most.
    pub blocks: usize,
}

/// How often ranks wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shots {
    /// Every rank pushes all to all others.
    One,
    /// Every rank sums its segment, then pushes the sums.
    Two,
}

impl Shots {
    /// What serves `bytes` on each of `ranks` ranks, as far as it can be told without a measurement.
    pub fn of(bytes: usize, ranks: usize) -> Self {
        let pushed = bytes.saturating_mul(ranks - 1);
        Self::sparing(pushed / ranks * ranks.saturating_sub(2), pushed)
    }

    /// Likewise where a norm follows, which two shots also share out: residuals and norms are four times the bytes, at about eight times
    /// the rate of a link.
    pub fn of_norm(bytes: usize, ranks: usize) -> Self {
        let pushed = bytes.saturating_mul(ranks - 1);
        Self::sparing(pushed / ranks * ranks.saturating_sub(2) + pushed / ranks / 2, pushed)
    }

    /// What serves where two shots would spare so many bytes of those that one would push.
    fn sparing(spared: usize, pushed: usize) -> Self {
        // Of a rank. Measured between two H100: a second wait takes as long as so many bytes take, and copies of this size are quicker
        // in halves.
        const SECOND_WAIT_BYTES: usize = 768 << 10;
        const ONE_SHOT_BYTES: usize = 16 << 20;
        if spared <= SECOND_WAIT_BYTES && pushed <= ONE_SHOT_BYTES { Shots::One } else { Shots::Two }
    }

    fn up_to(at_most: usize, bytes: usize) -> Self {
        if bytes <= at_most { Shots::One } else { Shots::Two }
    }
}

/// The tiles of all shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllReduceTiles {
    /// For one shot.
    pub one_shot: AllReduceTile,
    /// For two.
    pub two_shots: AllReduceTile,
    /// Of the sums that a norm follows.
    pub norm: AllReduceNormTiles,
    /// Up to which size one shot serves, where that is known; else it is inferred.
    pub crossover: Option<Crossover>,
}

impl AllReduceTiles {
    /// Those that fit any device.
    pub fn safe() -> Self {
        Self {
            one_shot: AllReduceTile::safe(Shots::One),
            two_shots: AllReduceTile::safe(Shots::Two),
            norm: AllReduceNormTiles::safe(),
            crossover: None,
        }
    }

    /// That of one way.
    pub fn of(&self, shots: Shots) -> AllReduceTile {
        if shots == Shots::One { self.one_shot } else { self.two_shots }
    }

    /// What sums `bytes` on each of `ranks` ranks.
    pub fn shots(&self, bytes: usize, ranks: usize) -> Shots {
        self.crossover.map_or_else(|| Shots::of(bytes, ranks), |at| Shots::up_to(at.all_reduce_bytes, bytes))
    }

    /// What sums and norms them.
    pub fn shots_of_norm(&self, bytes: usize, ranks: usize) -> Shots {
        self.crossover
            .map_or_else(|| Shots::of_norm(bytes, ranks), |at| Shots::up_to(at.all_reduce_norm_bytes, bytes))
    }
}

impl AllReduceTile {
    fn program(&self, dims: ExchangeDims, shots: Shots, dtype: DType, vector: usize) -> Program {
        let mut defines = dims.defines();
        defines.extend([
            ("THREADS", self.threads.to_string()),
            ("FLOATS", u8::from(dtype == DType::Float).to_string()),
            ("VECTOR", vector.to_string()),
            ("TWO_SHOTS", u8::from(shots == Shots::Two).to_string()),
        ]);
        Program { source: "all_reduce.cu", defines }
    }
}

impl Tile for AllReduceTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = Shots;

    fn safe(shots: Shots) -> Self {
        match shots {
            Shots::One => Self { threads: 512, blocks: 64 },
            Shots::Two => Self { threads: 512, blocks: 64 },
        }
    }

    fn candidates(shots: Shots, limits: &Limits) -> Vec<Self> {
        let tiles = [128, 256, 512]
            .into_iter()
            .flat_map(|threads| [16, 32, 64, 128].map(|blocks| Self { threads, blocks }));
        tiles.filter(|tile| tile.validate(shots, limits).is_ok()).collect()
    }

    fn validate(&self, _shots: Shots, _limits: &Limits) -> Result<()> {
        let threads = (32..=512).contains(&self.threads) && self.threads.is_multiple_of(32);
        require(self, threads, || "a block has 32 to 512 threads, whole warps".into())?;
        require(self, self.blocks > 0, || "a rank has at least a block".into())
    }
}

/// Every variant of a tile, for eight ranks.
pub fn programs(tile: &AllReduceTile, shots: Shots) -> Vec<ProgramEntry> {
    let Ok(dims) = ExchangeDims::new(8) else { return Vec::new() };
    let types = [(DType::Act, 8), (DType::Act, 1), (DType::Float, 4), (DType::Float, 1)];
    types
        .into_iter()
        .map(|(dtype, vector)| ProgramEntry {
            program: tile.program(dims, shots, dtype, vector),
            entry: KERNEL,
            threads: tile.threads as u32,
            shared_bytes: 0,
            variant: format!("{dtype}, vectors of {vector}, {shots:?}"),
        })
        .collect()
}

/// What `ranks` ranks of one GPU move that reduce `elements` each: every element is read, pushed, taken by who sums it, and written.
pub fn cost(elements: usize, dtype: DType, ranks: usize) -> Cost {
    Cost { bytes: (2 * ranks * elements * element_bytes(dtype)) as f64, flops: 0.0 }
}

/// The contract's [`all_reduce`](dsa80_reference::Communicator::all_reduce) for the ranks of `exchange` that have a tensor in `data`: one,
/// on a GPU of its own, or all ranks that share this one.
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn all_reduce<D: Device>(
    device: &D,
    tiles: &AllReduceTiles,
    exchange: &Exchange<D::Buffer>,
    data: &[CudaTensor<D>],
) -> Result<()> {
    let bytes = data.first().map_or(0, |x| x.len() * element_bytes(dsa80_reference::DeviceTensor::dtype(x)));
    let shots = tiles.shots(bytes, exchange.dims.ranks);
    all_reduce_in(shots, device, &tiles.of(shots), exchange, data)
}

/// [`all_reduce`] in one shot or in two, whatever the size.
///
/// # Errors
/// As there.
pub fn all_reduce_in<D: Device>(
    shots: Shots,
    device: &D,
    tile: &AllReduceTile,
    exchange: &Exchange<D::Buffer>,
    data: &[CudaTensor<D>],
) -> Result<()> {
    exchange.expect_parts(KERNEL, data.len())?;
    expect_alike(KERNEL, "data", data, SUMMED)?;
    tile.validate(shots, device.limits())?;
    let (dims, elements) = (exchange.dims, data[0].len());
    if elements == 0 {
        return Ok(());
    }
    let dtype = dsa80_reference::DeviceTensor::dtype(&data[0]);
    let vector = vector(elements, dtype);
    let shares = if shots == Shots::Two { dims.ranks } else { 1 };
    let blocks = tile.blocks.min(resident_blocks(device.limits(), data.len()));
    let vectors = elements / vector;
    let dealt = deal(dims, vectors, vector * element_bytes(dtype), [tile.threads, blocks, shares]);
    let mut args = exchange.pointers(data.iter().map(CudaTensor::buffer));
    args.extend(exchange.workspace_pointers());
    args.extend([
        Arg::I64(vectors as i64),
        Arg::I32(dealt.segment as i32),
        Arg::I32(exchange.first_rank as i32),
        Arg::I64(exchange.patience_ns()),
    ]);
    device.launch(&Launch {
        program: &tile.program(dims, shots, dtype, vector),
        entry: KERNEL,
        grid: [dealt.blocks as u32, data.len() as u32, 1],
        threads: tile.threads as u32,
        shared_bytes: 0,
        shape: format!("{elements} elements of {} ranks, {shots:?}", dims.ranks),
        args: &args,
    })
}

/// Blocks for each of `ranks` ranks of one launch that are resident at once, with a multiprocessor for every one.
pub(crate) fn resident_blocks(limits: &Limits, ranks: usize) -> usize {
    (limits.multiprocessors as usize / ranks.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    #[test]
    fn refusals_say_why() {
        for (tile, reason) in [
            (AllReduceTile { threads: 48, blocks: 1 }, "whole warps"),
            (AllReduceTile { threads: 1024, blocks: 1 }, "32 to 512 threads"),
            (AllReduceTile { threads: 64, blocks: 0 }, "at least a block"),
        ] {
            let error = tile.validate(Shots::One, &Limits::a100()).unwrap_err().to_string();
            assert!(error.starts_with("all_reduce: ") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_second_shot_pays_from_some_size_on() {
        let token = 6144 * 2;
        assert_eq!(
            [1, 12, 13].map(|tokens| Shots::of(tokens * token, 8)),
            [Shots::One, Shots::One, Shots::Two]
        );
        assert_eq!(
            [1, 1365, 1366].map(|tokens| Shots::of(tokens * token, 2)),
            [Shots::One, Shots::One, Shots::Two]
        );
    }

    #[test]
    fn what_was_measured_decides_where_it_is_known() {
        let token = 6144 * 2;
        let inferred = AllReduceTiles::safe();
        // A norm is shared out by two shots, which pay sooner.
        assert_eq!([256, 257].map(|n| inferred.shots_of_norm(n * token, 2)), [Shots::One, Shots::Two]);
        assert_eq!([11, 12].map(|n| inferred.shots_of_norm(n * token, 8)), [Shots::One, Shots::Two]);
        assert_eq!(inferred.shots(1000 * token, 2), Shots::One);
        let at = Crossover { all_reduce_bytes: 2 * token, all_reduce_norm_bytes: token };
        let measured = AllReduceTiles { crossover: Some(at), ..inferred };
        assert_eq!([2, 3].map(|n| measured.shots(n * token, 2)), [Shots::One, Shots::Two]);
        assert_eq!([1, 2].map(|n| measured.shots_of_norm(n * token, 2)), [Shots::One, Shots::Two]);
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        let both = [Shots::One, Shots::Two].map(|shots| programs(&AllReduceTile::safe(shots), shots));
        assert_distinct(&both.concat());
    }
}
