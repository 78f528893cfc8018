//! `linear`: products with a dense weight, of few tokens (`linear_few.cu`) and of many (`linear.cu`, or the device's own library).

use dsa80_reference::{DType, DeviceTensor, Result};

use crate::device::{Arg, Device, Gemm, Launch};
use crate::linear_few::{self, LinearFewSize, LinearFewTile, LinearWidth};
use crate::linear_many::{self, LinearTile};
use crate::router::Choice;
use crate::rows::WEIGHTS;
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, refuse, require_shared};

const KERNEL: &str = "linear";

/// The tiles of a launch of any number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearTiles {
    /// Up to 8 tokens, for each [`LinearWidth`].
    pub up_to_8: [LinearFewTile; 4],
    /// Up to 32 tokens, likewise.
    pub up_to_32: [LinearFewTile; 4],
    /// Up to [`MIDDLE`] tokens.
    pub middle: LinearTile,
    /// More.
    pub many: LinearTile,
    /// Whether the device's own library takes more than 32 tokens and a bf16 weight, where it has one.
    pub gemm: bool,
}

/// Tokens that the tile for a middling number of them takes at most.
pub const MIDDLE: usize = 128;

/// Classes of numbers of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearTokens {
    /// Up to 8.
    UpTo8,
    /// Up to 32.
    UpTo32,
    /// Up to [`MIDDLE`].
    Middle,
    /// More.
    Many,
}

impl LinearTokens {
    /// The class of a number.
    pub fn of(tokens: usize) -> Self {
        match tokens {
            ..=8 => Self::UpTo8,
            9..=32 => Self::UpTo32,
            33..=MIDDLE => Self::Middle,
            _ => Self::Many,
        }
    }

    /// The kernel that takes so many tokens, and the name of their class, with that many features, in tile files.
    pub fn class(self, features: usize) -> (&'static str, &'static str) {
        match self {
            Self::UpTo8 | Self::UpTo32 => {
                let size = LinearFewSize { tokens: self, width: LinearWidth::of(features) };
                (LinearFewTile::KERNEL, size.class())
            }
            Self::Middle => (LinearTile::KERNEL, "middle"),
            Self::Many => (LinearTile::KERNEL, "many"),
        }
    }

    /// The class of that name.
    pub(crate) fn named(class: &str) -> Self {
        if class == "middle" { Self::Middle } else { Self::Many }
    }

    /// Of few tokens, with every width.
    pub(crate) fn by_width(self) -> [LinearFewSize; 4] {
        LinearWidth::ALL.map(|width| LinearFewSize { tokens: self, width })
    }
}

impl LinearTiles {
    /// The tile for few tokens and that many features.
    pub fn few(&mut self, tokens: LinearTokens, features: usize) -> &mut LinearFewTile {
        let tiles = if tokens == LinearTokens::UpTo8 { &mut self.up_to_8 } else { &mut self.up_to_32 };
        &mut tiles[LinearWidth::of(features) as usize]
    }

    fn of_few(&self, size: LinearFewSize) -> &LinearFewTile {
        let tiles = if size.tokens == LinearTokens::UpTo8 { &self.up_to_8 } else { &self.up_to_32 };
        &tiles[size.width as usize]
    }

    /// The tiles that fit any device.
    pub fn safe() -> Self {
        Self {
            up_to_8: LinearTokens::UpTo8.by_width().map(Tile::safe),
            up_to_32: LinearTokens::UpTo32.by_width().map(Tile::safe),
            middle: Tile::safe(LinearTokens::Middle),
            many: Tile::safe(LinearTokens::Many),
            gemm: true,
        }
    }
}

/// What blocks that share an output leave for the one that adds it up: for one launch at a time.
#[derive(Debug)]
pub struct LinearWorkspace<D: Device> {
    few: Shared<D>,
    many: Shared<D>,
}

/// Parts of outputs, and a counter for each output.
#[derive(Debug)]
struct Shared<D: Device> {
    parts: D::Buffer,
    arrivals: D::Buffer,
    most: Need,
}

