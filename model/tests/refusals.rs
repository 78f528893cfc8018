//! Checkpoints whose tensors are not what config.json says: each is refused with file, tensor, expected and
//! found.

mod support;

use std::fs;
use std::path::Path;

use dsa80_model::checkpoint::{Checkpoint, CheckpointError, Shard};
use dsa80_model::config::QuantizationMethod;
use safetensors::Dtype;
use serde_json::json;
use support::{Format, Stored, Tiny, Written};

const ASYMMETRIC: Format =
    Format::CompressedTensors { group_size: Some(32), symmetric: false, scale: Dtype::BF16 };
const SYMMETRIC: Format =
    Format::CompressedTensors { group_size: Some(32), symmetric: true, scale: Dtype::BF16 };
const AWQ: Format = Format::AutoAwq { group_size: Some(32) };
const DENSE: Format = Format::Dense(Dtype::BF16);

/// A tensor in the middle of the model that is packed, or not, like every other.
const MODULE: &str = "model.layers.1.mlp.experts.1.down_proj";

fn open(written: &Written) -> Result<Checkpoint, CheckpointError> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    written.save(dir.path());
    // The mapping outlives the folder.
    Checkpoint::open(dir.path())
}

/// Spoils a checkpoint and checks that the message names the file and all of `parts`.
#[track_caller]
fn refused(format: Format, parts: &[&str], spoil: impl FnOnce(&mut Written)) {
    let mut written = Tiny::new(format).write();
    spoil(&mut written);
    let message = open(&written).err().expect("a refusal").to_string();
    for part in ["model.safetensors: "].iter().chain(parts) {
        assert!(message.contains(part), "{message}\nlacks {part}");
    }
}

#[track_caller]
fn accepted(format: Format, change: impl FnOnce(&mut Written)) -> Checkpoint {
    let mut written = Tiny::new(format).write();
    change(&mut written);
    open(&written).unwrap_or_else(|e| panic!("{e}"))
}

fn ints(dtype: Dtype, values: &[i64]) -> Stored {
    let bytes = values.iter().flat_map(|v| match dtype {
        Dtype::I32 => (*v as i32).to_le_bytes().to_vec(),
        _ => v.to_le_bytes().to_vec(),
    });
    Stored { dtype, shape: vec![values.len()], bytes: bytes.collect() }
}

fn zeros(dtype: Dtype, shape: &[usize]) -> Stored {
    let bytes = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
    Stored { dtype, shape: shape.to_vec(), bytes }
}

#[test]
fn missing_tensors() {
    let names: Vec<String> = Tiny::new(ASYMMETRIC).write().tensors.into_keys().collect();
    for name in names {
        refused(ASYMMETRIC, &[&name, "is missing; expected"], |w| _ = w.tensors.remove(&name));
    }
    let name = format!("{MODULE}.weight");
    refused(DENSE, &[&name, "is missing", "[16, 64]"], |w| _ = w.tensors.remove(&name));
    for suffix in ["qweight", "qzeros", "scales"] {
        let name = format!("{MODULE}.{suffix}");
        refused(AWQ, &[&name, "is missing"], |w| _ = w.tensors.remove(&name));
    }
}

#[test]
fn unexpected_tensors() {
    for (name, reason) in [
        ("model.layers.0.self_attn.q_proj.weight", "no place for it"),
        ("model.layers.0.self_attn.q_a_proj.bias", "no place for it"),
        ("model.layers.1.self_attn.indexer.wk.weight", "no place for it"),
        ("model.layers.1.mlp.experts.2.up_proj.weight", "no place for it"),
        ("model.layers.1.mlp.experts.gate_up_proj", "by expert"),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", "FP8"),
        ("model.layers.2.mystery.weight", "no place for it"),
        ("model.layers.3.self_attn.o_proj.weight", "no place for it"),
    ] {
        refused(DENSE, &[name, "was not expected", reason], |w| w.plain(name, &[4, 4], Dtype::BF16));
    }
    refused(DENSE, &["lm_head.weight", "tie_word_embeddings"], |w| {
        w.config["tie_word_embeddings"] = true.into()
    });
    let zero_points = format!("{MODULE}.weight_zero_point");
    refused(SYMMETRIC, &[&zero_points, "symmetric"], |w| {
        w.tensors.insert(zero_points.clone(), zeros(Dtype::I32, &[2, 2]));
    });
    // One weight twice.
    refused(DENSE, &[&format!("{MODULE}.qweight"), &format!("{MODULE}.weight`")], |w| {
        w.linear(MODULE, [16, 64], AWQ)
    });
}

