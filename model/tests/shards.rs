//! What a rank loads is its part of the weights that the files stand for: every format, group size and
//! degree.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dsa80_model::checkpoint::{Checkpoint, Progress, Shard};
use dsa80_model::weights::{HostMlp, HostSwiGlu};
use dsa80_reference::{HostExpert, HostLinear, HostTensor};
use proptest::prelude::*;
use safetensors::Dtype;
use support::{Format, Tiny, Written};

/// Which rows and columns of a weight a rank should have.
#[derive(Clone, Copy)]
enum Part {
    Whole,
    Rows,
    /// Where they divide; else all of them.
    RowsWhereEven,
    Columns,
}

/// Compares what a rank has with the whole.
struct Judge<'a> {
    written: &'a Written,
    shard: Shard,
}

impl Judge<'_> {
    fn tensor(&self, name: &str, found: &HostTensor, part: Part) {
        let (shape, values) = &self.written.weights[name];
        let columns: usize = shape[1..].iter().product();
        let range = |len: usize| {
            assert_eq!(len % self.shard.world_size, 0, "{name}");
            let share = len / self.shard.world_size;
            self.shard.rank * share..(self.shard.rank + 1) * share
        };
        let (rows, columns_range) = match part {
            Part::Whole => (0..shape[0], 0..columns),
            Part::RowsWhereEven if shape[0] % self.shard.world_size != 0 => (0..shape[0], 0..columns),
            Part::Rows | Part::RowsWhereEven => (range(shape[0]), 0..columns),
            Part::Columns => (0..shape[0], range(columns)),
        };
        let expected: Vec<f32> = rows
            .flat_map(|row| columns_range.clone().map(move |column| values[row * columns + column]))
            .collect();
        assert_eq!(found.shape.iter().product::<usize>(), expected.len(), "{name}: {:?}", found.shape);
        assert!(found.to_f32() == expected, "{name} of {:?} differs", self.shard);
    }

    fn linear(&self, module: &str, found: &HostLinear, part: Part) {
        let dense = match found {
            HostLinear::Dense(_) | HostLinear::Random(_) => found.clone().dense(),
            HostLinear::Int4(packed) => {
                let (rows, groups) = (packed.out_features, packed.groups());
                assert!(packed.group_size <= packed.in_features, "{module}");
                assert_eq!(packed.weight_packed.len(), rows * packed.words_per_row(), "{module}");
                assert_eq!(packed.scales.shape, [rows, groups], "{module}");
                if let Some(zero_points) = &packed.zero_points {
                    assert_eq!(zero_points.len(), rows.div_ceil(8) * groups, "{module}");
                }
                packed.dequantise()
            }
        };
        assert_eq!(found.dims(), (dense.shape[0], dense.shape[1]), "{module}");
        self.tensor(&format!("{module}.weight"), &dense, part);
    }

    fn swiglu(&self, prefix: &str, HostSwiGlu { gate_proj, up_proj, down_proj }: &HostSwiGlu) {
        self.linear(&format!("{prefix}.gate_proj"), gate_proj, Part::Rows);
        self.linear(&format!("{prefix}.up_proj"), up_proj, Part::Rows);
        self.linear(&format!("{prefix}.down_proj"), down_proj, Part::Columns);
    }

    /// Every weight of the model.
    fn model(&self, checkpoint: &Checkpoint) {
        let ends = checkpoint.load_ends(self.shard).expect("a degree that divides");
        assert_eq!(
            ends.vocab_start,
            self.shard.rank * checkpoint.config().vocab_size / self.shard.world_size
        );
        self.tensor("model.embed_tokens.weight", &ends.embed_tokens, Part::Rows);
        self.tensor("model.norm.weight", &ends.norm, Part::Whole);
        self.tensor("lm_head.weight", &ends.lm_head, Part::Rows);
        for index in 0..checkpoint.config().num_hidden_layers {
            self.layer(checkpoint, index);
        }
    }

    fn layer(&self, checkpoint: &Checkpoint, index: usize) {
        let layer = checkpoint.load_layer(index, self.shard).expect("a degree that divides");
        let prefix = format!("model.layers.{index}");
        let name = |name: &str| format!("{prefix}.{name}");
        self.tensor(&name("input_layernorm.weight"), &layer.input_layernorm, Part::Whole);
        self.tensor(&name("post_attention_layernorm.weight"), &layer.post_attention_layernorm, Part::Whole);

        let attention = &layer.attention;
        self.linear(&name("self_attn.q_a_proj"), &attention.q_a_proj, Part::RowsWhereEven);
        self.tensor(&name("self_attn.q_a_layernorm.weight"), &attention.q_a_layernorm, Part::Whole);
        self.linear(&name("self_attn.q_b_proj"), &attention.q_b_proj, Part::Rows);
        let kv_a_proj = name("self_attn.kv_a_proj_with_mqa");
        self.linear(&kv_a_proj, &attention.kv_a_proj_with_mqa, Part::RowsWhereEven);
        self.tensor(&name("self_attn.kv_a_layernorm.weight"), &attention.kv_a_layernorm, Part::Whole);
        self.tensor(&name("self_attn.kv_b_proj.weight"), &attention.kv_b_proj, Part::Rows);
        self.linear(&name("self_attn.o_proj"), &attention.o_proj, Part::Columns);
        let config = checkpoint.config();
        let heads = config.num_attention_heads / self.shard.world_size;
        let kv_head = config.qk_nope_head_dim + config.v_head_dim;
        assert_eq!(attention.kv_b_proj.shape, [heads, kv_head, config.kv_lora_rank]);
        if let Some(indexer) = &attention.indexer {
            let name = |module: &str| format!("{prefix}.self_attn.indexer.{module}");
            self.linear(&name("wq_b"), &indexer.wq_b, Part::Whole);
            self.linear(&name("wk"), &indexer.wk, Part::Whole);
            self.tensor(&name("k_norm.weight"), &indexer.k_norm_weight, Part::Whole);
            self.tensor(&name("k_norm.bias"), &indexer.k_norm_bias, Part::Whole);
            self.linear(&name("weights_proj"), &indexer.weights_proj, Part::Whole);
        }

        match &layer.mlp {
            HostMlp::Dense(swiglu) => self.swiglu(&name("mlp"), swiglu),
            HostMlp::Sparse(moe) => {
                self.linear(&name("mlp.gate"), &moe.gate, Part::Whole);
                let bias = name("mlp.gate.e_score_correction_bias");
                self.tensor(&bias, &moe.e_score_correction_bias, Part::Whole);
                assert_eq!(moe.experts.len(), config.n_routed_experts);
                for (expert, weights) in moe.experts.iter().enumerate() {
                    let HostExpert { gate_proj, up_proj, down_proj } = weights.clone();
                    let swiglu = HostSwiGlu { gate_proj, up_proj, down_proj };
                    self.swiglu(&name(&format!("mlp.experts.{expert}")), &swiglu);
                }
                assert_eq!(moe.shared_experts.is_some(), config.n_shared_experts > 0);
                if let Some(shared) = &moe.shared_experts {
                    self.swiglu(&name("mlp.shared_experts"), shared);
                }
            }
        }
    }
}

