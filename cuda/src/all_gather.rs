//! `all_gather` and `broadcast`: what ranks have, on all of them.

use dsa80_reference::{DType, DeviceTensor, Error, Result};

use crate::all_reduce::resident_blocks;
use crate::device::{Arg, Device, Launch, Program};
use crate::exchange::{Exchange, SUMMED, deal, expect_alike, vector};
use crate::tensor::{CudaTensor, element_bytes};

const KERNEL: &str = "all_gather";
/// Threads of a block, and blocks of a rank at most: once a step, so that nothing is to be won by other numbers.
const THREADS: usize = 256;
const BLOCKS: usize = 32;

/// The contract's [`all_gather`](dsa80_reference::Communicator::all_gather) for the ranks of `exchange` that have tensors here.
///
/// # Errors
/// A shape or element type that does not fit; the device.
pub fn all_gather<D: Device>(
    device: &D,
    exchange: &Exchange<D::Buffer>,
    shards: &[CudaTensor<D>],
    outs: &[CudaTensor<D>],
) -> Result<()> {
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
    launch(device, KERNEL, exchange, Some(shards), outs, shard.len(), columns, 0)
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
    launch(device, KERNEL, exchange, None, tensors, elements, elements, root)
}

fn launch<D: Device>(
    device: &D,
    kernel: &'static str,
    exchange: &Exchange<D::Buffer>,
    shards: Option<&[CudaTensor<D>]>,
    outs: &[CudaTensor<D>],
    elements: usize,
    columns: usize,
    root: usize,
) -> Result<()> {
    if elements == 0 {
        return Ok(());
    }
    let (dims, dtype) = (exchange.dims, outs[0].dtype());
    let vector = vector(columns, dtype);
    let blocks = BLOCKS.min(resident_blocks(device.limits(), outs.len()));
    let vectors = elements / vector;
    let dealt = deal(dims, vectors, vector * element_bytes(dtype), [THREADS, blocks, 1]);
    let mut args = exchange.pointers(shards.unwrap_or_default().iter().map(CudaTensor::buffer));
    args.extend(exchange.pointers(outs.iter().map(CudaTensor::buffer)));
    args.extend(exchange.workspace_pointers());
    args.extend([
        Arg::I64(vectors as i64),
        Arg::I32(dealt.segment as i32),
        Arg::I32(i32::try_from(columns / vector).unwrap_or(i32::MAX)),
        Arg::I32(root as i32),
        Arg::I32(exchange.first_rank as i32),
        Arg::I64(exchange.patience_ns()),
    ]);
    device.launch(&Launch {
        program: &program(exchange, dtype, vector, shards.is_none()),
        entry: KERNEL,
        grid: [dealt.blocks as u32, outs.len() as u32, 1],
        threads: THREADS as u32,
        shared_bytes: 0,
        shape: format!("{kernel}, {elements} elements of {} ranks", dims.ranks),
        args: &args,
    })
}

fn program<B>(exchange: &Exchange<B>, dtype: DType, vector: usize, broadcast: bool) -> Program {
    let mut defines = exchange.dims.defines();
    defines.extend([
        ("THREADS", THREADS.to_string()),
        ("ELEMENT_BYTES", element_bytes(dtype).to_string()),
        ("VECTOR", vector.to_string()),
        ("BROADCAST", u8::from(broadcast).to_string()),
    ]);
    Program { source: "all_gather.cu", defines }
}