/// The layer behind the last one is the MTP layer; it is loaded only where it is asked for, and may be absent.
#[test]
fn tensors_that_may_be_there() {
    accepted(DENSE, |w| {
        w.config["num_nextn_predict_layers"] = 1.into();
        for name in ["enorm.weight", "eh_proj.weight", "shared_head.norm.weight", "self_attn.q_a_proj.weight"]
        {
            w.plain(&format!("model.layers.2.{name}"), &[16], Dtype::BF16);
        }
    });
    accepted(DENSE, |w| w.plain("model.layers.0.self_attn.rotary_emb.inv_freq", &[2], Dtype::F32));
    let tied = accepted(DENSE, |w| {
        w.config["tie_word_embeddings"] = true.into();
        w.tensors.remove("lm_head.weight");
    });
    let ends = tied.load_ends(Shard { rank: 1, world_size: 2 }).unwrap();
    assert_eq!(ends.lm_head, ends.embed_tokens);
}

#[test]
fn a_draft_layer_that_is_not_whole() {
    let half = accepted(DENSE, |w| {
        w.config["num_nextn_predict_layers"] = 1.into();
        w.plain("model.layers.2.enorm.weight", &[16], Dtype::BF16);
    });
    let message = half.with_draft_layer().err().expect("a refusal").to_string();
    assert!(message.contains("model.layers.2.input_layernorm.weight"), "{message}");
}

#[test]
fn wrong_types() {
    let cases = [
        (DENSE, format!("{MODULE}.weight"), Dtype::F8_E4M3, "BF16, F16 or F32"),
        (DENSE, "model.norm.weight".to_owned(), Dtype::F64, "BF16, F16 or F32"),
        (DENSE, "model.layers.1.mlp.gate.e_score_correction_bias".to_owned(), Dtype::I32, "BF16, F16 or F32"),
        (SYMMETRIC, format!("{MODULE}.weight_packed"), Dtype::F32, "I32"),
        (SYMMETRIC, format!("{MODULE}.weight_scale"), Dtype::I16, "BF16, F16 or F32"),
        (SYMMETRIC, format!("{MODULE}.weight_shape"), Dtype::F64, "I64"),
        (ASYMMETRIC, format!("{MODULE}.weight_zero_point"), Dtype::F32, "I32"),
        (AWQ, format!("{MODULE}.qweight"), Dtype::F32, "I32"),
        (AWQ, format!("{MODULE}.qzeros"), Dtype::F32, "I32"),
        (AWQ, format!("{MODULE}.scales"), Dtype::I16, "BF16, F16 or F32"),
    ];
    for (format, name, dtype, expected) in cases {
        refused(format, &[&name, &format!("has type {dtype}; expected {expected}")], |w| {
            let stored = w.tensors.get_mut(&name).unwrap();
            *stored = zeros(dtype, &stored.shape);
        });
    }
}

