//! INT4 weights in the layout of the kernels (`kernels/int4.cuh`): what they take, host arrays in both directions, device memory.

use dsa80_reference::{DType, Error, HostData, HostInt4, HostTensor, RandomFormat, RandomLinear, Result};

use crate::device::Device;
use crate::rows::WEIGHTS;

const KERNEL: &str = "upload_int4";

/// Output features of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Inputs of a tile.
pub(crate) const TILE_INPUTS: usize = 64;
/// 32-bit words of a tile: 4 a lane.
pub(crate) const TILE_WORDS: usize = 128;
/// Pairs of rows, (g, g + 8) of a tile, that have scales and zero points together.
const PAIRS: usize = TILE_ROWS / 2;
/// Inputs that no group's end may divide.
const GROUP_STEP: usize = 32;

/// Whose features the 16 rows of a tile are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Int4Rows {
    /// 16 neighbours of one weight.
    One,
    /// Eight of a gate's, then the same eight of the up projection's, so that one thread gets both of a feature.
    GateUp,
}

/// What a packed weight looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int4Shape {
    /// Whose features the rows of a tile are.
    pub rows: Int4Rows,
    /// Output features (of the gate alone).
    pub out_features: usize,
    /// Input features.
    pub in_features: usize,
    /// Inputs that share a scale: a multiple of 32, or all.
    pub group_size: usize,
    /// The type of the scales: bf16, f16 or f32.
    pub scales: DType,
    /// Whether groups have zero points (8 if not).
    pub zero_points: bool,
}

/// The arrays of a packed weight in host memory, in the byte order of the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPackedInt4 {
    /// `[row tiles, k tiles, 32 lanes, 4]` words.
    pub weight: Vec<u32>,
    /// `[row tiles, groups, 8, 2]` scales.
    pub scales: Vec<u8>,
    /// `[row tiles, groups, 8]`, where there are zero points.
    pub zeros: Option<Vec<u8>>,
}

impl Int4Shape {
    /// The shape of one weight, or of a gate and its up projection together.
    ///
    /// # Errors
    /// The arrays contradict the dimensions; the dimensions, or the element types, of a gate and an up projection differ; groups that
    /// the layout cannot hold.
    pub fn of(weights: &[&HostInt4]) -> Result<Self> {
        let (first, rows) = match weights {
            [one] => (one, Int4Rows::One),
            [gate, _] => (gate, Int4Rows::GateUp),
            _ => return Err(refuse("weights", "one weight, or a gate and an up projection", weights.len())),
        };
        let shape = Self {
            rows,
            out_features: first.out_features,
            in_features: first.in_features,
            group_size: first.group_size,
            scales: first.scales.dtype(),
            zero_points: weights.iter().any(|weight| weight.zero_points.is_some()),
        };
        shape.require(weights)?;
        Ok(shape)
    }

    /// The shape of one random weight, or of a gate and its up projection together.
    ///
    /// # Errors
    /// Weights that are not packed, or that differ; groups that the layout cannot hold.
    pub fn of_random(weights: &[&RandomLinear]) -> Result<Self> {
        let (first, rows) = match weights {
            [one] => (one, Int4Rows::One),
            [gate, up] if (gate.out_features, gate.in_features) == (up.out_features, up.in_features) => {
                (gate, Int4Rows::GateUp)
            }
            _ => return Err(refuse("weights", "one weight, or a gate and an up projection", weights.len())),
        };
        let RandomFormat::Int4 { group_size, scales, zero_points } = first.format else {
            return Err(refuse("weights", "INT4", "unquantised"));
        };
        if weights.iter().any(|weight| weight.format != first.format) {
            return Err(refuse("weights", "one format", "two"));
        }
        let RandomLinear { out_features, in_features, .. } = **first;
        let shape = Self { rows, out_features, in_features, group_size, scales, zero_points };
        shape.require_groups().map(|()| shape)
    }