impl<D: Device> LinearWorkspace<D> {
    /// For every launch with one of `tiles`: with `slots` the blocks that are resident at a time, for few tokens
    /// `slots * 4 * tokens * features` bytes, for many twice that; and up to 16 bytes for each slot.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, tiles: &LinearTiles) -> Result<Self> {
        let limits = device.limits();
        let LinearTiles { up_to_8, up_to_32, middle, many, .. } = tiles;
        let few = LinearFewSize::all().zip(up_to_8.iter().chain(up_to_32));
        let few = few.map(|(size, tile)| tile.needs(limits, size)).fold(Need::default(), Need::max);
        let many = middle.needs(limits).max(many.needs(limits));
        // Parts of few tokens that are not there yet are all ones.
        Ok(Self { few: Shared::alloc(device, few, true)?, many: Shared::alloc(device, many, false)? })
    }
}

impl<D: Device> Shared<D> {
    fn alloc(device: &D, most: Need, ones: bool) -> Result<Self> {
        let arrivals = device.alloc("linear arrivals", 4 * most.arrivals)?;
        device.write(&arrivals, 0, &vec![0; 4 * most.arrivals])?;
        let parts = device.alloc("linear parts", most.part_bytes)?;
        if ones {
            device.write(&parts, 0, &vec![0xff; most.part_bytes])?;
        }
        Ok(Self { parts, arrivals, most })
    }

    /// The arguments of a launch that needs this much of it, or an error.
    fn arguments<T: Tile>(&self, tile: &T, need: Need) -> Result<[Arg<'_, D::Buffer>; 2]> {
        if need.max(self.most) != self.most {
            return Err(refuse(tile, "the workspace was allocated for other tiles".into()));
        }
        Ok([Arg::Buffer(&self.parts), Arg::Buffer(&self.arrivals)])
    }
}

/// What a launch needs of a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Need {
    pub(crate) part_bytes: usize,
    pub(crate) arrivals: usize,
}

impl Need {
    /// What serves both.
    fn max(self, other: Self) -> Self {
        let part_bytes = self.part_bytes.max(other.part_bytes);
        Self { part_bytes, arrivals: self.arrivals.max(other.arrivals) }
    }
}

/// The place of the weight among the parameters of either kernel.
const WEIGHT: usize = 2;

/// Outputs of a launch at most.
pub(crate) const OUTS: usize = 4;

/// A matrix product of the contract, its arguments checked.
pub(crate) struct Product<'a, D: Device> {
    pub(crate) kernel: &'static str,
    pub(crate) x: &'a CudaTensor<D>,
    /// Rows of `x`, unless they are taken one after the other.
    pub(crate) rows: Option<&'a CudaTensor<D>>,
    pub(crate) weight: &'a CudaTensor<D>,
    /// A weight of as many columns, whose features are the second output: of few tokens.
    pub(crate) beside: Option<&'a CudaTensor<D>>,
    /// The columns of each are features, which lie one after the other.
    pub(crate) outs: [Option<&'a CudaTensor<D>>; OUTS],
    /// Whether the features are those of a gate and its up projection in turns, and the first output gets their SwiGLU.
    pub(crate) swiglu: bool,
    pub(crate) tokens: usize,
    pub(crate) features: usize,
    pub(crate) columns: usize,
}

impl<'a, D: Device> Product<'a, D> {
    /// Checks what `linear` and `lm_head` have in common; `out` is called `name`.
    pub(crate) fn new(
        kernel: &'static str,
        x: &'a CudaTensor<D>,
        rows: Option<&'a CudaTensor<D>>,
        weight: &'a CudaTensor<D>,
        name: &'static str,
        out: &'a CudaTensor<D>,
    ) -> Result<Self> {
        let product = Self::unchecked(kernel, x, rows, weight, out)?;
        let Self { tokens, features, .. } = product;
        out.expect(kernel, name, out.shape() == [tokens, features], || format!("[{tokens}, {features}]"))?;
        Ok(product)
    }

