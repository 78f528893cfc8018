//! `all_gather` and `broadcast`: what ranks have, on all of them.

use dsa80_reference::{DType, DeviceTensor, Error, Result};

use crate::all_reduce::resident_blocks;
use crate::device::{Arg, Device, Launch, Program};
use crate::exchange::{Exchange, SUMMED, deal, expect_alike, vector};
use crate::tensor::{CudaTensor, element_bytes};

const KERNEL: &str = "all_gather";
/// Tensors of a launch at most.
pub const MOST: usize = 2;
/// Threads of a block, and blocks of a rank at most.
const THREADS: usize = 256;
const BLOCKS: usize = 32;

/// A tensor that ranks gather: the shards of those that are here, and where each of them wants the whole.
#[derive(Debug)]
pub struct Gathered<'a, D: Device> {
    /// `[rows, columns]`.
    pub shards: &'a [CudaTensor<D>],
    /// `[rows, columns of all ranks]`.
    pub outs: &'a [CudaTensor<D>],
}

impl<D: Device> Gathered<'_, D> {
    /// Elements of a shard and of a row of it.
    fn check(&self, exchange: &Exchange<D::Buffer>) -> Result<Shard> {
        let Self { shards, outs } = *self;
        exchange.expect_parts(KERNEL, shards.len())?;
        exchange.expect_parts(KERNEL, outs.len())?;
        expect_alike(KERNEL, "shard", shards, SUMMED)?;
        expect_alike(KERNEL, "out", outs, SUMMED)?;
        let shard = &shards[0];
        let Some((&columns, rows)) = shard.shape().split_last() else {
            let expected = "at least one dimension".into();
            return Err(Error::Shape { kernel: KERNEL, tensor: "shard", expected, found: Vec::new() });
        };
        let whole = [rows, &[columns * exchange.dims.ranks]].concat();
        for out in outs {
            out.expect(KERNEL, "out", out.shape() == whole, || format!("{whole:?}"))?;
            if out.dtype() != shard.dtype() {
                let expected = "the element type of the shard";
                return Err(Error::DType { kernel: KERNEL, tensor: "out", expected, found: out.dtype() });
            }
        }
        Ok(Shard { elements: shard.len(), columns })
    }
}

/// A rank's part of a tensor, or one that is broadcast.
#[derive(Debug, Clone, Copy, Default)]
struct Shard {
    elements: usize,
    columns: usize,
}

/// The contract's [`all_gather`](dsa80_reference::Communicator::all_gather) for the ranks of `exchange` that have tensors here: of one
/// tensor, or of [two](MOST) of one element type in one launch.
///
/// # Errors
/// No tensor or more than two; a shape or element type that does not fit; the device.
pub fn all_gather<D: Device>(
    device: &D,
    exchange: &Exchange<D::Buffer>,
    gathered: &[Gathered<'_, D>],
) -> Result<()> {
    let (first, next) = match gathered {
        [first] => (first, None),
        [first, next] => (first, Some(next)),
        _ => {
            let (expected, found) = (format!("1 to {MOST}"), gathered.len().to_string());
            return Err(Error::Value { kernel: KERNEL, name: "tensors", expected, found });
        }
    };
    let shard = first.check(exchange)?;
    let dtype = first.outs[0].dtype();
    let mut next_shard = Shard::default();
    if let Some(next) = next {
        next_shard = next.check(exchange)?;
        if next.outs[0].dtype() != dtype {
            let (expected, found) = ("the element type of the first tensor", next.outs[0].dtype());
            return Err(Error::DType { kernel: KERNEL, tensor: "shard", expected, found });
        }
        if next.outs.len() != first.outs.len() || next.shards.len() != first.shards.len() {
            let (expected, found) = (first.outs.len().to_string(), next.outs.len().to_string());
            return Err(Error::Value { kernel: KERNEL, name: "ranks of the second tensor", expected, found });
        }
    }
    let next_parts = next.map_or((&[][..], &[][..]), |next| (next.shards, next.outs));
    launch(
        device,
        exchange,
        &Launched {
            kernel: KERNEL,
            shards: [first.shards, next_parts.0],
            outs: [first.outs, next_parts.1],
            sizes: [shard, next_shard],
            mode: if next.is_some() { Mode::Pair } else { Mode::One },
            root: 0,
        },
    )
}

/// The contract's [`broadcast`](dsa80_reference::Communicator::broadcast) for the ranks of `exchange` that have a tensor here.
///
/// # Errors
/// A shape, element type or root that does not fit; the device.
pub fn broadcast<D: Device>(
    device: &D,
    exchange: &Exchange<D::Buffer>,
    tensors: &[CudaTensor<D>],
    root: usize,
) -> Result<()> {
    const KERNEL: &str = "broadcast";
    exchange.expect_parts(KERNEL, tensors.len())?;
    expect_alike(KERNEL, "tensor", tensors, SUMMED)?;
    if root >= exchange.dims.ranks {
        let expected = format!("a rank below {}", exchange.dims.ranks);
        return Err(Error::Value { kernel: KERNEL, name: "root", expected, found: root.to_string() });
    }
    let elements = tensors[0].len();
    launch(
        device,
        exchange,
        &Launched {
            kernel: KERNEL,
            shards: [&[], &[]],
            outs: [tensors, &[]],
            sizes: [Shard { elements, columns: elements }, Shard::default()],
            mode: Mode::Broadcast,
            root,
        },
    )
}

/// What is compiled apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    One,
    Pair,
    Broadcast,
}