    fn require_groups(&self) -> Result<()> {
        let Self { in_features, group_size, .. } = *self;
        if group_size == 0 || (!group_size.is_multiple_of(GROUP_STEP) && group_size < in_features) {
            return Err(refuse(
                "group_size",
                &format!("a multiple of {GROUP_STEP}, or all inputs"),
                group_size,
            ));
        }
        Ok(())
    }

    /// Fails unless weights of this shape are what `weights` hold.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub fn require(&self, weights: &[&HostInt4]) -> Result<()> {
        let count = if self.rows == Int4Rows::One { 1 } else { 2 };
        if weights.len() != count {
            return Err(refuse("weights", &count.to_string(), weights.len()));
        }
        let Self { out_features, in_features, group_size, .. } = *self;
        self.require_groups()?;
        for weight in weights {
            for (name, found, expected) in [
                ("out_features", weight.out_features, out_features),
                ("in_features", weight.in_features, in_features),
                ("group_size", weight.group_size, group_size),
            ] {
                if found != expected {
                    return Err(refuse(name, &expected.to_string(), found));
                }
            }
            if weight.scales.dtype() != self.scales {
                let found = weight.scales.dtype();
                return Err(refuse("scales", &self.scales.to_string(), found));
            }
            if weight.zero_points.is_some() && !self.zero_points {
                return Err(refuse("zero_points", "none", "some"));
            }
            let groups = self.groups();
            let zeros = weight.zero_points.as_ref().map(|zeros| zeros.len());
            for (tensor, found, expected) in [
                ("weight_packed", weight.weight_packed.len(), out_features * weight.words_per_row()),
                ("scales", weight.scales.len(), out_features * groups),
                ("zero_points", zeros.unwrap_or(0), zeros.map_or(0, |_| out_features.div_ceil(8) * groups)),
            ] {
                if found != expected {
                    let expected = format!("[{expected}]");
                    return Err(Error::Shape { kernel: KERNEL, tensor, expected, found: vec![found] });
                }
            }
        }
        Ok(())
    }

    /// Tiles of 16 rows.
    pub fn row_tiles(&self) -> usize {
        self.out_features.div_ceil(self.rows_per_tile())
    }

    /// Tiles of 64 inputs.
    pub fn k_tiles(&self) -> usize {
        self.in_features.div_ceil(TILE_INPUTS)
    }

    /// Groups of inputs.
    pub fn groups(&self) -> usize {
        self.in_features.div_ceil(self.group_size)
    }

    /// Bytes of the packed words.
    pub fn weight_bytes(&self) -> usize {
        self.row_tiles() * self.k_tiles() * TILE_WORDS * size_of::<u32>()
    }

    /// Bytes of the scales.
    pub fn scales_bytes(&self) -> usize {
        self.row_tiles() * self.groups() * TILE_ROWS * crate::tensor::element_bytes(self.scales)
    }

    /// Bytes of the zero points.
    pub fn zeros_bytes(&self) -> usize {
        if self.zero_points { self.row_tiles() * self.groups() * PAIRS } else { 0 }
    }

    /// The number of the scales' type in `rows.cuh`.
    pub(crate) fn scale_type(&self) -> usize {
        WEIGHTS.iter().position(|&weight| weight == self.scales).unwrap_or_default()
    }

    /// The group size that kernels count with: whole tiles where there is one group.
    pub(crate) fn kernel_group_size(&self) -> usize {
        if self.groups() == 1 { self.k_tiles() * TILE_INPUTS } else { self.group_size }
    }

    /// Features of a tile (of the gate alone).
    pub(crate) fn rows_per_tile(&self) -> usize {
        if self.rows == Int4Rows::One { TILE_ROWS } else { TILE_ROWS / 2 }
    }

    /// The weight and its feature that are row `row` (0..16) of tile `tile`.
    fn source(&self, tile: usize, row: usize) -> (usize, usize) {
        match self.rows {
            Int4Rows::One => (0, TILE_ROWS * tile + row),
            Int4Rows::GateUp => (row / 8, 8 * tile + row % 8),
        }
    }

    /// Packs on the host: one weight, or a gate and its up projection.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub fn pack(&self, weights: &[&HostInt4]) -> Result<HostPackedInt4> {
        self.require(weights)?;
        let (row_tiles, k_tiles, groups) = (self.row_tiles(), self.k_tiles(), self.groups());
        let mut weight = Vec::with_capacity(row_tiles * k_tiles * TILE_WORDS);
        for tile in 0..row_tiles {
            for k_tile in 0..k_tiles {
                for place in 0..TILE_WORDS {
                    weight.push((0..8).fold(0, |word, nibble| {
                        let (row, input) = place_of(place, nibble);
                        let ((from, feature), input) = (self.source(tile, row), TILE_INPUTS * k_tile + input);
                        let inside = feature < self.out_features && input < self.in_features;
                        word | if inside { weights[from].q(feature, input) << (4 * nibble) } else { 0 }
                    }));
                }
            }
        }
        let mut scales = Vec::with_capacity(self.scales_bytes());
        let mut zeros = Vec::with_capacity(self.zeros_bytes());
        for tile in 0..row_tiles {
            for group in 0..groups {
                for pair in 0..PAIRS {
                    let mut byte = 0;
                    for (high, row) in [pair, pair + PAIRS].into_iter().enumerate() {
                        let (from, feature) = self.source(tile, row);
                        let inside = feature < self.out_features;
                        push_scale(
                            &weights[from].scales.data,
                            inside.then_some(feature * groups + group),
                            &mut scales,
                        );
                        let zero = if inside { weights[from].zero_point(feature, group) as u8 } else { 0 };
                        byte |= zero << (4 * high);
                    }
                    zeros.push(byte);
                }
            }
        }
        Ok(HostPackedInt4 { weight, scales, zeros: self.zero_points.then_some(zeros) })
    }

    /// The weights that were packed: the exact inverse of [`pack`](Self::pack), with nothing in the unused nibbles.
    ///
    /// # Errors
    /// Arrays of another length than the shape's.
    pub fn unpack(&self, packed: &HostPackedInt4) -> Result<Vec<HostInt4>> {
        for (tensor, found, expected) in [
            ("weight", packed.weight.len() * size_of::<u32>(), self.weight_bytes()),
            ("scales", packed.scales.len(), self.scales_bytes()),
            ("zeros", packed.zeros.as_ref().map_or(0, Vec::len), self.zeros_bytes()),
        ] {
            if found != expected {
                let expected = format!("[{expected}] bytes");
                return Err(Error::Shape { kernel: KERNEL, tensor, expected, found: vec![found] });
            }
        }
        let (out, groups, words) = (self.out_features, self.groups(), self.in_features.div_ceil(8));
        let one = HostInt4 {
            out_features: out,
            in_features: self.in_features,
            group_size: self.group_size,
            weight_packed: vec![0; out * words].into(),
            scales: HostTensor { shape: vec![out, groups], data: zero_scales(self.scales, out * groups) },
            zero_points: self.zero_points.then(|| vec![0; out.div_ceil(8) * groups].into()),
        };
        let mut weights = vec![one; if self.rows == Int4Rows::One { 1 } else { 2 }];
        for (index, word) in packed.weight.iter().enumerate() {
            let (tile, place) = (index / TILE_WORDS, index % TILE_WORDS);
            let (tile, k_tile) = (tile / self.k_tiles(), tile % self.k_tiles());
            for nibble in 0..8 {
                let (row, input) = place_of(place, nibble);
                let ((from, feature), input) = (self.source(tile, row), TILE_INPUTS * k_tile + input);
                if feature < out && input < self.in_features {
                    weights[from].weight_packed[feature * words + input / 8] |=
                        (word >> (4 * nibble) & 0xf) << (4 * (input % 8));
                }
            }
        }
        let bytes = crate::tensor::element_bytes(self.scales);
        for (index, scale) in packed.scales.chunks_exact(bytes).enumerate() {
            let (pair, high) = (index / 2 % PAIRS, index % 2);
            let (tile, group) = (index / TILE_ROWS / groups, index / TILE_ROWS % groups);
            let (from, feature) = self.source(tile, pair + PAIRS * high);
            if feature < out {
                let weight = &mut weights[from];
                set_scale(&mut weight.scales.data, feature * groups + group, scale);
                if let (Some(zeros), Some(zero_points)) = (&packed.zeros, &mut weight.zero_points) {
                    let zero = u32::from(zeros[index / 2] >> (4 * high) & 0xf);
                    zero_points[feature / 8 * groups + group] |= zero << (4 * (feature % 8));
                }
            }
        }
        Ok(weights)
    }
}

