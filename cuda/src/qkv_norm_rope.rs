//! `qkv_norm_rope`: what follows a layer's first projections, in one launch.

use dsa80_reference::{DType, DeviceTensor, IndexKeys, Result, RopeLayout};
use serde::{Deserialize, Serialize};

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::latent_rope::{self, LatentRopeDims, LatentRopeTile};
use crate::layer_norm_rope::{self, LayerNormRopeDims, LayerNormRopeTile};
use crate::rms_norm::{self, RmsNormDims, RmsNormTile};
use crate::rows::{WEIGHTS, rotary_dim};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require};

const KERNEL: &str = "qkv_norm_rope";

/// How a block takes a row of the query, and a warp of it a cache row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QkvNormRopeTile {
    /// Vectors of a row of the query that a thread holds: so many threads has a block.
    pub vectors: usize,
    /// Neighbouring columns of a cache row that a lane holds.
    pub vector: usize,
}

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QkvNormRopeDims {
    /// Columns of the query's latent.
    pub q_lora_rank: usize,
    /// Those of MLA's cache row.
    pub latent: LatentRopeDims,
    /// Columns of the indexer's keys, where there are any.
    pub key: Option<usize>,
}

/// What is compiled in of the keys.
#[derive(Debug, Clone, Copy)]
struct KeyVariant {
    weight: DType,
    bias: DType,
    layout: RopeLayout,
    fp8: bool,
}

/// What is compiled in beside tile and dims.
#[derive(Debug, Clone, Copy)]
struct Variant {
    q_weight: DType,
    kv_weight: DType,
    fp8: bool,
    keys: Option<KeyVariant>,
}

impl QkvNormRopeDims {
    fn query(self) -> RmsNormDims {
        RmsNormDims { width: self.q_lora_rank }
    }

    fn keys(self) -> Option<LayerNormRopeDims> {
        self.key.map(|width| LayerNormRopeDims { width, rope: self.latent.rope })
    }
}

impl QkvNormRopeTile {
    fn query(self) -> RmsNormTile {
        RmsNormTile { vectors: self.vectors, blocks: 1 }
    }

    fn warps(self, dims: QkvNormRopeDims) -> usize {
        self.query().threads(dims.query()) / 32
    }

    fn keys(self, dims: QkvNormRopeDims) -> LayerNormRopeTile {
        LayerNormRopeTile { warps: self.warps(dims), vector: self.vector }
    }

    /// What the warps of a query's row summed, and the keys' columns that rotate.
    fn shared_bytes(self, dims: QkvNormRopeDims) -> usize {
        // The columns are declared in either layout of the keys.
        let keys = dims.keys().map_or(0, |keys| self.keys(dims).shared_bytes(keys, RopeLayout::Half));
        self.query().shared_bytes(dims.query()) + keys
    }

    fn program(self, dims: QkvNormRopeDims, variant: Variant) -> Program {
        let Variant { q_weight, kv_weight, fp8, keys } = variant;
        let mut defines = rms_norm::defines(&self.query(), dims.query(), q_weight, rms_norm::Rows::Acts);
        defines.extend(latent_rope::defines(dims.latent, kv_weight, fp8));
        if let (Some(KeyVariant { weight, bias, layout, fp8 }), Some(width)) = (keys, dims.key) {
            defines.extend(layer_norm_rope::defines(width, [weight, bias], layout, fp8));
        }
        defines.extend([
            ("KEYS", u8::from(keys.is_some()).to_string()),
            ("TILE_WARPS", self.warps(dims).to_string()),
            ("TILE_VECTOR", self.vector.to_string()),
            ("TILE_SHARED_BYTES", self.shared_bytes(dims).to_string()),
        ]);
        Program { source: "qkv_norm_rope.cu", defines }
    }
}

