//! Writes tiny checkpoints in every format, and remembers the weights that they stand for.
//!
//! Independent of the loader on purpose: names, shapes and packings are spelled out here again.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// How linear layers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Plain, in this type.
    Dense(Dtype),
    /// compressed-tensors `pack-quantized`; no group size: one scale a row.
    CompressedTensors { group_size: Option<usize>, symmetric: bool, scale: Dtype },
    /// AutoAWQ `gemm`.
    AutoAwq { group_size: Option<usize> },
}

/// A model's dimensions.
#[derive(Debug, Clone)]
pub(crate) struct Tiny {
    pub(crate) format: Format,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) q_lora: usize,
    pub(crate) kv_lora: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) v_head: usize,
    pub(crate) index_heads: usize,
    pub(crate) index_dim: usize,
    pub(crate) vocab: usize,
    pub(crate) intermediate: usize,
    pub(crate) moe_intermediate: usize,
    pub(crate) experts: usize,
    pub(crate) shared_experts: usize,
    /// Full or not, dense or not, one entry a layer.
    pub(crate) layers: Vec<(bool, bool)>,
    /// Quantise the attention too, or the feed-forward layers alone.
    pub(crate) quantise_attention: bool,
}

impl Tiny {
    /// Eight heads, a dense full layer, a sparse shared one; awkward where a format allows: six query rows a
    /// head, a latent that fills one and a half words.
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            hidden: 16,
            heads: 8,
            q_lora: 16,
            kv_lora: 12,
            nope: 2,
            rope: 4,
            v_head: 8,
            index_heads: 2,
            index_dim: 8,
            vocab: 16,
            intermediate: 64,
            moe_intermediate: 64,
            experts: 2,
            shared_experts: 1,
            layers: vec![(true, true), (false, false)],
            quantise_attention: true,
        }
    }

    /// The checkpoint.
    pub(crate) fn write(&self) -> Written {
        let mut written =
            Written { config: self.config(), tensors: BTreeMap::new(), weights: BTreeMap::new() };
        let shape = [self.vocab, self.hidden];
        written.plain("model.embed_tokens.weight", &shape, Dtype::BF16);
        written.plain("model.norm.weight", &[self.hidden], Dtype::BF16);
        written.plain("lm_head.weight", &shape, Dtype::BF16);
        for (index, (full, dense)) in self.layers.iter().enumerate() {
            self.write_layer(&mut written, &format!("model.layers.{index}"), *full, *dense);
        }
        written
    }

    fn write_layer(&self, written: &mut Written, prefix: &str, full: bool, dense: bool) {
        let hidden = self.hidden;
        written.plain(&format!("{prefix}.input_layernorm.weight"), &[hidden], Dtype::BF16);
        written.plain(&format!("{prefix}.post_attention_layernorm.weight"), &[hidden], Dtype::BF16);

        let attention = if self.quantise_attention { self.format } else { Format::Dense(Dtype::BF16) };
        let name = |name: &str| format!("{prefix}.self_attn.{name}");
        written.linear(&name("q_a_proj"), [self.q_lora, hidden], attention);
        written.plain(&name("q_a_layernorm.weight"), &[self.q_lora], Dtype::BF16);
        written.linear(&name("q_b_proj"), [self.heads * (self.nope + self.rope), self.q_lora], attention);
        written.linear(&name("kv_a_proj_with_mqa"), [self.kv_lora + self.rope, hidden], attention);
        written.plain(&name("kv_a_layernorm.weight"), &[self.kv_lora], Dtype::BF16);
        written.linear(&name("kv_b_proj"), [self.heads * (self.nope + self.v_head), self.kv_lora], attention);
        written.linear(&name("o_proj"), [hidden, self.heads * self.v_head], attention);
        if full {
            written.linear(
                &name("indexer.wq_b"),
                [self.index_heads * self.index_dim, self.q_lora],
                attention,
            );
            written.linear(&name("indexer.wk"), [self.index_dim, hidden], attention);
            written.plain(&name("indexer.k_norm.weight"), &[self.index_dim], Dtype::BF16);
            written.plain(&name("indexer.k_norm.bias"), &[self.index_dim], Dtype::BF16);
            written.plain(&name("indexer.weights_proj.weight"), &[self.index_heads, hidden], Dtype::F32);
        }

        if dense {
            self.write_swiglu(written, &format!("{prefix}.mlp"), self.intermediate);
            return;
        }
        written.plain(&format!("{prefix}.mlp.gate.weight"), &[self.experts, hidden], Dtype::BF16);
        written.plain(&format!("{prefix}.mlp.gate.e_score_correction_bias"), &[self.experts], Dtype::F32);
        for expert in 0..self.experts {
            self.write_swiglu(written, &format!("{prefix}.mlp.experts.{expert}"), self.moe_intermediate);
        }
        if self.shared_experts > 0 {
            let intermediate = self.moe_intermediate * self.shared_experts;
            self.write_swiglu(written, &format!("{prefix}.mlp.shared_experts"), intermediate);
        }
    }

    fn write_swiglu(&self, written: &mut Written, prefix: &str, intermediate: usize) {
        written.linear(&format!("{prefix}.gate_proj"), [intermediate, self.hidden], self.format);
        written.linear(&format!("{prefix}.up_proj"), [intermediate, self.hidden], self.format);
        written.linear(&format!("{prefix}.down_proj"), [self.hidden, intermediate], self.format);
    }

    fn config(&self) -> Value {
        let words = |pick: fn(&(bool, bool)) -> &'static str| self.layers.iter().map(pick).collect::<Value>();
        let mut config = json!({
            "model_type": "glm_moe_dsa",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers.len(),
            "vocab_size": self.vocab,
            "num_attention_heads": self.heads,
            "q_lora_rank": self.q_lora,
            "kv_lora_rank": self.kv_lora,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.v_head,
            "index_n_heads": self.index_heads,
            "index_head_dim": self.index_dim,
            "index_topk": 4,
            "indexer_types": words(|(full, _)| if *full { "full" } else { "shared" }),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "n_routed_experts": self.experts,
            "num_experts_per_tok": 1,
            "n_shared_experts": self.shared_experts,
            "moe_intermediate_size": self.moe_intermediate,
            "intermediate_size": self.intermediate,
            "routed_scaling_factor": 2.5,
            "mlp_layer_types": words(|(_, dense)| if *dense { "dense" } else { "sparse" }),
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
            "eos_token_id": 1,
        });
        if let Some(quantization) = self.quantization_config() {
            config["quantization_config"] = quantization;
        }
        config
    }

    fn quantization_config(&self) -> Option<Value> {
        match self.format {
            Format::Dense(_) => None,
            Format::CompressedTensors { group_size, symmetric, .. } => {
                let mut ignore = vec!["lm_head", "re:.*weights_proj$", "re:.*mlp[.]gate$"];
                if !self.quantise_attention {
                    ignore.push("re:.*self_attn.*");
                }
                let strategy = if group_size.is_some() { "group" } else { "channel" };
                Some(json!({
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "ignore": ignore,
                    "config_groups": {"group_0": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 4, "type": "int", "strategy": strategy, "symmetric": symmetric,
                            "group_size": group_size,
                        },
                    }},
                }))
            }
            Format::AutoAwq { group_size } => {
                let mut skip = vec!["lm_head", "weights_proj", "mlp.gate"];
                if !self.quantise_attention {
                    skip.push("self_attn");
                }
                Some(json!({
                    "quant_method": "awq",
                    "version": "gemm",
                    "bits": 4,
                    "zero_point": true,
                    "group_size": group_size.map_or(-1, |size| size as i64),
                    "modules_to_not_convert": skip,
                }))
            }
        }
    }
}