    /// Checks all but the output's shape.
    pub(crate) fn unchecked(
        kernel: &'static str,
        x: &'a CudaTensor<D>,
        rows: Option<&'a CudaTensor<D>>,
        weight: &'a CudaTensor<D>,
        out: &'a CudaTensor<D>,
    ) -> Result<Self> {
        let [features, columns] = weight.dims(kernel, "weight")?;
        weight.expect_dtype(kernel, "weight", &WEIGHTS, "a weight (bf16, f16 or f32)")?;
        weight.expect(kernel, "weight", columns > 0, || "[out, in] with at least one column".into())?;
        let [x_rows, x_columns] = x.dims(kernel, "x")?;
        x.expect(kernel, "x", x_columns == columns, || format!("[{x_rows}, {columns}]"))?;
        x.expect_dtype(kernel, "x", &[DType::Act], "activations")?;
        let tokens = match rows {
            None => x_rows,
            Some(rows) => {
                rows.expect_dtype(kernel, "rows", &[DType::Index], "indices (i32)")?;
                let [count] = rows.dims(kernel, "rows")?;
                count
            }
        };
        let outs = [Some(out), None, None, None];
        let (beside, swiglu) = (None, false);
        Ok(Self { kernel, x, rows, weight, beside, outs, swiglu, tokens, features, columns })
    }

    pub(crate) fn launch(
        &self,
        device: &D,
        tiles: &LinearTiles,
        workspace: &LinearWorkspace<D>,
    ) -> Result<()> {
        if self.tokens == 0 || self.features == 0 {
            return Ok(());
        }
        if tiles.gemm && self.launch_library(device)? {
            return Ok(());
        }
        match LinearTokens::of(self.tokens) {
            LinearTokens::UpTo8 | LinearTokens::UpTo32 => self.launch_few(device, tiles, workspace, None),
            LinearTokens::Middle => self.launch_many(device, &tiles.middle, workspace),
            LinearTokens::Many => self.launch_many(device, &tiles.many, workspace),
        }
    }

    /// Whether it is a product of few tokens, which other work can go beside.
    pub(crate) fn is_few(&self) -> bool {
        matches!(LinearTokens::of(self.tokens), LinearTokens::UpTo8 | LinearTokens::UpTo32)
            && self.tokens > 0
            && self.features > 0
    }

    /// Launches by the device's own library; false where that has nothing for it, and what it launched then counts for nothing.
    fn launch_library(&self, device: &D) -> Result<bool> {
        let plain = self.rows.is_none() && !self.swiglu && self.weight.dtype() == DType::Bf16;
        if self.is_few() || !plain {
            return Ok(false);
        }
        let mut first_row = 0;
        for out in self.outs.into_iter().flatten() {
            let features = out.shape()[1];
            let product = Gemm {
                kernel: self.kernel,
                x: self.x.buffer(),
                weight: self.weight.buffer(),
                first_row,
                out: out.buffer(),
                floats: out.dtype() == DType::Float,
                tokens: self.tokens,
                columns: self.columns,
                features,
            };
            if features > 0 && !device.gemm(&product)? {
                return Ok(false);
            }
            first_row += features;
        }
        Ok(true)
    }

    /// Whether every row is whole vectors of 16 bytes.
    fn vectors(&self) -> bool {
        self.columns.is_multiple_of(8)
    }

    fn shape(&self) -> String {
        let Self { kernel, tokens, columns, features, .. } = self;
        let beside = self.beside.map_or(String::new(), |beside| format!(" and {}", beside.shape()[0]));
        format!("{kernel}: {tokens} x {columns} -> {features}{beside}, {}", self.weight.dtype())
    }

