//! `repack_int4`: from the arrays of a checkpoint, as uploaded, to those of the kernels.

use dsa80_cuda::repack_int4::{self, CanonicalInt4, RepackInt4Tile};
use dsa80_cuda::{Cost, Gpu, Int4Rows, Int4Shape, PackedInt4, Tile};
use dsa80_reference::{DType, HostInt4, Result};

use super::{Case, Run, copies, typed};
use crate::inputs;
use crate::oracle::Accuracy;

struct Repack {
    shape: Int4Shape,
    tile: RepackInt4Tile,
    weight: HostInt4,
    sets: Vec<([CanonicalInt4<Gpu>; 1], PackedInt4<Gpu>)>,
}

pub(super) fn cases() -> Vec<Case> {
    let shapes = [("o_proj", 2048, 6144, 128, false), ("gate-up", 6144, 3072, 32, true)];
    shapes
        .into_iter()
        .map(|(what, in_features, out_features, group_size, zero_points)| {
            let (rows, scales) = (Int4Rows::One, DType::Bf16);
            let shape = Int4Shape { rows, out_features, in_features, group_size, scales, zero_points };
            Case {
                kernel: RepackInt4Tile::KERNEL,
                name: format!("{what} {in_features} -> {out_features}, g{group_size}"),
                class: "any",
                // 20 GB/s of packed words.
                goal_us: Some(shape.weight_bytes() as f64 / 20e3),
                check: true,
                make: Box::new(move |gpu, _| Ok(Box::new(Repack::new(gpu, shape)?))),
            }
        })
        .collect()
}

impl Repack {
    fn new(gpu: &Gpu, shape: Int4Shape) -> Result<Self> {
        let tile = RepackInt4Tile::safe(());
        let random = inputs::packed_int4(gpu, shape, 1, 1, 0.02)?.read(gpu, 0)?;
        let weight = shape.unpack(&random)?.swap_remove(0);
        let sets = (0..copies(gpu, repack_int4::cost(&shape).bytes))
            .map(|_| {
                let mut packed = PackedInt4::alloc(gpu, "packed", shape, 1)?;
                let mut staging = [CanonicalInt4::alloc(gpu, shape)?];
                packed.upload_at(gpu, &tile, &mut staging, 0, &[&weight])?;
                Ok((staging, packed))
            })
            .collect::<Result<_>>()?;
        Ok(Self { shape, tile, weight, sets })
    }
}

impl Run for Repack {
    fn set_tile(&mut self, _gpu: &Gpu, tile: &toml::Table) -> Result<()> {
        self.tile = typed(tile)?;
        Ok(())
    }

    fn copies(&self) -> usize {
        self.sets.len()
    }

    fn cost(&self) -> Cost {
        repack_int4::cost(&self.shape)
    }

    fn launch(&mut self, gpu: &Gpu, copy: usize) -> Result<()> {
        let (staging, packed) = &mut self.sets[copy];
        repack_int4::repack_int4(gpu, &self.tile, staging, packed, 0)
    }

    fn poison(&mut self, gpu: &Gpu) -> Result<()> {
        self.sets.iter().try_for_each(|(_, packed)| {
            gpu.fill(packed.weight(), 0xff)?;
            gpu.fill(packed.scales(), 0xff)?;
            packed.zeros().map_or(Ok(()), |zeros| gpu.fill(zeros, 0xff))
        })
    }

    fn check(&self, gpu: &Gpu, copy: usize) -> Result<Accuracy> {
        let (found, expected) = (self.sets[copy].1.read(gpu, 0)?, self.shape.pack(&[&self.weight])?);
        let wrong = if found == expected { 0.0 } else { f64::INFINITY };
        Ok(Accuracy::of(self.shape.out_features, 0.0, &[wrong], &[0.0], |_| 0.0))
    }
}