/// Row and input, within a tile, of a nibble of word `place` = 4 lane + j: what `kernels/int4.cuh` says.
fn place_of(place: usize, nibble: usize) -> (usize, usize) {
    let (lane, j, p) = (place / 4, place % 4, nibble % 4);
    let (g, t) = (lane / 4, lane % 4);
    let row = g + 8 * (p % 2);
    (row, 32 * (j / 2) + 8 * t + 4 * (j % 2) + 2 * (p / 2) + nibble / 4)
}

/// The little-endian bytes of scale number `index`, or of 0.
fn push_scale(scales: &HostData, index: Option<usize>, out: &mut Vec<u8>) {
    match scales {
        HostData::Bf16(data) => out.extend(index.map_or([0; 2], |i| data[i].to_le_bytes())),
        HostData::F16(data) => out.extend(index.map_or([0; 2], |i| data[i].to_le_bytes())),
        HostData::F32(data) => out.extend(index.map_or([0; 4], |i| data[i].to_le_bytes())),
    }
}

fn zero_scales(dtype: DType, count: usize) -> HostData {
    match dtype {
        DType::Bf16 => HostData::Bf16(vec![half::bf16::ZERO; count].into()),
        DType::F16 => HostData::F16(vec![half::f16::ZERO; count].into()),
        _ => HostData::F32(vec![0.0; count].into()),
    }
}

