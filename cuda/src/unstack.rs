//! `unstack`: gathered shards from one below the other to side by side, for ranks whose library gathers whole buffers.

use dsa80_reference::{DeviceTensor, Error, Result};

use crate::device::{Arg, Device, Launch, Program};
use crate::exchange::{SUMMED, vector};
use crate::tensor::{CudaTensor, element_bytes};

const KERNEL: &str = "unstack";
/// Tensors of a launch at most.
pub const MOST: usize = 2;
const THREADS: usize = 256;
/// Blocks of a tensor at most.
const BLOCKS: usize = 256;

/// Puts the shards of one or two tensors of one element type, which lie in `stacked` as `[ranks, rows, columns]` one tensor after the other,
/// into rows of `outs`, `[.., ranks * columns]` each, from `first_row` on.
///
/// # Errors
/// No tensor or more than two; a shape or element type that does not fit; the device.
pub fn unstack<D: Device>(
    device: &D,
    stacked: &D::Buffer,
    outs: &[&CudaTensor<D>],
    ranks: usize,
    [first_row, rows]: [usize; 2],
) -> Result<()> {
    let (out, next) = match outs {
        [out] => (*out, None),
        [out, next] => (*out, Some(*next)),
        _ => {
            let (expected, found) = (format!("1 to {MOST}"), outs.len().to_string());
            return Err(Error::Value { kernel: KERNEL, name: "outs", expected, found });
        }
    };
    let (dtype, mut columns) = (out.dtype(), [0; MOST]);
    for (out, columns) in outs.iter().zip(&mut columns) {
        let (expected, kind) = SUMMED;
        out.expect_dtype(KERNEL, "out", expected, kind)?;
        if out.dtype() != dtype {
            let (expected, found) = ("the element type of the first tensor", out.dtype());
            return Err(Error::DType { kernel: KERNEL, tensor: "out", expected, found });
        }
        let width = out.shape().last().copied().unwrap_or(0);
        let fits = width.is_multiple_of(ranks) && (first_row + rows) * width <= out.len();
        out.expect(KERNEL, "out", fits, || {
            format!("[at least {} rows, a multiple of {ranks}]", first_row + rows)
        })?;
        *columns = width / ranks;
    }
    let [wide, next_wide] = columns;
    let vector = vector(wide, dtype).min(vector(next_wide, dtype));
    let cells = ranks * rows * wide.max(next_wide) / vector;
    if cells == 0 {
        return Ok(());
    }
    let size = |size: usize| {
        i32::try_from(size).map(Arg::I32).map_err(|_| Error::Value {
            kernel: KERNEL,
            name: "size",
            expected: "less than 2^31".into(),
            found: size.to_string(),
        })
    };
    device.launch(&Launch {
        program: &Program::new(
            "unstack.cu",
            [("ELEMENT_BYTES", element_bytes(dtype)), ("VECTOR", vector), ("THREADS", THREADS)],
        ),
        entry: KERNEL,
        grid: [cells.div_ceil(THREADS).min(BLOCKS) as u32, outs.len() as u32, 1],
        threads: THREADS as u32,
        shared_bytes: 0,
        shape: format!("{rows} rows of {} columns of {ranks} ranks", wide + next_wide),
        args: &[
            Arg::Buffer(stacked),
            Arg::Buffer(out.buffer()),
            next.map_or(Arg::Null, |next| Arg::Buffer(next.buffer())),
            Arg::I64(first_row as i64),
            size(ranks)?,
            size(rows)?,
            size(wide / vector)?,
            size(next_wide / vector)?,
        ],
    })
}
