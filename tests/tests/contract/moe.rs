//! `moe_int4` and `moe`: one body, layers of INT4 experts or of any mix of formats.

use dsa80_reference::cpu::Real;
use dsa80_reference::sampling::uniform;
use dsa80_reference::wgpu::{ActType, Edit};
use dsa80_reference::{DType, HostExpert, HostInt4, HostLinear, HostTensor, Kernels};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{F32_UNIT, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

/// A layer's dimensions, and its groups: of gate and up, and of down.
#[derive(Debug, Clone, Copy)]
struct Layer {
    hidden: usize,
    intermediate: usize,
    experts: usize,
    groups: (usize, usize),
    scales: DType,
    zero_points: bool,
}

const LAYERS: [Layer; 4] = [
    Layer {
        hidden: 256,
        intermediate: 72,
        experts: 5,
        groups: (128, 32),
        scales: DType::Bf16,
        zero_points: true,
    },
    Layer {
        hidden: 192,
        intermediate: 20,
        experts: 4,
        groups: (64, 20),
        scales: DType::F16,
        zero_points: false,
    },
    Layer {
        hidden: 72,
        intermediate: 96,
        experts: 16,
        groups: (72, 32),
        scales: DType::F32,
        zero_points: true,
    },
    Layer {
        hidden: 544,
        intermediate: 32,
        experts: 3,
        groups: (32, 32),
        scales: DType::Bf16,
        zero_points: true,
    },
];

#[derive(Debug, Clone)]
struct Case {
    layer: Layer,
    /// Some projections are dense.
    mixed: bool,
    tokens: usize,
    top_k: usize,
    /// All tokens choose one expert, again and again.
    one: bool,
    shared: bool,
    values: Values,
    seed: u64,
}

/// A number inside (0, 1).
fn unit(seed: u64, i: usize) -> f64 {
    f64::from(uniform(seed, (i >> 20) as u32, (i & 0xf_ffff) as u32))
}

impl Case {
    fn weight(&self, (out, inner): (usize, usize), group_size: usize, place: usize) -> HostLinear {
        let seed = self.seed.wrapping_add(1000 + place as u64);
        let random = |stream: u64, i: usize| unit(seed ^ stream << 40, i);
        // Outputs then are as large as inputs.
        let size = 1.0 / (inner as f64).sqrt() / 4.0;
        if self.mixed && !place.is_multiple_of(4) {
            let dtype = [DType::Bf16, DType::F16, DType::F32][place % 3];
            let values: Vec<f64> =
                Values::Normal.take(seed, out * inner).iter().map(|x| 4.0 * size * x).collect();
            return HostLinear::Dense(contract::host_weight(dtype, &[out, inner], &values));
        }
        let (groups, words) = (inner.div_ceil(group_size), inner.div_ceil(8));
        let word = |stream, i| {
            let half = |stream| (random(stream, i) * 65536.0) as u32 & 0xffff;
            half(stream) | half(stream + 8) << 16
        };
        let scale = |i| {
            let sign = if random(2, i) < 0.2 { -1.0 } else { 1.0 };
            sign * size * (0.5 + random(3, i))
        };
        let scales: Vec<f64> = (0..out * groups).map(scale).collect();
        HostLinear::Int4(HostInt4 {
            out_features: out,
            in_features: inner,
            group_size,
            weight_packed: (0..out * words).map(|i| word(1, i)).collect(),
            scales: contract::host_weight(self.layer.scales, &[out, groups], &scales),
            zero_points: (self.layer.zero_points && place.is_multiple_of(2))
                .then(|| (0..out.div_ceil(8) * groups).map(|i| word(4, i)).collect()),
        })
    }

    fn experts(&self) -> Vec<HostExpert> {
        let Layer { hidden, intermediate, experts, groups, .. } = self.layer;
        (0..experts)
            .map(|e| HostExpert {
                gate_proj: self.weight((intermediate, hidden), groups.0, 3 * e),
                up_proj: self.weight((intermediate, hidden), groups.0, 3 * e + 1),
                down_proj: self.weight((hidden, intermediate), groups.1, 3 * e + 2),
            })
            .collect()
    }

    /// The experts of every token, which differ unless all are one.
    fn ids(&self) -> Vec<i32> {
        let experts = self.layer.experts;
        let mut all = Vec::new();
        for t in 0..self.tokens {
            let mut left: Vec<i32> = (0..experts as i32).collect();
            for k in 0..self.top_k {
                let random = unit(self.seed ^ 0x77, t * self.top_k + k).powi(2);
                all.push(match self.one {
                    true => (self.seed % experts as u64) as i32,
                    false => left.remove((random * left.len() as f64) as usize % left.len()),
                });
            }
        }
        all
    }
}

/// A weight's rows, widened.
fn rows(weight: &HostLinear) -> Vec<Vec<f64>> {
    let HostTensor { shape, data } = weight.clone().dense();
    let values = HostTensor { shape: shape.clone(), data }.to_f32();
    values.chunks(shape[1]).map(|row| row.iter().map(|&w| f64::from(w)).collect()).collect()
}

/// The sum of the products, and of their magnitudes.
fn product(row: &[f64], x: &[f64]) -> (f64, f64) {
    row.iter().zip(x).fold((0.0, 0.0), |(sum, all), (w, x)| (sum + w * x, all + (w * x).abs()))
}

/// How far what an expert gives may be off: by what sums in f32 lose, and by the rounding of `silu * up`, which may go the other way where it is
/// rounded.
fn expert_error<K>(kernels: &Backend<'_, K>, expert: &HostExpert, x: &[f64]) -> Vec<f64> {
    let lost = |inner: usize| (inner as f64 + 16.0) * F32_UNIT;
    let (gate, up) = (rows(&expert.gate_proj), rows(&expert.up_proj));
    let activated = gate.iter().zip(&up).map(|(gate, up)| {
        let ((g, g_all), (u, u_all)) = (product(gate, x), product(up, x));
        let silu = g / (1.0 + (-g).exp());
        let off = lost(x.len()) * (1.1 * g_all * (u.abs() + lost(x.len()) * u_all) + silu.abs() * u_all);
        let exact = silu * u;
        let rounded = if kernels.act() == ActType::Bf16 { exact.round_bf16() } else { exact };
        (rounded, off + exact.abs() * 32.0 * F32_UNIT + 2.0 * kernels.half_ulp(exact.abs() + off))
    });
    let (activated, off): (Vec<f64>, Vec<f64>) = activated.unzip();
    rows(&expert.down_proj)
        .iter()
        .map(|row| {
            product(row, &off).1 + lost(off.len()) * (product(row, &activated).1 + product(row, &off).1)
        })
        .collect()
}

fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
    let &Case { layer: Layer { hidden, .. }, tokens, top_k, seed, .. } = case;
    let experts = case.experts();
    let act = |values: Values, seed| {
        contract::numbers(kernels, DType::Act, &[tokens, hidden], &values.take(seed, tokens * hidden))
    };
    let x = act(case.values, seed);
    let shared = case.shared.then(|| act(Values::Normal, seed ^ 0x55));
    let ids = case.ids();
    let topk_ids = contract::index(kernels, &[tokens, top_k], &ids);
    let weights: Vec<f64> = (0..tokens * top_k).map(|i| 2.0 * unit(seed ^ 0x99, i)).collect();
    let topk_weights = contract::numbers(kernels, DType::Float, &[tokens, top_k], &weights);
    let mut out = contract::output(kernels, DType::Act, &[tokens, hidden]);
    let oracle = kernels.oracle();
    let (of_host, of_device) = (shared.as_ref().map(|x| &x.0), shared.as_ref().map(|x| &x.1));
    if case.mixed {
        let on_host = oracle.upload_experts(experts.clone()).unwrap();
        let on_device = kernels.upload_experts(experts.clone()).unwrap();
        oracle.moe(&x.0, &topk_ids.0, &topk_weights.0, &on_host, of_host, &mut out.0).unwrap();
        kernels.moe(&x.1, &topk_ids.1, &topk_weights.1, &on_device, of_device, &mut out.1).unwrap();
    } else {
        let on_host = oracle.upload_experts_int4(experts.clone()).unwrap();
        let on_device = kernels.upload_experts_int4(experts.clone()).unwrap();
        oracle.moe_int4(&x.0, &topk_ids.0, &topk_weights.0, &on_host, of_host, &mut out.0).unwrap();
        kernels.moe_int4(&x.1, &topk_ids.1, &topk_weights.1, &on_device, of_device, &mut out.1).unwrap();
    }
    let (found, expected) = (kernels.read(&out.1).unwrap(), oracle.read(&out.0).unwrap());
    let values = oracle.read(&x.0).unwrap();
    let mut bounds: Vec<f64> = expected.iter().map(|x| 16.0 * F32_UNIT * x.abs()).collect();
    for (pair, &expert) in ids.iter().enumerate() {
        let t = pair / top_k;
        let errors = expert_error(kernels, &experts[expert as usize], &values[t * hidden..][..hidden]);
        for (bound, error) in bounds[t * hidden..].iter_mut().zip(errors) {
            *bound += 1.01 * weights[pair] * error;
        }
    }
    for (bound, expected) in bounds.iter_mut().zip(&expected) {
        *bound += kernels.half_ulp(*expected) + kernels.half_ulp(expected.abs() + *bound);
    }
    assert_close("out", hidden, &found, &expected, f64::INFINITY, |i| bounds[i]);
}