    /// The parameters of either kernel.
    fn args<'b>(&'b self, [parts, arrivals]: [Arg<'b, D::Buffer>; 2]) -> [Arg<'b, D::Buffer>; 17] {
        let tensor = |tensor: Option<&'b CudaTensor<D>>| {
            tensor.map_or(Arg::Null, |tensor| Arg::Buffer(tensor.buffer()))
        };
        let size = |size: usize| Arg::I32(size as i32);
        let [first, second, third, fourth] = self.outs;
        // An output that is not there ends where the one before it does; the last one's end is the features'.
        let mut end = 0;
        let [first_end, second_end, third_end, _] = self.outs.map(|out| {
            end += out.map_or(0, |out| out.shape()[1]);
            end
        });
        let floats = self.outs.iter().enumerate().map(|(i, out)| {
            let is_float = out.is_some_and(|out| out.dtype() == DType::Float);
            usize::from(is_float) << i
        });
        [
            tensor(Some(self.x)),
            tensor(self.rows),
            tensor(Some(self.weight)),
            tensor(first),
            tensor(second),
            tensor(third),
            tensor(fourth),
            parts,
            arrivals,
            size(self.x.shape()[0]),
            size(self.tokens),
            size(self.columns),
            size(self.features),
            size(first_end),
            size(second_end),
            size(third_end),
            size(floats.sum()),
        ]
    }

    /// A product of few tokens; `choice` is made beside it.
    pub(crate) fn launch_few(
        &self,
        device: &D,
        tiles: &LinearTiles,
        workspace: &LinearWorkspace<D>,
        choice: Option<&Choice<'_, D>>,
    ) -> Result<()> {
        let (limits, weight) = (device.limits(), self.weight.dtype());
        let beside = self.beside.map_or(0, |beside| beside.shape()[0]);
        let size = LinearFewSize {
            tokens: LinearTokens::of(self.tokens),
            width: LinearWidth::of(self.features + beside),
        };
        let tile = tiles.of_few(size);
        tile.validate(size, limits)?;
        let variant = linear_few::Variant {
            weight,
            vectors: self.vectors(),
            groups: linear_few::groups(self.tokens),
            swiglu: self.swiglu,
            routes: choice.map(Choice::variant),
        };
        // What chooses experts has more than the tile was asked about.
        require_shared(tile, tile.shared_bytes(variant), limits)?;
        // No block has rows of both weights.
        let features =
            if beside > 0 { self.features.next_multiple_of(tile.features()) } else { self.features };
        let grid = tile.grid([self.tokens, self.columns, features + beside], limits);
        let (blocks, splits) = (grid.blocks, grid.splits);
        let need = if splits > 1 { tile.need(blocks * splits, variant.groups) } else { Need::default() };
        let mut args = Vec::from(self.args(workspace.few.arguments(tile, need)?));
        args.insert(WEIGHT + 1, self.beside.map_or(Arg::Null, |beside| Arg::Buffer(beside.buffer())));
        args.extend(choice.into_iter().flat_map(Choice::args));
        let routing = choice.map_or(0, |choice| choice.tokens.div_ceil(tile.warps));
        device.launch(&Launch {
            program: &tile.program(variant),
            entry: linear_few::ENTRY,
            grid: [(routing + blocks) as u32, splits as u32, 1],
            threads: tile.threads(),
            shared_bytes: tile.shared_bytes(variant),
            shape: choice
                .map_or_else(|| self.shape(), |choice| format!("{}; {}", self.shape(), choice.shape())),
            args: &args,
        })
    }

    fn launch_many(&self, device: &D, tile: &LinearTile, workspace: &LinearWorkspace<D>) -> Result<()> {
        let (limits, weight) = (device.limits(), self.weight.dtype());
        tile.validate(LinearTokens::of(self.tokens), limits)?;
        let tile = tile.for_weight(weight);
        let variant = linear_many::Variant { weight, vectors: self.vectors(), swiglu: self.swiglu };
        let (blocks, need) = tile.grid(self.tokens, self.features, self.columns, limits);
        let args = self.args(workspace.many.arguments(&tile, need)?);
        device.launch(&Launch {
            program: &tile.program("linear.cu", variant, false),
            entry: KERNEL,
            grid: [blocks as u32, 1, 1],
            threads: tile.threads(),
            shared_bytes: tile.shared_bytes(weight),
            shape: self.shape(),
            args: &args,
        })
    }
}

/// What a launch moves and computes.
pub fn cost(tokens: usize, columns: usize, features: usize, weight: DType, out: DType) -> Cost {
    let weight_bytes = if weight == DType::F32 { 4 } else { 2 };
    let out_bytes = if out == DType::Float { 4 } else { 2 };
    let bytes = features * columns * weight_bytes + tokens * columns * 2 + tokens * features * out_bytes;
    Cost { bytes: bytes as f64, flops: 2.0 * (tokens * columns) as f64 * features as f64 }
}

/// The kernel of the contract's [`linear`](dsa80_reference::Kernels::linear).
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn linear<D: Device>(
    device: &D,
    tiles: &LinearTiles,
    workspace: &LinearWorkspace<D>,
    x: &CudaTensor<D>,
    weight: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let product = Product::new(KERNEL, x, None, weight, "out", out)?;
    out.expect_dtype(KERNEL, "out", &[DType::Act, DType::Float], "activations or floats")?;
    product.launch(device, tiles, workspace)
}