/// A tensor as stored.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// A checkpoint in memory, to be spoiled and saved.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub(crate) config: Value,
    /// By full name, as stored.
    pub(crate) tensors: BTreeMap<String, Stored>,
    /// By name with `.weight`: shape and the values that the stored tensors stand for.
    pub(crate) weights: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Written {
    /// Writes `config.json` and `model.safetensors`.
    pub(crate) fn save(&self, dir: &Path) {
        self.save_config(dir);
        fs::write(dir.join("model.safetensors"), serialise(self.tensors.iter())).expect("a writable folder");
    }

    /// Writes `config.json`, `shards` shards and their index.
    pub(crate) fn save_sharded(&self, dir: &Path, shards: usize) {
        self.save_config(dir);
        let file = |shard: usize| format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        for shard in 0..shards {
            let part =
                self.tensors.iter().enumerate().filter(|(i, _)| i % shards == shard).map(|(_, entry)| entry);
            fs::write(dir.join(file(shard)), serialise(part)).expect("a writable folder");
        }
        let map: BTreeMap<_, _> =
            self.tensors.keys().enumerate().map(|(i, name)| (name, file(i % shards))).collect();
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("a writable folder");
    }

    fn save_config(&self, dir: &Path) {
        fs::write(dir.join("config.json"), self.config.to_string()).expect("a writable folder");
    }

    /// Adds a tensor that no quantiser touches.
    pub(crate) fn plain(&mut self, name: &str, shape: &[usize], dtype: Dtype) {
        let mut random = Random::new(name);
        let count = shape.iter().product();
        let (bytes, values) = floats((0..count).map(|_| random.unit()), dtype);
        self.tensors.insert(name.to_owned(), Stored { dtype, shape: shape.to_vec(), bytes });
        self.weights.insert(name.to_owned(), (shape.to_vec(), values));
    }

    /// Adds a linear layer.
    pub(crate) fn linear(&mut self, module: &str, [out, columns]: [usize; 2], format: Format) {
        match format {
            Format::Dense(dtype) => self.plain(&format!("{module}.weight"), &[out, columns], dtype),
            Format::CompressedTensors { group_size, symmetric, scale } => {
                let layer = Quantised::new(module, out, columns, group_size, symmetric, scale);
                self.add_compressed_tensors(module, &layer, symmetric);
                self.weights.insert(format!("{module}.weight"), (vec![out, columns], layer.values()));
            }
            Format::AutoAwq { group_size } => {
                let layer = Quantised::new(module, out, columns, group_size, false, Dtype::F16);
                self.add_auto_awq(module, &layer);
                self.weights.insert(format!("{module}.weight"), (vec![out, columns], layer.values()));
            }
        }
    }

    fn add_compressed_tensors(&mut self, module: &str, layer: &Quantised, symmetric: bool) {
        let Quantised { out, columns, groups, .. } = *layer;
        let words = columns.div_ceil(8);
        let packed = pack(out, words, |o, word, j| {
            let column = word * 8 + j;
            if column < columns { layer.q[o * columns + column] } else { 0 }
        });
        self.words(&format!("{module}.weight_packed"), [out, words], packed);
        let shape: Vec<u8> = [out as i64, columns as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
        let stored = Stored { dtype: Dtype::I64, shape: vec![2], bytes: shape };
        self.tensors.insert(format!("{module}.weight_shape"), stored);
        let (bytes, _) = floats(layer.scales.iter().copied(), layer.scale);
        let stored = Stored { dtype: layer.scale, shape: vec![out, groups], bytes };
        self.tensors.insert(format!("{module}.weight_scale"), stored);
        if !symmetric {
            let rows = out.div_ceil(8);
            let packed = pack(rows, groups, |row, group, j| {
                let o = row * 8 + j;
                if o < out { layer.z[o * groups + group] } else { 0 }
            });
            self.words(&format!("{module}.weight_zero_point"), [rows, groups], packed);
        }
    }

    fn add_auto_awq(&mut self, module: &str, layer: &Quantised) {
        const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        let Quantised { out, columns, groups, .. } = *layer;
        let words = out / 8;
        let packed = pack(columns, words, |i, word, j| layer.q[(word * 8 + ORDER[j]) * columns + i]);
        self.words(&format!("{module}.qweight"), [columns, words], packed);
        let packed = pack(groups, words, |group, word, j| layer.z[(word * 8 + ORDER[j]) * groups + group]);
        self.words(&format!("{module}.qzeros"), [groups, words], packed);
        let transposed = (0..groups).flat_map(|g| (0..out).map(move |o| layer.scales[o * groups + g]));
        let (bytes, _) = floats(transposed, Dtype::F16);
        let stored = Stored { dtype: Dtype::F16, shape: vec![groups, out], bytes };
        self.tensors.insert(format!("{module}.scales"), stored);
    }

    fn words(&mut self, name: &str, shape: [usize; 2], words: Vec<u32>) {
        let bytes = words.into_iter().flat_map(u32::to_le_bytes).collect();
        self.tensors.insert(name.to_owned(), Stored { dtype: Dtype::I32, shape: shape.to_vec(), bytes });
    }
}

/// `[rows, words]`, eight nibbles a word.
fn pack(rows: usize, words: usize, nibble: impl Fn(usize, usize, usize) -> u32) -> Vec<u32> {
    let word = |row, word| (0..8).fold(0, |packed, j| packed | nibble(row, word, j) << (4 * j));
    (0..rows).flat_map(|row| (0..words).map(move |w| (row, w))).map(|(row, w)| word(row, w)).collect()
}

/// A quantised layer before it is packed: all in `[out, in]` order, nibbles unsigned.
struct Quantised {
    out: usize,
    columns: usize,
    group_size: usize,
    groups: usize,
    q: Vec<u32>,
    z: Vec<u32>,
    scales: Vec<f32>,
    scale: Dtype,
}

impl Quantised {
    fn new(
        name: &str,
        out: usize,
        columns: usize,
        group: Option<usize>,
        symmetric: bool,
        scale: Dtype,
    ) -> Self {
        let mut random = Random::new(name);
        let group_size = group.unwrap_or(columns).min(columns);
        let groups = columns.div_ceil(group_size);
        let q = (0..out * columns).map(|_| random.nibble()).collect();
        let z = (0..out * groups).map(|_| if symmetric { 8 } else { random.nibble() }).collect();
        let (_, scales) = floats((0..out * groups).map(|_| random.unit()), scale);
        Self { out, columns, group_size, groups, q, z, scales, scale }
    }

    fn values(&self) -> Vec<f32> {
        let value = |o: usize, i: usize| {
            let group = o * self.groups + i / self.group_size;
            (self.q[o * self.columns + i] as f32 - self.z[group] as f32) * self.scales[group]
        };
        (0..self.out).flat_map(|o| (0..self.columns).map(move |i| (o, i))).map(|(o, i)| value(o, i)).collect()
    }
}

/// The bytes of `values` in `dtype`, and the values after rounding to it.
fn floats(values: impl Iterator<Item = f32>, dtype: Dtype) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = Vec::new();
    let mut rounded = Vec::new();
    for value in values {
        match dtype {
            Dtype::BF16 => {
                let x = bf16::from_f32(value);
                bytes.extend(x.to_le_bytes());
                rounded.push(x.to_f32());
            }
            Dtype::F16 => {
                let x = f16::from_f32(value);
                bytes.extend(x.to_le_bytes());
                rounded.push(x.to_f32());
            }
            _ => {
                bytes.extend(value.to_le_bytes());
                rounded.push(value);
            }
        }
    }
    (bytes, rounded)
}

/// A safetensors file.
pub(crate) fn serialise<'a>(tensors: impl Iterator<Item = (&'a String, &'a Stored)>) -> Vec<u8> {
    let views = tensors.map(|(name, stored)| {
        let view = TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes);
        (name, view.expect("as many bytes as the shape says"))
    });
    safetensors::serialize(views, None).expect("sound tensors")
}

/// A small generator seeded by a name: what a tensor holds does not depend on what was written before it.
struct Random(u64);

impl Random {
    fn new(name: &str) -> Self {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn nibble(&mut self) -> u32 {
        (self.next() >> 60) as u32
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