/// All ranks of all degrees.
fn judge(written: &Written, dir: &Path) {
    let degrees = Checkpoint::open(dir).unwrap_or_else(|e| panic!("{e}")).config().valid_tp();
    for world_size in degrees {
        for rank in 0..world_size {
            // A fresh checkpoint, so that the bytes counted are this rank's.
            let checkpoint = Checkpoint::open(dir).expect("it has just been opened");
            let shard = Shard { rank, world_size };
            Judge { written, shard }.model(&checkpoint);
            assert_eq!(
                checkpoint.bytes_read().total(),
                checkpoint.shard_bytes(shard).expect("a valid degree")
            );
        }
    }
}

fn formats() -> impl Strategy<Value = Format> {
    let dense = prop::sample::select(vec![Dtype::BF16, Dtype::F16, Dtype::F32]);
    let scale = dense.clone();
    let group_size = prop::sample::select(vec![Some(32), Some(64), Some(128), None]);
    prop_oneof![
        dense.prop_map(Format::Dense),
        (group_size.clone(), any::<bool>(), scale).prop_map(|(group_size, symmetric, scale)| {
            Format::CompressedTensors { group_size, symmetric, scale }
        }),
        group_size.prop_map(|group_size| Format::AutoAwq { group_size }),
    ]
}

