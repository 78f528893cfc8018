//! `absorb_query` and `absorb_output`: MLA's key and value up-projections, a product a head.

use dsa80_reference::{DType, DeviceTensor, Result};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, ProgramEntry};
use crate::linear_many::{self, LinearTile, Variant};
use crate::rows::{WEIGHTS, rotary_dim};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile};

const QUERY: &str = "absorb_query";
const OUTPUT: &str = "absorb_output";
const ENTRY: &str = "absorb";

/// Classes of numbers of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbsorbTokens {
    /// Up to 32.
    Few,
    /// More.
    Many,
}

impl AbsorbTokens {
    /// The class of a number.
    pub fn of(tokens: usize) -> Self {
        if tokens <= 32 { Self::Few } else { Self::Many }
    }
}

/// How blocks cut a head's product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AbsorbTile {
    /// For few tokens.
    pub few: LinearTile,
    /// For many.
    pub many: LinearTile,
}

impl Tile for AbsorbTile {
    const KERNEL: &'static str = "absorb";
    type Dims = AbsorbTokens;

    fn safe(_tokens: AbsorbTokens) -> Self {
        Self {
            few: LinearTile::of([16, 64, 1, 4, 8, 1], true),
            many: LinearTile::of([64, 128, 2, 4, 3, 2], true),
        }
    }

    fn candidates(tokens: AbsorbTokens, limits: &Limits) -> Vec<Self> {
        let safe = Self::safe(tokens);
        let few = [
            ([16, 64, 1, 4, 8, 1], true),
            ([16, 64, 1, 4, 8, 1], false),
            ([16, 64, 1, 4, 6, 1], true),
            ([16, 64, 1, 2, 8, 1], true),
            ([16, 64, 1, 4, 4, 2], true),
            ([32, 64, 2, 4, 8, 1], true),
        ];
        let many = [
            ([64, 128, 2, 4, 3, 2], true),
            ([64, 128, 2, 4, 3, 2], false),
            ([128, 128, 2, 2, 2, 2], false),
            ([128, 128, 2, 4, 3, 1], true),
            ([128, 256, 2, 4, 3, 1], true),
        ];
        let shape = |(shape, ahead)| LinearTile::of(shape, ahead);
        let tiles: Vec<Self> = match tokens {
            AbsorbTokens::Few => few.map(|few| Self { few: shape(few), ..safe }).into(),
            AbsorbTokens::Many => many.map(|many| Self { many: shape(many), ..safe }).into(),
        };
        tiles.into_iter().filter(|tile| tile.validate(tokens, limits).is_ok()).collect()
    }

    fn validate(&self, _tokens: AbsorbTokens, limits: &Limits) -> Result<()> {
        self.few.require(self, limits)?;
        self.many.require(self, limits)
    }
}

/// Every variant of a tile.
pub fn programs(tile: &AbsorbTile) -> Vec<ProgramEntry> {
    let mut programs = Vec::new();
    for part in [tile.few, tile.many] {
        for transposed in [true, false] {
            for entry in linear_many::entries(&part, "absorb.cu", ENTRY, transposed) {
                if programs.iter().all(|other: &ProgramEntry| other.program != entry.program) {
                    programs.push(entry);
                }
            }
        }
    }
    programs
}

/// What a launch moves and computes: `columns` of every head become `features`, and `rotary` are turned.
pub fn cost(
    tokens: usize,
    heads: usize,
    columns: usize,
    features: usize,
    rotary: usize,
    weight: DType,
) -> Cost {
    let weight_bytes = if weight == DType::F32 { 4 } else { 2 };
    let product = tokens * heads * columns * features;
    let row = 2 * heads * (columns + features + 2 * rotary) + size_of::<f32>() * rotary;
    let bytes = heads * columns * features * weight_bytes + tokens * row;
    Cost { bytes: bytes as f64, flops: 2.0 * product as f64 }
}

/// A product a head.
struct Heads {
    kernel: &'static str,
    tokens: usize,
    heads: usize,
    x_width: usize,
    columns: usize,
    out_width: usize,
    features: usize,
    /// Columns that are turned.
    rotary: usize,
    /// Rows of a head of `kv_b`, and the first that counts.
    rows: usize,
    first_row: usize,
    rank: usize,
    transposed: bool,
}

impl Heads {
    fn launch<D: Device>(
        &self,
        device: &D,
        tile: &AbsorbTile,
        x: &CudaTensor<D>,
        kv_b: &CudaTensor<D>,
        cos_sin: Option<&CudaTensor<D>>,
        out: &CudaTensor<D>,
    ) -> Result<()> {
        let &Self { kernel, tokens, heads, x_width, columns, out_width, features, rotary, .. } = self;
        let class = AbsorbTokens::of(tokens);
        tile.validate(class, device.limits())?;
        if tokens == 0 || heads == 0 || out_width == 0 {
            return Ok(());
        }
        let weight = kv_b.dtype();
        let tile = if class == AbsorbTokens::Few { tile.few } else { tile.many }.for_weight(weight);
        let vectors = [x_width, columns, self.rank].iter().all(|width| width.is_multiple_of(8));
        let program = tile.program("absorb.cu", Variant { weight, vectors, swiglu: false }, self.transposed);
        let of_head = features.div_ceil(tile.features) + usize::from(rotary > 0);
        let grid = [tokens.div_ceil(tile.tokens), of_head, heads];
        device.launch(&Launch {
            program: &program,
            entry: ENTRY,
            grid: grid.map(|blocks| blocks as u32),
            threads: tile.threads(),
            shared_bytes: tile.shared_bytes(weight),
            shape: format!("{kernel}: {tokens} x {heads} heads, {columns} -> {features}, {weight}"),
            args: &[
                Arg::Buffer(x.buffer()),
                Arg::Buffer(kv_b.buffer()),
                cos_sin.map_or(Arg::Null, |cos_sin| Arg::Buffer(cos_sin.buffer())),
                Arg::Buffer(out.buffer()),
                Arg::I32(tokens as i32),
                Arg::I32(heads as i32),
                Arg::I32(x_width as i32),
                Arg::I32(columns as i32),
                Arg::I32(out_width as i32),
                Arg::I32(features as i32),
                Arg::I64((self.rows * self.rank) as i64),
                Arg::I64((self.first_row * self.rank) as i64),
            ],
        })
    }
}