fn cases(mixed: bool) -> impl Strategy<Value = Case> {
    let tokens = prop_oneof![2 => 1..=4_usize, 3 => 0..=24_usize];
    let values =
        Values::any_of(&[Values::Normal, Values::Ties, Values::Negative, Values::Zeros, Values::Outliers]);
    let layer = select(&LAYERS[..]);
    let one = prop_oneof![4 => Just(false), 1 => Just(true)];
    (layer, tokens, 1..=4_usize, one, any::<bool>(), values, any::<u64>()).prop_map(
        move |(layer, tokens, top_k, one, shared, values, seed)| Case {
            layer,
            mixed,
            tokens,
            top_k: top_k.min(layer.experts),
            one,
            shared,
            values,
            seed: seed >> 8,
        },
    )
}

struct MoeInt4;

impl Contract for MoeInt4 {
    const NAME: &'static str = "contract_moe_int4";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        cases(false)
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        run(kernels, case);
    }
}

struct Moe;

impl Contract for Moe {
    const NAME: &'static str = "contract_moe";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        cases(true)
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        run(kernels, case);
    }
}

#[test]
fn int4_agrees_with_the_oracle() {
    contract::check::<MoeInt4>();
}

#[test]
fn any_mix_agrees_with_the_oracle() {
    contract::check::<Moe>();
}

