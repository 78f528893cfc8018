//! `rope_table`.

use super::launch::Launch;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuBatch};
use crate::error::{Error, Result};

static SHADER: Shader = shader!("rope_table");

const KERNEL: &str = "rope_table";

/// What every pair turns by from one position to the next: of one `theta`, on the device.
#[derive(Debug)]
pub(super) struct Turns {
    theta: f64,
    pairs: usize,
    words: WgpuTensor,
}

impl Turns {
    fn upload(wgpu: &Wgpu, theta: f64, pairs: usize) -> Result<Self> {
        let turn = |pair: usize| {
            let turns = theta.powf(-(pair as f64) / pairs as f64) / std::f64::consts::TAU;
            // Whole turns change nothing.
            let turns = (turns.fract() * 2.0_f64.powi(64)) as u64;
            [(turns >> 32) as u32, turns as u32]
        };
        let words: Vec<u32> = (0..pairs).flat_map(turn).collect();
        Ok(Self { theta, pairs, words: wgpu.upload_words(&[pairs, 2], &words)? })
    }
}

pub(super) fn rope_table(wgpu: &Wgpu, batch: &WgpuBatch, theta: f64, cos_sin: &mut WgpuTensor) -> Result<()> {
    let [rows, pairs, two] = cos_sin.dims(KERNEL, "cos_sin")?;
    let tokens = batch.host().num_tokens();
    cos_sin.expect(KERNEL, "cos_sin", rows == tokens && two == 2, || format!("[{tokens}, dim / 2, 2]"))?;
    cos_sin.expect_float(KERNEL, "cos_sin")?;
    if !theta.is_finite() || theta <= 0.0 {
        let (expected, found) = ("a positive number".into(), theta.to_string());
        return Err(Error::Value { kernel: KERNEL, name: "theta", expected, found });
    }
    if tokens * pairs == 0 {
        return Ok(());
    }
    let mut kept = wgpu.turns.borrow_mut();
    let turns = match kept.take() {
        Some(turns) if turns.theta == theta && turns.pairs == pairs => turns,
        _ => Turns::upload(wgpu, theta, pairs)?,
    };
    let lanes = wgpu.workgroup(64);
    wgpu.launch(&Launch {
        kernel: KERNEL,
        shader: &SHADER,
        entry: "main",
        constants: &[("WORKGROUP", lanes.into())],
        bindings: &[batch.positions.reads(), turns.words.reads(), cos_sin.writes()],
        params: &[tokens as u32, pairs as u32],
        groups: wgpu.fold((tokens * pairs).div_ceil(lanes as usize)),
        shape: format!("{tokens} tokens, {pairs} pairs"),
    })?;
    *kept = Some(turns);
    Ok(())
}
