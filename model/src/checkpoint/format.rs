//! How the checkpoint holds a linear layer, as its tensors say.

use dsa80_reference::DType;

use super::CheckpointError;
use super::layout::LinearSpec;
use super::tensors::{TensorView, Tensors};
use crate::config::{Expectation, Int4Scheme, ModelConfig, QuantizationMethod};

/// The stored form of a linear layer's weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearFormat {
    /// A plain `.weight`.
    Dense(DType),
    /// Packed.
    Int4(Int4Format),
}

/// A packed layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int4Format {
    /// Names and layout of its tensors.
    pub method: QuantizationMethod,
    /// Columns that share a scale; at most the layer's `in_features`.
    pub group_size: usize,
    /// Without zero points.
    pub symmetric: bool,
    /// The type of the scales.
    pub scale: DType,
}

/// The form in which a checkpoint that follows its config stores `spec`: dense weights and scales in 16 bits, packed layers as
/// `quantization_config` says.
pub(crate) fn described(config: &ModelConfig, spec: &LinearSpec) -> LinearFormat {
    let Some(quantization) = &config.quantization else { return LinearFormat::Dense(DType::Bf16) };
    match quantization.expectation(&spec.module, spec.is_linear_class()) {
        Expectation::Int4(scheme) => LinearFormat::Int4(Int4Format {
            method: quantization.method,
            group_size: scheme.group_size_of(spec.in_features).min(spec.in_features),
            symmetric: scheme.symmetric,
            scale: match quantization.method {
                QuantizationMethod::CompressedTensors => DType::Bf16,
                QuantizationMethod::AutoAwq => DType::F16,
            },
        }),
        Expectation::Dense | Expectation::Either(_) => LinearFormat::Dense(DType::Bf16),
    }
}

/// The form in which `spec` is stored: every tensor of it has the right type and shape, and the config does
/// not contradict. `claim` is told the name of each tensor.
pub(super) fn detect(
    tensors: &Tensors,
    config: &ModelConfig,
    spec: &LinearSpec,
    claim: &mut dyn FnMut(TensorView<'_>),
) -> Result<LinearFormat, CheckpointError> {
    let module = &spec.module;
    let dense = tensors.get(&format!("{module}.weight"));
    let packed = tensors.get(&format!("{module}.weight_packed"));
    let awq = tensors.get(&format!("{module}.qweight"));
    let found = [dense, packed, awq];
    let mut found = found.into_iter().flatten();
    let (first, second) = (found.next(), found.next());
    if let (Some(first), Some(second)) = (first, second) {
        return Err(second.unexpected(format!("the same weight is in `{}`", first.name)));
    }

    let expectation = config.quantization.as_ref().map(|q| q.expectation(module, spec.is_linear_class()));
    let expectation = expectation.unwrap_or(Expectation::Dense);
    let contradiction = |view: TensorView<'_>, expected: String| CheckpointError::Quantization {
        file: view.file.to_owned(),
        module: module.clone(),
        found: format!("`{}`", view.name),
        expected,
    };

    if let Some(weight) = dense {
        if let Expectation::Int4(scheme) = expectation {
            return Err(contradiction(
                weight,
                format!("packs it ({}) and does not ignore it", describe(scheme)),
            ));
        }
        claim(weight);
        let dtype = weight.float()?;
        weight.expect_shape(&[spec.out_features, spec.in_features], || "from config.json".to_owned())?;
        return Ok(LinearFormat::Dense(dtype));
    }

    let (weight, method) = match (packed, awq, config.quantization.as_ref()) {
        (Some(view), _, _) => (view, QuantizationMethod::CompressedTensors),
        (None, Some(view), _) => (view, QuantizationMethod::AutoAwq),
        (None, None, quantization) => {
            let suffix = match (expectation, quantization.map(|q| q.method)) {
                (Expectation::Int4(_), Some(QuantizationMethod::CompressedTensors)) => "weight_packed",
                (Expectation::Int4(_), Some(QuantizationMethod::AutoAwq)) => "qweight",
                _ => "weight",
            };
            let name = format!("{module}.{suffix}");
            let shape = [spec.out_features, spec.in_features];
            return Err(tensors.missing(&name, format!("the weight {shape:?} of this module")));
        }
    };
    let scheme = match (expectation, config.quantization.as_ref().map(|q| q.method)) {
        (_, None) => return Err(contradiction(weight, "does not exist".to_owned())),
        (Expectation::Dense, _) => return Err(contradiction(weight, "leaves it unquantised".to_owned())),
        (_, Some(other)) if other != method => {
            return Err(contradiction(weight, format!("says {other:?}, whose tensors have other names")));
        }
        (Expectation::Int4(scheme) | Expectation::Either(scheme), _) => scheme,
    };
    claim(weight);
    let format = match method {
        QuantizationMethod::CompressedTensors => compressed_tensors(tensors, spec, scheme, weight, claim)?,
        QuantizationMethod::AutoAwq => auto_awq(tensors, spec, scheme, weight, claim)?,
    };
    Ok(LinearFormat::Int4(format))
}

