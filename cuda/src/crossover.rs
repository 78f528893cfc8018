//! From which size on two shots are quicker than one: measured between the GPUs of a group.

use std::sync::Arc;

use dsa80_reference::{DType, Error, Rendezvous, Result};
use serde::{Deserialize, Serialize};

use crate::all_reduce::{AllReduceTiles, Shots, all_reduce_in};
use crate::all_reduce_norm::{NormParts, all_reduce_norm};
use crate::communicator::PATIENCE;
use crate::device::Device as _;
use crate::exchange::{self, Exchange, ExchangeDims};
use crate::gpu::{Gpu, GpuBuffer};
use crate::tensor::{CudaTensor, element_bytes};

/// Bytes of a rank up to which one shot serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Crossover {
    /// Of `all_reduce`.
    pub all_reduce_bytes: usize,
    /// Of `all_reduce_norm`.
    pub all_reduce_norm_bytes: usize,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Summed {
    /// `all_reduce` of activations.
    Alone,
    /// `all_reduce_norm`.
    WithNorm,
}

/// Columns of the rows that are measured: those of GLM-5.2.
pub const WIDTH: usize = 6144;
/// Rows: every power of two up to the largest.
const MOST_ROWS: usize = 2048;
/// Launches in a graph, and replays of it. The first ones are not counted.
const IN_A_GRAPH: usize = 10;
const REPLAYS: usize = 10;
const UNCOUNTED: usize = 3;

/// Measures both ways between `gpus`, which reach each other's memory: a second or so, once the kernels are compiled.
///
/// # Errors
/// A GPU failed, or did not come to a collective.
pub fn measure(gpus: &[Arc<Gpu>], tiles: &AllReduceTiles) -> Result<Crossover> {
    choose(|summed, shots, rows| time(gpus, summed, shots, tiles, rows))
}

/// The sizes up to which one shot is the better choice, by what `time` says that it takes with so many rows.
fn choose(mut time: impl FnMut(Summed, Shots, usize) -> Result<f64>) -> Result<Crossover> {
    let sizes: Vec<usize> =
        std::iter::successors(Some(1), |rows| Some(rows * 2)).take_while(|&rows| rows <= MOST_ROWS).collect();
    let mut up_to = |summed| -> Result<usize> {
        let ratios = sizes
            .iter()
            .map(|&rows| Ok(time(summed, Shots::One, rows)? / time(summed, Shots::Two, rows)?))
            .collect::<Result<Vec<f64>>>()?;
        Ok(up_to_bytes(&sizes, WIDTH * size_of::<u16>(), &ratios))
    };
    Ok(Crossover { all_reduce_bytes: up_to(Summed::Alone)?, all_reduce_norm_bytes: up_to(Summed::WithNorm)? })
}

/// Bytes up to which one way serves, by the ratios of its times to another's for these numbers of rows of `row_bytes`, in ascending order.
pub fn up_to_bytes(rows: &[usize], row_bytes: usize, ratios: &[f64]) -> usize {
    let ones = last_of_one_shot(ratios);
    // Between the last size of the one and the first of the other; none at all is less than a row.
    let rows = |index: usize| rows.get(index).copied();
    match (ones.checked_sub(1).and_then(rows), rows(ones)) {
        (Some(last), Some(first)) => row_bytes * (last + first) / 2,
        (None, _) => row_bytes / 2,
        (Some(_), None) => usize::MAX >> 1,
    }
}

/// How many of the sizes one shot serves, by the ratios of its times to those of two: so that the product of all times is the least. A
/// measurement that is off by a little moves nothing.
fn last_of_one_shot(ratios: &[f64]) -> usize {
    let mut best = (0.0, 0);
    let mut sum = 0.0;
    for (index, ratio) in ratios.iter().enumerate() {
        sum += ratio.ln();
        if sum < best.0 {
            best = (sum, index + 1);
        }
    }
    best.1
}

/// What one of both ways takes between `gpus`, in microseconds.
///
/// # Errors
/// As for [`measure`].
pub fn time(
    gpus: &[Arc<Gpu>],
    summed: Summed,
    shots: Shots,
    tiles: &AllReduceTiles,
    rows: usize,
) -> Result<f64> {
    microseconds(gpus, |gpu, exchange| launches(gpu, exchange, summed, shots, *tiles, rows))
}

/// One of both ways on one of the GPUs, with tensors of its own.
fn launches(
    gpu: &Arc<Gpu>,
    exchange: Exchange<GpuBuffer>,
    summed: Summed,
    shots: Shots,
    tiles: AllReduceTiles,
    rows: usize,
) -> Result<Launches<'_>> {
    let shape = [rows, WIDTH];
    let x = [zeros(gpu, DType::Act, &shape)?];
    if summed == Summed::Alone {
        return Ok(Box::new(move || all_reduce_in(shots, gpu, &tiles.of(shots), &exchange, &x)));
    }
    let residual = [zeros(gpu, DType::Float, &shape)?];
    let (weight, out) = ([zeros(gpu, DType::Bf16, &shape[1..])?], [zeros(gpu, DType::Act, &shape)?]);
    Ok(Box::new(move || {
        let parts = NormParts { x: &x, residual: &residual, weight: &weight, out: &out };
        all_reduce_norm(shots, gpu, &tiles.norm.of(shots), &exchange, &parts, 1e-5)
    }))
}

