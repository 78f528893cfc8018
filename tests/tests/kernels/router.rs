//! `router` against the oracle: the same experts wherever scores are further apart than rounding, and a right choice in any case.

use dsa80_cuda::router::{RouterDims, RouterTile, router};
use dsa80_cuda::{Limits, Tile};
use dsa80_reference::{DType, Kernels, RouterParams};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, F32_UNIT, Pair, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone, Copy)]
struct Variant {
    experts: usize,
    n_group: usize,
    topk_group: usize,
    bias: DType,
    warps: usize,
}

const fn variant(experts: usize, n_group: usize, topk_group: usize, bias: DType, warps: usize) -> Variant {
    Variant { experts, n_group, topk_group, bias, warps }
}

/// Few programs: experts of one lane round and of several, groups of one, of some, and of more experts than lanes.
const VARIANTS: &[Variant] = &[
    variant(40, 1, 1, DType::F32, 4),
    variant(16, 4, 2, DType::Bf16, 2),
    variant(132, 3, 2, DType::F16, 1),
    variant(66, 66, 11, DType::F32, 1),
];

#[derive(Debug, Clone)]
struct Case {
    variant: Variant,
    tokens: usize,
    k: usize,
    norm_topk_prob: bool,
    scaling: f64,
    values: Values,
    spread: f64,
    seed: u64,
}

const VALUES: [Values; 6] =
    [Values::Normal, Values::Ties, Values::Tiny, Values::Negative, Values::Zeros, Values::Outliers];

fn cases(variants: impl Strategy<Value = Variant>, tokens: usize) -> impl Strategy<Value = Case> {
    let numbers = (any::<bool>(), select(vec![1.0, 2.5]), select(vec![1.0, 6.0, 30.0]));
    (variants, 1..=tokens, 1..=16_usize, numbers, Values::any_of(&VALUES), any::<u64>()).prop_map(
        |(variant, tokens, k, (norm_topk_prob, scaling, spread), values, seed)| {
            let most = variant.topk_group * (variant.experts / variant.n_group);
            Case { variant, tokens, k: k.min(most), norm_topk_prob, scaling, values, spread, seed }
        },
    )
}

struct Inputs {
    logits: Pair,
    bias: Pair,
}

impl Inputs {
    fn new(device: &TestDevice, case: &Case) -> Self {
        let experts = case.variant.experts;
        let logits = case.values.take(case.seed, case.tokens * experts);
        let logits: Vec<f64> = logits.iter().map(|x| x * case.spread).collect();
        let bias = if case.seed.is_multiple_of(3) { Values::Ties } else { Values::Normal };
        let bias: Vec<f64> = bias.take(case.seed ^ 1, experts).iter().map(|x| 0.3 * x).collect();
        Self {
            logits: Pair::new(device, "logits", DType::Float, &[case.tokens, experts], &logits),
            bias: Pair::weight(device, "bias", case.variant.bias, &[experts], &bias),
        }
    }
}

/// A token's scores and how far the kernel's may be off.
struct Scores {
    score: Vec<f64>,
    choice: Vec<f64>,
    error: Vec<f64>,
    groups: Vec<f64>,
    group_error: f64,
}

impl Scores {
    /// The error analysis beside the kernel.
    fn new(logits: &[f64], bias: &[f64], n_group: usize) -> Self {
        let score: Vec<f64> = logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
        let choice: Vec<f64> = score.iter().zip(bias).map(|(s, b)| s + b).collect();
        let off = |(s, c): (&f64, &f64)| F32_UNIT * (s * (8.0 * (1.0 - s) + 2.0) + c.abs()) + 1e-37;
        let error: Vec<f64> = score.iter().zip(&choice).map(off).collect();
        let two_best = |group: &[f64]| {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            group.iter().take(2).sum::<f64>()
        };
        let groups: Vec<f64> = choice.chunks(choice.len() / n_group).map(two_best).collect();
        let largest = |values: &[f64]| values.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let group_error = 2.0 * largest(&error) + F32_UNIT * largest(&groups);
        Self { score, choice, error, groups, group_error }
    }
}

