//! `sample`.

use std::collections::BTreeMap;

use super::Wgpu;
use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use crate::cpu::check_sample_row;
use crate::error::{Error, Result};
use crate::kernels::SampleOutput;
use crate::sampling::SampleRow;
use crate::tensor::DType;

static KEYS: Shader = shader!("sample_keys", after "sample_wide");
static SAMPLE: Shader = shader!("sample", after "sample_wide");

const KERNEL: &str = "sample";

/// Lanes of a row, and of what makes keys.
const LANES: usize = 256;
const KEY_LANES: usize = 64;

/// Words of a request, and of an edit.
const REQUEST: usize = 16;
const EDIT: usize = 5;

const NONE: u32 = u32::MAX;

/// What an edit does, as `sample_keys.wgsl` numbers it.
const BAN: u32 = 0;
const ADD: u32 = 1;
const SCALE: u32 = 2;

/// What a request has, as `sample.wgsl` does.
const GREEDY: u32 = 1;
const HAS_MIN_P: u32 = 2;
const HAS_TOP_P: u32 = 4;

pub(super) fn sample(
    wgpu: &Wgpu,
    logits: &WgpuTensor,
    rows: &[SampleRow<'_>],
    out: &mut SampleOutput<WgpuTensor>,
) -> Result<()> {
    logits.expect_float(KERNEL, "logits")?;
    let [count, vocab] = logits.dims(KERNEL, "logits")?;
    logits.expect(KERNEL, "logits", count == rows.len() && (vocab > 0 || count == 0), || {
        format!("[{}, V] with V at least 1", rows.len())
    })?;
    let [_, top] = out.top_ids.dims(KERNEL, "top_ids")?;
    for (name, tensor, shape) in [
        ("token_ids", &out.token_ids, &[count][..]),
        ("logprobs", &out.logprobs, &[count]),
        ("top_ids", &out.top_ids, &[count, top]),
        ("top_logprobs", &out.top_logprobs, &[count, top]),
    ] {
        tensor.expect_shape(KERNEL, name, shape)?;
        if name.ends_with("ids") {
            tensor.expect_index(KERNEL, name)?;
        } else {
            tensor.expect_float(KERNEL, name)?;
        }
    }
    rows.iter().try_for_each(|row| check_sample_row(row, vocab))?;
    if count == 0 {
        return Ok(());
    }
    if u32::try_from(count * vocab).is_err() {
        return Err(Error::Shape {
            kernel: KERNEL,
            tensor: "logits",
            expected: "less than 2^32 elements".into(),
            found: vec![count, vocab],
        });
    }
    let words: Vec<u32> = rows.iter().flat_map(request).collect();
    let requests = wgpu.upload_words(&[count, REQUEST], &words)?;
    let mut words: Vec<u32> =
        rows.iter().enumerate().flat_map(|(row, request)| edits(row as u32, request, vocab)).collect();
    let edited = words.len() / EDIT;
    words.resize(words.len().max(EDIT), 0);
    let edits = wgpu.upload_words(&[words.len()], &words)?;
    let shape = format!("{count} rows of {vocab}, the best {top}");
    for window in wgpu.windows(KERNEL, "logits", count, vocab * 8)? {
        let elements = window.start * vocab..window.end * vocab;
        let mut keys = wgpu.tensor(DType::Index, &[window.len(), vocab, 2])?;
        for (edit, threads) in [(false, elements.len()), (true, edited)] {
            if threads == 0 {
                continue;
            }
            let lanes = wgpu.workgroup(KEY_LANES);
            wgpu.launch(&Launch {
                kernel: KERNEL,
                shader: &KEYS,
                entry: "main",
                constants: &[("WORKGROUP", lanes.into()), ("EDITS", edit.into())],
                bindings: &[logits.reads_window(elements.clone()), edits.reads(), keys.writes()],
                params: &[window.start as u32, threads as u32, vocab as u32, window.len() as u32],
                groups: wgpu.fold(threads.div_ceil(lanes as usize)),
                shape: shape.clone(),
            })?;
        }
        wgpu.launch(&Launch {
            kernel: KERNEL,
            shader: &SAMPLE,
            entry: "main",
            constants: &[("WORKGROUP", wgpu.workgroup(LANES).into())],
            bindings: &[
                logits.reads_window(elements),
                keys.writes(),
                requests.reads(),
                out.token_ids.writes(),
                out.logprobs.writes(),
                out.top_ids.writes(),
                out.top_logprobs.writes(),
            ],
            params: &[window.len() as u32, vocab as u32, window.start as u32, top as u32],
            groups: wgpu.fold(window.len()),
            shape: shape.clone(),
        })?;
    }
    Ok(())
}

/// An f64's bits, the higher word first.
fn words_of(number: f64) -> [u32; 2] {
    let bits = number.to_bits();
    [(bits >> 32) as u32, bits as u32]
}

fn request(row: &SampleRow<'_>) -> [u32; REQUEST] {
    let params = row.params;
    let (temperature, min_p, top_p) =
        (f64::from(params.temperature), f64::from(params.min_p), f64::from(params.top_p));
    let mut flags = 0;
    for (flag, has) in [(GREEDY, temperature == 0.0), (HAS_MIN_P, min_p > 0.0), (HAS_TOP_P, top_p < 1.0)] {
        flags |= if has { flag } else { 0 };
    }
    let mut words = [0; REQUEST];
    words[0] = params.seed as u32;
    words[1] = (params.seed >> 32) as u32;
    words[2] = row.position;
    words[3] = row.forced.unwrap_or(NONE);
    words[4] = flags;
    words[5] = params.top_k;
    if flags & GREEDY == 0 {
        words[6..8].copy_from_slice(&words_of(std::f64::consts::LOG2_E / temperature));
    }
    if flags & HAS_MIN_P != 0 {
        // With half a unit of f64, by which the oracle rounds a probability up: what all but equals the best is as probable.
        words[8..10].copy_from_slice(&words_of((2.0_f64.powi(-54) - min_p.ln()) * temperature));
    }
    if flags & HAS_TOP_P != 0 {
        // Exact: a share has 24 bits. What is too small to be one asks for the best token alone, as 0 does.
        let share = (top_p * 2.0_f64.powi(64)) as u64;
        words[10..12].copy_from_slice(&[(share >> 32) as u32, share as u32]);
    }
    words
}

/// What a row does to its logits, in the order of the tokens, and for each in the order of `SamplingParams`.
fn edits(index: u32, row: &SampleRow<'_>, vocab: usize) -> Vec<u32> {
    let params = row.params;
    let mut of_token: BTreeMap<u32, Vec<(u32, f64)>> = BTreeMap::new();
    let mut edit = |token: u32, what, number| {
        if (token as usize) < vocab {
            of_token.entry(token).or_default().push((what, number));
        }
    };
    row.banned.iter().for_each(|&token| edit(token, BAN, 0.0));
    params.logit_bias.iter().for_each(|&(token, bias)| edit(token, ADD, f64::from(bias)));
    let counts = |tokens: &mut dyn Iterator<Item = &u32>| {
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        tokens.for_each(|&token| *counts.entry(token).or_default() += 1);
        counts
    };
    if params.repetition_penalty != 1.0 {
        for token in counts(&mut row.prompt.iter().chain(row.output)).into_keys() {
            edit(token, SCALE, params.repetition_penalty.into());
        }
    }
    let (frequency, presence) = (f64::from(params.frequency_penalty), f64::from(params.presence_penalty));
    if frequency != 0.0 || presence != 0.0 {
        for (token, count) in counts(&mut row.output.iter()) {
            edit(token, ADD, -(frequency * f64::from(count) + presence));
        }
    }
    let words = |(token, what, number): (u32, u32, f64)| {
        let [high, low] = words_of(number);
        [index, token, what, high, low]
    };
    of_token
        .into_iter()
        .flat_map(|(token, edits)| edits.into_iter().map(move |(what, number)| (token, what, number)))
        .flat_map(words)
        .collect()
}