impl Tile for QkvNormRopeTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = QkvNormRopeDims;

    fn safe(dims: QkvNormRopeDims) -> Self {
        let of = |vectors| Self { vectors, vector: 4 };
        (1..=4).map(of).find(|tile| tile.warps(dims) <= 8).unwrap_or(of(4))
    }

    fn candidates(dims: QkvNormRopeDims, limits: &Limits) -> Vec<Self> {
        let tiles = [1, 2, 4].into_iter().flat_map(|vectors| [4, 8].map(|vector| Self { vectors, vector }));
        tiles.filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: QkvNormRopeDims, limits: &Limits) -> Result<()> {
        self.query().validate(dims.query(), limits)?;
        let warps = self.warps(dims);
        require(self, warps <= 8, || {
            format!("{warps} warps are more than the 8 whose threads can have the registers of a cache row")
        })?;
        LatentRopeTile { warps, vector: self.vector }.validate(dims.latent, limits)?;
        dims.keys().map_or(Ok(()), |keys| self.keys(dims).validate(keys, limits))
    }
}

/// Every variant of a tile, with weights of one type and caches of one type.
pub fn programs(tile: &QkvNormRopeTile, dims: QkvNormRopeDims) -> Vec<ProgramEntry> {
    let mut entries = Vec::new();
    for weight in WEIGHTS {
        for fp8 in [false, true] {
            for layout in [None, Some(RopeLayout::Interleaved), Some(RopeLayout::Half)] {
                let dims = QkvNormRopeDims { key: dims.key.filter(|_| layout.is_some()), ..dims };
                let keys = layout.map(|layout| KeyVariant { weight, bias: weight, layout, fp8 });
                entries.push(ProgramEntry {
                    program: tile.program(dims, Variant { q_weight: weight, kv_weight: weight, fp8, keys }),
                    entry: KERNEL,
                    threads: 32 * tile.warps(dims) as u32,
                    shared_bytes: tile.shared_bytes(dims),
                    variant: format!(
                        "{weight}, {} caches, {}",
                        if fp8 { "8-bit" } else { "bf16" },
                        layout.map_or("no keys".into(), |layout| format!("{layout:?} keys"))
                    ),
                });
            }
        }
    }
    entries
}

/// What a launch over `rows` tokens moves.
pub fn cost(rows: usize, dims: QkvNormRopeDims, weight: DType, fp8: bool) -> Cost {
    let keys = dims.keys().map_or(0.0, |keys| layer_norm_rope::cost(rows, keys, weight, fp8).bytes);
    let query = rms_norm::cost(rows, dims.query(), weight, false).bytes;
    Cost { bytes: query + latent_rope::cost(rows, dims.latent, weight, fp8).bytes + keys, flops: 0.0 }
}