/// A tensor that is all zeros.
///
/// # Errors
/// Memory.
pub fn zeros(gpu: &Arc<Gpu>, dtype: DType, shape: &[usize]) -> Result<CudaTensor<Arc<Gpu>>> {
    let tensor = CudaTensor::alloc(gpu, "what is summed", dtype, shape)?;
    gpu.write(tensor.buffer(), 0, &vec![0; tensor.len() * element_bytes(dtype)])?;
    Ok(tensor)
}

/// What a GPU is measured with.
pub type Launches<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// What a launch of each of `gpus`, which meet in it, takes on the slowest: the median over replays of a graph of many. `prepare` makes them,
/// on a thread for every GPU.
///
/// # Errors
/// A GPU failed, or did not come to a collective.
pub fn microseconds(
    gpus: &[Arc<Gpu>],
    prepare: impl Fn(&Arc<Gpu>, Exchange<GpuBuffer>) -> Result<Launches<'_>> + Sync,
) -> Result<f64> {
    let dims = ExchangeDims::new(gpus.len())?;
    let workspaces: Vec<GpuBuffer> =
        gpus.iter().map(|gpu| exchange::alloc_workspace(gpu, dims)).collect::<Result<_>>()?;
    let of_rank = |meeting: Rendezvous<()>| -> Result<f64> {
        let rank = meeting.rank();
        let gpu = &gpus[rank];
        let exchange =
            Exchange { dims, workspaces: workspaces.clone(), first_rank: rank, patience: PATIENCE };
        let launch = prepare(gpu, exchange)?;
        launch()?;
        gpu.synchronize()?;
        let graph = gpu.capture(|| (0..IN_A_GRAPH).try_for_each(|_| launch()))?;
        // Nobody begins while another still compiles or captures.
        meeting.exchange(())?;
        let mut times = gpu.time(UNCOUNTED + REPLAYS, || graph.launch())?.split_off(UNCOUNTED);
        if let Some(reason) = exchange::failure(gpu, &workspaces[rank], PATIENCE)? {
            return Err(Error::Communicator { rank, world_size: dims.ranks, reason });
        }
        // What the others push into is freed when all are done.
        meeting.exchange(())?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2] / IN_A_GRAPH as f64)
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Rendezvous::group(dims.ranks)
            .into_iter()
            .map(|meeting| {
                let of_rank = &of_rank;
                scope.spawn(move || of_rank(meeting))
            })
            .collect();
        let died = || Error::Backend { backend: "thread", message: "a measurement has panicked".into() };
        let times: Vec<Result<f64>> =
            ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|_| Err(died()))).collect();
        times.into_iter().try_fold(0.0, |slowest, us| Ok(f64::max(slowest, us?)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crossover_lies_between_the_sizes_where_the_quicker_one_changes() {
        let token = WIDTH * 2;
        // One shot: a wait and its bytes; two: twice the wait and half of them, or less where a norm is shared out.
        let time = |summed, shots, rows: usize| {
            let per_row = match (summed, shots) {
                (_, Shots::One) => 0.05,
                (Summed::Alone, Shots::Two) => 0.04,
                (Summed::WithNorm, Shots::Two) => 0.01,
            };
            let waits = if shots == Shots::One { 2.0 } else { 4.0 };
            Ok(waits + per_row * rows as f64)
        };
        let Crossover { all_reduce_bytes, all_reduce_norm_bytes } = choose(time).unwrap();
        assert_eq!((all_reduce_bytes, all_reduce_norm_bytes), (192 * token, 48 * token));
        let always = |quicker| move |_, shots, _| Ok::<_, Error>(if shots == quicker { 1.0 } else { 2.0 });
        assert!(choose(always(Shots::One)).unwrap().all_reduce_bytes > MOST_ROWS * token);
        assert!(choose(always(Shots::Two)).unwrap().all_reduce_norm_bytes < token);
        let broken = |_, _, _| Err(Error::Backend { backend: "test", message: "no link".into() });
        assert!(choose(broken).unwrap_err().to_string().contains("no link"));
    }

    #[test]
    fn a_measurement_that_is_off_by_a_little_moves_nothing() {
        assert_eq!(last_of_one_shot(&[0.5, 0.6, 1.01, 0.7, 1.2, 0.99, 1.5]), 4);
        assert_eq!(last_of_one_shot(&[1.0, 1.1]), 0);
        assert_eq!(last_of_one_shot(&[]), 0);
    }
}