/// `found` are the best of the best groups, in their order, as far as rounding lets anyone tell.
fn assert_chosen(
    scores: &Scores,
    identical: impl Fn(usize, usize) -> bool,
    found: &[i32],
    topk_group: usize,
) {
    let size = scores.choice.len() / scores.groups.len();
    let ids: Vec<usize> = found.iter().map(|&id| usize::try_from(id).unwrap()).collect();
    let mut used: Vec<usize> = ids.iter().map(|id| id / size).collect();
    used.sort_unstable();
    used.dedup();
    assert!(used.len() <= topk_group, "{ids:?} are of more than {topk_group} groups");
    let mut sorted = scores.groups.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let last_kept = sorted[topk_group - 1];
    let first_dropped = sorted.get(topk_group).copied().unwrap_or(f64::NEG_INFINITY);
    for &group in &used {
        let score = scores.groups[group];
        assert!(score >= last_kept - 2.0 * scores.group_error, "group {group} has {score} < {last_kept}");
    }
    for (place, &id) in ids.iter().enumerate() {
        assert!(!ids[..place].contains(&id), "{id} twice in {ids:?}");
        for other in 0..scores.choice.len() {
            let surely = scores.groups[other / size] > first_dropped + 2.0 * scores.group_error;
            if ids[..=place].contains(&other) || !(surely || used.contains(&(other / size))) {
                continue;
            }
            let margin = scores.error[id] + scores.error[other];
            assert!(
                scores.choice[id] >= scores.choice[other] - margin,
                "{id} with {} is place {place}, {other} has {}",
                scores.choice[id],
                scores.choice[other]
            );
            assert!(!identical(id, other) || id < other, "{id} is place {place} before {other}, its equal");
        }
    }
}

fn run(device: &TestDevice, case: Case) {
    let Variant { experts, n_group, topk_group, warps, .. } = case.variant;
    let Case { tokens, k, norm_topk_prob, scaling, .. } = case;
    let inputs = Inputs::new(device, &case);
    let params = RouterParams { n_group, topk_group, norm_topk_prob, routed_scaling_factor: scaling };
    let ids_bytes = 4 * tokens * k;
    let found = parity::twice(device, || {
        let mut ids = parity::poisoned(device, "topk_ids", DType::Index, &[tokens, k]);
        let mut weights = parity::poisoned(device, "topk_weights", DType::Float, &[tokens, k]);
        let (logits, bias) = (&inputs.logits.device, &inputs.bias.device);
        router(device, &RouterTile { warps }, logits, bias, params, &mut ids, &mut weights).unwrap();
        [parity::read_bytes(device, &ids), parity::read_bytes(device, &weights)].concat()
    });
    let ids = parity::integers(&found[..ids_bytes]);
    let weights = parity::numbers(DType::Float, &found[ids_bytes..]);
    let logits = parity::oracle().read(&inputs.logits.host).unwrap();
    let bias = parity::oracle().read(&inputs.bias.host).unwrap();

    let mut host_ids = Pair::poisoned(device, "topk_ids", DType::Index, &[tokens, k]);
    let mut host_weights = Pair::poisoned(device, "topk_weights", DType::Float, &[tokens, k]);
    parity::oracle()
        .router(&inputs.logits.host, &inputs.bias.host, params, &mut host_ids.host, &mut host_weights.host)
        .unwrap();
    let oracle_ids = parity::oracle().read_index(&host_ids.host).unwrap();
    let mut expected = parity::oracle().read(&host_weights.host).unwrap();
    for (t, logits) in logits.chunks(experts).enumerate() {
        let scores = Scores::new(logits, &bias, n_group);
        let identical = |a: usize, b: usize| logits[a] == logits[b] && bias[a] == bias[b];
        let row = t * k..(t + 1) * k;
        assert_chosen(&scores, identical, &oracle_ids[row.clone()], topk_group);
        assert_chosen(&scores, identical, &ids[row.clone()], topk_group);
        // What the weights of these experts are, should rounding have chosen others than the oracle.
        if ids[row.clone()] != oracle_ids[row.clone()] {
            let of = |&id: &i32| scores.score[id as usize];
            let total = ids[row.clone()].iter().map(of).sum::<f64>() + 1e-20;
            let divisor = if norm_topk_prob { total } else { 1.0 };
            for (expected, id) in expected[row.clone()].iter_mut().zip(&ids[row]) {
                *expected = of(id) / divisor * scaling;
            }
        }
    }
    // Powers beyond the largest float make a score zero, 1e-20 at least is divided by.
    let bound = |i: usize| 32.0 * F32_UNIT * expected[i].abs() + 1e-17 * scaling;
    parity::assert_close("topk_weights", k, &weights, &expected, 8.0 * F32_UNIT, bound);
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("router", cases(select(VARIANTS), 9), run);
}