#[test]
fn planted_faults_are_seen() {
    for (shader, find, replace) in [
        // A group begins one step early; the zero point of the neighbouring feature.
        (
            "moe",
            "min(column / table[entry + 5u], groups - 1u)",
            "min((column + STEP) / table[entry + 5u], groups - 1u)",
        ),
        (
            "moe",
            "feature / 8u * groups + group), feature % 8u",
            "feature / 8u * groups + group), (feature ^ 1u) % 8u",
        ),
        // The second of the two halves of a word; the next chunk of columns.
        ("moe", "nibble(word, 4u), nibble(word, 5u)", "nibble(word, 5u), nibble(word, 4u)"),
        ("moe", "let column = first + step * STEP;", "let column = step * STEP;"),
        // The last pair of an item; the gate for the up projection.
        ("moe", "if p < item.count {", "if p + 1u < item.count {"),
        ("moe", "(expert * 3u + 1u) * ENTRY", "expert * 3u * ENTRY"),
        // Full items come to an end.
        ("moe_sort", "start + taken, min", "start, min"),
        // The weights of the pair before; without the shared expert.
        ("moe_sum", "sum += topk_weights[pair] *", "sum += topk_weights[max(pair, 1u) - 1u] *"),
        ("moe_sum", "sum += act_pair(shared_out[i]);", ""),
    ] {
        contract::catches::<MoeInt4>(Edit { shader, find, replace });
    }
    for (find, replace) in [
        (
            "low = vec4(halves(kind, vector.x), halves(kind, vector.y))",
            "low = vec4(halves(kind, vector.y), halves(kind, vector.x))",
        ),
        ("let vector = row + column / 4u + 2u * i", "let vector = row + column / 4u + i"),
    ] {
        contract::catches::<Moe>(Edit { shader: "moe", find, replace });
    }
    let edit = Edit { shader: "moe", find: "!GATE_UP || ACT_WORDS == 2u", replace: "!GATE_UP" };
    contract::catches_in_f32::<MoeInt4>(edit);
}