fn set_scale(scales: &mut HostData, index: usize, bytes: &[u8]) {
    match (scales, bytes) {
        (HostData::Bf16(data), &[a, b]) => data[index] = half::bf16::from_le_bytes([a, b]),
        (HostData::F16(data), &[a, b]) => data[index] = half::f16::from_le_bytes([a, b]),
        (HostData::F32(data), &[a, b, c, d]) => data[index] = f32::from_le_bytes([a, b, c, d]),
        _ => {}
    }
}

fn refuse(name: &'static str, expected: &str, found: impl ToString) -> Error {
    Error::Value { kernel: KERNEL, name, expected: expected.to_owned(), found: found.to_string() }
}

/// Packed weights of one shape in device memory: one, or a layer's experts.
#[derive(Debug)]
pub struct PackedInt4<D: Device> {
    shape: Int4Shape,
    count: usize,
    pub(crate) weight: D::Buffer,
    pub(crate) scales: D::Buffer,
    pub(crate) zeros: Option<D::Buffer>,
}

impl<D: Device> PackedInt4<D> {
    /// Allocates `count` weights; the contents are unspecified.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(device: &D, name: &str, shape: Int4Shape, count: usize) -> Result<Self> {
        let zeros =
            shape.zero_points.then(|| device.alloc(&format!("{name} zeros"), count * shape.zeros_bytes()));
        Ok(Self {
            shape,
            count,
            weight: device.alloc(&format!("{name} weight"), count * shape.weight_bytes())?,
            scales: device.alloc(&format!("{name} scales"), count * shape.scales_bytes())?,
            zeros: zeros.transpose()?,
        })
    }

    /// The shape of each.
    pub fn shape(&self) -> &Int4Shape {
        &self.shape
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The packed words, of all weights in their order.
    pub fn weight(&self) -> &D::Buffer {
        &self.weight
    }

    /// The scales.
    pub fn scales(&self) -> &D::Buffer {
        &self.scales
    }

    /// The zero points, if there are any.
    pub fn zeros(&self) -> Option<&D::Buffer> {
        self.zeros.as_ref()
    }

    /// Output features.
    pub fn out_features(&self) -> usize {
        self.shape.out_features
    }

    /// Input features.
    pub fn in_features(&self) -> usize {
        self.shape.in_features
    }

    /// Writes what the host packed to place `index`.
    ///
    /// # Errors
    /// The arrays are of another shape, or there is no such place; the device.
    pub fn write(&self, device: &D, index: usize, packed: &HostPackedInt4) -> Result<()> {
        device.write(
            &self.weight,
            index * self.shape.weight_bytes(),
            bytemuck::cast_slice(&packed.weight),
        )?;
        device.write(&self.scales, index * self.shape.scales_bytes(), &packed.scales)?;
        if let (Some(buffer), Some(zeros)) = (&self.zeros, &packed.zeros) {
            device.write(buffer, index * self.shape.zeros_bytes(), zeros)?;
        }
        Ok(())
    }

    /// Reads place `index` back. Waits for the device.
    ///
    /// # Errors
    /// There is no such place; the device.
    pub fn read(&self, device: &D, index: usize) -> Result<HostPackedInt4> {
        let shape = &self.shape;
        let mut weight = vec![0_u32; shape.weight_bytes() / size_of::<u32>()];
        device.read(&self.weight, index * shape.weight_bytes(), bytemuck::cast_slice_mut(&mut weight))?;
        let mut scales = vec![0; shape.scales_bytes()];
        device.read(&self.scales, index * shape.scales_bytes(), &mut scales)?;
        let read_zeros = |buffer| {
            let mut zeros = vec![0; shape.zeros_bytes()];
            device.read(buffer, index * shape.zeros_bytes(), &mut zeros).map(|()| zeros)
        };
        Ok(HostPackedInt4 { weight, scales, zeros: self.zeros.as_ref().map(read_zeros).transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random words, scales that are all different; unused nibbles are zero, as `unpack` leaves them.
    fn host(
        out: usize,
        inner: usize,
        group_size: usize,
        dtype: DType,
        zero_points: bool,
        seed: u32,
    ) -> HostInt4 {
        let random =
            |i: usize| (i as u32 ^ seed).wrapping_mul(0x9e37_79b9).rotate_left(13).wrapping_mul(0x85eb_ca6b);
        let words = inner.div_ceil(8);
        let used = |word: usize| match inner - 8 * word {
            left @ 0..8 => (1 << (4 * left)) - 1,
            _ => u32::MAX,
        };
        let groups = inner.div_ceil(group_size);
        let scale = |i: usize| (random(i) % 256) as f32 / 64.0;
        let count = out * groups;
        let data = match dtype {
            DType::Bf16 => HostData::Bf16((0..count).map(|i| half::bf16::from_f32(scale(i))).collect()),
            DType::F16 => HostData::F16((0..count).map(|i| half::f16::from_f32(scale(i))).collect()),
            _ => HostData::F32((0..count).map(scale).collect()),
        };
        let zero_word = |i: usize| {
            let rows = (out - i / groups * 8).min(8);
            random(i + 77) & ((1_u64 << (4 * rows)) - 1) as u32
        };
        HostInt4 {
            out_features: out,
            in_features: inner,
            group_size,
            weight_packed: (0..out * words).map(|i| random(i) & used(i % words)).collect(),
            scales: HostTensor { shape: vec![out, groups], data },
            zero_points: zero_points.then(|| (0..out.div_ceil(8) * groups).map(zero_word).collect()),
        }
    }

    #[test]
    fn every_nibble_of_a_tile_has_its_place() {
        let mut seen = vec![false; TILE_ROWS * TILE_INPUTS];
        for place in 0..TILE_WORDS {
            for nibble in 0..8 {
                let (row, input) = place_of(place, nibble);
                assert!(!std::mem::replace(&mut seen[row * TILE_INPUTS + input], true));
            }
        }
        // Lane 6 (g = 1, t = 2), word 3 (h = 1, i = 1): a[3]'s upper half.
        assert_eq!(place_of(4 * 6 + 3, 7), (9, 32 + 16 + 4 + 3));
    }

    #[test]
    fn what_was_packed_comes_back() {
        for (out, inner, group_size) in
            [(16, 64, 32), (40, 192, 128), (9, 20, 20), (33, 100, 32), (8, 65, 96)]
        {
            for dtype in WEIGHTS {
                for zero_points in [false, true] {
                    let gate = host(out, inner, group_size, dtype, zero_points, 1);
                    let up = host(out, inner, group_size, dtype, true, 2);
                    for weights in [vec![&gate], vec![&up], vec![&gate, &up]] {
                        let shape = Int4Shape::of(&weights).unwrap();
                        let found = shape.unpack(&shape.pack(&weights).unwrap()).unwrap();
                        for (found, &weight) in found.iter().zip(&weights) {
                            assert_eq!(found.dequantise(), weight.dequantise());
                            if weight.zero_points.is_some() == shape.zero_points {
                                assert_eq!(found, weight);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_gate_and_its_up_projection_lie_in_one_tile() {
        let gate = host(12, 64, 64, DType::F32, false, 1);
        let up = host(12, 64, 64, DType::F32, false, 2);
        let shape = Int4Shape::of(&[&gate, &up]).unwrap();
        let packed = shape.pack(&[&gate, &up]).unwrap();
        assert_eq!((shape.row_tiles(), packed.weight.len(), packed.scales.len()), (2, 256, 128));
        // Lane 0, word 0: row 0 of both, inputs 0 to 3.
        let (gate, up) = (gate.weight_packed[0], up.weight_packed[0]);
        let nibble = |word: u32, i: u32| word >> (4 * i) & 0xf;
        let expected = [(gate, 0), (up, 0), (gate, 2), (up, 2), (gate, 1), (up, 1), (gate, 3), (up, 3)];
        for (p, (word, i)) in expected.into_iter().enumerate() {
            assert_eq!(nibble(packed.weight[0], p as u32), nibble(word, i), "nibble {p}");
        }
    }

    #[test]
    fn refusals_say_what_does_not_fit() {
        let good = host(16, 96, 32, DType::Bf16, true, 1);
        let refused = |weights: &[&HostInt4]| Int4Shape::of(weights).unwrap_err().to_string();
        let groups = HostInt4 { group_size: 16, ..good.clone() };
        assert_eq!(
            refused(&[&groups]),
            "upload_int4: `group_size` is 16, expected a multiple of 32, or all inputs"
        );
        let none = HostInt4 { group_size: 0, ..good.clone() };
        assert!(refused(&[&none]).contains("`group_size` is 0"));
        let short = HostInt4 { weight_packed: vec![0; 191].into(), ..good.clone() };
        assert_eq!(refused(&[&short]), "upload_int4: `weight_packed` has shape [191], expected [192]");
        let zeros = HostInt4 { zero_points: Some(vec![0; 7].into()), ..good.clone() };
        assert_eq!(refused(&[&zeros]), "upload_int4: `zero_points` has shape [7], expected [6]");
        assert!(
            refused(&[&good, &host(8, 96, 32, DType::Bf16, true, 1)])
                .contains("`out_features` is 8, expected 16")
        );
        let scales = host(16, 96, 32, DType::F16, true, 1);
        assert_eq!(refused(&[&good, &scales]), "upload_int4: `scales` is f16 weights, expected bf16 weights");
        assert!(refused(&[]).contains("a gate and an up projection"));
    }
}
