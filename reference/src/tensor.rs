//! What crosses the border between host and backend: element types, host tensors, packed INT4 weights.

use half::{bf16, f16};

use crate::host_array::HostArray;
use crate::random::RandomLinear;

/// The element type of a tensor, as the kernel contract names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// Activations and caches: bf16 on the GPU backends, f32 on `Wgpu` where it is asked to, the oracle's own float (f32 or f64) on `Cpu`.
    Act,
    /// What must not be rounded to bf16 (logits, scores, router weights, cos/sin): f32 on the GPU backends,
    /// the oracle's own float on `Cpu`.
    Float,
    /// Indices: i32 everywhere.
    Index,
    /// Caches in 8 bits: bytes on every backend, laid out as the kernel that writes them says.
    Fp8,
    /// Weights in bfloat16, as stored in the checkpoint.
    Bf16,
    /// Weights in IEEE half precision, as stored in the checkpoint.
    F16,
    /// Weights in single precision, as stored in the checkpoint.
    F32,
}

impl DType {
    /// Whether this is a checkpoint weight type.
    pub fn is_weight(self) -> bool {
        matches!(self, DType::Bf16 | DType::F16 | DType::F32)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::Act => "activations",
            DType::Float => "floats",
            DType::Index => "indices (i32)",
            DType::Fp8 => "8-bit cache rows",
            DType::Bf16 => "bf16 weights",
            DType::F16 => "f16 weights",
            DType::F32 => "f32 weights",
        })
    }
}

/// The elements of a [`HostTensor`].
#[derive(Debug, Clone, PartialEq)]
pub enum HostData {
    /// bfloat16 weights.
    Bf16(HostArray<bf16>),
    /// Half precision weights.
    F16(HostArray<f16>),
    /// Single precision weights.
    F32(HostArray<f32>),
}

/// A dense, row-major weight tensor in host memory, in the type the checkpoint stores.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// `shape.iter().product()` elements.
    pub data: HostData,
}

impl HostTensor {
    /// An f32 tensor.
    pub fn f32(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        Self { shape: shape.into(), data: HostData::F32(data.into()) }
    }

    /// A bf16 tensor.
    pub fn bf16(shape: impl Into<Vec<usize>>, data: Vec<bf16>) -> Self {
        Self { shape: shape.into(), data: HostData::Bf16(data.into()) }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self.data {
            HostData::Bf16(_) => DType::Bf16,
            HostData::F16(_) => DType::F16,
            HostData::F32(_) => DType::F32,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match &self.data {
            HostData::Bf16(v) => v.len(),
            HostData::F16(v) => v.len(),
            HostData::F32(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements widened to f32 (exact).
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            HostData::Bf16(v) => v.iter().map(|x| x.to_f32()).collect(),
            HostData::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            HostData::F32(v) => v.to_vec(),
        }
    }
}

/// One INT4 linear layer in the *canonical* packed form that every checkpoint format is brought to at load,
/// without unpacking where the format allows (compressed-tensors stores exactly this).
///
/// The weight is `w[o, i] = (q[o, i] - z[o, g]) * scale[o, g]` with `g = i / group_size`, `q` and `z`
/// unsigned nibbles and the product never rounded to bf16: with bf16 or f16 scales it has at most 5 + 11
/// significant bits and is exact in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct HostInt4 {
    /// Rows: output features.
    pub out_features: usize,
    /// Columns: input features.
    pub in_features: usize,
    /// Columns that share a scale; equals `in_features` for per-channel scales.
    pub group_size: usize,
    /// `[out, ceil(in / 8)]`: nibble `j` (bits `4j..4j+3`) of word `c` is `q[o, 8c + j]`, in 0..=15. The
    /// unused nibbles of a padded last word are ignored.
    pub weight_packed: HostArray<u32>,
    /// `[out, ceil(in / group_size)]` in the checkpoint's own float type.
    pub scales: HostTensor,
    /// `[ceil(out / 8), groups]`: nibble `j` of row `r` is `z[8r + j, g]`. `None` means 8 everywhere
    /// (symmetric).
    pub zero_points: Option<HostArray<u32>>,
}

impl HostInt4 {
    /// Groups along the input dimension.
    pub fn groups(&self) -> usize {
        self.in_features.div_ceil(self.group_size)
    }

    /// Packed words in a row.
    pub fn words_per_row(&self) -> usize {
        self.in_features.div_ceil(8)
    }

    /// The nibble `q[o, i]`.
    pub fn q(&self, o: usize, i: usize) -> u32 {
        (self.weight_packed[o * self.words_per_row() + i / 8] >> (4 * (i % 8))) & 0xf
    }

    /// The zero point `z[o, g]`.
    pub fn zero_point(&self, o: usize, g: usize) -> u32 {
        match &self.zero_points {
            None => 8,
            Some(z) => (z[(o / 8) * self.groups() + g] >> (4 * (o % 8))) & 0xf,
        }
    }

