//! `all_reduce_norm`: the sum over ranks, added to the residual stream, and its norm.

use dsa80_reference::{DType, DeviceTensor, Error, Result};
use serde::{Deserialize, Serialize};

use crate::all_reduce::{Shots, resident_blocks};
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::exchange::{Exchange, ExchangeDims, expect_alike};
use crate::rms_norm::{self, RmsNormDims, RmsNormTile, Rows};
use crate::rows::{self, WEIGHTS};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "all_reduce_norm";

/// How rows are laid over blocks, of which one takes a whole row at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllReduceNormTile {
    /// Vectors of neighbouring columns that a thread holds, as in an [`RmsNormTile`].
    pub vectors: usize,
    /// Blocks of a rank at most.
    pub blocks: usize,
}

/// What the model fixes, and how often ranks wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllReduceNormDims {
    /// Columns of a row.
    pub width: usize,
    /// Whether every rank norms every row.
    pub shots: Shots,
}

/// The tiles of all shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllReduceNormTiles {
    /// For one shot.
    pub one_shot: AllReduceNormTile,
    /// For two.
    pub two_shots: AllReduceNormTile,
}

impl AllReduceNormTiles {
    /// Those that fit any device.
    pub fn safe() -> Self {
        Self { one_shot: AllReduceNormTile::SAFE, two_shots: AllReduceNormTile::SAFE }
    }

    /// That of one way.
    pub fn of(&self, shots: Shots) -> AllReduceNormTile {
        if shots == Shots::One { self.one_shot } else { self.two_shots }
    }
}

impl AllReduceNormTile {
    const SAFE: Self = Self { vectors: 1, blocks: 64 };

    fn norm(&self) -> RmsNormTile {
        RmsNormTile { vectors: self.vectors, blocks: 1 }
    }

    fn threads(&self, width: usize) -> usize {
        self.norm().threads(RmsNormDims { width })
    }

    fn shared_bytes(&self, width: usize) -> usize {
        self.norm().shared_bytes(RmsNormDims { width })
    }

    fn program(
        &self,
        exchange: ExchangeDims,
        AllReduceNormDims { width, shots }: AllReduceNormDims,
        weight: DType,
    ) -> Program {
        let mut defines = exchange.defines();
        defines.extend(rms_norm::defines(&self.norm(), RmsNormDims { width }, weight, Rows::Residual));
        defines.push(("TILE_SHARED_BYTES", self.shared_bytes(width).to_string()));
        defines.push(("TWO_SHOTS", u8::from(shots == Shots::Two).to_string()));
        Program { source: "all_reduce_norm.cu", defines }
    }
}

impl Tile for AllReduceNormTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = AllReduceNormDims;

    fn safe(_dims: AllReduceNormDims) -> Self {
        Self::SAFE
    }

    fn candidates(dims: AllReduceNormDims, limits: &Limits) -> Vec<Self> {
        let tiles =
            [1, 2].into_iter().flat_map(|vectors| [16, 32, 64, 128].map(|blocks| Self { vectors, blocks }));
        tiles.filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: AllReduceNormDims, limits: &Limits) -> Result<()> {
        require(self, self.blocks > 0, || "a rank has at least a block".into())?;
        self.norm().validate(RmsNormDims { width: dims.width }, limits)
    }
}

/// Every variant of a tile, for eight ranks.
pub fn programs(tile: &AllReduceNormTile, dims: AllReduceNormDims) -> Vec<ProgramEntry> {
    let Ok(exchange) = ExchangeDims::new(8) else { return Vec::new() };
    WEIGHTS
        .map(|weight| ProgramEntry {
            program: tile.program(exchange, dims, weight),
            entry: KERNEL,
            threads: tile.threads(dims.width) as u32,
            shared_bytes: tile.shared_bytes(dims.width),
            variant: format!("{weight}, {:?}", dims.shots),
        })
        .to_vec()
}

/// What `ranks` ranks of one GPU move that sum and norm `rows` rows each: x is read, pushed and taken, the residual read and written and the
/// norm written by every rank, or by a row's keeper alone, who pushes the norm instead.
pub fn cost(rows: usize, dims: AllReduceNormDims, ranks: usize) -> Cost {
    let (x, residual, out) = (2, 4, 2);
    let keepers = if dims.shots == Shots::One { ranks } else { 1 };
    Cost { bytes: (rows * dims.width * (ranks * (x + out) + keepers * 2 * residual)) as f64, flops: 0.0 }
}

/// Rows of `width` columns that a slot receives.
fn rows_of_slot(exchange: ExchangeDims, width: usize) -> usize {
    let vector = rows::vector(width);
    exchange.slot_bytes / (width / vector * (2 * vector).next_multiple_of(4)).max(1)
}

/// Whether the kernel can norm rows of `width` columns: a slot has to hold one, and so have the registers of a block.
pub fn fits(
    tile: &AllReduceNormTile,
    exchange: ExchangeDims,
    dims: AllReduceNormDims,
    limits: &Limits,
) -> bool {
    tile.validate(dims, limits).is_ok() && rows_of_slot(exchange, dims.width) > 0
}

