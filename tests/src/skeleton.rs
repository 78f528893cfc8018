//! Checkpoints of GLM-5.2 with its real names and shapes: in full, in files that are all holes but for their headers, or a few layers of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use dsa80_reference::random;
use serde_json::json;

/// Layers of GLM-5.2, beside the one that drafts tokens.
pub const LAYERS: usize = 78;
/// Its vocabulary.
pub const VOCAB: usize = 154_880;
const SHARDS: usize = 83;
const HIDDEN: usize = 6144;

/// How a checkpoint is quantised.
#[derive(Debug, Clone, Copy)]
pub struct Scheme {
    /// Columns that share a scale.
    pub group_size: usize,
    /// Without zero points.
    pub symmetric: bool,
    /// Whether a linear layer is packed.
    pub packs: fn(&str) -> bool,
}

impl Scheme {
    /// As cyankiwi/GLM-5.2-AWQ-INT4: the routed experts alone, asymmetric, in groups of 32; the drafting layer is bf16.
    pub const EXPERTS: Self = Self {
        group_size: 32,
        symmetric: false,
        packs: |module| module.contains(".experts.") && !module.starts_with("model.layers.78."),
    };
}

/// Who reads a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Every rank its part.
    Shared,
    /// Every rank all of it.
    Replicated,
    /// `weight_shape`: whoever opens the checkpoint.
    Opening,
    /// Nobody.
    Draft,
}

#[derive(Debug)]
struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: u64,
    contents: Vec<u8>,
    by: Use,
}

/// All tensors of a checkpoint.
#[derive(Debug)]
pub struct Skeleton {
    scheme: Scheme,
    layers: usize,
    experts: usize,
    vocab: usize,
    tensors: Vec<Tensor>,
    /// Linear layers that are not packed.
    ignored: Vec<String>,
}

impl Skeleton {
    /// All of the model.
    pub fn whole(scheme: Scheme) -> Self {
        Self::new(scheme, LAYERS, 256, VOCAB)
    }

    /// The first `layers` of the model with the first `experts` and the first `vocab` tokens; with the drafting layer where that is all
    /// layers.
    pub fn new(scheme: Scheme, layers: usize, experts: usize, vocab: usize) -> Self {
        let mut all = Self { scheme, layers, experts, vocab, tensors: Vec::new(), ignored: Vec::new() };
        all.plain("model.embed_tokens.weight", &[vocab, HIDDEN], Use::Shared);
        for layer in 0..layers + usize::from(layers == LAYERS) {
            all.layer(layer);
        }
        all.plain("model.norm.weight", &[HIDDEN], Use::Replicated);
        all.ignored.push("lm_head".to_owned());
        all.plain("lm_head.weight", &[vocab, HIDDEN], Use::Shared);
        all
    }

    fn layer(&mut self, layer: usize) {
        let prefix = format!("model.layers.{layer}");
        let norm = |name: &str| format!("{prefix}.{name}.weight");
        let (shared, replicated) =
            if layer == LAYERS { (Use::Draft, Use::Draft) } else { (Use::Shared, Use::Replicated) };
        self.plain(&norm("input_layernorm"), &[HIDDEN], replicated);
        self.plain(&norm("post_attention_layernorm"), &[HIDDEN], replicated);
        let module = |name: &str| format!("{prefix}.self_attn.{name}");
        self.linear(&module("q_a_proj"), [2048, HIDDEN], shared);
        self.plain(&norm("self_attn.q_a_layernorm"), &[2048], replicated);
        self.linear(&module("q_b_proj"), [64 * 256, 2048], shared);
        self.linear(&module("kv_a_proj_with_mqa"), [512 + 64, HIDDEN], shared);
        self.plain(&norm("self_attn.kv_a_layernorm"), &[512], replicated);
        self.linear(&module("kv_b_proj"), [64 * (192 + 256), 512], shared);
        self.linear(&module("o_proj"), [HIDDEN, 64 * 256], shared);
        if layer < 3 || layer % 4 == 2 || layer == LAYERS {
            self.linear(&module("indexer.wq_b"), [32 * 128, 2048], replicated);
            self.linear(&module("indexer.wk"), [128, HIDDEN], replicated);
            self.plain(&norm("self_attn.indexer.k_norm"), &[128], replicated);
            self.plain(&module("indexer.k_norm.bias"), &[128], replicated);
            self.linear(&module("indexer.weights_proj"), [32, HIDDEN], replicated);
        }
        let mlp = format!("{prefix}.mlp");
        if layer < 3 {
            self.swiglu(&mlp, 12288, shared);
        } else {
            self.plain(&format!("{mlp}.gate.weight"), &[self.experts, HIDDEN], replicated);
            self.typed(
                &format!("{mlp}.gate.e_score_correction_bias"),
                "F32",
                &[self.experts],
                Vec::new(),
                replicated,
            );
            for expert in 0..self.experts {
                self.swiglu(&format!("{mlp}.experts.{expert}"), 2048, shared);
            }
            self.swiglu(&format!("{mlp}.shared_experts"), 2048, shared);
        }
        if layer == LAYERS {
            for name in ["enorm", "hnorm", "shared_head.norm"] {
                self.plain(&norm(name), &[HIDDEN], Use::Draft);
            }
            self.linear(&format!("{prefix}.eh_proj"), [HIDDEN, 2 * HIDDEN], Use::Draft);
        }
    }

