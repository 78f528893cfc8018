//! The published checkpoints of GLM-5.2 in full: real names and shapes in sparse files, headers alone written.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use dsa80_model::checkpoint::{Checkpoint, LinearFormat, Shard};
use dsa80_model::plan::Plan;
use dsa80_tests::skeleton::{LAYERS, Scheme, Skeleton, Use};

const RANKS: usize = 8;

/// Opens the skeleton, and accounts for every byte of it. Returns the plan at TP = 8.
fn check(scheme: Scheme) -> (Checkpoint, Plan, BTreeMap<Use, u64>) {
    let skeleton = Skeleton::whole(scheme);
    let dir = tempfile::tempdir().unwrap();
    let headers = skeleton.save(dir.path(), false).unwrap();
    let bytes = skeleton.bytes();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.file_bytes(), headers + bytes.values().sum::<u64>());
    let rank = bytes[&Use::Shared] / RANKS as u64 + bytes[&Use::Replicated];
    for rank_number in 0..RANKS {
        let shard = Shard { rank: rank_number, world_size: RANKS };
        assert_eq!(checkpoint.shard_bytes(shard).unwrap(), rank, "rank {rank_number}");
    }
    let plan = Plan::from_checkpoint(&checkpoint, RANKS).unwrap();
    // The config alone says the same, but for the one tensor that is wider than it has to be.
    let described = Plan::from_config(checkpoint.config(), RANKS).unwrap().weights;
    assert_eq!(plan.weights.total() - described.total(), 75 * 256 * 2);
    (checkpoint, plan, bytes)
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64
}

/// cyankiwi/GLM-5.2-AWQ-INT4: the routed experts alone are packed, in asymmetric groups of 32; the drafting layer is bf16.
#[test]
fn experts_in_asymmetric_groups_of_32() {
    let (checkpoint, plan, bytes) = check(Scheme::EXPERTS);
    // Everything is held as it is stored.
    let rank = bytes[&Use::Shared] / RANKS as u64 + bytes[&Use::Replicated];
    assert_eq!(plan.weights.total(), rank);
    assert!((gib(rank) - 53.6).abs() < 1.0, "{}", gib(rank));
    // The published sizes: 474 GB, 20 of them the drafting layer's; 423 GiB on one rank.
    let published = |bytes: u64, gb: f64| (bytes as f64 / 1e9 / gb - 1.0).abs() < 0.02;
    assert!(published(bytes.values().sum(), 474.0) && published(bytes[&Use::Draft], 20.0));
    let whole = Plan::from_checkpoint(&checkpoint, 1).unwrap().weights.total();
    assert!((gib(whole) / 423.0 - 1.0).abs() < 0.01, "{}", gib(whole));
    let format = |module: &str| checkpoint.linear_format(module).unwrap();
    assert!(
        matches!(format("model.layers.40.mlp.experts.255.down_proj"), LinearFormat::Int4(f) if f.group_size == 32)
    );
    assert!(matches!(format("model.layers.40.mlp.shared_experts.down_proj"), LinearFormat::Dense(_)));
}

/// All linear layers packed, in symmetric groups of 128, the drafting layer's too.
#[test]
fn everything_in_symmetric_groups_of_128() {
    let packs = |module: &str| !module.ends_with("weights_proj");
    let (checkpoint, plan, bytes) = check(Scheme { group_size: 128, symmetric: true, packs });
    // kv_b is held as f32, because `absorb` works on single heads.
    let kv_b = (LAYERS * 64 * (192 + 256) * 512) as u64;
    let (packed, held) = (kv_b / 2 + kv_b / 128 * 2, 4 * kv_b);
    let rank = (bytes[&Use::Shared] - packed + held) / RANKS as u64 + bytes[&Use::Replicated];
    assert_eq!(plan.weights.total(), rank);
    let whole = Plan::from_checkpoint(&checkpoint, 1).unwrap().weights.total();
    assert!(gib(whole) < 375.0, "{}", gib(whole));
}

/// Attention and the drafting layer in bf16, shared experts and dense layers packed.
#[test]
fn attention_and_the_drafting_layer_in_bf16() {
    let packs = |module: &str| module.contains(".mlp.") && !module.starts_with("model.layers.78.");
    let (checkpoint, plan, bytes) = check(Scheme { group_size: 128, symmetric: true, packs });
    assert_eq!(plan.weights.total(), bytes[&Use::Shared] / RANKS as u64 + bytes[&Use::Replicated]);
    let format = |module: &str| checkpoint.linear_format(module).unwrap();
    for (module, packed) in [
        ("model.layers.0.mlp.down_proj", true),
        ("model.layers.3.mlp.shared_experts.up_proj", true),
        ("model.layers.77.mlp.experts.0.gate_proj", true),
        ("model.layers.77.self_attn.o_proj", false),
        ("model.layers.2.self_attn.indexer.wq_b", false),
    ] {
        assert_eq!(matches!(format(module), LinearFormat::Int4(_)), packed, "{module}");
    }
}
