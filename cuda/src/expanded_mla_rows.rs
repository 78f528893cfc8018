//! What `expanded_mla` reads beside the keys and values: a sequence's latent rows one below the other, and a bit for each selected position.

use dsa80_reference::Result;

use crate::batch::CudaBatch;
use crate::device::{Arg, Device, Launch, Program, ProgramEntry};
use crate::tensor::CudaTensor;

const THREADS: usize = 256;

/// Positions of a word of bits.
pub(crate) const WORD: usize = 32;

/// Both kernels, for caches with rows of `rank + rope` columns and tokens with up to `words` words of bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) rank: usize,
    pub(crate) rope: usize,
    pub(crate) words: usize,
}

impl Rows {
    pub(crate) fn entries(self) -> [ProgramEntry; 2] {
        let Self { rank, rope, words } = self;
        ["latent_rows", "selection_bits"].map(|entry| ProgramEntry {
            program: Program::new(
                "expanded_mla_rows.cu",
                [("RANK", rank), ("ROPE", rope), ("WORDS", words), ("TILE_SHARED_BYTES", 4 * words)],
            ),
            entry,
            threads: THREADS as u32,
            shared_bytes: 4 * words,
            variant: format!("{entry}, {rank} + {rope}"),
        })
    }

    /// The rows of the only sequence's context, of a bf16 cache: `latent` `[context, rank]`, `rotary` `[context, rope]`.
    pub(crate) fn gather<D: Device>(
        self,
        device: &D,
        batch: &CudaBatch<D>,
        cache: &CudaTensor<D>,
        latent: &CudaTensor<D>,
        rotary: &D::Buffer,
    ) -> Result<()> {
        let [entry, _] = self.entries();
        let (context, page_size) = (batch.host().max_context_len, batch.host().page_size);
        let vectors = context * (self.rank + self.rope) / 8;
        device.launch(&Launch {
            program: &entry.program,
            entry: entry.entry,
            grid: [vectors.div_ceil(THREADS) as u32, 1, 1],
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            shape: format!("{context} rows of {} + {}", self.rank, self.rope),
            args: &[
                Arg::Buffer(cache.buffer()),
                Arg::Buffer(&batch.block_table),
                Arg::Buffer(latent.buffer()),
                Arg::Buffer(rotary),
                Arg::I32(context as i32),
                Arg::I32(page_size as i32),
            ],
        })
    }

    /// `bits` `[tokens, words]` of the first positions.
    pub(crate) fn bits<D: Device>(
        self,
        device: &D,
        topk_indices: &CudaTensor<D>,
        [tokens, k, words]: [usize; 3],
        bits: &D::Buffer,
    ) -> Result<()> {
        let [_, entry] = self.entries();
        device.launch(&Launch {
            program: &entry.program,
            entry: entry.entry,
            grid: [tokens as u32, 1, 1],
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            shape: format!("{tokens} tokens, {k} of {} positions", words * WORD),
            args: &[
                Arg::Buffer(topk_indices.buffer()),
                Arg::Buffer(bits),
                Arg::I32(k as i32),
                Arg::I32(words as i32),
            ],
        })
    }
}