#[test]
fn wrong_shapes() {
    let cases = [
        (DENSE, format!("{MODULE}.weight"), vec![64, 16], "[16, 64]"),
        (DENSE, "model.norm.weight".to_owned(), vec![16, 1], "[16]"),
        (DENSE, "model.embed_tokens.weight".to_owned(), vec![17, 16], "[16, 16]"),
        (SYMMETRIC, format!("{MODULE}.weight_packed"), vec![16, 64], "[16, 8]"),
        // Two groups of 32, not four of 16.
        (SYMMETRIC, format!("{MODULE}.weight_scale"), vec![16, 4], "[16, 2]"),
        (SYMMETRIC, format!("{MODULE}.weight_shape"), vec![3], "[2]"),
        (ASYMMETRIC, format!("{MODULE}.weight_zero_point"), vec![16, 2], "[2, 2]"),
        (AWQ, format!("{MODULE}.qweight"), vec![16, 8], "[64, 2]"),
        (AWQ, format!("{MODULE}.qzeros"), vec![1, 2], "[2, 2]"),
        (AWQ, format!("{MODULE}.scales"), vec![16, 2], "[2, 16]"),
    ];
    for (format, name, shape, expected) in cases {
        refused(format, &[&name, &format!("has shape {shape:?}; expected {expected} (")], |w| {
            let stored = w.tensors.get_mut(&name).unwrap();
            *stored = zeros(stored.dtype, &shape);
        });
    }
}

#[test]
fn wrong_contents() {
    let shape = format!("{MODULE}.weight_shape");
    refused(SYMMETRIC, &[&shape, "holds [16, 63]; expected [16, 64]"], |w| {
        w.tensors.insert(shape.clone(), ints(Dtype::I64, &[16, 63]));
    });
    let order = format!("{MODULE}.weight_g_idx");
    refused(SYMMETRIC, &[&order, "activation order"], |w| {
        let shuffled: Vec<i64> = (0..64).map(|i| (i + 1) / 32).collect();
        w.tensors.insert(order.clone(), ints(Dtype::I32, &shuffled));
    });
    let identity: Vec<i64> = (0..64).map(|i| i / 32).collect();
    for (dtype, values) in
        [(Dtype::I32, identity.clone()), (Dtype::I64, identity), (Dtype::I32, vec![-1; 64])]
    {
        accepted(SYMMETRIC, |w| _ = w.tensors.insert(order.clone(), ints(dtype, &values)));
    }
}