#[test]
fn agrees_with_the_oracle_at_size_with_every_tile() {
    let glm = RouterDims { experts: 256, groups: 8 };
    let variants = select(RouterTile::candidates(glm, &Limits::a100())).prop_flat_map(move |tile| {
        select(vec![(256, 1, 1), (256, 8, 4), (512, 16, 3), (160, 8, 3)]).prop_map(
            move |(experts, n_group, topk_group)| {
                variant(experts, n_group, topk_group, DType::F32, tile.warps)
            },
        )
    });
    parity::check_on_gpu("router_at_size", cases(variants, 3000), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // What chooses also weighs.
        ("shared.scores[warp][expert] = score;", "shared.scores[warp][expert] = score + offset[i][0];"),
        // A group too many is kept, one too few.
        ("if (better >= topk_group)", "if (better > topk_group)"),
        ("if (better >= topk_group)", "if (better + 1 >= topk_group)"),
        // A group is scored by its best alone.
        ("to_key(to_value(best) + to_value(second))", "best"),
        // Ties go to the higher expert, inside a lane and among lanes; they are not seen.
        ("tied |= (owners & (owners - 1)) != 0;", ""),
        ("if (keys[i] > best.key)", "if (keys[i] >= best.key)"),
        (
            "__reduce_min_sync(ALL_LANES, own.key == key ? own.index : 0xffffffffu)",
            "__reduce_max_sync(ALL_LANES, own.key == key ? own.index : 0u)",
        ),
        // The sum of one lane less; no sum.
        ("float weight = lane < k ?", "float weight = lane < k - 1 ?"),
        ("if (normalise != 0)", "if (normalise == 0)"),
        // Scores are read before they are there.
        ("    __syncwarp();\n    int chosen", "    int chosen"),
        // The last token of a block is left out.
        ("if (token >= tokens) return;", "if (token >= tokens - 1) return;"),
    ] {
        let fault = Fault { file: "router.cuh", find, replace };
        parity::catches(fault, cases(select(VARIANTS), 9), run);
    }
}

fn route(
    device: &TestDevice,
    logits: &[f64],
    bias: &[f64],
    k: usize,
    groups: (usize, usize),
) -> (Vec<i32>, Vec<f64>) {
    let (n_group, topk_group) = groups;
    let params = RouterParams { n_group, topk_group, norm_topk_prob: true, routed_scaling_factor: 2.5 };
    let logits = Pair::new(device, "logits", DType::Float, &[1, bias.len()], logits);
    let bias = Pair::weight(device, "bias", DType::F32, &[bias.len()], bias);
    let mut ids = parity::poisoned(device, "topk_ids", DType::Index, &[1, k]);
    let mut weights = parity::poisoned(device, "topk_weights", DType::Float, &[1, k]);
    let tile = RouterTile { warps: 1 };
    router(device, &tile, &logits.device, &bias.device, params, &mut ids, &mut weights).unwrap();
    (parity::read_index(device, &ids), parity::read(device, &weights))
}

fn ties(device: &TestDevice) {
    let ids = |logits: &[f64], k, groups| route(device, logits, &vec![0.0; logits.len()], k, groups).0;
    assert_eq!(ids(&[1.0; 6], 3, (1, 1)), [0, 1, 2]);
    assert_eq!(ids(&[1.0; 6], 4, (3, 2)), [0, 1, 2, 3]);
    // Group 1 ties with group 2 for the second place.
    assert_eq!(ids(&[5.0, 1.0, 0.5, 2.0, 2.0, 0.5], 4, (3, 2)), [0, 3, 1, 2]);
    // One lane has the best three, which tie.
    let mut one_lane = [0.0; 100];
    for expert in [3, 35, 99] {
        one_lane[expert] = 1.0;
    }
    assert_eq!(ids(&one_lane, 3, (1, 1)), [3, 35, 99]);
    // NaN is last of all, and so is a group that needs it; infinities are the ends.
    let (nan, infinity) = (f64::NAN, f64::INFINITY);
    assert_eq!(ids(&[nan, -infinity, infinity, 0.0, nan, 1.0], 6, (1, 1)), [2, 5, 3, 1, 0, 4]);
    assert_eq!(ids(&[nan, 9.0, -9.0, -8.0, 1.0, 2.0], 4, (3, 2)), [5, 4, 3, 2]);
    let (_, weights) = route(device, &[infinity, -infinity, 0.0, -200.0, 200.0, -87.0], &[0.0; 6], 6, (1, 1));
    // Their sum is 2.5, as is what they are multiplied by.
    let expected = [1.0, 1.0, 0.5, 1.645e-38, 0.0, 0.0];
    parity::assert_close("topk_weights", 6, &weights, &expected, 1e-6, |_| 1e-6);
}

