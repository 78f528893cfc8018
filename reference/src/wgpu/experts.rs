//! A layer's routed experts in device memory, in any mix of formats.

use bytemuck::cast_slice;

use super::Wgpu;
use super::tensor::{WEIGHTS, WgpuTensor};
use crate::cpu::{check_expert_dims, check_int4_weight};
use crate::error::{Error, Result};
use crate::tensor::{HostData, HostExpert, HostInt4, HostLinear, HostTensor};

/// Words of a vector, which rows are whole numbers of.
const VECTOR: usize = 4;

/// What is packed at once, in bytes: the host has it twice meanwhile.
const CHUNK: usize = 1 << 28;

/// In place of zero points that are not there.
const NO_ZEROS: u32 = u32::MAX;

/// The number of INT4 behind those of the types of dense weights.
const INT4: u32 = WEIGHTS.len() as u32;

/// Projections of an expert, and words of one in `moe.wgsl`'s table.
const PROJECTIONS: usize = 3;
const ENTRY: usize = 8;

/// The routed experts of one layer of `Wgpu`, each projection in its own format.
#[derive(Debug)]
pub struct WgpuExperts {
    pub(super) count: usize,
    pub(super) hidden: usize,
    pub(super) moe_intermediate: usize,
    pub(super) chunks: Vec<Chunk>,
}

/// Experts that one binding holds.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) first: usize,
    pub(super) count: usize,
    /// Where the projections lie among the weights.
    pub(super) table: WgpuTensor,
    pub(super) weights: WgpuTensor,
}

/// A chunk in host memory.
#[derive(Default)]
struct Packed {
    table: Vec<u32>,
    words: Vec<u32>,
}

impl WgpuExperts {
    pub(super) fn upload(wgpu: &Wgpu, experts: Vec<HostExpert>, kernel: &'static str) -> Result<Self> {
        let (moe_intermediate, hidden) = check_expert_dims(&experts, kernel)?;
        if hidden % 2 + moe_intermediate % 2 != 0 || hidden * moe_intermediate == 0 {
            return Err(Error::Shape {
                kernel,
                tensor: "gate_proj",
                expected: "even dimensions, whose rows are whole words".into(),
                found: vec![moe_intermediate, hidden],
            });
        }
        let count = experts.len();
        let most =
            usize::try_from(wgpu.context().limits.max_storage_buffer_binding_size).unwrap_or(usize::MAX);
        let (mut chunks, mut packed, mut first) = (Vec::new(), Packed::default(), 0);
        for (e, expert) in experts.into_iter().enumerate() {
            let mut next = Packed::default();
            let HostExpert { gate_proj, up_proj, down_proj } = expert.made();
            for weight in [gate_proj, up_proj, down_proj] {
                next.add(&weight)?;
            }
            if 4 * next.words.len() > most {
                return Err(Error::Value {
                    kernel,
                    name: "experts",
                    expected: format!(
                        "experts of at most {most} bytes, which is what the adapter binds; use more ranks"
                    ),
                    found: format!("{} bytes", 4 * next.words.len()),
                });
            }
            if 4 * (packed.words.len() + next.words.len()) > most.min(CHUNK) && first < e {
                chunks.push(std::mem::take(&mut packed).upload(wgpu, first)?);
                first = e;
            }
            packed.append(next);
        }
        chunks.push(packed.upload(wgpu, first)?);
        Ok(Self { count, hidden, moe_intermediate, chunks })
    }
}

impl Packed {
    fn upload(self, wgpu: &Wgpu, first: usize) -> Result<Chunk> {
        Ok(Chunk {
            first,
            count: self.table.len() / (ENTRY * PROJECTIONS),
            table: wgpu.upload_words(&[self.table.len()], &self.table)?,
            weights: wgpu.upload_words(&[self.words.len()], &self.words)?,
        })
    }

    /// `other` behind this: its places move.
    fn append(&mut self, mut other: Self) {
        let vectors = (self.words.len() / VECTOR) as u32;
        for entry in other.table.chunks_exact_mut(ENTRY) {
            for place in [1, 3, 4] {
                if entry[place] != NO_ZEROS {
                    entry[place] += vectors;
                }
            }
        }
        self.table.append(&mut other.table);
        self.words.append(&mut other.words);
    }

    fn add(&mut self, weight: &HostLinear) -> Result<()> {
        let entry = match weight {
            HostLinear::Dense(weight) => self.dense(weight),
            HostLinear::Int4(weight) => {
                check_int4_weight(weight)?;
                self.int4(weight)
            }
            // Made before.
            HostLinear::Random(weight) => return self.add(&weight.make()),
        };
        self.table.extend(entry);
        Ok(())
    }

    fn dense(&mut self, weight: &HostTensor) -> [u32; ENTRY] {
        let columns = weight.shape[1];
        let (rows, row_vectors) = match &weight.data {
            HostData::Bf16(values) => self.rows(cast_slice(values), 2 * columns),
            HostData::F16(values) => self.rows(cast_slice(values), 2 * columns),
            HostData::F32(values) => self.rows(cast_slice(values), 4 * columns),
        };
        [dtype(weight), rows, row_vectors, 0, NO_ZEROS, 1, 0, 1]
    }

    fn int4(&mut self, weight: &HostInt4) -> [u32; ENTRY] {
        let (rows, row_vectors) = self.rows(cast_slice(&weight.weight_packed), 4 * weight.words_per_row());
        let scales = match &weight.scales.data {
            HostData::Bf16(values) => self.bytes(cast_slice(values)),
            HostData::F16(values) => self.bytes(cast_slice(values)),
            HostData::F32(values) => self.bytes(cast_slice(values)),
        };
        let zeros = weight.zero_points.as_ref().map_or(NO_ZEROS, |words| self.bytes(cast_slice(words)));
        let (group_size, groups) = (weight.group_size as u32, weight.groups() as u32);
        [INT4, rows, row_vectors, scales, zeros, group_size, dtype(&weight.scales), groups]
    }

    /// Rows of `row_bytes`, each filled up to whole vectors: where they begin, and the vectors of one.
    fn rows(&mut self, bytes: &[u8], row_bytes: usize) -> (u32, u32) {
        let start = self.words.len() / VECTOR;
        for row in bytes.chunks(row_bytes) {
            self.bytes(row);
        }
        (start as u32, row_bytes.div_ceil(4 * VECTOR) as u32)
    }

    /// `bytes`, filled up to whole vectors: where they begin.
    fn bytes(&mut self, bytes: &[u8]) -> u32 {
        let start = self.words.len() / VECTOR;
        self.words.extend(bytes.chunks(4).map(|bytes| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(word)
        }));
        self.words.resize(self.words.len().next_multiple_of(VECTOR), 0);
        start as u32
    }
}

/// The number of a dense weight's type in `prelude.wgsl`.
fn dtype(weight: &HostTensor) -> u32 {
    WEIGHTS.iter().position(|&dtype| dtype == weight.dtype()).unwrap_or_default() as u32
}