/// Pairs of experts that do not exist give nothing.
#[test]
fn experts_that_do_not_exist_are_skipped() {
    contract::on_wgpu(|kernels| {
        let case = Case {
            layer: LAYERS[1],
            mixed: false,
            tokens: 5,
            top_k: 3,
            one: false,
            shared: false,
            values: Values::Normal,
            seed: 3,
        };
        let experts = kernels.upload_experts_int4(case.experts()).unwrap();
        let hidden = case.layer.hidden;
        let x = contract::numbers(kernels, DType::Act, &[5, hidden], &Values::Normal.take(1, 5 * hidden)).1;
        let run = |ids: &[i32], weights: &[f64]| {
            let mut topk_ids = kernels.alloc(DType::Index, &[5, 3]).unwrap();
            kernels.write_index(ids, &mut topk_ids).unwrap();
            let weights = contract::numbers(kernels, DType::Float, &[5, 3], weights).1;
            let mut out = contract::output(kernels, DType::Act, &[5, hidden]).1;
            kernels.moe_int4(&x, &topk_ids, &weights, &experts, None, &mut out).unwrap();
            kernels.read(&out).unwrap()
        };
        let (mut wild, mut tame, mut weights) = (case.ids(), case.ids(), vec![1.0; 15]);
        for (i, id) in [(0, -1), (4, 4), (7, i32::MAX), (12, i32::MIN), (13, 100), (14, -7)] {
            (wild[i], tame[i], weights[i]) = (id, 0, 0.0);
        }
        assert_eq!(run(&wild, &[1.0; 15]), run(&tame, &weights));
    });
}

#[test]
fn an_empty_step_and_misfits() {
    contract::on_wgpu(|kernels| {
        let case = Case {
            layer: LAYERS[1],
            mixed: false,
            tokens: 0,
            top_k: 2,
            one: false,
            shared: false,
            values: Values::Normal,
            seed: 3,
        };
        run(kernels, &case);
        let refused = |experts, word: &str| {
            let error = kernels.upload_experts_int4(experts).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(vec![], "`experts` is 0");
        let mut experts = case.experts();
        experts[1].down_proj = experts[1].gate_proj.clone();
        refused(experts, "groups of 20 as in expert 0");
        let mut experts = case.experts();
        if let HostLinear::Int4(weight) = &mut experts[2].up_proj {
            weight.weight_packed = vec![0; 3].into();
        }
        refused(experts, "`weight_packed` has shape [3]");
        let mixed = Case { mixed: true, ..case };
        refused(mixed.experts(), "use `upload_experts` and `moe`");
    });
}
