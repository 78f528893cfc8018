//! The kernels of `product.wgsl`: everything that is `x weight^T`.

use std::ops::Range;

use super::Wgpu;
use super::int4::WgpuInt4;
use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::Result;
use crate::tensor::{DType, DeviceTensor};

static DENSE: Shader = shader!("weights_dense", after "product");
static INT4: Shader = shader!("weights_int4", after "product");

/// Tokens that a workgroup of `few` has.
const FEW_TOKENS: usize = 8;
/// More tokens than these go by tiles.
const FEW: usize = 16;
/// Lanes of a feature in `few`.
const LANES: usize = 32;
/// Lanes of `one`, best first.
const ONE_LANES: [usize; 3] = [128, 64, 32];
/// Columns that a lane of `one` has at a time: dense ones, and of INT4.
const EIGHT: usize = 8;
const QUAD: usize = 32;
/// What packed weights are added to, so that their bits are a number's.
const INTEGER: f32 = 8_388_608.0;
/// Columns that a tile has at a time.
const TILE_COLUMNS: usize = 32;

/// The weight of a product.
#[derive(Debug, Clone, Copy)]
pub(super) enum Weight<'a> {
    Dense(&'a WgpuTensor),
    Int4(&'a WgpuInt4),
}

/// One product: which elements are a token's, a head's, a feature's.
#[derive(Debug)]
pub(super) struct Product<'a> {
    pub(super) kernel: &'static str,
    pub(super) x: &'a WgpuTensor,
    /// Rows of x, in place of all of them in their order.
    pub(super) rows: Option<&'a WgpuTensor>,
    pub(super) weight: Weight<'a>,
    /// Rows of the weight, of every head.
    pub(super) features: Range<usize>,
    pub(super) rows_of_head: usize,
    pub(super) tokens: usize,
    pub(super) heads: usize,
    pub(super) columns: usize,
}

