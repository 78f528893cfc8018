//! `repack_int4`: a checkpoint's INT4 weight, uploaded as it is, into the layout of the kernels.

use dsa80_reference::{DType, Error, HostData, HostInt4, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::int4::{Int4Rows, Int4Shape, PackedInt4};
use crate::tensor::element_bytes;
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "repack_int4";

/// How blocks take tiles of 16 features x 64 inputs: a warp each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepackInt4Tile {
    /// Tiles of a block.
    pub warps: usize,
}

impl Tile for RepackInt4Tile {
    const KERNEL: &'static str = KERNEL;
    type Dims = ();

    fn safe((): ()) -> Self {
        Self { warps: 8 }
    }

    fn candidates((): (), limits: &Limits) -> Vec<Self> {
        let tiles = [2, 4, 8, 16].map(|warps| Self { warps });
        tiles.into_iter().filter(|tile| tile.validate((), limits).is_ok()).collect()
    }

    fn validate(&self, (): (), _limits: &Limits) -> Result<()> {
        require(self, (1..=32).contains(&self.warps), || "a block has 1 to 32 warps".into())
    }
}

impl RepackInt4Tile {
    fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    fn program(&self, scales: DType) -> Program {
        Program::new("repack_int4.cu", [("SCALE_BYTES", element_bytes(scales)), ("TILE_WARPS", self.warps)])
    }
}

/// Every variant of a tile.
pub fn programs(tile: &RepackInt4Tile) -> Vec<ProgramEntry> {
    [(DType::Bf16, "scales of 16 bits"), (DType::F32, "scales of 32 bits")]
        .map(|(scales, variant)| ProgramEntry {
            program: tile.program(scales),
            entry: KERNEL,
            threads: tile.threads(),
            shared_bytes: 0,
            variant: variant.into(),
        })
        .into()
}

/// What repacking a weight reads and writes.
pub fn cost(shape: &Int4Shape) -> Cost {
    let packed = shape.weight_bytes() + shape.scales_bytes() + shape.zeros_bytes();
    Cost { bytes: 2.0 * packed as f64, flops: 0.0 }
}

/// Device memory for the arrays of one weight as the checkpoint has them, to be used again for the next.
#[derive(Debug)]
pub struct CanonicalInt4<D: Device> {
    shape: Int4Shape,
    pub(crate) weight: D::Buffer,
    pub(crate) scales: D::Buffer,
    pub(crate) zeros: Option<D::Buffer>,
    pub(crate) has_zeros: bool,
}

impl<D: Device> CanonicalInt4<D> {
    /// For one weight (of a gate and its up projection, one) of this shape.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, shape: Int4Shape) -> Result<Self> {
        let Int4Shape { out_features, in_features, .. } = shape;
        let zeros = || device.alloc("checkpoint zeros", out_features.div_ceil(8) * shape.groups() * 4);
        let scales = out_features * shape.groups() * element_bytes(shape.scales);
        Ok(Self {
            shape,
            weight: device.alloc("checkpoint weight", out_features * in_features.div_ceil(8) * 4)?,
            scales: device.alloc("checkpoint scales", scales)?,
            zeros: shape.zero_points.then(zeros).transpose()?,
            has_zeros: false,
        })
    }

    /// Uploads a weight's arrays.
    fn write(&mut self, device: &D, weight: &HostInt4) -> Result<()> {
        device.write(&self.weight, 0, bytemuck::cast_slice(&weight.weight_packed))?;
        device.write(&self.scales, 0, scale_bytes(&weight.scales.data))?;
        if let (Some(buffer), Some(zeros)) = (&self.zeros, &weight.zero_points) {
            device.write(buffer, 0, bytemuck::cast_slice(zeros))?;
        }
        self.has_zeros = weight.zero_points.is_some();
        Ok(())
    }

    fn zeros_arg(&self) -> Arg<'_, D::Buffer> {
        self.zeros.as_ref().filter(|_| self.has_zeros).map_or(Arg::Null, Arg::Buffer)
    }
}

fn scale_bytes(scales: &HostData) -> &[u8] {
    match scales {
        HostData::Bf16(data) => bytemuck::cast_slice(data),
        HostData::F16(data) => bytemuck::cast_slice(data),
        HostData::F32(data) => bytemuck::cast_slice(data),
    }
}