/// The kernel of the contract's [`qkv_norm_rope`](dsa80_reference::Kernels::qkv_norm_rope).
///
/// # Errors
/// A shape, element type, value or tile that does not fit; the device.
pub fn qkv_norm_rope<D: Device>(
    device: &D,
    tile: &QkvNormRopeTile,
    batch: &CudaBatch<D>,
    q_a: &CudaTensor<D>,
    q_weight: &CudaTensor<D>,
    q_latent: &mut CudaTensor<D>,
    kv_a: &CudaTensor<D>,
    kv_weight: &CudaTensor<D>,
    cache: &mut CudaTensor<D>,
    eps: f64,
    cos_sin: &CudaTensor<D>,
    keys: Option<IndexKeys<'_, CudaTensor<D>>>,
) -> Result<()> {
    let rows = batch.host().num_tokens();
    let [_, q_lora_rank] = q_a.dims(KERNEL, "q_a")?;
    for (name, tensor) in [("q_a", q_a), ("q_latent", &*q_latent)] {
        let shape = [rows, q_lora_rank];
        tensor.expect(KERNEL, name, tensor.shape() == shape, || format!("{shape:?}"))?;
        tensor.expect_dtype(KERNEL, name, &[DType::Act], "activations")?;
    }
    q_weight.expect(KERNEL, "q_weight", q_weight.shape() == [q_lora_rank], || format!("[{q_lora_rank}]"))?;
    q_weight.expect_dtype(KERNEL, "q_weight", &WEIGHTS, "weights")?;
    let rope = rotary_dim(KERNEL, cos_sin, rows)?;
    let names = latent_rope::Names { kernel: KERNEL, x: "kv_a", weight: "kv_weight" };
    let (latent, slots) = latent_rope::check(names, batch, kv_a, kv_weight, rope, cache)?;
    let key_slots = match &keys {
        None => 0,
        Some(keys) => {
            let (x, weight, bias) = ("keys.x", "keys.weight", "keys.bias");
            layer_norm_rope::check(layer_norm_rope::Names { kernel: KERNEL, x, weight, bias }, batch, keys)?
        }
    };
    let width = keys.as_ref().map(|keys| keys.x.shape()[1]);
    let dims = QkvNormRopeDims { q_lora_rank, latent, key: width };
    tile.validate(dims, device.limits())?;
    if rows == 0 {
        return Ok(());
    }
    let fp8 = |cache: &CudaTensor<D>| cache.dtype() == DType::Fp8;
    let variant = Variant {
        q_weight: q_weight.dtype(),
        kv_weight: kv_weight.dtype(),
        fp8: fp8(cache),
        keys: keys.as_ref().map(|keys| KeyVariant {
            weight: keys.weight.dtype(),
            bias: keys.bias.dtype(),
            layout: keys.layout,
            fp8: fp8(keys.cache),
        }),
    };
    let row_blocks = rows.div_ceil(tile.warps(dims));
    let [key_x, key_weight, key_bias, key_cache] = match &keys {
        None => [Arg::Null, Arg::Null, Arg::Null, Arg::Null],
        Some(IndexKeys { x, weight, bias, cache, .. }) => {
            [*x, *weight, *bias, &**cache].map(|tensor| Arg::Buffer(tensor.buffer()))
        }
    };
    device.launch(&Launch {
        program: &tile.program(dims, variant),
        entry: KERNEL,
        grid: [(rows + row_blocks * if width.is_some() { 2 } else { 1 }) as u32, 1, 1],
        threads: 32 * tile.warps(dims) as u32,
        shared_bytes: tile.shared_bytes(dims),
        shape: format!("{rows} rows, {dims:?}, {variant:?}"),
        args: &[
            Arg::Buffer(q_a.buffer()),
            Arg::Buffer(q_weight.buffer()),
            Arg::Buffer(q_latent.buffer()),
            Arg::Buffer(kv_a.buffer()),
            Arg::Buffer(kv_weight.buffer()),
            Arg::Buffer(cache.buffer()),
            key_x,
            key_weight,
            key_bias,
            key_cache,
            Arg::Buffer(cos_sin.buffer()),
            Arg::Buffer(&batch.slot_mapping),
            Arg::I32(slots),
            Arg::I32(key_slots),
            Arg::I32(batch.host().page_size as i32),
            Arg::I32(rows as i32),
            Arg::F32(eps as f32),
            Arg::F32(keys.as_ref().map_or(0.0, |keys| keys.eps) as f32),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    const GLM: QkvNormRopeDims = QkvNormRopeDims {
        q_lora_rank: 2048,
        latent: LatentRopeDims { kv_lora_rank: 512, rope: 64 },
        key: Some(128),
    };

    #[test]
    fn refusals_say_why() {
        let safe = QkvNormRopeTile::safe(GLM);
        for (tile, dims, reason) in [
            (QkvNormRopeTile { vectors: 5, ..safe }, GLM, "1 to 4 vectors"),
            (QkvNormRopeTile { vector: 2, ..safe }, GLM, "4 or 8 columns"),
            (safe, QkvNormRopeDims { q_lora_rank: 4096, ..GLM }, "16 warps"),
            (safe, QkvNormRopeDims { key: Some(120), ..GLM }, "a key of 120 columns"),
        ] {
            let error = tile.validate(dims, &Limits::a100()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        // More columns are more vectors of a thread.
        let wide = QkvNormRopeDims { q_lora_rank: 8192, ..GLM };
        QkvNormRopeTile::safe(wide).validate(wide, &Limits::a100()).unwrap();
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        assert_distinct(&programs(&QkvNormRopeTile::safe(GLM), GLM));
    }
}