#[test]
fn ties_and_what_is_no_number() {
    parity::small_cases(ties);
    for (find, replace) in [
        // Ties go to the higher group; to the higher expert of a lane.
        ("groups[own] && group < own", "groups[own] && group > own"),
        (
            "keys[i] < keys[i + 1];",
            "keys[i] < keys[i + 1] || (keys[i] == keys[i + 1] && experts[i] < experts[i + 1]);",
        ),
    ] {
        let fault = Fault { file: "router.cuh", find, replace };
        parity::catches(fault, Just(()), |device, ()| ties(device));
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let plain =
            RouterParams { n_group: 2, topk_group: 1, norm_topk_prob: true, routed_scaling_factor: 1.0 };
        let run = |logits, bias, params, ids, weights| {
            let (mut ids, mut weights) = (ids, weights);
            let tile = RouterTile { warps: 4 };
            let outcome = router(device, &tile, &logits, &bias, params, &mut ids, &mut weights);
            outcome.map_or_else(|error| error.to_string(), |()| "fine".to_owned())
        };
        let (float, index) = (DType::Float, DType::Index);
        let with = |params| {
            run(
                tensor(float, &[3, 8]),
                tensor(DType::F32, &[8]),
                params,
                tensor(index, &[3, 2]),
                tensor(float, &[3, 2]),
            )
        };
        let expect = |message: String, words: &[&str]| {
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        };
        expect(with(RouterParams { n_group: 3, ..plain }), &["`n_group` is 3", "divisor of 8"]);
        expect(with(RouterParams { topk_group: 3, ..plain }), &["`topk_group` is 3", "1..=2"]);
        expect(with(RouterParams { topk_group: 0, ..plain }), &["`topk_group` is 0"]);
        let tensors =
            |logits: (DType, &[usize]), bias: (DType, &[usize]), ids: (DType, &[usize]), k: usize| {
                let [logits, bias, ids] = [logits, bias, ids].map(|(dtype, shape)| tensor(dtype, shape));
                run(logits, bias, plain, ids, tensor(float, &[3, k]))
            };
        let (good, bias, ids) = ((float, &[3, 8][..]), (DType::F32, &[8][..]), (index, &[3, 2][..]));
        expect(tensors((DType::Act, &[3, 8]), bias, ids, 2), &["`logits` holds activations"]);
        expect(tensors(good, (DType::F32, &[9]), ids, 2), &["`bias`", "[8]"]);
        expect(tensors(good, (float, &[8]), ids, 2), &["`bias` holds floats"]);
        expect(tensors(good, bias, (index, &[2, 2]), 2), &["`topk_ids`", "[3, K]"]);
        expect(tensors(good, bias, (float, &[3, 2]), 2), &["`topk_ids` holds floats"]);
        expect(tensors(good, bias, ids, 3), &["`topk_weights`", "[3, 2]"]);
        expect(
            tensors(good, bias, (index, &[3, 5]), 5),
            &["`topk_ids`", "at most the 4 experts of 1 groups"],
        );
        assert_eq!(
            tensors((float, &[0, 8]), bias, (index, &[0, 2]), 2),
            "router: `topk_weights` has shape [3, 2], expected [0, 2]"
        );
        let empty = run(
            tensor(float, &[0, 8]),
            tensor(DType::F32, &[8]),
            plain,
            tensor(index, &[0, 2]),
            tensor(float, &[0, 2]),
        );
        assert_eq!(empty, "fine");
    });
}
