//! Every tensor against the config, before anything is loaded.

use std::collections::{HashMap, HashSet};

use super::CheckpointError;
use super::format::{self, LinearFormat};
use super::layout::{self, Spec, TensorSpec};
use super::tensors::{TensorView, Tensors};
use crate::config::ModelConfig;

/// Checks that every tensor that the config calls for is there with the right type and shape, and that there
/// is no other. Returns how each linear layer is stored.
pub(super) fn verify(
    tensors: &Tensors,
    config: &ModelConfig,
) -> Result<HashMap<String, LinearFormat>, CheckpointError> {
    let mut formats = HashMap::new();
    let mut claimed = HashSet::new();
    for spec in layout::all(config, 1) {
        match spec {
            Spec::Tensor(spec) => {
                check_tensor(tensors, &spec)?;
                claimed.insert(spec.name);
            }
            Spec::Linear(spec) => {
                let mut claim = |view: TensorView<'_>| _ = claimed.insert(view.name.to_owned());
                let format = format::detect(tensors, config, &spec, &mut claim)?;
                formats.insert(spec.module, format);
            }
        }
    }
    let others = tensors.iter().filter(|view| !claimed.contains(view.name));
    let refused = others.filter_map(|view| Some((view, refusal(view.name, config)?)));
    // The first by name, so that the message is the same every time.
    match refused.min_by_key(|(view, _)| view.name) {
        Some((view, reason)) => Err(view.unexpected(reason)),
        None => Ok(formats),
    }
}

fn check_tensor(tensors: &Tensors, spec: &TensorSpec) -> Result<(), CheckpointError> {
    let view = tensors.require(&spec.name, || format!("shape {:?}", spec.shape))?;
    view.float()?;
    view.expect_shape(&spec.shape, || "from config.json".to_owned())
}

/// Why a tensor that no module claimed is refused; `None` for what may be there without being used.
fn refusal(name: &str, config: &ModelConfig) -> Option<String> {
    // A buffer that old exporters wrote; the frequencies are computed.
    if name.ends_with(".rotary_emb.inv_freq") || is_mtp(name, config) {
        return None;
    }
    let reason = if name == "lm_head.weight" {
        "`tie_word_embeddings` is true, so the embedding serves as `lm_head`"
    } else if name.contains(".mlp.experts.gate_up_proj") || name.contains(".mlp.experts.down_proj") {
        "experts fused into one tensor are not read; save them by expert, as the published checkpoints do"
    } else if name.ends_with("_scale_inv") {
        "this looks like an FP8 checkpoint; bf16, f16, f32 and INT4 weights are read"
    } else {
        "the model that config.json describes has no place for it"
    };
    Some(reason.to_owned())
}

/// Whether `name` is a tensor of a multi-token-prediction layer, which follows the decoder layers and may be
/// absent.
fn is_mtp(name: &str, config: &ModelConfig) -> bool {
    const PARTS: [&str; 9] = [
        "enorm.",
        "hnorm.",
        "eh_proj.",
        "shared_head.",
        "embed_tokens.",
        "input_layernorm.",
        "post_attention_layernorm.",
        "self_attn.",
        "mlp.",
    ];
    let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        return false;
    };
    // What of one that drafts is the model's again (its embedding, its `lm_head`) stays unused.
    let first = config.index_of_draft_layer().unwrap_or(config.num_hidden_layers);
    let layers = first..first + config.num_nextn_predict_layers.max(1);
    layer.parse().is_ok_and(|layer: usize| layers.contains(&layer))
        && PARTS.iter().any(|part| rest.starts_with(part))
}