fn models() -> impl Strategy<Value = Tiny> {
    let heads = prop::sample::select(vec![1_usize, 2, 4, 8]);
    let layers = prop::collection::vec((any::<bool>(), any::<bool>()), 0..2);
    let widths = (1_usize..=2, 1_usize..=2, prop::sample::select(vec![8_usize, 16, 32, 128]));
    let widths = (widths, prop::sample::select(vec![64_usize, 256, 512]));
    (formats(), heads, layers, widths, any::<bool>(), 0_usize..=2).prop_map(
        |(
            format,
            heads,
            layers,
            ((hidden, q_lora, v_head), intermediate),
            quantise_attention,
            shared_experts,
        )| Tiny {
            heads,
            hidden: 8 * hidden,
            q_lora: 8 * q_lora,
            // Whole words of output features even for a single head, which AutoAWQ asks for.
            kv_lora: 24,
            nope: 8,
            rope: 8,
            v_head,
            intermediate,
            moe_intermediate: intermediate,
            shared_experts,
            layers: [vec![(true, false)], layers].concat(),
            quantise_attention,
            ..Tiny::new(format)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_rank_has_its_part_of_the_whole(model in models(), shards in 1_usize..4) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let written = model.write();
        if shards == 1 {
            written.save(dir.path());
        } else {
            written.save_sharded(dir.path(), shards);
        }
        judge(&written, dir.path());
    }
}

/// Six query rows a head: the zero points of a rank's rows start inside a word.
#[test]
fn rows_that_start_inside_a_word_of_zero_points() {
    let asymmetric = Format::CompressedTensors { group_size: Some(8), symmetric: false, scale: Dtype::BF16 };
    for format in [asymmetric, Format::AutoAwq { group_size: Some(8) }] {
        let dir = tempfile::tempdir().unwrap();
        let written = Tiny::new(format).write();
        written.save(dir.path());
        assert!(Checkpoint::open(dir.path()).unwrap().config().valid_tp().contains(&8));
        judge(&written, dir.path());
    }
}

/// Latents of 14 are whole on each of four and eight ranks, and shared by two.
#[test]
fn what_ranks_gather_is_shared_where_they_divide_it() {
    let asymmetric = Format::CompressedTensors { group_size: Some(8), symmetric: false, scale: Dtype::BF16 };
    for format in [asymmetric, Format::Dense(Dtype::BF16)] {
        let dir = tempfile::tempdir().unwrap();
        let written = Tiny { rope: 2, ..Tiny::new(format) }.write();
        written.save(dir.path());
        judge(&written, dir.path());
        for (world_size, rows) in [(1, 14), (2, 7), (4, 14), (8, 14)] {
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            let layer = checkpoint.load_layer(0, Shard { rank: 0, world_size }).unwrap();
            assert_eq!(layer.attention.kv_a_proj_with_mqa.dims(), (rows, 16), "{world_size} ranks");
        }
    }
}

/// Eight ranks read an eighth of what is sharded each, and no byte of another's part.
#[test]
fn a_rank_reads_only_its_shard() {
    for format in [
        Format::Dense(Dtype::BF16),
        Format::CompressedTensors { group_size: Some(32), symmetric: false, scale: Dtype::BF16 },
        Format::CompressedTensors { group_size: Some(32), symmetric: true, scale: Dtype::F32 },
        Format::AutoAwq { group_size: Some(32) },
    ] {
        let dir = tempfile::tempdir().unwrap();
        // Heads of 40 query rows and 40 of keys and values, and latents of 64: every shard falls on whole words.
        Tiny {
            q_lora: 64,
            kv_lora: 32,
            nope: 8,
            rope: 32,
            index_dim: 32,
            v_head: 32,
            intermediate: 256,
            moe_intermediate: 256,
            ..Tiny::new(format)
        }
        .write()
        .save(dir.path());
        let read = |shard| {
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(checkpoint.bytes_read().total(), 0);
            checkpoint.load_ends(shard).unwrap();
            for layer in 0..2 {
                checkpoint.load_layer(layer, shard).unwrap();
            }
            checkpoint.bytes_read()
        };
        let whole = read(Shard::WHOLE);
        for rank in 0..8 {
            let part = read(Shard { rank, world_size: 8 });
            assert_eq!(part.sharded * 8, whole.sharded, "{format:?}");
            assert_eq!(part.replicated, whole.replicated, "{format:?}");
        }
    }
}

/// Progress reaches exactly what was announced, over all ranks.
#[test]
fn progress_is_told_about_every_byte() {
    struct Sum(AtomicU64);
    impl Progress for Sum {
        fn advance(&self, bytes: u64) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    let dir = tempfile::tempdir().unwrap();
    Tiny::new(Format::AutoAwq { group_size: Some(32) }).write().save(dir.path());
    let sum = Arc::new(Sum(AtomicU64::new(0)));
    let checkpoint =
        Checkpoint::open(dir.path()).unwrap().with_progress(Arc::clone(&sum) as Arc<dyn Progress>);
    let mut announced = 0;
    for rank in 0..2 {
        let shard = Shard { rank, world_size: 2 };
        announced += checkpoint.shard_bytes(shard).unwrap();
        checkpoint.load_ends(shard).unwrap();
        for layer in 0..2 {
            checkpoint.load_layer(layer, shard).unwrap();
        }
    }
    assert!(announced > 0);
    assert_eq!(sum.0.load(Ordering::Relaxed), announced);
}

#[test]
fn ranks_and_layers_that_do_not_exist() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new(Format::CompressedTensors { group_size: Some(32), symmetric: true, scale: Dtype::BF16 })
        .write()
        .save(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    // 64 columns in groups of 32: two ranks.
    assert_eq!(checkpoint.config().valid_tp(), [1, 2]);
    let message = checkpoint.load_layer(0, Shard { rank: 0, world_size: 4 }).unwrap_err().to_string();
    assert!(message.contains("64") && message.contains("32") && message.ends_with("1, 2"), "{message}");
    let message = checkpoint.load_ends(Shard { rank: 0, world_size: 0 }).unwrap_err().to_string();
    assert!(message.contains("0 ranks"), "{message}");
    let message = checkpoint.load_ends(Shard { rank: 2, world_size: 2 }).unwrap_err().to_string();
    assert!(message.contains("rank = 2"), "{message}");
    let message = checkpoint.load_layer(2, Shard::WHOLE).unwrap_err().to_string();
    assert!(message.contains("layer = 2"), "{message}");
}