/// Checked tensors: the first, and the second of a pair.
struct Launched<'a, D: Device> {
    kernel: &'static str,
    shards: [&'a [CudaTensor<D>]; MOST],
    outs: [&'a [CudaTensor<D>]; MOST],
    sizes: [Shard; MOST],
    mode: Mode,
    root: usize,
}

fn launch<D: Device>(device: &D, exchange: &Exchange<D::Buffer>, of: &Launched<'_, D>) -> Result<()> {
    let [shard, next] = of.sizes;
    let elements = shard.elements + next.elements;
    if elements == 0 {
        return Ok(());
    }
    let (dims, dtype, outs) = (exchange.dims, of.outs[0][0].dtype(), of.outs[0]);
    let vector = vector(shard.columns, dtype).min(vector(next.columns, dtype));
    let words = |elements: usize| {
        let vectors = elements / vector;
        i32::try_from(vectors).map(Arg::I32).map_err(|_| Error::Value {
            kernel: of.kernel,
            name: "elements",
            expected: format!("fewer than 2^31 vectors of {vector}"),
            found: elements.to_string(),
        })
    };
    let blocks = BLOCKS.min(resident_blocks(device.limits(), outs.len()));
    let dealt = deal(dims, elements / vector, vector * element_bytes(dtype), [THREADS, blocks, 1]);
    let mut args = Vec::new();
    for (shards, outs) in of.shards.into_iter().zip(of.outs) {
        args.extend(exchange.pointers(shards.iter().map(CudaTensor::buffer)));
        args.extend(exchange.pointers(outs.iter().map(CudaTensor::buffer)));
    }
    args.extend(exchange.workspace_pointers());
    args.extend([
        words(shard.elements)?,
        words(elements)?,
        Arg::I32(dealt.segment as i32),
        words(shard.columns)?,
        words(next.columns)?,
        Arg::I32(of.root as i32),
        Arg::I32(exchange.first_rank as i32),
        Arg::I64(exchange.patience_ns()),
    ]);
    device.launch(&Launch {
        program: &program(exchange, dtype, vector, of.mode),
        entry: KERNEL,
        grid: [dealt.blocks as u32, outs.len() as u32, 1],
        threads: THREADS as u32,
        shared_bytes: 0,
        shape: format!("{}, {elements} elements of {} ranks", of.kernel, dims.ranks),
        args: &args,
    })
}

fn program<B>(exchange: &Exchange<B>, dtype: DType, vector: usize, mode: Mode) -> Program {
    let mut defines = exchange.dims.defines();
    defines.extend([
        ("THREADS", THREADS.to_string()),
        ("ELEMENT_BYTES", element_bytes(dtype).to_string()),
        ("VECTOR", vector.to_string()),
        ("PAIR", u8::from(mode == Mode::Pair).to_string()),
        ("BROADCAST", u8::from(mode == Mode::Broadcast).to_string()),
    ]);
    Program { source: "all_gather.cu", defines }
}
