//! `sample`: a token for every row, and log-probabilities.
//!
//! The host turns what a row asks for into a few numbers and a sorted list of the tokens whose logits change, and writes them to the
//! workspace. Three kernels follow: `sample` takes the rows apart into parts, and its last block of a row has the result unless the row
//! drops improbable tokens; then `sample_filter` counts tokens by how probable they are, and `sample_pick` finds the cut and draws.

use dsa80_reference::{DType, DeviceTensor, Error, Result, SampleOutput, SampleRow, SamplingParams};
use serde::{Deserialize, Serialize};

use crate::device::{Arg, Device, Launch, Limits, Program, ProgramEntry};
use crate::tensor::CudaTensor;
use crate::tile::{Cost, Tile, require, require_shared};

const KERNEL: &str = "sample";

/// Parts of a row at most.
const MAX_PARTS: usize = 128;

/// Tokens of a part at most, so that 16 bits count them.
const MAX_PART_TOKENS: usize = 65_528;

/// Tokens that a row can report at most.
const MAX_TOP: usize = 32;

/// Places for candidates of these.
const TOP_LIST: usize = 512;

/// Powers of two that the bins of `sample_filter` cover.
const OCTAVES: usize = 32;

/// Bytes of `Request`, `State` and `Part` in `sample.cuh`.
const REQUEST_BYTES: usize = 64;
const STATE_BYTES: usize = 64;
const PART_BYTES: usize = 48;

/// How rows are laid over blocks, and how finely tokens are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleTile {
    /// Threads of a block.
    pub threads: usize,
    /// Blocks for every multiprocessor that rows are split to reach.
    pub split: usize,
    /// Bits of a probability's logarithm, beside its exponent, by which tokens are counted.
    pub fraction_bits: usize,
    /// Tokens of a row that are put into order at most (more only cost time).
    pub listed: usize,
}

impl Tile for SampleTile {
    const KERNEL: &'static str = KERNEL;
    type Dims = ();

    fn safe((): ()) -> Self {
        Self { threads: 256, split: 3, fraction_bits: 7, listed: 4096 }
    }

    fn candidates((): (), limits: &Limits) -> Vec<Self> {
        let tiles = [(128, 6), (256, 2), (256, 3), (256, 4)].into_iter().map(|(threads, split)| Self {
            threads,
            split,
            ..Self::safe(())
        });
        tiles.filter(|tile| tile.validate((), limits).is_ok()).collect()
    }

    fn validate(&self, (): (), limits: &Limits) -> Result<()> {
        let Self { threads, split, fraction_bits, listed } = *self;
        // A thread takes up to 100 registers.
        require(self, threads.is_power_of_two() && (32..=512).contains(&threads), || {
            format!("{threads} threads are not 1, 2, 4, 8 or 16 warps")
        })?;
        require(self, (1..=32).contains(&split), || "a multiprocessor has 1 to 32 blocks".into())?;
        require(self, fraction_bits <= 8, || format!("{fraction_bits} bits are not 0 to 8"))?;
        require(self, listed.is_power_of_two() && (4..=8192).contains(&listed), || {
            format!("{listed} tokens are not a power of two from 4 to 8192")
        })?;
        Stage::ALL.into_iter().try_for_each(|stage| require_shared(self, self.shared_bytes(stage), limits))
    }
}

/// The kernels, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Sample,
    Filter,
    Pick,
}

impl Stage {
    const ALL: [Self; 3] = [Self::Sample, Self::Filter, Self::Pick];

    fn entry(self) -> &'static str {
        match self {
            Stage::Sample => KERNEL,
            Stage::Filter => "sample_filter",
            Stage::Pick => "sample_pick",
        }
    }

    fn source(self) -> &'static str {
        match self {
            Stage::Sample => "sample.cu",
            Stage::Filter => "sample_filter.cu",
            Stage::Pick => "sample_pick.cu",
        }
    }
}

impl SampleTile {
    fn bins(&self) -> usize {
        OCTAVES << self.fraction_bits
    }

