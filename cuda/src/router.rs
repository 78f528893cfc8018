//! `router`: which experts see a token.

use dsa80_reference::{DType, DeviceTensor, Error, Result, RouterParams};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::rows::{WEIGHTS, weight_type};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "router";

/// Experts of a token at most: each has a lane.
const MAX_CHOSEN: usize = 32;

/// Experts at most: a lane holds 16.
pub(crate) const MAX_EXPERTS: usize = 512;

/// How a block takes tokens: one warp each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterTile {
    /// Tokens of a block.
    pub warps: usize,
}

/// What the model fixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterDims {
    /// Experts that a token can be sent to.
    pub experts: usize,
    /// Groups of experts (`n_group`).
    pub groups: usize,
}

impl Tile for RouterTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = RouterDims;

    fn safe(_dims: RouterDims) -> Self {
        Self { warps: 4 }
    }

    fn candidates(dims: RouterDims, limits: &Limits) -> Vec<Self> {
        let tiles = [1, 2, 4, 8].into_iter().map(|warps| Self { warps });
        tiles.filter(|tile| tile.validate(dims, limits).is_ok()).collect()
    }

    fn validate(&self, dims: RouterDims, limits: &Limits) -> Result<()> {
        let RouterDims { experts, groups } = dims;
        require(self, (1..=8).contains(&self.warps), || "a block has 1 to 8 warps".into())?;
        require(self, (1..=MAX_EXPERTS).contains(&experts), || {
            format!("a warp holds 1 to {MAX_EXPERTS} experts, not {experts}")
        })?;
        require(self, groups > 0 && experts.is_multiple_of(groups), || {
            format!("{groups} groups do not divide {experts} experts")
        })?;
        let largest = Variant { dims, bias: DType::F32, grouped: true };
        require_shared(self, largest.shared_bytes(self.warps), limits)
    }
}

impl RouterTile {
    fn threads(&self) -> u32 {
        32 * self.warps as u32
    }

    fn program(&self, variant: Variant) -> Program {
        let tile = [
            ("TILE_WARPS", self.warps.to_string()),
            ("TILE_SHARED_BYTES", variant.shared_bytes(self.warps).to_string()),
        ];
        Program { source: "router.cu", defines: variant.defines().into_iter().chain(tile).collect() }
    }
}

/// What is compiled apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variant {
    pub(crate) dims: RouterDims,
    pub(crate) bias: DType,
    /// Some groups are dropped.
    pub(crate) grouped: bool,
}

impl Variant {
    /// A token's scores and who is chosen; what they are chosen by and the groups' scores, where groups are dropped: of a block of
    /// `warps` tokens.
    pub(crate) fn shared_bytes(&self, warps: usize) -> usize {
        let RouterDims { experts, groups } = self.dims;
        warps * 4 * (MAX_CHOSEN + if self.grouped { 2 * experts + groups } else { experts })
    }

    /// The constants of `router.cuh` but the warps.
    pub(crate) fn defines(&self) -> [(&'static str, String); 4] {
        // Without a group to drop, one program serves every number of them.
        let groups = if self.grouped { self.dims.groups } else { 1 };
        [
            ("EXPERTS", self.dims.experts.to_string()),
            ("N_GROUP", groups.to_string()),
            ("GROUPED", u8::from(self.grouped).to_string()),
            ("BIAS_TYPE", weight_type(self.bias)),
        ]
    }
}

/// Every variant of a tile.
pub fn programs(tile: &RouterTile, dims: RouterDims) -> Vec<ProgramEntry> {
    let grouped = if dims.groups > 1 { &[false, true][..] } else { &[false] };
    let variants = WEIGHTS
        .into_iter()
        .flat_map(|bias| grouped.iter().map(move |&grouped| Variant { dims, bias, grouped }));
    let entry = |variant: Variant| ProgramEntry {
        program: tile.program(variant),
        entry: KERNEL,
        threads: tile.threads(),
        shared_bytes: variant.shared_bytes(tile.warps),
        variant: format!("{}{}", variant.bias, if variant.grouped { ", some groups" } else { "" }),
    };
    variants.map(entry).collect()
}

/// What a launch over `tokens` tokens moves; it has no tensor-core work.
pub fn cost(tokens: usize, experts: usize, k: usize, bias: DType) -> Cost {
    let bias = experts * if bias == DType::F32 { 4 } else { 2 };
    Cost { bytes: (tokens * (4 * experts + 8 * k) + bias) as f64, flops: 0.0 }
}

/// A choice of experts, its arguments checked.
pub(crate) struct Choice<'a, D: Device> {
    logits: &'a CudaTensor<D>,
    bias: &'a CudaTensor<D>,
    params: RouterParams,
    topk_ids: &'a CudaTensor<D>,
    topk_weights: &'a CudaTensor<D>,
    pub(crate) tokens: usize,
    pub(crate) k: usize,
    dims: RouterDims,
}

