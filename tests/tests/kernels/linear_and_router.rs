//! `linear_and_router`: to the bit what `linear` and `router` give, which are tested against the oracle.

use dsa80_cuda::linear::{LinearWorkspace, linear};
use dsa80_cuda::linear_and_router::linear_and_router;
use dsa80_cuda::router::{RouterTile, router};
use dsa80_reference::{DType, RouterParams};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::linear::{fine, small_tiles};

#[derive(Debug, Clone)]
struct Case {
    /// Of the product, and of the choice.
    tokens: (usize, usize),
    columns: usize,
    features: usize,
    floats: bool,
    /// Experts, groups, and groups that are kept.
    experts: (usize, usize, usize),
    bias: DType,
    k: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let tokens = prop_oneof![1..=8_usize, 17..=20_usize, 33..=36_usize];
    let experts = select(vec![((40, 1, 1), DType::F32), ((16, 4, 2), DType::Bf16)]);
    let sizes = (1..=300_usize, 1..=70_usize, 1..=8_usize);
    (tokens, 1..=20_usize, any::<bool>(), sizes, experts, any::<bool>(), any::<u64>()).prop_map(
        |(tokens, routed, alike, (columns, features, k), (experts, bias), floats, seed)| Case {
            tokens: (tokens, if alike { tokens } else { routed }),
            columns: 8 * columns,
            features,
            floats,
            experts,
            bias,
            k,
            seed,
        },
    )
}

fn run(device: &TestDevice, case: Case) {
    let Case { tokens: (tokens, routed), columns, features, floats, experts, bias, k, seed } = case;
    let (experts, n_group, topk_group) = experts;
    let normal = |stream: u64, n| Values::Normal.take(seed ^ stream, n);
    let x = Pair::new(device, "x", DType::Act, &[tokens, columns], &normal(0, tokens * columns)).device;
    let weight = Pair::weight(
        device,
        "weight",
        DType::Bf16,
        &[features, columns],
        &fine(seed ^ 1, -3, features * columns),
    )
    .device;
    let logits =
        Pair::new(device, "logits", DType::Float, &[routed, experts], &normal(2, routed * experts)).device;
    let bias = Pair::weight(device, "bias", bias, &[experts], &normal(3, experts)).device;
    let params = RouterParams { n_group, topk_group, norm_topk_prob: true, routed_scaling_factor: 2.5 };
    let (tiles, tile) = (small_tiles(), RouterTile { warps: 4 });
    let workspace = LinearWorkspace::alloc(device, &tiles).unwrap();
    let both = |together: bool| {
        let dtype = if floats { DType::Float } else { DType::Act };
        let mut out = parity::poisoned(device, "out", dtype, &[tokens, features]);
        let mut ids = parity::poisoned(device, "topk_ids", DType::Index, &[routed, k]);
        let mut weights = parity::poisoned(device, "topk_weights", DType::Float, &[routed, k]);
        if together {
            let linear = (&tiles, &workspace);
            linear_and_router(
                device,
                linear,
                &tile,
                &x,
                &weight,
                &mut out,
                &logits,
                &bias,
                params,
                &mut ids,
                &mut weights,
            )
            .unwrap();
        } else {
            linear(device, &tiles, &workspace, &x, &weight, &mut out).unwrap();
            router(device, &tile, &logits, &bias, params, &mut ids, &mut weights).unwrap();
        }
        [&out, &ids, &weights].map(|tensor| parity::read_bytes(device, tensor)).concat()
    };
    assert_eq!(parity::twice(device, || both(true)), both(false));
}

#[test]
fn is_what_the_two_give() {
    parity::check("linear_and_router", cases(), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // A block of experts too few, too many; features that are left out; the tokens of another block.
        ("if (block < routing_blocks) {", "if (block + 1 < routing_blocks) {"),
        ("if (block < routing_blocks) {", "if (block <= routing_blocks) {"),
        ("    block -= routing_blocks;\n", ""),
        ("routing::route(block, logits", "routing::route(block + 1, logits"),
        // Parts and arrivals of the blocks that only choose.
        ("static_cast<int64_t>(block) * splits", "static_cast<int64_t>(blockIdx.x) * splits"),
        ("atomicAdd(arrivals + block, 1u)", "atomicAdd(arrivals + blockIdx.x, 1u)"),
    ] {
        let fault = Fault { file: "linear_few.cu", find, replace };
        parity::catches(fault, cases(), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let (tiles, tile) = (small_tiles(), RouterTile { warps: 4 });
        let workspace = LinearWorkspace::alloc(device, &tiles).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let params =
            RouterParams { n_group: 1, topk_group: 1, norm_topk_prob: true, routed_scaling_factor: 1.0 };
        let run = |mut out, experts: usize, mut ids| {
            let logits = tensor(DType::Float, &[2, experts]);
            let both = linear_and_router(
                device,
                (&tiles, &workspace),
                &tile,
                &tensor(DType::Act, &[2, 16]),
                &tensor(DType::Bf16, &[8, 16]),
                &mut out,
                &logits,
                &tensor(DType::F32, &[experts]),
                params,
                &mut ids,
                &mut tensor(DType::Float, &[2, 2]),
            );
            both.unwrap_err().to_string()
        };
        let (act, ids) = (|shape: &[usize]| tensor(DType::Act, shape), || tensor(DType::Index, &[2, 2]));
        expect(run(act(&[2, 9]), 8, ids()), &["linear_and_router: `out`", "[2, 8]"]);
        expect(run(tensor(DType::Index, &[2, 8]), 8, ids()), &["`out` holds indices"]);
        expect(run(act(&[2, 8]), 8, tensor(DType::Index, &[3, 2])), &["router: `topk_ids`", "[2, K]"]);
        expect(run(act(&[2, 8]), 513, ids()), &["router", "1 to 512 experts, not 513"]);
    });
}