    /// Parts that a round of a search tells apart.
    fn digits(&self) -> usize {
        self.bins() / 4
    }

    /// Bytes of `Shared` in the kernel of a stage.
    fn shared_bytes(&self, stage: Stage) -> usize {
        let warps = self.threads / 32;
        // What warps reduce through, whether the block is its row's last, marks of edited tokens.
        let block = 24 * warps + 16 + 4 * self.threads;
        block
            + match stage {
                // Candidates for the best tokens, and the threads' own.
                Stage::Sample => 8 * TOP_LIST + 8 * self.threads + 16,
                // Counts and masses, and where the cuts are.
                Stage::Filter => 12 * self.bins() + 32,
                // The list, or counts and masses of the digits of a search.
                Stage::Pick => 12 * self.listed.max(self.digits()) + 16,
            }
    }

    fn program(&self, stage: Stage) -> Program {
        Program::new(
            stage.source(),
            [
                ("TILE_THREADS", self.threads),
                ("TILE_FRACTION_BITS", self.fraction_bits),
                ("TILE_LISTED", self.listed),
                ("TILE_SHARED_BYTES", self.shared_bytes(stage)),
            ],
        )
    }

    /// Parts of each of `rows` rows.
    fn parts(&self, rows: usize, vocab: usize, limits: &Limits) -> usize {
        let by_device = limits.multiprocessors as usize * self.split / rows.max(1);
        let by_row = vocab.div_ceil(4 * self.threads);
        by_device.min(by_row).clamp(1, MAX_PARTS).max(vocab.div_ceil(MAX_PART_TOKENS))
    }
}

/// Blocks that search one of `rows` rows. They wait for each other, so all of them have a multiprocessor.
fn searching_parts(rows: usize, row_parts: usize, limits: &Limits) -> usize {
    (limits.multiprocessors as usize / rows.max(1)).clamp(1, row_parts)
}

/// Every program of a tile.
pub fn programs(tile: &SampleTile) -> Vec<ProgramEntry> {
    let entry = |stage: Stage| ProgramEntry {
        program: tile.program(stage),
        entry: stage.entry(),
        threads: tile.threads as u32,
        shared_bytes: tile.shared_bytes(stage),
        variant: stage.entry().to_owned(),
    };
    Stage::ALL.map(entry).to_vec()
}

/// What the kernels tell each other, and what the host tells them.
#[derive(Debug)]
pub struct SampleWorkspace<D: Device> {
    tile: SampleTile,
    max_rows: usize,
    max_top: usize,
    max_edits: usize,
    uploads: D::Buffer,
    arrivals: D::Buffer,
    states: D::Buffer,
    parts: D::Buffer,
    tops: D::Buffer,
    counts: D::Buffer,
    masses: D::Buffer,
    lengths: D::Buffer,
    lists: D::Buffer,
}

impl<D: Device> SampleWorkspace<D> {
    /// For launches over up to `max_rows` rows of `vocab` logits that report up to `max_top` tokens each. Takes
    /// `140 + 128 (48 + 8 max_top) + 12 * 2^(5 + fraction_bits) + 16 listed` bytes a row (138 KiB for the safe tile and 20 tokens), and
    /// `8 (4 vocab + 4096)` for edits of logits: rows whose edits do not fit together are sampled one after the other.
    ///
    /// # Errors
    /// Memory runs out.
    pub fn alloc(
        device: &D,
        tile: &SampleTile,
        max_rows: usize,
        vocab: usize,
        max_top: usize,
    ) -> Result<Self> {
        let max_edits = 4 * vocab + 4096;
        let zeros = |name: &str, bytes: usize| {
            let buffer = device.alloc(name, bytes)?;
            device.write(&buffer, 0, &vec![0; bytes])?;
            Ok(buffer)
        };
        Ok(Self {
            tile: *tile,
            max_rows,
            max_top,
            max_edits,
            uploads: device.alloc("sample uploads", upload_bytes(max_rows, max_edits))?,
            arrivals: zeros("sample arrivals", 4 * max_rows)?,
            states: device.alloc("sample states", STATE_BYTES * max_rows)?,
            parts: device.alloc("sample parts", PART_BYTES * MAX_PARTS * max_rows)?,
            tops: device.alloc("sample tops", 8 * max_top * MAX_PARTS * max_rows)?,
            counts: zeros("sample counts", 4 * tile.bins() * max_rows)?,
            masses: zeros("sample masses", 8 * tile.bins() * max_rows)?,
            lengths: zeros("sample lengths", 4 * max_rows)?,
            lists: device.alloc("sample lists", 16 * tile.listed * max_rows)?,
        })
    }
}