/// The kernel of the contract's [`absorb_query`](dsa80_reference::Kernels::absorb_query).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn absorb_query<D: Device>(
    device: &D,
    tile: &AbsorbTile,
    q: &CudaTensor<D>,
    kv_b: &CudaTensor<D>,
    cos_sin: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let [tokens, heads, x_width] = q.dims(QUERY, "q")?;
    let [kv_heads, rows, rank] = kv_b.dims(QUERY, "kv_b")?;
    let [out_tokens, out_heads, out_width] = out.dims(QUERY, "out")?;
    q.expect_dtype(QUERY, "q", &[DType::Act], "activations")?;
    kv_b.expect_dtype(QUERY, "kv_b", &WEIGHTS, "dense weights")?;
    out.expect_dtype(QUERY, "out", &[DType::Act], "activations")?;
    kv_b.expect(QUERY, "kv_b", kv_heads == heads, || format!("[{heads}, nope + v, kv_lora_rank]"))?;
    let rope = rotary_dim(QUERY, cos_sin, tokens)?;
    out.expect(QUERY, "out", (out_tokens, out_heads, out_width) == (tokens, heads, rank + rope), || {
        format!("[{tokens}, {heads}, {rank} + {rope}]")
    })?;
    q.expect(QUERY, "q", rope <= x_width && x_width - rope <= rows, || {
        format!("[T, H, nope + {rope}] with nope at most the {rows} rows of a head of `kv_b`")
    })?;
    let heads = Heads {
        kernel: QUERY,
        tokens,
        heads,
        x_width,
        columns: x_width - rope,
        out_width,
        features: rank,
        rotary: rope,
        rows,
        first_row: 0,
        rank,
        transposed: true,
    };
    heads.launch(device, tile, q, kv_b, Some(cos_sin), out)
}

/// The sizes of an `absorb_output` that fits the contract.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OutputHeads {
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) rank: usize,
    /// Rows of a head of `kv_b`, of which the last `v` count.
    pub(crate) rows: usize,
    pub(crate) v: usize,
}

impl OutputHeads {
    pub(crate) fn check<D: Device>(
        o: &CudaTensor<D>,
        kv_b: &CudaTensor<D>,
        out: &CudaTensor<D>,
    ) -> Result<Self> {
        let [tokens, heads, rank] = o.dims(OUTPUT, "o")?;
        let [kv_heads, rows, kv_rank] = kv_b.dims(OUTPUT, "kv_b")?;
        let [out_tokens, out_heads, v] = out.dims(OUTPUT, "out")?;
        o.expect_dtype(OUTPUT, "o", &[DType::Act], "activations")?;
        kv_b.expect_dtype(OUTPUT, "kv_b", &WEIGHTS, "dense weights")?;
        out.expect_dtype(OUTPUT, "out", &[DType::Act], "activations")?;
        kv_b.expect(OUTPUT, "kv_b", (kv_heads, kv_rank) == (heads, rank), || {
            format!("[{heads}, nope + v, {rank}]")
        })?;
        out.expect(OUTPUT, "out", (out_tokens, out_heads) == (tokens, heads) && v <= rows, || {
            format!("[{tokens}, {heads}, v] with v at most the {rows} rows of a head of `kv_b`")
        })?;
        Ok(Self { tokens, heads, rank, rows, v })
    }
}

/// The kernel of the contract's [`absorb_output`](dsa80_reference::Kernels::absorb_output).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn absorb_output<D: Device>(
    device: &D,
    tile: &AbsorbTile,
    o: &CudaTensor<D>,
    kv_b: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let OutputHeads { tokens, heads, rank, rows, v } = OutputHeads::check(o, kv_b, out)?;
    let heads = Heads {
        kernel: OUTPUT,
        tokens,
        heads,
        x_width: rank,
        columns: rank,
        out_width: v,
        features: v,
        rotary: 0,
        rows,
        first_row: rows - v,
        rank,
        transposed: false,
    };
    heads.launch(device, tile, o, kv_b, None, out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        assert_distinct(&programs(&AbsorbTile::safe(AbsorbTokens::Few)));
    }

    #[test]
    fn a_tile_is_refused_for_either_part() {
        let (limits, tokens) = (Limits::a100(), AbsorbTokens::Few);
        let (safe, bad) = (AbsorbTile::safe(tokens), LinearTile::of([16, 64, 1, 4, 99, 1], true));
        for tile in [AbsorbTile { few: bad, ..safe }, AbsorbTile { many: bad, ..safe }] {
            let error = tile.validate(tokens, &limits).unwrap_err().to_string();
            assert!(error.starts_with("absorb: ") && error.contains("2 to 8 steps"), "{error}");
        }
    }
}
