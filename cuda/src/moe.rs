//! `moe`: routed experts in any mix of formats. Plain: it serves checkpoints that are not quantised throughout.

use dsa80_reference::{Error, HostData, HostExpert, HostLinear, HostTensor, Result};

use crate::device::{Arg, Device, Launch, Program};
use crate::moe_int4::check;
use crate::tensor::CudaTensor;

const KERNEL: &str = "moe";
const UPLOAD: &str = "upload_experts";

/// Features of a block, a warp each.
const WARPS: usize = 8;
/// Tokens that are done at once: what the workspace has room for.
const CHUNK: usize = 512;
/// The kind of an INT4 projection, after those of dense ones.
const INT4: i64 = 3;
/// Every array starts on a multiple of this.
const ALIGNMENT: usize = 16;

/// The routed experts of one layer, each projection in its own format.
#[derive(Debug)]
pub struct Experts<D: Device> {
    /// Every array of every projection, as the checkpoint has it.
    data: D::Buffer,
    /// `[experts, 3, 8]` i64: how gate, up and down lie in `data`.
    table: D::Buffer,
    count: usize,
    hidden: usize,
    moe_intermediate: usize,
}

/// Arrays that are put one after the other.
#[derive(Debug, Default)]
struct Arrays<'a> {
    parts: Vec<(usize, &'a [u8])>,
    bytes: usize,
}

impl<'a> Arrays<'a> {
    fn push(&mut self, bytes: &'a [u8]) -> i64 {
        let offset = self.bytes.next_multiple_of(ALIGNMENT);
        self.parts.push((offset, bytes));
        self.bytes = offset + bytes.len();
        offset as i64
    }

    fn push_tensor(&mut self, tensor: &'a HostTensor) -> (i64, i64) {
        match &tensor.data {
            HostData::Bf16(data) => (0, self.push(bytemuck::cast_slice(data))),
            HostData::F16(data) => (1, self.push(bytemuck::cast_slice(data))),
            HostData::F32(data) => (2, self.push(bytemuck::cast_slice(data))),
        }
    }

    /// What the kernel knows of a projection.
    fn describe(&mut self, weight: &'a HostLinear) -> [i64; 8] {
        match weight {
            HostLinear::Dense(tensor) => {
                let (kind, offset) = self.push_tensor(tensor);
                [kind, 0, 0, 0, offset, 0, 0, 0]
            }
            HostLinear::Int4(weight) => {
                let words = self.push(bytemuck::cast_slice(&weight.weight_packed));
                let (scale_type, scales) = self.push_tensor(&weight.scales);
                let zeros = weight.zero_points.as_ref();
                let zeros = zeros.map_or(-1, |zeros| self.push(bytemuck::cast_slice(zeros)));
                let (group_size, groups) = (weight.group_size as i64, weight.groups() as i64);
                [INT4, scale_type, group_size, groups, words, scales, zeros, 0]
            }
            // Its numbers were made on the way here.
            HostLinear::Random(_) => [0; 8],
        }
    }
}