/// Repacks what lies in `from` (one weight, or a gate and its up projection) to place `index` of `out`.
///
/// # Errors
/// A shape or tile that does not fit; the device.
pub fn repack_int4<D: Device>(
    device: &D,
    tile: &RepackInt4Tile,
    from: &[CanonicalInt4<D>],
    out: &mut PackedInt4<D>,
    index: usize,
) -> Result<()> {
    tile.validate((), device.limits())?;
    let (shape, count) = (*out.shape(), out.count());
    let (first, second, second_start) = match (shape.rows, from) {
        (Int4Rows::One, [one]) => (one, one, 8),
        (Int4Rows::GateUp, [gate, up]) => (gate, up, 0),
        _ => return Err(refuse("from", "the weights of a tile".into(), from.len())),
    };
    if first.shape != shape || second.shape != shape {
        return Err(refuse("from", format!("{shape:?}"), format!("{:?}, {:?}", first.shape, second.shape)));
    }
    if index >= count {
        return Err(refuse("index", format!("below {count}"), index));
    }
    let tiles = shape.row_tiles() * shape.k_tiles();
    if tiles == 0 {
        return Ok(());
    }
    let blocks = u32::try_from(tiles.div_ceil(tile.warps))
        .map_err(|_| refuse("weight", "fewer than 2^32 tiles".into(), tiles))?;
    device.launch(&Launch {
        program: &tile.program(shape.scales),
        entry: KERNEL,
        grid: [blocks, 1, 1],
        threads: tile.threads(),
        shared_bytes: 0,
        shape: format!("{shape:?}"),
        args: &[
            Arg::Buffer(&first.weight),
            Arg::Buffer(&first.scales),
            first.zeros_arg(),
            Arg::Buffer(&second.weight),
            Arg::Buffer(&second.scales),
            second.zeros_arg(),
            Arg::Buffer(&out.weight),
            Arg::Buffer(&out.scales),
            out.zeros.as_ref().map_or(Arg::Null, Arg::Buffer),
            Arg::I32(shape.out_features as i32),
            Arg::I32(shape.in_features as i32),
            Arg::I32(shape.groups() as i32),
            Arg::I32(shape.rows_per_tile() as i32),
            Arg::I32(second_start),
            Arg::I32(index as i32),
        ],
    })
}

fn refuse(name: &'static str, expected: String, found: impl ToString) -> Error {
    Error::Value { kernel: KERNEL, name, expected, found: found.to_string() }
}

impl<D: Device> PackedInt4<D> {
    /// Uploads one weight.
    ///
    /// # Errors
    /// As for [`Int4Shape::of`]; memory; the device.
    pub fn upload(device: &D, tile: &RepackInt4Tile, weight: &HostInt4) -> Result<Self> {
        let shape = Int4Shape::of(&[weight])?;
        let mut packed = Self::alloc(device, "int4", shape, 1)?;
        let mut staging = [CanonicalInt4::alloc(device, shape)?];
        packed.upload_at(device, tile, &mut staging, 0, &[weight])?;
        Ok(packed)
    }

    /// Uploads a gate and its up projection as one weight.
    ///
    /// # Errors
    /// As for [`upload`](Self::upload).
    pub fn upload_gate_up(device: &D, tile: &RepackInt4Tile, gate: &HostInt4, up: &HostInt4) -> Result<Self> {
        let shape = Int4Shape::of(&[gate, up])?;
        let mut packed = Self::alloc(device, "int4", shape, 1)?;
        let mut staging = [CanonicalInt4::alloc(device, shape)?, CanonicalInt4::alloc(device, shape)?];
        packed.upload_at(device, tile, &mut staging, 0, &[gate, up])?;
        Ok(packed)
    }

    /// Uploads one weight, or a gate and its up projection, to place `index` through the memory of `staging`, one for each.
    ///
    /// # Errors
    /// Weights of another shape; there is no such place; the device.
    pub fn upload_at(
        &mut self,
        device: &D,
        tile: &RepackInt4Tile,
        staging: &mut [CanonicalInt4<D>],
        index: usize,
        weights: &[&HostInt4],
    ) -> Result<()> {
        self.shape().require(weights)?;
        for (staging, weight) in staging.iter_mut().zip(weights) {
            staging.write(device, weight)?;
        }
        repack_int4(device, tile, staging, self, index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_fit_and_refusals_say_why() {
        let limits = Limits::a100();
        assert!(RepackInt4Tile::candidates((), &limits).contains(&RepackInt4Tile::safe(())));
        let error = RepackInt4Tile { warps: 33 }.validate((), &limits).unwrap_err().to_string();
        assert!(error.contains("1 to 32 warps"), "{error}");
    }
}
