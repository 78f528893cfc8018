//! `linear`, `linear_split`, `linear_int4`, `lm_head` and `swiglu`.

use super::Wgpu;
use super::int4::WgpuInt4;
use super::product::{Product, Weight};
use super::silu_mul;
use super::tensor::WgpuTensor;
use crate::error::{Error, Result};
use crate::tensor::{DType, HostLinear};

/// What the contract calls each output of `linear_split`.
const OUTS: [&str; 4] = ["outs[0]", "outs[1]", "outs[2]", "outs[3]"];

/// Either projection of a SwiGLU.
#[derive(Debug)]
pub(super) enum Projection {
    Dense(WgpuTensor),
    Int4(WgpuInt4),
}

impl Projection {
    fn upload(wgpu: &Wgpu, weight: HostLinear) -> Result<Self> {
        Ok(match weight.made() {
            HostLinear::Int4(weight) => Self::Int4(WgpuInt4::upload(wgpu, &weight)?),
            other => Self::Dense(wgpu.upload_host(&other.dense())?),
        })
    }

    fn weight(&self) -> Weight<'_> {
        match self {
            Self::Dense(weight) => Weight::Dense(weight),
            Self::Int4(weight) => Weight::Int4(weight),
        }
    }
}

/// The gate and up projections of a SwiGLU of `Wgpu`, each in its own format.
#[derive(Debug)]
pub struct WgpuSwiGlu {
    gate_proj: Projection,
    up_proj: Projection,
    intermediate: usize,
    columns: usize,
}

impl WgpuSwiGlu {
    pub(super) fn upload(wgpu: &Wgpu, gate_proj: HostLinear, up_proj: HostLinear) -> Result<Self> {
        let kernel = "upload_swiglu";
        for (tensor, weight) in [("gate_proj", &gate_proj), ("up_proj", &up_proj)] {
            weight.check(kernel, tensor)?;
        }
        let (dims, found) = (gate_proj.dims(), up_proj.dims());
        if dims != found {
            let expected = format!("{:?}", [dims.0, dims.1]);
            return Err(Error::Shape { kernel, tensor: "up_proj", expected, found: vec![found.0, found.1] });
        }
        Ok(Self {
            gate_proj: Projection::upload(wgpu, gate_proj)?,
            up_proj: Projection::upload(wgpu, up_proj)?,
            intermediate: dims.0,
            columns: dims.1,
        })
    }
}

/// `[rows, columns]` of a dense weight.
fn dense_dims(kernel: &'static str, weight: &WgpuTensor) -> Result<[usize; 2]> {
    let [rows, columns] = weight.dims(kernel, "weight")?;
    weight.expect_weight(kernel, "weight")?;
    weight.expect(kernel, "weight", columns > 0, || "at least one column".into())?;
    Ok([rows, columns])
}

/// The tokens of `x`, `[T, columns]`.
fn tokens(kernel: &'static str, x: &WgpuTensor, columns: usize) -> Result<usize> {
    let [tokens, _] = x.dims(kernel, "x")?;
    x.expect_shape(kernel, "x", &[tokens, columns])?;
    x.expect_act(kernel, "x")?;
    Ok(tokens)
}

pub(super) fn linear(wgpu: &Wgpu, x: &WgpuTensor, weight: &WgpuTensor, out: &mut WgpuTensor) -> Result<()> {
    let kernel = "linear";
    let [features, columns] = dense_dims(kernel, weight)?;
    let tokens = tokens(kernel, x, columns)?;
    out.expect_shape(kernel, "out", &[tokens, features])?;
    let weight = Weight::Dense(weight);
    let all = 0..features;
    Product {
        kernel,
        x,
        rows: None,
        weight,
        features: all,
        rows_of_head: features,
        tokens,
        heads: 1,
        columns,
    }
    .launch(wgpu, "out", out)
}

