//! `swiglu`: both projections of a SwiGLU and its activation in one launch, by the kernels of [`linear`](crate::linear) or of
//! [`linear_int4`](crate::linear_int4).
//!
//! Rows of the weight are eight of the gate and the same eight of the up projection in turns, so that one thread gets both of a feature.

use bytemuck::Pod;
use dsa80_reference::buffers;
use dsa80_reference::{
    DType, DeviceTensor, Error, HostArray, HostData, HostLinear, HostTensor, RandomFormat, RandomLinear,
    Result,
};

use crate::device::Device;
use crate::int4::PackedInt4;
use crate::linear::{LinearTiles, LinearWorkspace, Product};
use crate::random_fill::{Rows, random_fill};
use crate::repack_int4::RepackInt4Tile;
use crate::tensor::{CudaTensor, element_bytes};

const KERNEL: &str = "swiglu";
const UPLOAD: &str = "upload_swiglu";

/// Rows of a projection that lie together.
const ROWS: usize = 8;

/// A gate and its up projection.
#[derive(Debug)]
pub enum SwiGlu<D: Device> {
    /// Both INT4, with groups of one size and scales of one type.
    Int4(PackedInt4<D>),
    /// Anything else, as a dense weight: INT4 beside another format is dequantised, which is exact.
    Dense(SwiGluDense<D>),
}

/// A gate and its up projection as one dense weight.
#[derive(Debug)]
pub struct SwiGluDense<D: Device> {
    /// `[2 * intermediate rounded up to 8, in]`.
    weight: CudaTensor<D>,
    /// Features of either projection.
    intermediate: usize,
}

impl<D: Device> SwiGluDense<D> {
    /// Of a weight whose rows are [`rows`](Self::rows), eight of the gate and the same eight of the up projection in turns.
    ///
    /// # Errors
    /// Another number of rows.
    pub fn of(weight: CudaTensor<D>, intermediate: usize) -> Result<Self> {
        let [rows, columns] = weight.dims(UPLOAD, "weight")?;
        let expected = Self::rows(intermediate);
        weight.expect(UPLOAD, "weight", rows == expected, || format!("[{expected}, {columns}]"))?;
        Ok(Self { weight, intermediate })
    }

    /// The rows that the weight of two projections of so many features has.
    pub fn rows(intermediate: usize) -> usize {
        2 * intermediate.next_multiple_of(ROWS)
    }

    /// The row of a feature of the gate (`half` is 0) or of the up projection (1).
    pub fn row(feature: usize, half: usize) -> usize {
        2 * ROWS * (feature / ROWS) + ROWS * half + feature % ROWS
    }

    /// The weight.
    pub fn weight(&self) -> &CudaTensor<D> {
        &self.weight
    }
}

impl<D: Device> SwiGlu<D> {
    /// Uploads, and repacks what is INT4.
    ///
    /// # Errors
    /// Unequal dimensions, named; arrays that contradict them; memory; the device.
    pub fn upload(
        device: &D,
        tile: &RepackInt4Tile,
        gate_proj: HostLinear,
        up_proj: HostLinear,
    ) -> Result<Self> {
        for (tensor, weight) in [("gate_proj", &gate_proj), ("up_proj", &up_proj)] {
            weight.check(UPLOAD, tensor)?;
        }
        let (dims, found) = (gate_proj.dims(), up_proj.dims());
        if dims != found {
            return Err(Error::Shape {
                kernel: UPLOAD,
                tensor: "up_proj",
                expected: format!("{:?}", [dims.0, dims.1]),
                found: vec![found.0, found.1],
            });
        }
        if let (HostLinear::Random(gate), HostLinear::Random(up)) = (&gate_proj, &up_proj)
            && gate.format == up.format
        {
            return Self::random(device, tile, gate, up);
        }
        let [gate_proj, up_proj] = [gate_proj, up_proj].map(HostLinear::made);
        if let (HostLinear::Int4(gate), HostLinear::Int4(up)) = (&gate_proj, &up_proj)
            && gate.group_size == up.group_size
            && gate.scales.dtype() == up.scales.dtype()
        {
            let packed = PackedInt4::upload_gate_up(device, tile, gate, up)?;
            return Ok(Self::Int4(packed));
        }
        // Exact, but for f32 scales.
        let [gate, up] = [gate_proj, up_proj].map(HostLinear::dense);
        let data = match (&gate.data, &up.data) {
            (HostData::Bf16(gate), HostData::Bf16(up)) => HostData::Bf16(in_turns(gate, up, dims)),
            (HostData::F16(gate), HostData::F16(up)) => HostData::F16(in_turns(gate, up, dims)),
            _ => HostData::F32(in_turns(&gate.to_f32(), &up.to_f32(), dims)),
        };
        drop((gate, up));
        let shape = vec![SwiGluDense::<D>::rows(dims.0), dims.1];
        let both = HostTensor { shape, data };
        let weight = crate::cuda::upload(device, &both)?;
        Ok(Self::Dense(SwiGluDense { weight, intermediate: dims.0 }))
    }