impl Product<'_> {
    /// Launches it into `out`, `[tokens, heads, features]`, `Act` with an even number of features, or `Float`.
    pub(super) fn launch(&self, wgpu: &Wgpu, name: &'static str, out: &mut WgpuTensor) -> Result<()> {
        let Self { kernel, tokens, heads, columns, .. } = *self;
        out.expect_dtype(kernel, name, &[DType::Act, DType::Float], "activations or floats")?;
        if out.dtype() == DType::Act {
            out.expect_even(kernel, name)?;
        }
        if tokens * heads * self.features.len() == 0 {
            return Ok(());
        }
        let (weight, row_bytes, multiple) = match self.weight {
            Weight::Dense(weight) => (weight, columns * weight.width, 1),
            // Eight rows have their zero points in a word.
            Weight::Int4(weight) => (&weight.weight_packed, 4 * columns.div_ceil(8), 8),
        };
        if heads > 1 {
            // All heads are one binding: no weight by heads is larger.
            let whole = 0..heads * self.rows_of_head;
            return self.launch_window(wgpu, weight, whole, self.features.clone(), out);
        }
        let windows = wgpu.windows_of(kernel, "weight", multiple, self.rows_of_head, row_bytes)?;
        for window in windows {
            let features = self.features.start.max(window.start)..self.features.end.min(window.end);
            if features.start < features.end {
                self.launch_window(wgpu, weight, window, features, out)?;
            }
        }
        Ok(())
    }

    /// The features that are rows `features` of the weight, of which the rows `window` are bound.
    fn launch_window(
        &self,
        wgpu: &Wgpu,
        weight: &WgpuTensor,
        window: Range<usize>,
        features: Range<usize>,
        out: &mut WgpuTensor,
    ) -> Result<()> {
        let Self { kernel, x, tokens, heads, columns, rows_of_head, .. } = *self;
        let (of_lane, of_group) = match self.weight {
            Weight::Dense(_) => (EIGHT, EIGHT),
            Weight::Int4(weight) => (QUAD, weight.group_size),
        };
        let one = tokens == 1 && columns.is_multiple_of(of_lane) && of_group.is_multiple_of(of_lane);
        let nothing = wgpu.nothing()?;
        let row_elements = match self.weight {
            Weight::Dense(_) => columns,
            Weight::Int4(_) => columns.div_ceil(8),
        };
        let floats = out.is_floats();
        let of_all = self.features.len();
        let mut constants = vec![("FLOATS", floats.into()), ("GATHER", self.rows.is_some().into())];
        let (entry, grid) = if one {
            // All lanes have as many columns, if they can.
            let vectors = columns / of_lane;
            let even = ONE_LANES.into_iter().find(|&lanes| vectors.is_multiple_of(lanes));
            let lanes = wgpu.workgroup(even.unwrap_or(ONE_LANES[0].min(vectors)));
            constants.extend([
                ("WORKGROUP", f64::from(lanes)),
                ("STEPS", vectors.div_ceil(lanes as usize) as f64),
                ("EVEN", vectors.is_multiple_of(lanes as usize).into()),
            ]);
            if let Weight::Int4(weight) = self.weight {
                constants.push(("GROUP_QUADS", (weight.group_size / QUAD) as f64));
            }
            ("one", [features.len().div_ceil(4), 1])
        } else if tokens <= FEW {
            let lanes = wgpu.workgroup(128);
            // A feature's lanes are no more than its chunks, and a workgroup has pairs of features.
            let of_feature = LANES.min(columns.div_ceil(8).next_power_of_two()).min(lanes as usize / 2);
            let tokens_of_group = FEW_TOKENS.min(tokens);
            constants.extend([
                ("WORKGROUP", f64::from(lanes)),
                ("LANES", of_feature as f64),
                ("TOKENS", tokens_of_group as f64),
                ("PARTS", (tokens_of_group * lanes as usize) as f64),
            ]);
            ("few", [features.len().div_ceil(lanes as usize / of_feature), tokens.div_ceil(tokens_of_group)])
        } else {
            let side = wgpu.tile_side();
            constants.extend([
                ("WORKGROUP", (side * side) as f64),
                ("SIDE", side as f64),
                ("TILE", (4 * side * (TILE_COLUMNS / 4 + 1)) as f64),
            ]);
            ("tiles", [features.len().div_ceil(4 * side), tokens.div_ceil(4 * side)])
        };
        let (x_rows, x_width) = (x.shape().first().copied().unwrap_or(0), heads * columns);
        let (group_size, groups) = match self.weight {
            Weight::Dense(_) => (1, 1),
            Weight::Int4(weight) => (weight.group_size, weight.in_features.div_ceil(weight.group_size)),
        };
        let integer = INTEGER.to_bits() as usize;
        let params = [
            tokens,
            columns,
            features.len(),
            features.start - self.features.start,
            features.start - window.start,
            rows_of_head,
            x_width,
            columns,
            heads * of_all,
            of_all,
            x_rows,
            group_size,
            groups,
            window.start,
            integer,
            integer,
        ];
        let params = params.map(|number| number as u32);
        let bound = weight.reads_window(window.start * row_elements..window.end * row_elements);
        let mut bindings =
            vec![x.reads(), self.rows.map_or(nothing.reads(), WgpuTensor::reads), out.writes(), bound];
        let (shader, words) = match self.weight {
            Weight::Dense(weight) => {
                constants.push(("WEIGHT", weight.weight_type()));
                (&DENSE, weight.dtype().to_string())
            }
            Weight::Int4(weight) => {
                let WgpuInt4 { scales, zero_points, group_size, .. } = weight;
                constants.extend([
                    ("SCALE", scales.weight_type()),
                    ("ZEROS", zero_points.is_some().into()),
                    ("WHOLE", group_size.is_multiple_of(8).into()),
                    ("EVEN_GROUPS", groups.is_multiple_of(2).into()),
                ]);
                bindings.extend([
                    scales.reads(),
                    zero_points.as_ref().map_or(nothing.reads(), WgpuTensor::reads),
                ]);
                (&INT4, format!("INT4 in groups of {group_size}"))
            }
        };
        let shape =
            format!("{tokens} tokens, {heads} heads, {columns} columns to {of_all} features, {words}");
        // More than a word has is more than an adapter has.
        let groups = [grid[0], grid[1], heads].map(|groups| u32::try_from(groups).unwrap_or(u32::MAX));
        wgpu.launch(&Launch {
            kernel,
            shader,
            entry,
            constants: &constants,
            bindings: &bindings,
            params: &params,
            groups,
            shape,
        })
    }
}

impl Wgpu {
    /// The root of a workgroup of `tiles` that the adapter has room for.
    fn tile_side(&self) -> usize {
        let limits = &self.context.limits;
        let bytes = |side: usize| 2 * 4 * side * (TILE_COLUMNS / 4 + 1) * 16;
        let fits = |side: usize| {
            bytes(side) <= limits.max_compute_workgroup_storage_size as usize
                && side * side <= self.workgroup(side * side) as usize
        };
        if fits(16) { 16 } else { 8 }
    }
}
