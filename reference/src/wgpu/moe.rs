//! `moe` and `moe_int4`: experts of any mix of formats go one way.

use super::Wgpu;
use super::experts::{Chunk, WgpuExperts};
use super::launch::{Binding, Launch};
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::error::Result;
use crate::tensor::DType;

static SORT: Shader = shader!("moe_sort");
static EXPERTS: Shader = shader!("moe");
static SUM: Shader = shader!("moe_sum");

/// Of a workgroup of `moe.wgsl`: lanes, features, pairs, bytes.
const LANES: u32 = 256;
const FEATURES: usize = 64;
const PAIRS: usize = 8;
const SHARED: usize = 16 * 1152 + 4 * 2048;

/// Words of an item.
const ITEM: usize = 3;

/// Lanes that sort, and that add up.
const SORT_LANES: usize = 256;
const SUM_LANES: usize = 128;

/// What the experts of the pairs of a launch give, in bytes.
const PARTS: usize = 1 << 27;

/// Tokens of a launch are a multiple of this: what they bind then begins where a binding may.
const ALIGNED: usize = 64;

/// The arguments that a chunk of tokens has a share of.
struct Step<'a> {
    kernel: &'static str,
    x: &'a WgpuTensor,
    topk_ids: &'a WgpuTensor,
    topk_weights: &'a WgpuTensor,
    experts: &'a WgpuExperts,
    shared: Option<&'a WgpuTensor>,
    top_k: usize,
}

pub(super) fn moe(
    wgpu: &Wgpu,
    kernel: &'static str,
    x: &WgpuTensor,
    topk_ids: &WgpuTensor,
    topk_weights: &WgpuTensor,
    experts: &WgpuExperts,
    shared: Option<&WgpuTensor>,
    out: &mut WgpuTensor,
) -> Result<()> {
    let hidden = experts.hidden;
    topk_ids.expect_index(kernel, "topk_ids")?;
    let [tokens, top_k] = topk_ids.dims(kernel, "topk_ids")?;
    topk_weights.expect_float(kernel, "topk_weights")?;
    topk_weights.expect_shape(kernel, "topk_weights", &[tokens, top_k])?;
    for (name, tensor) in [("x", Some(x)), ("shared", shared)] {
        let Some(tensor) = tensor else { continue };
        tensor.expect_act(kernel, name)?;
        tensor.expect_shape(kernel, name, &[tokens, hidden])?;
    }
    out.expect_act(kernel, "out")?;
    out.expect_shape(kernel, "out", &[tokens, hidden])?;
    wgpu.expect_lanes(kernel, LANES)?;
    wgpu.expect_shared(kernel, "x", SHARED, hidden)?;
    let step = Step { kernel, x, topk_ids, topk_weights, experts, shared, top_k };
    let most = usize::try_from(wgpu.context().limits.max_storage_buffer_binding_size).unwrap_or(usize::MAX);
    let chunk = (most.min(PARTS) / (4 * top_k.max(1) * hidden) / ALIGNED).max(1) * ALIGNED;
    for first in (0..tokens).step_by(chunk) {
        step.run(wgpu, first..tokens.min(first + chunk), out)?;
    }
    Ok(())
}

impl Step<'_> {
    fn run(&self, wgpu: &Wgpu, tokens: std::ops::Range<usize>, out: &mut WgpuTensor) -> Result<()> {
        let &Step { kernel, experts, top_k, .. } = self;
        let (hidden, intermediate) = (experts.hidden, experts.moe_intermediate);
        let pairs = tokens.len() * top_k;
        let shape = format!(
            "{} tokens, {top_k} of {} experts of {intermediate} x {hidden}",
            tokens.len(),
            experts.count
        );
        let of_pairs = tokens.start * top_k..tokens.end * top_k;
        let of_rows = tokens.start * hidden..tokens.end * hidden;
        let mut parts = wgpu.tensor(DType::Float, &[pairs.max(1), hidden])?;
        if pairs > 0 {
            let most_items = pairs.div_ceil(PAIRS) + experts.count.min(pairs);
            let mut sorted = wgpu.tensor(DType::Index, &[pairs])?;
            let mut items = wgpu.tensor(DType::Index, &[most_items, ITEM])?;
            wgpu.launch(&Launch {
                kernel,
                shader: &SORT,
                entry: "main",
                constants: &[("WORKGROUP", wgpu.workgroup(SORT_LANES).into())],
                bindings: &[self.topk_ids.reads_window(of_pairs.clone()), sorted.writes(), items.writes()],
                params: &[pairs as u32, experts.count as u32, PAIRS as u32],
                groups: [1; 3],
                shape: shape.clone(),
            })?;
            let mut act = wgpu.tensor(DType::Act, &[pairs, intermediate])?;
            let launch = |chunk: &Chunk, gate_up: bool, x: Binding<'_>, out: Binding<'_>| {
                let (columns, features) =
                    if gate_up { (hidden, intermediate) } else { (intermediate, hidden) };
                let blocks = features.div_ceil(FEATURES);
                wgpu.launch(&Launch {
                    kernel,
                    shader: &EXPERTS,
                    entry: "main",
                    constants: &[("GATE_UP", f64::from(gate_up))],
                    bindings: &[
                        sorted.reads(),
                        items.reads(),
                        chunk.table.reads(),
                        chunk.weights.reads(),
                        x,
                        out,
                    ],
                    params: &[
                        most_items as u32,
                        columns as u32,
                        features as u32,
                        blocks as u32,
                        top_k as u32,
                        chunk.first as u32,
                        chunk.count as u32,
                    ],
                    groups: wgpu.fold(most_items * blocks),
                    shape: shape.clone(),
                })
            };
            for chunk in &experts.chunks {
                launch(chunk, true, self.x.reads_window(of_rows.clone()), act.writes())?;
            }
            for chunk in &experts.chunks {
                launch(chunk, false, act.reads(), parts.writes())?;
            }
        }
        let words = hidden / 2;
        let nothing = wgpu.nothing()?;
        wgpu.launch(&Launch {
            kernel,
            shader: &SUM,
            entry: "main",
            constants: &[
                ("WORKGROUP", wgpu.workgroup(SUM_LANES).into()),
                ("SHARED", f64::from(self.shared.is_some())),
            ],
            bindings: &[
                self.topk_ids.reads_window(of_pairs.clone()),
                self.topk_weights.reads_window(of_pairs),
                parts.reads(),
                self.shared.map_or(nothing.reads(), |shared| shared.reads_window(of_rows.clone())),
                out.writes_window(of_rows),
            ],
            params: &[tokens.len() as u32, words as u32, top_k as u32, experts.count as u32],
            groups: wgpu.fold((tokens.len() * words).div_ceil(wgpu.workgroup(SUM_LANES) as usize)),
            shape,
        })
    }
}