pub(super) fn linear_split(
    wgpu: &Wgpu,
    x: &WgpuTensor,
    weight: &WgpuTensor,
    outs: &mut [&mut WgpuTensor],
) -> Result<()> {
    let kernel = "linear_split";
    let [rows_of_head, columns] = dense_dims(kernel, weight)?;
    let tokens = tokens(kernel, x, columns)?;
    if !(1..=OUTS.len()).contains(&outs.len()) {
        let (expected, found) = ("1 to 4 tensors".into(), outs.len().to_string());
        return Err(Error::Value { kernel, name: "outs", expected, found });
    }
    let mut ends = vec![0];
    for (out, name) in outs.iter().zip(OUTS) {
        let [_, features] = out.dims(kernel, name)?;
        out.expect_shape(kernel, name, &[tokens, features])?;
        out.expect_dtype(kernel, name, &[DType::Act, DType::Float], "activations or floats")?;
        ends.push(ends[ends.len() - 1] + features);
    }
    let all = ends[outs.len()];
    weight.expect(kernel, "weight", rows_of_head >= all, || format!("[at least {all}, {columns}]"))?;
    for ((out, name), ends) in outs.iter_mut().zip(OUTS).zip(ends.windows(2)) {
        let (weight, features) = (Weight::Dense(weight), ends[0]..ends[1]);
        Product { kernel, x, rows: None, weight, features, rows_of_head, tokens, heads: 1, columns }
            .launch(wgpu, name, out)?;
    }
    Ok(())
}

pub(super) fn linear_int4(
    wgpu: &Wgpu,
    x: &WgpuTensor,
    weight: &WgpuInt4,
    out: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "linear_int4";
    let &WgpuInt4 { out_features, in_features: columns, .. } = weight;
    let tokens = tokens(kernel, x, columns)?;
    out.expect_shape(kernel, "out", &[tokens, out_features])?;
    let (weight, features) = (Weight::Int4(weight), 0..out_features);
    Product { kernel, x, rows: None, weight, features, rows_of_head: out_features, tokens, heads: 1, columns }
        .launch(wgpu, "out", out)
}

pub(super) fn lm_head(
    wgpu: &Wgpu,
    x: &WgpuTensor,
    rows: &WgpuTensor,
    weight: &WgpuTensor,
    logits: &mut WgpuTensor,
) -> Result<()> {
    let kernel = "lm_head";
    let [vocab, columns] = dense_dims(kernel, weight)?;
    let all = tokens(kernel, x, columns)?;
    let [count] = rows.dims(kernel, "rows")?;
    rows.expect_index(kernel, "rows")?;
    logits.expect_shape(kernel, "logits", &[count, vocab])?;
    logits.expect_float(kernel, "logits")?;
    x.expect(kernel, "x", all > 0 || count == 0, || "at least one row".into())?;
    let (weight, features, rows) = (Weight::Dense(weight), 0..vocab, Some(rows));
    Product { kernel, x, rows, weight, features, rows_of_head: vocab, tokens: count, heads: 1, columns }
        .launch(wgpu, "logits", logits)
}

/// Both projections in floats, then the activation.
pub(super) fn swiglu(wgpu: &Wgpu, x: &WgpuTensor, weights: &WgpuSwiGlu, out: &mut WgpuTensor) -> Result<()> {
    let kernel = "swiglu";
    let &WgpuSwiGlu { intermediate, columns, .. } = weights;
    let tokens = tokens(kernel, x, columns)?;
    out.expect_shape(kernel, "out", &[tokens, intermediate])?;
    out.expect_act(kernel, "out")?;
    let project =
        |projection: &Projection| {
            let mut floats = wgpu.tensor(DType::Float, &[tokens, intermediate])?;
            let (weight, features, rows_of_head) = (projection.weight(), 0..intermediate, intermediate);
            Product { kernel, x, rows: None, weight, features, rows_of_head, tokens, heads: 1, columns }
                .launch(wgpu, "out", &mut floats)?;
            Ok(floats)
        };
    let (gate, up) = (project(&weights.gate_proj)?, project(&weights.up_proj)?);
    silu_mul::launch(wgpu, kernel, &gate, &up, out)
}