impl<'a, D: Device> Choice<'a, D> {
    /// Of up to 512 experts up to 32.
    pub(crate) fn new(
        logits: &'a CudaTensor<D>,
        bias: &'a CudaTensor<D>,
        params: RouterParams,
        topk_ids: &'a CudaTensor<D>,
        topk_weights: &'a CudaTensor<D>,
    ) -> Result<Self> {
        let RouterParams { n_group, topk_group, .. } = params;
        let [tokens, experts] = logits.dims(KERNEL, "logits")?;
        logits.expect_dtype(KERNEL, "logits", &[DType::Float], "floats")?;
        bias.expect(KERNEL, "bias", bias.shape() == [experts], || format!("[{experts}]"))?;
        bias.expect_dtype(KERNEL, "bias", &WEIGHTS, "weights")?;
        let value = |name, ok: bool, expected: String, found: usize| {
            let error = || Error::Value { kernel: KERNEL, name, expected, found: found.to_string() };
            if ok { Ok(()) } else { Err(error()) }
        };
        let divides = n_group > 0 && experts.is_multiple_of(n_group);
        value("n_group", divides, format!("a divisor of {experts} experts"), n_group)?;
        value("topk_group", (1..=n_group).contains(&topk_group), format!("1..={n_group}"), topk_group)?;
        let [_, k] = topk_ids.dims(KERNEL, "topk_ids")?;
        topk_ids.expect(KERNEL, "topk_ids", topk_ids.shape() == [tokens, k], || format!("[{tokens}, K]"))?;
        topk_ids.expect_dtype(KERNEL, "topk_ids", &[DType::Index], "indices")?;
        let same = topk_weights.shape() == [tokens, k];
        topk_weights.expect(KERNEL, "topk_weights", same, || format!("[{tokens}, {k}]"))?;
        topk_weights.expect_dtype(KERNEL, "topk_weights", &[DType::Float], "floats")?;
        let most = topk_group * (experts / n_group);
        topk_ids.expect(KERNEL, "topk_ids", k <= most.min(MAX_CHOSEN), || {
            format!("at most the {most} experts of {topk_group} groups, and at most {MAX_CHOSEN}")
        })?;
        let dims = RouterDims { experts, groups: n_group };
        Ok(Self { logits, bias, params, topk_ids, topk_weights, tokens, k, dims })
    }

    /// Whether there is nothing to choose.
    pub(crate) fn is_empty(&self) -> bool {
        self.tokens == 0 || self.k == 0
    }

    pub(crate) fn variant(&self) -> Variant {
        let grouped = self.params.topk_group < self.params.n_group;
        Variant { dims: self.dims, bias: self.bias.dtype(), grouped }
    }

    pub(crate) fn shape(&self) -> String {
        let (Self { tokens, k, .. }, RouterDims { experts, groups }) = (self, self.dims);
        format!("{tokens} tokens, {k} of {experts} experts, {} of {groups} groups", self.params.topk_group)
    }

    /// Fails where no tile has room for so many experts.
    pub(crate) fn check_dims(&self, tile: &RouterTile, device: &D) -> Result<()> {
        tile.validate(self.dims, device.limits())
    }

    /// In a launch of its own.
    pub(crate) fn launch(&self, device: &D, tile: &RouterTile) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        self.check_dims(tile, device)?;
        let variant = self.variant();
        device.launch(&Launch {
            program: &tile.program(variant),
            entry: KERNEL,
            grid: [self.tokens.div_ceil(tile.warps) as u32, 1, 1],
            threads: tile.threads(),
            shared_bytes: variant.shared_bytes(tile.warps),
            shape: self.shape(),
            args: &self.args(),
        })
    }

    /// The parameters of `route`.
    pub(crate) fn args(&self) -> [Arg<'a, D::Buffer>; 9] {
        let RouterParams { topk_group, norm_topk_prob, routed_scaling_factor, .. } = self.params;
        [
            Arg::Buffer(self.logits.buffer()),
            Arg::Buffer(self.bias.buffer()),
            Arg::Buffer(self.topk_ids.buffer()),
            Arg::Buffer(self.topk_weights.buffer()),
            Arg::I32(self.tokens as i32),
            Arg::I32(self.k as i32),
            Arg::I32(topk_group as i32),
            Arg::I32(i32::from(norm_topk_prob)),
            Arg::F32(routed_scaling_factor as f32),
        ]
    }
}

/// The kernel of the contract's [`router`](dsa80_reference::Kernels::router), for up to 512 experts of which up to 32 are chosen.
///
/// # Errors
/// A shape, element type, parameter or tile that does not fit; the device.
pub fn router<D: Device>(
    device: &D,
    tile: &RouterTile,
    logits: &CudaTensor<D>,
    bias: &CudaTensor<D>,
    params: RouterParams,
    topk_ids: &mut CudaTensor<D>,
    topk_weights: &mut CudaTensor<D>,
) -> Result<()> {
    Choice::new(logits, bias, params, topk_ids, topk_weights)?.launch(device, tile)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    const GROUPED: RouterDims = RouterDims { experts: 256, groups: 8 };

    #[test]
    fn candidates_are_valid_and_refusals_say_why() {
        let limits = Limits::a100();
        let candidates = RouterTile::candidates(GROUPED, &limits);
        assert!(candidates.contains(&RouterTile::safe(GROUPED)) && candidates.len() == 4, "{candidates:?}");
        for (warps, dims, reason) in [
            (0, GROUPED, "a block has 1 to 8 warps"),
            (4, RouterDims { experts: 513, groups: 1 }, "1 to 512 experts, not 513"),
            (4, RouterDims { experts: 256, groups: 3 }, "3 groups do not divide 256 experts"),
        ] {
            let error = RouterTile { warps }.validate(dims, &limits).unwrap_err().to_string();
            assert!(error.starts_with("router: ") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn every_variant_is_a_program_of_its_own() {
        let programs = programs(&RouterTile { warps: 2 }, GROUPED);
        assert_eq!(programs.len(), 6);
        assert_distinct(&programs);
    }

    #[test]
    fn a_launch_moves_logits_and_choices() {
        assert_eq!(cost(2, 256, 8, DType::F32).bytes, (2 * (1024 + 64) + 1024) as f64);
    }
}