impl<D: Device> Experts<D> {
    /// Uploads a layer's experts.
    ///
    /// # Errors
    /// Unequal dimensions, or arrays that contradict them; memory; the device.
    pub fn upload(device: &D, experts: Vec<HostExpert>) -> Result<Self> {
        let experts: Vec<HostExpert> = experts.into_iter().map(HostExpert::made).collect();
        let first = experts.first().ok_or_else(|| refuse("experts", "at least one", "0".into()))?;
        let (moe_intermediate, hidden) = dims("gate_proj", &first.gate_proj)?;
        let (mut arrays, mut table) = (Arrays::default(), Vec::new());
        for expert in &experts {
            for (tensor, weight, expected) in [
                ("gate_proj", &expert.gate_proj, (moe_intermediate, hidden)),
                ("up_proj", &expert.up_proj, (moe_intermediate, hidden)),
                ("down_proj", &expert.down_proj, (hidden, moe_intermediate)),
            ] {
                let found = dims(tensor, weight)?;
                if found != expected {
                    let expected = format!("{:?}", [expected.0, expected.1]);
                    return Err(shape(tensor, expected, vec![found.0, found.1]));
                }
                table.extend(arrays.describe(weight));
            }
        }
        let data = device.alloc("experts", arrays.bytes.next_multiple_of(ALIGNMENT))?;
        for (offset, bytes) in &arrays.parts {
            device.write(&data, *offset, bytes)?;
        }
        let on_device = device.alloc("experts' table", table.len() * size_of::<i64>())?;
        device.write(&on_device, 0, bytemuck::cast_slice(&table))?;
        Ok(Self { data, table: on_device, count: experts.len(), hidden, moe_intermediate })
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Columns of a token's row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Features between gate-up and down.
    pub fn moe_intermediate(&self) -> usize {
        self.moe_intermediate
    }
}

/// `(out_features, in_features)`, where the arrays hold as many.
fn dims(tensor: &'static str, weight: &HostLinear) -> Result<(usize, usize)> {
    match weight {
        HostLinear::Dense(weight) => match weight.shape[..] {
            [out, inner] if out * inner == weight.len() => Ok((out, inner)),
            _ => {
                let expected = format!("the two dimensions of {} elements", weight.len());
                Err(shape(tensor, expected, weight.shape.clone()))
            }
        },
        HostLinear::Int4(weight) => {
            let (out, inner) = (weight.out_features, weight.in_features);
            if weight.group_size == 0 {
                return Err(refuse("group_size", "at least 1", "0".into()));
            }
            let (groups, zeros) = (weight.groups(), weight.zero_points.as_ref().map(|zeros| zeros.len()));
            for (tensor, found, expected) in [
                ("weight_packed", weight.weight_packed.len(), out * weight.words_per_row()),
                ("scales", weight.scales.len(), out * groups),
                ("zero_points", zeros.unwrap_or(0), zeros.map_or(0, |_| out.div_ceil(8) * groups)),
            ] {
                if found != expected {
                    return Err(shape(tensor, format!("[{expected}]"), vec![found]));
                }
            }
            Ok((out, inner))
        }
        HostLinear::Random(weight) => Ok((weight.out_features, weight.in_features)),
    }
}

fn shape(tensor: &'static str, expected: String, found: Vec<usize>) -> Error {
    Error::Shape { kernel: UPLOAD, tensor, expected, found }
}

fn refuse(name: &'static str, expected: &str, found: String) -> Error {
    Error::Value { kernel: UPLOAD, name, expected: expected.to_owned(), found }
}

/// Room for what is between the launches of a step.
#[derive(Debug)]
pub struct MoeWorkspace<D: Device> {
    elements: usize,
    /// `[pairs, moe_intermediate]` bf16.
    activated: D::Buffer,
}

impl<D: Device> MoeWorkspace<D> {
    /// For steps of up to `max_tokens` tokens with `top_k` experts each: 2 * top_k * min(max_tokens, 512) * moe_intermediate bytes.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, max_tokens: usize, top_k: usize, moe_intermediate: usize) -> Result<Self> {
        let elements = top_k * max_tokens.min(CHUNK) * moe_intermediate;
        Ok(Self { elements, activated: device.alloc("moe activated", 2 * elements)? })
    }
}

/// The kernel of the contract's [`moe`](dsa80_reference::Kernels::moe).
///
/// # Errors
/// A shape or element type that does not fit; the device.
pub fn moe<D: Device>(
    device: &D,
    workspace: &MoeWorkspace<D>,
    x: &CudaTensor<D>,
    topk_ids: &CudaTensor<D>,
    topk_weights: &CudaTensor<D>,
    experts: &Experts<D>,
    shared: Option<&CudaTensor<D>>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    let (hidden, intermediate) = (experts.hidden, experts.moe_intermediate);
    let [tokens, top_k] = check(KERNEL, x, topk_ids, topk_weights, hidden, shared, out)?;
    let elements = top_k * tokens.min(CHUNK) * intermediate;
    if elements > workspace.elements {
        let shape = vec![top_k * tokens.min(CHUNK), intermediate];
        return Err(Error::Capacity { shape, elements, capacity: workspace.elements });
    }
    for first in (0..tokens).step_by(CHUNK) {
        let tokens = (tokens - first).min(CHUNK);
        let numbers = [experts.count, hidden, intermediate, top_k, first];
        let launch = |entry, grid: [usize; 2], mut args: Vec<Arg<'_, D::Buffer>>| {
            args.extend(numbers.map(|number| Arg::I32(number as i32)));
            device.launch(&Launch {
                program: &Program::new("moe.cu", [("TILE_WARPS", WARPS)]),
                entry,
                grid: [grid[0].div_ceil(WARPS) as u32, grid[1] as u32, 1],
                threads: 32 * WARPS as u32,
                shared_bytes: 0,
                shape: format!("{tokens} tokens of {top_k} experts, {hidden} x {intermediate}"),
                args: &args,
            })
        };
        let (data, table) = (Arg::Buffer(&experts.data), Arg::Buffer(&experts.table));
        let (ids, activated) = (Arg::Buffer(topk_ids.buffer()), Arg::Buffer(&workspace.activated));
        let args = vec![data, table, Arg::Buffer(x.buffer()), ids, activated];
        launch("moe_gate_up", [intermediate, tokens * top_k], args)?;
        let args = vec![
            Arg::Buffer(&experts.data),
            Arg::Buffer(&experts.table),
            Arg::Buffer(&workspace.activated),
            Arg::Buffer(topk_ids.buffer()),
            Arg::Buffer(topk_weights.buffer()),
            shared.map_or(Arg::Null, |shared| Arg::Buffer(shared.buffer())),
            Arg::Buffer(out.buffer()),
        ];
        launch("moe_down", [hidden, tokens], args)?;
    }
    Ok(())
}