fn compressed_tensors(
    tensors: &Tensors,
    spec: &LinearSpec,
    scheme: Int4Scheme,
    packed: TensorView<'_>,
    claim: &mut dyn FnMut(TensorView<'_>),
) -> Result<Int4Format, CheckpointError> {
    let LinearSpec { module, out_features, in_features, .. } = spec;
    let (out, columns) = (*out_features, *in_features);
    let group_size = scheme.group_size_of(columns).min(columns);
    let groups = columns.div_ceil(group_size);
    let why = || format!("[{out}, {columns}] from config.json, {}", describe(scheme));

    packed.expect_words()?;
    packed.expect_shape(&[out, columns.div_ceil(8)], why)?;

    let mut part = |suffix: &str, what: &str| {
        let view = tensors
            .require(&format!("{module}.{suffix}"), || format!("{what}, as `{}` is there", packed.name));
        view.inspect(|view| claim(*view))
    };
    let scales = part("weight_scale", "the scales")?;
    let scale = scales.float()?;
    scales.expect_shape(&[out, groups], why)?;

    let shape = part("weight_shape", "the unpacked shape")?;
    shape.expect_shape(&[2], || "out and in".to_owned())?;
    let stated = shape.integers()?;
    if stated != [out as i64, columns as i64] {
        return Err(
            shape.wrong_contents(format!("{stated:?}"), format!("[{out}, {columns}], from config.json"))
        );
    }

    let zero_points = format!("{module}.weight_zero_point");
    if scheme.symmetric {
        if let Some(view) = tensors.get(&zero_points) {
            return Err(view.unexpected("`quantization_config` says symmetric: no zero points"));
        }
    } else {
        let view = part("weight_zero_point", "the zero points of an asymmetric layer")?;
        view.expect_words()?;
        view.expect_shape(&[out.div_ceil(8), groups], why)?;
    }

    if let Some(view) = tensors.get(&format!("{module}.weight_g_idx")) {
        claim(view);
        view.expect_shape(&[columns], || "one group number an input feature".to_owned())?;
        let identity = (0..columns).map(|column| (column / group_size) as i64);
        // -1 everywhere is how compressed-tensors writes "not computed".
        let stated = view.integers()?;
        if stated.iter().any(|g| *g != -1) && !stated.iter().copied().eq(identity) {
            let expected = format!("column / {group_size}: weights in activation order are not supported");
            return Err(view.wrong_contents("another order of columns", expected));
        }
    }
    Ok(Int4Format {
        method: QuantizationMethod::CompressedTensors,
        group_size,
        symmetric: scheme.symmetric,
        scale,
    })
}

fn auto_awq(
    tensors: &Tensors,
    spec: &LinearSpec,
    scheme: Int4Scheme,
    packed: TensorView<'_>,
    claim: &mut dyn FnMut(TensorView<'_>),
) -> Result<Int4Format, CheckpointError> {
    let LinearSpec { module, out_features, in_features, .. } = spec;
    let (out, columns) = (*out_features, *in_features);
    let group_size = scheme.group_size_of(columns).min(columns);
    let groups = columns.div_ceil(group_size);
    let why = || format!("[{out}, {columns}] from config.json, transposed, {}", describe(scheme));

    // The words run along `out`: there is no room for a remainder.
    packed.expect_words()?;
    packed.expect_shape(&[columns, out / 8], why)?;
    if out % 8 != 0 {
        return Err(packed.unexpected(format!("{out} output features do not fill words of 8")));
    }
    let mut part = |suffix: &str, what: &str| {
        let view = tensors
            .require(&format!("{module}.{suffix}"), || format!("{what}, as `{}` is there", packed.name));
        view.inspect(|view| claim(*view))
    };
    let scales = part("scales", "the scales")?;
    let scale = scales.float()?;
    scales.expect_shape(&[groups, out], why)?;
    let zero_points = part("qzeros", "the zero points")?;
    zero_points.expect_words()?;
    zero_points.expect_shape(&[groups, out / 8], why)?;
    Ok(Int4Format { method: QuantizationMethod::AutoAwq, group_size, symmetric: false, scale })
}

fn describe(scheme: Int4Scheme) -> String {
    let groups = match scheme.group_size {
        Some(size) => format!("group size {size}"),
        None => "one group a row".to_owned(),
    };
    format!("4 bits, {groups}, {}symmetric", if scheme.symmetric { "" } else { "a" })
}