/// Requests, the rows that are filtered, and edits, as they lie one behind the other.
fn upload_bytes(rows: usize, edits: usize) -> usize {
    REQUEST_BYTES * rows + 4 * rows.next_multiple_of(2) + 8 * edits
}

/// What a launch over `rows` rows moves: every logit once.
pub fn cost(rows: usize, vocab: usize, top: usize) -> Cost {
    Cost { bytes: (rows * (4 * vocab + 8 * (1 + top))) as f64, flops: 0.0 }
}

/// Rows that are sampled together; what they ask for lies in the workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleStep {
    first_row: usize,
    rows: usize,
    filtered: usize,
    edits: usize,
}

impl SampleStep {
    /// How many they are.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }
}

/// The kernel of the contract's [`sample`](dsa80_reference::Kernels::sample).
///
/// # Errors
/// A shape, element type, parameter or tile that does not fit; more rows or tokens than the workspace has room for; the device.
pub fn sample<D: Device>(
    device: &D,
    tile: &SampleTile,
    workspace: &SampleWorkspace<D>,
    logits: &CudaTensor<D>,
    rows: &[SampleRow<'_>],
    out: &mut SampleOutput<CudaTensor<D>>,
) -> Result<()> {
    let vocab = check(device, tile, workspace, logits, rows, out)?;
    let mut first_row = 0;
    while first_row < rows.len() {
        let step = upload(device, workspace, vocab, rows, first_row)?;
        launch(device, tile, workspace, logits, step, out)?;
        first_row += step.rows;
    }
    Ok(())
}

fn check<D: Device>(
    device: &D,
    tile: &SampleTile,
    workspace: &SampleWorkspace<D>,
    logits: &CudaTensor<D>,
    rows: &[SampleRow<'_>],
    out: &SampleOutput<CudaTensor<D>>,
) -> Result<usize> {
    let [count, vocab] = logits.dims(KERNEL, "logits")?;
    logits.expect(KERNEL, "logits", count == rows.len() && (vocab > 0 || count == 0), || {
        format!("[{}, V] with V at least 1", rows.len())
    })?;
    logits.expect_dtype(KERNEL, "logits", &[DType::Float], "floats")?;
    let [_, top] = out.top_ids.dims(KERNEL, "top_ids")?;
    for (name, tensor, shape) in [
        ("token_ids", &out.token_ids, &[count][..]),
        ("logprobs", &out.logprobs, &[count]),
        ("top_ids", &out.top_ids, &[count, top]),
        ("top_logprobs", &out.top_logprobs, &[count, top]),
    ] {
        tensor.expect(KERNEL, name, tensor.shape() == shape, || format!("{shape:?}"))?;
        let (dtype, expected) =
            if name.ends_with("ids") { (DType::Index, "indices") } else { (DType::Float, "floats") };
        tensor.expect_dtype(KERNEL, name, &[dtype], expected)?;
    }
    out.top_ids.expect(KERNEL, "top_ids", top <= MAX_TOP, || format!("[{count}, at most {MAX_TOP}]"))?;
    rows.iter().try_for_each(|row| check_row(row, vocab))?;
    tile.validate((), device.limits())?;
    let (shape, elements) = (vec![count, top], count * top.max(1));
    let SampleWorkspace { max_rows, max_top, .. } = *workspace;
    if workspace.tile.bins() != tile.bins() || workspace.tile.listed != tile.listed {
        let expected = format!("one allocated for {tile:?}");
        return check_value("workspace", false, || expected, format!("{:?}", workspace.tile)).map(|()| 0);
    }
    if count > max_rows || top > max_top || count > 0 && workspace.max_edits < 4 * vocab + 4096 {
        return Err(Error::Capacity { shape, elements, capacity: max_rows * max_top.max(1) });
    }
    Ok(vocab)
}

fn check_value(
    name: &'static str,
    ok: bool,
    expected: impl FnOnce() -> String,
    found: impl ToString,
) -> Result<()> {
    let error = || Error::Value { kernel: KERNEL, name, expected: expected(), found: found.to_string() };
    if ok { Ok(()) } else { Err(error()) }
}

pub(crate) fn check_row(row: &SampleRow<'_>, vocab: usize) -> Result<()> {
    check_params(row.params)?;
    let Some(token) = row.forced else { return Ok(()) };
    check_value("forced", (token as usize) < vocab, || format!("a token below {vocab}"), token)
}

fn check_params(params: &SamplingParams) -> Result<()> {
    let SamplingParams { temperature, top_p, min_p, repetition_penalty, .. } = *params;
    let at_least_0 = || "a number, 0 or more".into();
    let share = || "0 to 1".into();
    check_value("temperature", temperature.is_finite() && temperature >= 0.0, at_least_0, temperature)?;
    check_value("top_p", (0.0..=1.0).contains(&top_p), share, top_p)?;
    check_value("min_p", (0.0..=1.0).contains(&min_p), share, min_p)?;
    let positive = repetition_penalty.is_finite() && repetition_penalty > 0.0;
    check_value("repetition_penalty", positive, || "a positive number".into(), repetition_penalty)?;
    let (frequency, presence) = (params.frequency_penalty, params.presence_penalty);
    for (name, value) in [("frequency_penalty", frequency), ("presence_penalty", presence)] {
        check_value(name, value.is_finite(), || "a finite number".into(), value)?;
    }
    params.logit_bias.iter().try_for_each(|&(token, bias)| {
        check_value("logit_bias", bias.is_finite(), || format!("a finite number for token {token}"), bias)
    })
}

/// What rows ask for, as the kernels read it.
#[derive(Default)]
struct Requests {
    requests: Vec<[u32; REQUEST_BYTES / 4]>,
    /// The rows that drop tokens before the draw.
    filtered: Vec<u32>,
    edits: Vec<[u32; 2]>,
}

impl Requests {
    /// As many of `rows` as have no more than `max_edits` edits together.
    fn of(rows: &[SampleRow<'_>], vocab: usize, max_edits: usize) -> Self {
        let (mut asked, mut counts) = (Self::default(), Vec::new());
        for (index, row) in rows.iter().enumerate() {
            let begin = asked.edits.len();
            edit(&mut asked.edits, &mut counts, vocab, row);
            if asked.edits.len() > max_edits && index > 0 {
                asked.edits.truncate(begin);
                break;
            }
            let filters = is_filtered(row, vocab);
            if filters {
                asked.filtered.push(index as u32);
            }
            asked.requests.push(request(row, filters, begin, asked.edits.len()));
        }
        asked
    }

    fn write<D: Device>(mut self, device: &D, workspace: &SampleWorkspace<D>) -> Result<()> {
        self.filtered.resize(self.requests.len().next_multiple_of(2), 0);
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&self.requests).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(&self.filtered));
        bytes.extend_from_slice(bytemuck::cast_slice(&self.edits));
        device.write(&workspace.uploads, 0, &bytes)
    }
}

/// Writes what all `rows` ask for into the workspace, for a [`launch`] that a graph has captured: one that filters every row, and lets
/// every row edit its logits. `None`, and nothing is written, where their edits do not fit together.
///
/// # Errors
/// More rows than the workspace has room for; a parameter that means nothing; the device.
pub fn upload_all<D: Device>(
    device: &D,
    workspace: &SampleWorkspace<D>,
    vocab: usize,
    rows: &[SampleRow<'_>],
) -> Result<Option<SampleStep>> {
    rows.iter().try_for_each(|row| check_row(row, vocab))?;
    let (count, capacity) = (rows.len(), workspace.max_rows);
    if count > capacity {
        return Err(Error::Capacity { shape: vec![count], elements: count, capacity });
    }
    let mut asked = Requests::of(rows, vocab, workspace.max_edits);
    if asked.requests.len() < count || asked.edits.len() > workspace.max_edits {
        return Ok(None);
    }
    // The kernels leave a row alone that its request does not have filtered.
    asked.filtered = (0..count as u32).collect();
    asked.write(device, workspace)?;
    Ok(Some(SampleStep { first_row: 0, rows: count, filtered: count, edits: workspace.max_edits }))
}

/// Writes what the rows from `first_row` on ask for into the workspace: as many as its room for edits holds. The rows' parameters are
/// taken as they are; `sample` checks them.
///
/// # Errors
/// A row whose edits alone are too many; the device.
pub fn upload<D: Device>(
    device: &D,
    workspace: &SampleWorkspace<D>,
    vocab: usize,
    rows: &[SampleRow<'_>],
    first_row: usize,
) -> Result<SampleStep> {
    let asked = Requests::of(&rows[first_row..], vocab, workspace.max_edits);
    let (rows, filtered, edits) = (asked.requests.len(), asked.filtered.len(), asked.edits.len());
    let expected = || format!("at most {} changes of a row's logits", workspace.max_edits);
    check_value("logit_bias", edits <= workspace.max_edits, expected, edits)?;
    asked.write(device, workspace)?;
    Ok(SampleStep { first_row, rows, filtered, edits })
}

/// Whether tokens are dropped before the draw.
fn is_filtered(row: &SampleRow<'_>, vocab: usize) -> bool {
    let SamplingParams { temperature, top_k, top_p, min_p, .. } = *row.params;
    let drops = min_p > 0.0 || top_p < 1.0 || (1..vocab).contains(&(top_k as usize));
    row.forced.is_none() && temperature > 0.0 && drops
}

/// `Request` of `sample.cuh`.
fn request(row: &SampleRow<'_>, filtered: bool, begin: usize, end: usize) -> [u32; REQUEST_BYTES / 4] {
    let params = row.params;
    [
        params.seed as u32,
        (params.seed >> 32) as u32,
        row.position,
        row.forced.unwrap_or(u32::MAX),
        params.temperature.to_bits(),
        params.top_p.to_bits(),
        params.min_p.to_bits(),
        (-f64::from(params.min_p).ln() as f32).to_bits(),
        params.top_k,
        params.repetition_penalty.to_bits(),
        params.frequency_penalty.to_bits(),
        params.presence_penalty.to_bits(),
        begin as u32,
        end as u32,
        u32::from(filtered),
        0,
    ]
}

/// What happens to a token's logit, in the order of the contract.
const BAN: u32 = 0;
const BIAS: u32 = 1;
const SEEN: u32 = 2;

/// One change of one logit: the token and what happens to it, so that they sort by it, and the bias or how often the output has the
/// token.
fn change(token: u32, what: u32, value: u32) -> [u32; 2] {
    [token << 2 | what, value]
}

/// Appends the changes of a row's logits, by token. `counts` is all zeros, or empty, before and after.
fn edit(edits: &mut Vec<[u32; 2]>, counts: &mut Vec<u32>, vocab: usize, row: &SampleRow<'_>) {
    if row.forced.is_some() {
        return;
    }
    let params = row.params;
    let inside = |token: &u32| (*token as usize) < vocab;
    let mut own: Vec<[u32; 2]> = Vec::new();
    own.extend(row.banned.iter().filter(|token| inside(token)).map(|&token| change(token, BAN, 0)));
    let biases = params.logit_bias.iter().filter(|(token, _)| inside(token));
    own.extend(biases.map(|&(token, bias)| change(token, BIAS, bias.to_bits())));
    let repetition = params.repetition_penalty != 1.0;
    let output = params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
    if repetition || output {
        // A token of the prompt alone counts as 1, one of the output as 2 more for each time.
        counts.resize(vocab, 0);
        let mut seen = Vec::new();
        let prompt: &[u32] = if repetition { row.prompt } else { &[] };
        let once = prompt.iter().map(|token| (token, 0));
        for (&token, times) in once.chain(row.output.iter().map(|token| (token, 2))) {
            if let Some(count) = counts.get_mut(token as usize) {
                if *count == 0 {
                    seen.push(token);
                    *count = 1;
                }
                *count += times;
            }
        }
        own.extend(seen.iter().map(|&token| change(token, SEEN, counts[token as usize] / 2)));
        seen.iter().for_each(|&token| counts[token as usize] = 0);
    }
    // Biases of one token stay in their order, which rounding sees.
    own.sort_by_key(|change| change[0]);
    // A banned token's logit does not change again.
    let mut banned = None;
    own.retain(|change| {
        let (token, bans) = (change[0] >> 2, change[0] % 4 == BAN);
        let keep = banned != Some(token);
        if bans {
            banned = Some(token);
        }
        keep
    });
    edits.extend(own);
}

/// Launches what [`upload`] has prepared; nothing is written from the host, so that a graph can hold it.
///
/// # Errors
/// The device.
pub fn launch<D: Device>(
    device: &D,
    tile: &SampleTile,
    workspace: &SampleWorkspace<D>,
    logits: &CudaTensor<D>,
    step: SampleStep,
    out: &mut SampleOutput<CudaTensor<D>>,
) -> Result<()> {
    let SampleStep { first_row, rows, filtered, edits } = step;
    let [_, vocab] = logits.dims(KERNEL, "logits")?;
    let [_, top] = out.top_ids.dims(KERNEL, "top_ids")?;
    let SampleWorkspace { uploads, arrivals, states, parts, tops, counts, masses, lengths, lists, .. } =
        workspace;
    let stages: &[Stage] = if filtered > 0 { &Stage::ALL } else { &Stage::ALL[..1] };
    for &stage in stages {
        let grid_rows = if stage == Stage::Sample { rows } else { filtered };
        let row_parts = tile.parts(grid_rows, vocab, device.limits());
        let buffers: &[&D::Buffer] = match stage {
            Stage::Sample => &[parts, tops, out.token_ids.buffer(), out.logprobs.buffer()],
            Stage::Filter => &[counts, masses],
            Stage::Pick => {
                &[parts, lengths, lists, counts, masses, out.token_ids.buffer(), out.logprobs.buffer()]
            }
        };
        let mut args: Vec<Arg<'_, D::Buffer>> =
            Vec::from([logits.buffer(), uploads, arrivals, states].map(Arg::Buffer));
        args.extend(buffers.iter().map(|&buffer| Arg::Buffer(buffer)));
        if stage == Stage::Sample {
            args.extend([&out.top_ids, &out.top_logprobs].map(|tensor| Arg::Buffer(tensor.buffer())));
        }
        args.extend(
            [rows, first_row, vocab, row_parts, usize::from(edits > 0)].map(|number| Arg::I32(number as i32)),
        );
        match stage {
            Stage::Sample => args.push(Arg::I32(top as i32)),
            Stage::Filter => {}
            Stage::Pick => args.push(Arg::I32(searching_parts(grid_rows, row_parts, device.limits()) as i32)),
        }
        device.launch(&Launch {
            program: &tile.program(stage),
            entry: stage.entry(),
            grid: [(grid_rows * row_parts) as u32, 1, 1],
            threads: tile.threads as u32,
            shared_bytes: tile.shared_bytes(stage),
            shape: format!("{grid_rows} rows of {vocab}, {top} reported"),
            args: &args,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::assert_distinct;

    #[test]
    fn candidates_are_valid_and_refusals_say_why() {
        let limits = Limits::a100();
        let safe = SampleTile::safe(());
        let candidates = SampleTile::candidates((), &limits);
        assert!(candidates.contains(&safe) && candidates.len() == 4, "{candidates:?}");
        for (tile, reason) in [
            (SampleTile { threads: 96, ..safe }, "96 threads are not"),
            (SampleTile { threads: 1024, ..safe }, "1024 threads are not"),
            (SampleTile { split: 0, ..safe }, "1 to 32 blocks"),
            (SampleTile { fraction_bits: 9, ..safe }, "9 bits are not 0 to 8"),
            (SampleTile { listed: 100, ..safe }, "100 tokens are not a power of two"),
        ] {
            let error = tile.validate((), &limits).unwrap_err().to_string();
            assert!(error.starts_with("sample: ") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn every_stage_is_a_program_of_its_own() {
        let programs = programs(&SampleTile::safe(()));
        assert_eq!(programs.len(), 3);
        assert_distinct(&programs);
    }

    #[test]
    fn parts_fill_the_device_and_can_be_counted() {
        let (tile, limits) = (SampleTile::safe(()), Limits::a100());
        assert_eq!(tile.parts(1, 154_880, &limits), MAX_PARTS);
        assert_eq!(tile.parts(32, 154_880, &limits), 10);
        assert_eq!(tile.parts(1, 100, &limits), 1);
        assert_eq!(tile.parts(4096, 154_880, &limits), 3);
        // Blocks that wait for each other are no more than multiprocessors.
        assert_eq!([1, 32, 200].map(|rows| searching_parts(rows, 10, &limits)), [10, 3, 1]);
        assert_eq!(searching_parts(1, MAX_PARTS, &limits), 108);
    }

    #[test]
    fn edits_are_sorted_counted_and_end_at_a_ban() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            frequency_penalty: 1.0,
            logit_bias: vec![(4, 1.0), (9, 1.0), (4, -3.0), (2, 5.0)],
            ..SamplingParams::default()
        };
        let row = SampleRow {
            params: &params,
            prompt: &[7, 1, 7, 8],
            output: &[1, 3, 1],
            banned: &[2, 99, 2],
            position: 0,
            forced: None,
        };
        let (mut edits, mut counts) = (Vec::new(), Vec::new());
        edit(&mut edits, &mut counts, 8, &row);
        let bias = |x: f32| x.to_bits();
        let expected = [
            change(1, SEEN, 2),
            change(2, BAN, 0),
            change(3, SEEN, 1),
            change(4, BIAS, bias(1.0)),
            change(4, BIAS, bias(-3.0)),
            change(7, SEEN, 0),
        ];
        assert_eq!(edits, expected);
        assert!(counts.iter().all(|&count| count == 0));
        // Without a repetition penalty the prompt does not matter; a forced row has no edits.
        let params = SamplingParams { presence_penalty: 1.0, ..SamplingParams::default() };
        edits.clear();
        edit(&mut edits, &mut counts, 8, &SampleRow { params: &params, banned: &[], ..row });
        assert_eq!(edits, [change(1, SEEN, 2), change(3, SEEN, 1)]);
        edits.clear();
        edit(&mut edits, &mut counts, 8, &SampleRow { forced: Some(1), ..row });
        assert!(edits.is_empty());
    }

    #[test]
    fn rows_that_drop_nothing_are_not_filtered() {
        let default = SamplingParams::default;
        let filtered = |params: SamplingParams| {
            let row = SampleRow {
                params: &params,
                prompt: &[],
                output: &[],
                banned: &[],
                position: 0,
                forced: None,
            };
            is_filtered(&row, 100)
        };
        assert!(!filtered(default()) && !filtered(SamplingParams { top_k: 100, ..default() }));
        assert!(!filtered(SamplingParams { top_k: 5, temperature: 0.0, ..default() }));
        assert!(filtered(SamplingParams { top_k: 99, ..default() }));
        assert!(filtered(SamplingParams { top_p: 0.5, ..default() }));
        assert!(filtered(SamplingParams { min_p: 0.1, ..default() }));
    }
}