/// The tensors and `quantization_config` must tell one story.
#[test]
fn packed_against_the_configs_word() {
    let named = format!("module `{MODULE}`");
    refused(DENSE, &[&named, "weight_packed", "does not exist"], |w| {
        w.tensors.remove(&format!("{MODULE}.weight"));
        w.linear(MODULE, [16, 64], SYMMETRIC);
    });
    refused(SYMMETRIC, &[&named, "weight_packed", "leaves it unquantised"], |w| {
        w.config["quantization_config"]["ignore"].as_array_mut().unwrap().push(MODULE.into());
    });
    refused(SYMMETRIC, &[&named, ".weight`", "packs it (4 bits, group size 32, symmetric)"], |w| {
        w.tensors.retain(|name, _| !name.starts_with(MODULE));
        w.linear(MODULE, [16, 64], DENSE);
    });
    refused(AWQ, &[&named, ".weight`", "packs it (4 bits, group size 32, asymmetric)"], |w| {
        w.tensors.retain(|name, _| !name.starts_with(MODULE));
        w.linear(MODULE, [16, 64], DENSE);
    });
    refused(AWQ, &[&named, "weight_packed", "AutoAwq"], |w| {
        w.tensors.retain(|name, _| !name.starts_with(MODULE));
        w.linear(MODULE, [16, 64], SYMMETRIC);
    });
    refused(SYMMETRIC, &[MODULE, "weight_scale", "[16, 2]", "group size 64"], |w| {
        let group = &mut w.config["quantization_config"]["config_groups"]["group_0"];
        group["weights"]["group_size"] = 64.into();
        // The first layers have columns for one group of either size; only the experts tell.
        group["targets"] = json!(["re:.*experts.*"]);
        w.config["quantization_config"]["config_groups"]["group_1"] =
            json!({"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}});
        for expert in ["experts.0.down_proj", "shared_experts.down_proj"] {
            let module = format!("model.layers.1.mlp.{expert}");
            w.tensors.retain(|name, _| !name.starts_with(&module));
            let scheme =
                Format::CompressedTensors { group_size: Some(64), symmetric: true, scale: Dtype::BF16 };
            w.linear(&module, [16, 64], scheme);
        }
    });
}

/// Any mix that the config describes is taken: here one expert is ignored, and the router is packed though it
/// is no `Linear`.
#[test]
fn mixtures() {
    let checkpoint = accepted(SYMMETRIC, |w| {
        w.config["quantization_config"]["ignore"] = json!(["lm_head", "re:.*weights_proj", MODULE]);
        w.tensors.retain(|name, _| !name.starts_with(MODULE));
        w.linear(MODULE, [16, 64], Format::Dense(Dtype::F16));
        w.tensors.remove("model.layers.1.mlp.gate.weight");
        w.linear("model.layers.1.mlp.gate", [2, 16], SYMMETRIC);
    });
    let format = |module: &str| format!("{:?}", checkpoint.linear_format(module).unwrap());
    assert_eq!(format(MODULE), "Dense(F16)");
    let method = QuantizationMethod::CompressedTensors;
    assert!(format("model.layers.1.mlp.gate").contains(&format!("{method:?}")));
    checkpoint.load_layer(1, Shard::WHOLE).unwrap();
}

/// `lm_head` and `kv_b_proj` are wanted dense; packed ones are dequantised.
#[test]
fn a_packed_lm_head() {
    let mut written = Tiny::new(SYMMETRIC).write();
    written.config["quantization_config"]["ignore"] = json!(["re:.*weights_proj", "re:.*mlp[.]gate$"]);
    written.tensors.remove("lm_head.weight");
    written.linear("lm_head", [16, 16], SYMMETRIC);
    let ends = open(&written).unwrap().load_ends(Shard { rank: 1, world_size: 2 }).unwrap();
    assert_eq!(ends.lm_head.shape, [8, 16]);
    assert_eq!(ends.lm_head.to_f32(), written.weights["lm_head.weight"].1[8 * 16..]);
}

// --- files
// ------------------------------------------------------------------------------------------------------

fn refused_folder(dir: &Path, parts: &[&str]) {
    let message = Checkpoint::open(dir).err().expect("a refusal").to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message}\nlacks one of {parts:?}");
}

#[test]
fn missing_files() {
    let dir = tempfile::tempdir().unwrap();
    refused_folder(dir.path(), &["config.json", "no such file"]);
    Tiny::new(DENSE).write().save(dir.path());
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused_folder(dir.path(), &["model.safetensors", "no such file"]);
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    refused_folder(dir.path(), &["model.safetensors", "not a regular file"]);
    fs::write(dir.path().join("config.json"), b"\xff").unwrap();
    refused_folder(dir.path(), &["config.json", "not a JSON object"]);
    fs::write(dir.path().join("config.json"), "{\"model_type\": \"llama\"}").unwrap();
    refused_folder(dir.path(), &["config.json", "`model_type` is \"llama\""]);
    refused_folder(&dir.path().join("absent"), &["absent", "config.json"]);
}

#[test]
fn an_index_that_does_not_fit_its_shards() {
    const INDEX: &str = "model.safetensors.index.json";
    let dir = tempfile::tempdir().unwrap();
    let written = Tiny::new(DENSE).write();
    written.save_sharded(dir.path(), 2);
    Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().join(INDEX);
    let sound = fs::read_to_string(&path).unwrap();
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let change = |from: &str, to: &str| {
        assert!(sound.contains(from));
        fs::write(&path, sound.replacen(from, to, 1)).unwrap();
    };

    change(first, "../model.safetensors");
    refused_folder(dir.path(), &[INDEX, "\"../model.safetensors\"", "same folder"]);
    change(first, "/etc/passwd");
    refused_folder(dir.path(), &[INDEX, "\"/etc/passwd\"", "same folder"]);
    change(first, "..");
    refused_folder(dir.path(), &[INDEX, "\"..\"", "same folder"]);
    change(first, "model-00003-of-00002.safetensors");
    refused_folder(dir.path(), &["model-00003-of-00002.safetensors", "no such file", INDEX]);
    change(first, second);
    refused_folder(dir.path(), &[second, "is missing", INDEX]);
    change("\"weight_map\":{", "\"weight_map\":{\"extra\":\"model-00001-of-00002.safetensors\",");
    refused_folder(dir.path(), &[first, "`extra`", "is missing"]);
    change("\"lm_head.weight\":", "\"lm_head.weight2\":");
    refused_folder(dir.path(), &["lm_head.weight"]);
    change("\"lm_head.weight\":\"model-00001-of-00002.safetensors\",", "");
    refused_folder(dir.path(), &[first, "`lm_head.weight` was not expected", INDEX]);
    change("\"weight_map\":{", "\"weight_map\":{\"lm_head.weight\":\"model-00001-of-00002.safetensors\",");
    refused_folder(dir.path(), &[INDEX, "`lm_head.weight` is listed twice"]);
    for text in ["", "[]", "{}", "{\"weight_map\": []}", "{\"weight_map\": {\"a\": 1}}"] {
        fs::write(&path, text).unwrap();
        refused_folder(dir.path(), &[INDEX]);
    }

    // One tensor in two shards.
    fs::write(&path, &sound).unwrap();
    fs::write(dir.path().join(second), support::serialise(written.tensors.iter())).unwrap();
    refused_folder(dir.path(), &[first, second, "expected it once"]);
    // A second set of weights.
    written.save_sharded(dir.path(), 2);
    written.save(dir.path());
    refused_folder(dir.path(), &["model.safetensors: ", INDEX, "remove the one that is not meant"]);
}

#[test]
fn other_files_of_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(DENSE).write().save(dir.path());
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.file("tokenizer.json").unwrap().as_deref(), Some(b"{}".as_slice()));
    assert_eq!(checkpoint.file("chat_template.jinja").unwrap(), None);
    assert_eq!(checkpoint.file("../tokenizer.json").unwrap(), None);
    checkpoint.verify().unwrap();
    assert_eq!(checkpoint.file_bytes(), fs::metadata(dir.path().join("model.safetensors")).unwrap().len());
}