    /// Both of random numbers in one format.
    fn random(device: &D, tile: &RepackInt4Tile, gate: &RandomLinear, up: &RandomLinear) -> Result<Self> {
        let RandomFormat::Dense(dtype) = gate.format else {
            return PackedInt4::random(device, tile, &[gate, up]).map(Self::Int4);
        };
        let (rows, columns) = (gate.out_features, gate.in_features);
        let shape = [SwiGluDense::<D>::rows(rows), columns];
        let mut weight = CudaTensor::alloc(device, "gate and up", dtype, &shape)?;
        if !rows.is_multiple_of(ROWS) {
            device.write(weight.buffer(), 0, &vec![0; weight.len() * element_bytes(dtype)])?;
        }
        for (first, part) in [(0, gate), (ROWS, up)] {
            let rows = Rows { together: ROWS, stride: 2 * ROWS, first };
            random_fill(device, &part.tensor(dtype), rows, &mut weight)?;
        }
        Ok(Self::Dense(SwiGluDense { weight, intermediate: rows }))
    }
}

/// Eight rows of `gate`, eight of `up`, and so on; rows of zeros fill up the last eight.
fn in_turns<T: Pod + Default>(gate: &[T], up: &[T], (rows, columns): (usize, usize)) -> HostArray<T> {
    let mut all = buffers::take(2 * rows.next_multiple_of(ROWS) * columns);
    let pieces = [gate, up].map(|weight| weight.chunks((ROWS * columns).max(1)));
    let [mut gates, mut ups] = pieces;
    for (turn, out) in all.chunks_mut((ROWS * columns).max(1)).enumerate() {
        let piece = if turn % 2 == 0 { gates.next() } else { ups.next() }.unwrap_or_default();
        out[..piece.len()].copy_from_slice(piece);
        out[piece.len()..].fill(T::default());
    }
    all
}

/// The contract's [`swiglu`](dsa80_reference::Kernels::swiglu) with a dense weight;
/// [`swiglu_int4`](crate::linear_int4::swiglu_int4) is the one with an INT4 weight.
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn swiglu<D: Device>(
    device: &D,
    tiles: &LinearTiles,
    workspace: &LinearWorkspace<D>,
    x: &CudaTensor<D>,
    SwiGluDense { weight, intermediate }: &SwiGluDense<D>,
    out: &mut CudaTensor<D>,
) -> Result<()> {
    product(KERNEL, x, weight, *intermediate, out)?.launch(device, tiles, workspace)
}

/// The product of a SwiGLU, its arguments checked.
fn product<'a, D: Device>(
    kernel: &'static str,
    x: &'a CudaTensor<D>,
    weight: &'a CudaTensor<D>,
    intermediate: usize,
    out: &'a CudaTensor<D>,
) -> Result<Product<'a, D>> {
    let product = Product::unchecked(kernel, x, None, weight, out)?;
    let expected = [product.tokens, intermediate];
    out.expect(kernel, "out", out.shape() == expected, || format!("{expected:?}"))?;
    out.expect_dtype(kernel, "out", &[DType::Act], "activations")?;
    Ok(Product { swiglu: true, ..product })
}

/// The contract's [`swiglu_and_linear`](dsa80_reference::Kernels::swiglu_and_linear) with dense weights: one launch for few tokens and
/// weights of one type.
///
/// # Errors
/// A shape, element type or tile that does not fit; the device.
pub fn swiglu_and_linear<D: Device>(
    device: &D,
    tiles: &LinearTiles,
    workspace: &LinearWorkspace<D>,
    x: &CudaTensor<D>,
    weights: &SwiGluDense<D>,
    out: &mut CudaTensor<D>,
    weight: &CudaTensor<D>,
    weight_out: &mut CudaTensor<D>,
) -> Result<()> {
    const KERNEL: &str = "swiglu_and_linear";
    let first = product(KERNEL, x, &weights.weight, weights.intermediate, out)?;
    let second = Product::new(KERNEL, x, None, weight, "weight_out", weight_out)?;
    weight_out.expect_dtype(KERNEL, "weight_out", &[DType::Act, DType::Float], "activations or floats")?;
    if first.is_few() && second.is_few() && weight.dtype() == weights.weight.dtype() {
        let outs = [Some(&*out), Some(&*weight_out), None, None];
        return Product { beside: Some(weight), outs, ..first }.launch(device, tiles, workspace);
    }
    first.launch(device, tiles, workspace)?;
    second.launch(device, tiles, workspace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_take_turns_and_zeros_fill_up() {
        let gate: Vec<u32> = (0..18).collect();
        let up: Vec<u32> = (100..118).collect();
        let all = in_turns(&gate, &up, (9, 2));
        assert_eq!(all.len(), 2 * 16 * 2);
        assert_eq!((all[0], all[15], all[16], all[31]), (0, 15, 100, 115));
        assert_eq!((&all[32..35], &all[48..51]), (&[16, 17, 0][..], &[116, 117, 0][..]));
    }
}