    /// The whole weight as f32: exactly with bf16 or f16 scales, rounded once with f32 ones. For load-time
    /// conversions and tests; kernels never call it.
    pub fn dequantise(&self) -> HostTensor {
        let scales = self.scales.to_f32();
        let groups = self.groups();
        let mut data = Vec::with_capacity(self.out_features * self.in_features);
        for o in 0..self.out_features {
            for i in 0..self.in_features {
                let g = i / self.group_size;
                let centred = self.q(o, i) as f32 - self.zero_point(o, g) as f32;
                data.push(centred * scales[o * groups + g]);
            }
        }
        HostTensor::f32([self.out_features, self.in_features], data)
    }
}

/// A linear layer's weight as the checkpoint stores it, `[out, in]`.
#[derive(Debug, Clone, PartialEq)]
pub enum HostLinear {
    /// Unquantised.
    Dense(HostTensor),
    /// Packed INT4.
    Int4(HostInt4),
    /// Random numbers of either kind, which the backend makes.
    Random(RandomLinear),
}

impl HostLinear {
    /// `(out_features, in_features)`.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            HostLinear::Dense(t) => (t.shape[0], t.shape[1]),
            HostLinear::Int4(w) => (w.out_features, w.in_features),
            HostLinear::Random(w) => (w.out_features, w.in_features),
        }
    }

    /// The weight with its numbers: what is random is made.
    #[must_use]
    pub fn made(self) -> Self {
        match self {
            HostLinear::Random(random) => random.make(),
            made => made,
        }
    }

    /// The weight as a dense one, as exact as [`HostInt4::dequantise`].
    pub fn dense(self) -> HostTensor {
        match self {
            HostLinear::Dense(tensor) => tensor,
            HostLinear::Int4(packed) => packed.dequantise(),
            HostLinear::Random(random) => random.make().dense(),
        }
    }

    /// The group size of a packed one.
    pub fn int4_group_size(&self) -> Option<usize> {
        match self {
            HostLinear::Dense(_) => None,
            HostLinear::Int4(weight) => Some(weight.group_size),
            HostLinear::Random(weight) => weight.int4().map(|weight| weight.group_size),
        }
    }

    /// Fails unless a dense weight is a matrix with as many elements as its shape says; `kernel` and `tensor`
    /// are what the error calls it.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape).
    pub fn check(&self, kernel: &'static str, tensor: &'static str) -> crate::Result<()> {
        if let HostLinear::Dense(weight) = self
            && !matches!(weight.shape[..], [out, inner] if out * inner == weight.len())
        {
            let expected = format!("the two dimensions of {} elements", weight.len());
            return Err(crate::Error::Shape { kernel, tensor, expected, found: weight.shape.clone() });
        }
        Ok(())
    }
}

/// One routed expert's three projections.
#[derive(Debug, Clone, PartialEq)]
pub struct HostExpert {
    /// `[moe_intermediate, hidden]`.
    pub gate_proj: HostLinear,
    /// `[moe_intermediate, hidden]`.
    pub up_proj: HostLinear,
    /// `[hidden, moe_intermediate]`.
    pub down_proj: HostLinear,
}

impl HostExpert {
    /// The expert with its numbers: what is random is made.
    #[must_use]
    pub fn made(self) -> Self {
        let [gate_proj, up_proj, down_proj] =
            [self.gate_proj, self.up_proj, self.down_proj].map(HostLinear::made);
        Self { gate_proj, up_proj, down_proj }
    }

    /// Whether `moe_int4` takes these experts: every projection is INT4, with one group size for all gates
    /// and ups and one for all downs (which differ where scales are per channel).
    pub fn fit_moe_int4(experts: &[HostExpert]) -> bool {
        let group_sizes = |expert: &HostExpert| {
            let gate = expert.gate_proj.int4_group_size()?;
            (expert.up_proj.int4_group_size()? == gate).then_some((gate, expert.down_proj.int4_group_size()?))
        };
        let Some(first) = experts.first().and_then(group_sizes) else { return false };
        experts.iter().all(|expert| group_sizes(expert) == Some(first))
    }
}

/// A tensor that lives on a backend: dense, row-major, with a fixed allocation and a variable shape.
pub trait DeviceTensor: Send {
    /// Dimensions, outermost first.
    fn shape(&self) -> &[usize];

    /// The element type.
    fn dtype(&self) -> DType;

    /// Elements that the allocation holds.
    fn capacity(&self) -> usize;

    /// Sets the shape without touching memory, so that one workspace serves every batch size and the output
    /// of a projection is seen as heads.
    ///
    /// # Errors
    /// [`Error::Capacity`](crate::Error::Capacity) when `shape` has more elements than
    /// [`capacity`](Self::capacity).
    fn set_shape(&mut self, shape: &[usize]) -> crate::Result<()>;

    /// [`set_shape`](Self::set_shape) of the first dimension alone.
    ///
    /// # Errors
    /// As for [`set_shape`](Self::set_shape).
    fn set_rows(&mut self, rows: usize) -> crate::Result<()> {
        let mut shape = self.shape().to_vec();
        if let Some(first) = shape.first_mut() {
            *first = rows;
        }
        self.set_shape(&shape)
    }
}