#[test]
fn embedded_in_the_binary() {
    let written = Tiny::new(ASYMMETRIC).write();
    let config: &'static str = written.config.to_string().leak();
    let weights: &'static [u8] = support::serialise(written.tensors.iter()).leak();
    let files: [(&'static str, &'static [u8]); 2] =
        [("config.json", config.as_bytes()), ("model.safetensors", weights)];
    let embedded = Checkpoint::from_static(&files).unwrap();
    let opened = open(&written).unwrap();
    assert_eq!(embedded.config(), opened.config());
    for layer in 0..2 {
        let load =
            |checkpoint: &Checkpoint| checkpoint.load_layer(layer, Shard { rank: 1, world_size: 2 }).unwrap();
        assert_eq!(load(&embedded), load(&opened));
    }
    let message = Checkpoint::from_static(&files[..1]).err().unwrap().to_string();
    assert!(message.contains("model.safetensors (embedded)"), "{message}");
}

/// A shard that is cut off while it is being loaded is named, and the tensor that it lacks.
#[test]
fn a_shard_that_is_cut_off_after_it_was_opened() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    Tiny::new(ASYMMETRIC).write().save_sharded(dir.path(), 2);
    let checkpoint = Checkpoint::open(dir.path()).expect("a sound checkpoint");
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let file = fs::OpenOptions::new().write(true).open(&shard).expect("the shard");
    file.set_len(file.metadata().expect("its length").len() / 2).expect("a shorter file");
    let message = (0..2).find_map(|layer| checkpoint.load_layer(layer, Shard::WHOLE).err());
    let message = message.expect("a refusal").to_string();
    assert!(message.contains("model-00002-of-00002.safetensors: not a sound safetensors file"), "{message}");
    assert!(message.contains("tensor `model.layers.") && message.contains("cut off"), "{message}");
}