    fn swiglu(&mut self, prefix: &str, intermediate: usize, by: Use) {
        self.linear(&format!("{prefix}.gate_proj"), [intermediate, HIDDEN], by);
        self.linear(&format!("{prefix}.up_proj"), [intermediate, HIDDEN], by);
        self.linear(&format!("{prefix}.down_proj"), [HIDDEN, intermediate], by);
    }

    fn linear(&mut self, module: &str, [out, columns]: [usize; 2], by: Use) {
        let Scheme { group_size, symmetric, packs } = self.scheme;
        if !packs(module) {
            self.ignored.push(module.to_owned());
            return self.plain(&format!("{module}.weight"), &[out, columns], by);
        }
        let groups = columns / group_size;
        self.typed(&format!("{module}.weight_packed"), "I32", &[out, columns / 8], Vec::new(), by);
        self.typed(&format!("{module}.weight_scale"), "BF16", &[out, groups], Vec::new(), by);
        if !symmetric {
            self.typed(&format!("{module}.weight_zero_point"), "I32", &[out / 8, groups], Vec::new(), by);
        }
        let contents = [out, columns].iter().flat_map(|&size| (size as i64).to_le_bytes()).collect();
        let by = if by == Use::Draft { by } else { Use::Opening };
        self.typed(&format!("{module}.weight_shape"), "I64", &[2], contents, by);
    }

    fn plain(&mut self, name: &str, shape: &[usize], by: Use) {
        self.typed(name, "BF16", shape, Vec::new(), by);
    }

    fn typed(&mut self, name: &str, dtype: &'static str, shape: &[usize], contents: Vec<u8>, by: Use) {
        let width = match dtype {
            "BF16" => 2,
            "I64" => 8,
            _ => 4,
        };
        let bytes = shape.iter().product::<usize>() as u64 * width;
        self.tensors.push(Tensor {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            bytes,
            contents,
            by,
        });
    }

    /// Bytes by who reads them.
    pub fn bytes(&self) -> BTreeMap<Use, u64> {
        let mut sums = BTreeMap::new();
        for tensor in &self.tensors {
            *sums.entry(tensor.by).or_default() += tensor.bytes;
        }
        sums
    }

    /// Writes the files, and returns the bytes of their headers. What is not a header is a hole, or random bytes if `filled`.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn save(&self, dir: &Path, filled: bool) -> Result<u64> {
        fs::write(dir.join("config.json"), self.config().to_string())?;
        let total: u64 = self.tensors.iter().map(|tensor| tensor.bytes).sum();
        let (mut shards, mut bytes) = (vec![Vec::new()], 0);
        for tensor in &self.tensors {
            if bytes > total / SHARDS as u64 * shards.len() as u64 {
                shards.push(Vec::new());
            }
            if let Some(last) = shards.last_mut() {
                last.push(tensor);
            }
            bytes += tensor.bytes;
        }
        let mut map = BTreeMap::new();
        let mut headers = 0;
        for (number, mut tensors) in shards.into_iter().enumerate() {
            let file = format!("model-{:05}-of-{SHARDS:05}.safetensors", number + 1);
            // As the library writes them: the widest types first, which brings the contents together.
            tensors.sort_by_key(|tensor| (tensor.dtype != "I64", tensor.dtype != "F32", &tensor.name));
            headers += write_shard(&dir.join(&file), &tensors, filled)?;
            map.extend(tensors.iter().map(|tensor| (&tensor.name, file.clone())));
        }
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string())?;
        Ok(headers)
    }

    fn config(&self) -> serde_json::Value {
        let Scheme { group_size, symmetric, .. } = self.scheme;
        let quantization = json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": self.ignored,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": symmetric, "group_size": group_size,
                "strategy": "group",
            }}},
        });
        let mut config = json!({
            "model_type": "glm_moe_dsa", "hidden_size": HIDDEN, "num_hidden_layers": self.layers,
            "vocab_size": self.vocab, "num_attention_heads": 64, "q_lora_rank": 2048, "kv_lora_rank": 512,
            "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "index_n_heads": 32,
            "index_head_dim": 128, "index_topk": 2048, "index_topk_freq": 4, "index_skip_topk_offset": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 8e6}, "n_routed_experts": self.experts,
            "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
            "intermediate_size": 12288, "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
            "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "first_k_dense_replace": 3, "rms_norm_eps": 1e-5, "max_position_embeddings": 1_048_576,
            "num_nextn_predict_layers": 1, "eos_token_id": [0, 1, 2],
        });
        config["quantization_config"] = quantization;
        config
    }
}

/// A file that holds the header and the contents there are; all else is a hole, or random.
fn write_shard(path: &Path, tensors: &[&Tensor], filled: bool) -> Result<u64> {
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut end = 0;
    let mut contents = Vec::new();
    for Tensor { name, dtype, shape, bytes, contents: some, .. } in tensors {
        let start = end;
        end += bytes;
        write!(
            header,
            ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
        )?;
        contents.extend_from_slice(some);
    }
    header.push('}');
    let padded = header.len().next_multiple_of(8);
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    file.write_all(&contents)?;
    let headers = 8 + header.len() as u64;
    if filled {
        let block: Vec<u8> = (0..1_u64 << 22).flat_map(|i| random::word(i, 1).to_le_bytes()).collect();
        let mut left = end - contents.len() as u64;
        while left > 0 {
            let part = left.min(block.len() as u64);
            file.write_all(&block[..part as usize])?;
            left -= part;
        }
    }
    file.set_len(headers + end)?;
    Ok(headers)
}