/// The tensors of every rank of a launch, in rank order.
#[derive(Debug)]
pub struct NormParts<'a, D: Device> {
    /// `[T, width]` activations: what is summed. Unspecified afterwards.
    pub x: &'a [CudaTensor<D>],
    /// `[T, width]` floats.
    pub residual: &'a [CudaTensor<D>],
    /// `[width]`: the same on every rank.
    pub weight: &'a [CudaTensor<D>],
    /// `[T, width]` activations.
    pub out: &'a [CudaTensor<D>],
}

/// The contract's [`all_reduce_norm`](dsa80_reference::Communicator::all_reduce_norm) for the ranks of `exchange` that have tensors here: one,
/// on a GPU of its own, or all ranks that share this one.
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn all_reduce_norm<D: Device>(
    shots: Shots,
    device: &D,
    tile: &AllReduceNormTile,
    exchange: &Exchange<D::Buffer>,
    parts: &NormParts<'_, D>,
    eps: f64,
) -> Result<()> {
    let &NormParts { x, residual, weight, out } = parts;
    let (acts, floats) = (&[DType::Act][..], &[DType::Float][..]);
    for (name, tensors, dtypes, expected) in [
        ("x", x, acts, "activations"),
        ("residual", residual, floats, "floats"),
        ("weight", weight, &WEIGHTS[..], "weights"),
        ("out", out, acts, "activations"),
    ] {
        exchange.expect_parts(KERNEL, tensors.len())?;
        if tensors.len() != x.len() {
            let expected = format!("{} of `{name}`, as of `x`", x.len());
            let found = tensors.len().to_string();
            return Err(Error::Value { kernel: KERNEL, name: "parts", expected, found });
        }
        expect_alike(KERNEL, name, tensors, (dtypes, expected))?;
    }
    let [rows, width] = x[0].dims(KERNEL, "x")?;
    weight[0].expect(KERNEL, "weight", weight[0].shape() == [width], || format!("[{width}]"))?;
    for (name, tensor) in [("residual", &residual[0]), ("out", &out[0])] {
        tensor.expect(KERNEL, name, tensor.shape() == [rows, width], || format!("[{rows}, {width}]"))?;
    }
    let dims = AllReduceNormDims { width, shots };
    tile.validate(dims, device.limits())?;
    let of_slot = rows_of_slot(exchange.dims, width);
    require(tile, of_slot > 0, || {
        format!("a row of {width} columns does not fit a slot of {} bytes", exchange.dims.slot_bytes)
    })?;
    if rows == 0 {
        return Ok(());
    }
    let shares = if shots == Shots::Two { exchange.dims.ranks } else { 1 };
    let resident = resident_blocks(device.limits(), x.len());
    let blocks = rows.div_ceil(shares).min(tile.blocks).min(exchange.dims.channels).min(resident);
    let segment = rows.div_ceil(blocks * shares).min(of_slot);
    let mut args = Vec::new();
    for tensors in [x, residual, weight, out] {
        args.extend(exchange.pointers(tensors.iter().map(CudaTensor::buffer)));
    }
    args.extend(exchange.workspace_pointers());
    args.extend([
        Arg::I32(rows as i32),
        Arg::I32(segment as i32),
        Arg::I32(exchange.first_rank as i32),
        Arg::F32(eps as f32),
        Arg::I64(exchange.patience_ns()),
    ]);
    device.launch(&Launch {
        program: &tile.program(exchange.dims, dims, weight[0].dtype()),
        entry: KERNEL,
        grid: [blocks as u32, x.len() as u32, 1],
        threads: tile.threads(width) as u32,
        shared_bytes: tile.shared_bytes(width),
        shape: format!("{rows} rows of {width} of {} ranks, {shots:?}", exchange.dims.ranks),
        args: &args,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    const GLM: [AllReduceNormDims; 2] = [
        AllReduceNormDims { width: 6144, shots: Shots::One },
        AllReduceNormDims { width: 6144, shots: Shots::Two },
    ];

    #[test]
    fn a_row_of_glm_fits_a_slot_of_eight_ranks_and_wider_ones_are_left_to_others() {
        let eight = ExchangeDims::new(8).unwrap();
        assert_eq!((rows_of_slot(eight, 6144), rows_of_slot(ExchangeDims::new(2).unwrap(), 6144)), (1, 5));
        // Single elements take four bytes each.
        assert_eq!((rows_of_slot(eight, 4095), rows_of_slot(eight, 4097)), (1, 0));
        let fits = |exchange, width| {
            fits(&AllReduceNormTile::SAFE, exchange, AllReduceNormDims { width, ..GLM[0] }, &Limits::a100())
        };
        assert!(fits(eight, 8192) && !fits(eight, 8200) && !fits(eight, 0));
        // Registers, though a slot of two ranks has room.
        assert!(!fits(ExchangeDims::new(2).unwrap(), 20_000));
    }

    #[test]
    fn refusals_say_why() {
        for (tile, reason) in [
            (AllReduceNormTile { vectors: 5, blocks: 1 }, "1 to 4 vectors"),
            (AllReduceNormTile { vectors: 1, blocks: 0 }, "at least a block"),
        ] {
            let error = tile.validate(GLM[0], &Limits::a100()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        assert_distinct(&GLM.map(|dims| programs(&AllReduceNormTile::safe(dims), dims)).concat());
    }
}
