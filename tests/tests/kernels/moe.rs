//! `moe` against the oracle.

use dsa80_cuda::moe::{Experts, MoeWorkspace, moe};
use dsa80_reference::{DType, HostExpert, HostLinear, HostTensor, Kernels};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, TestDevice, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::experts::{Layer, Routing, Step, dense, relative_l2, unit};

/// The formats of gate, up and down, from expert to expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mix {
    All(DType),
    /// INT4 here and there, every dense type beside it.
    Int4,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    layer: Layer,
    mix: Mix,
    step: Step,
}

const LAYERS: [Layer; 3] = [
    Layer {
        hidden: 64,
        intermediate: 20,
        experts: 4,
        groups: (24, 20),
        scales: DType::F16,
        zero_points: true,
    },
    Layer {
        hidden: 36,
        intermediate: 16,
        experts: 5,
        groups: (36, 8),
        scales: DType::F32,
        zero_points: false,
    },
    Layer {
        hidden: 264,
        intermediate: 32,
        experts: 3,
        groups: (32, 32),
        scales: DType::Bf16,
        zero_points: true,
    },
];

const VALUES: [Values; 5] = [Values::Normal, Values::Ties, Values::Negative, Values::Zeros, Values::Outliers];

fn cases(layers: &'static [Layer], tokens: usize, values: &'static [Values]) -> impl Strategy<Value = Case> {
    let mixes = [Mix::All(DType::Bf16), Mix::All(DType::F16), Mix::All(DType::F32), Mix::Int4, Mix::Int4];
    (select(layers), select(mixes.to_vec()), Step::any(tokens, 4, values)).prop_map(|(layer, mix, step)| {
        Case { layer, mix, step: Step { top_k: step.top_k.min(layer.experts), ..step } }
    })
}

impl Case {
    fn experts(&self) -> Vec<HostExpert> {
        let Layer { hidden, intermediate, .. } = self.layer;
        let mut experts = self.layer.experts(self.step.seed);
        for (e, expert) in experts.iter_mut().enumerate() {
            let HostExpert { gate_proj, up_proj, down_proj } = expert;
            for (i, (weight, shape)) in [
                (gate_proj, [intermediate, hidden]),
                (up_proj, [intermediate, hidden]),
                (down_proj, [hidden, intermediate]),
            ]
            .into_iter()
            .enumerate()
            {
                let types = [DType::Bf16, DType::F16, DType::F32];
                let dtype = match self.mix {
                    Mix::All(dtype) => dtype,
                    Mix::Int4 if (e + i) % 2 == 0 => continue,
                    Mix::Int4 => types[(e + i) / 2 % 3],
                };
                let scale = 2.0 / (shape[1] as f64).sqrt();
                let seed = self.step.seed + (3 * e + i) as u64;
                let value = |place| (scale * (2.0 * unit(seed, place) - 1.0)) as f32;
                *weight = HostLinear::Dense(dense(dtype, shape, value));
            }
        }
        experts
    }
}

fn run(device: &TestDevice, case: Case) {
    let Case { layer, step, .. } = case;
    let experts = case.experts();
    let inputs = step.inputs(device, layer.hidden, layer.experts);
    let on_device = Experts::upload(device, experts.clone()).unwrap();
    let workspace = MoeWorkspace::alloc(device, step.tokens, step.top_k, layer.intermediate).unwrap();
    let (ids, weights) = (&inputs.ids, &inputs.weights);
    let found = parity::twice(device, || {
        let mut out = parity::poisoned(device, "out", DType::Act, &[step.tokens, layer.hidden]);
        let shared = inputs.shared.as_ref().map(|shared| &shared.device);
        let x = &inputs.x.device;
        moe(device, &workspace, x, &ids.device, &weights.device, &on_device, shared, &mut out).unwrap();
        parity::read_bytes(device, &out)
    });
    let host = parity::oracle().upload_experts(experts.clone()).unwrap();
    let mut expected = parity::oracle().alloc(DType::Act, &[step.tokens, layer.hidden]).unwrap();
    let shared = inputs.shared.as_ref().map(|shared| &shared.host);
    parity::oracle().moe(&inputs.x.host, &ids.host, &weights.host, &host, shared, &mut expected).unwrap();
    let expected = parity::oracle().read(&expected).unwrap();
    let bounds = inputs.bounds(&experts, &expected, 0.0);
    let found = parity::numbers(DType::Act, &found);
    let most = relative_l2(&expected, &bounds);
    parity::assert_close("out", layer.hidden, &found, &expected, most, |i| bounds[i]);
}

#[test]
fn agrees_with_the_oracle() {
    parity::check("moe", cases(&LAYERS, 12, &VALUES), run);
}

#[test]
fn agrees_with_the_oracle_at_size() {
    const LARGE: [Layer; 1] = [Layer {
        hidden: 1024,
        intermediate: 256,
        experts: 4,
        groups: (128, 128),
        scales: DType::Bf16,
        zero_points: true,
    }];
    parity::check_on_gpu("moe_at_size", cases(&LARGE, 40, &[Values::Normal]), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // Columns beyond the last word's are counted.
        ("min(columns - word * 8, 8)", "8"),
        // A group begins one column early.
        ("group = column / group_size", "group = min(column + 1, columns - 1) / group_size"),
        // Zero points are ignored.
        ("zeros == nullptr ? 8 :", "true ? 8 :"),
        // The last feature of a block is left out.
        ("row >= intermediate ||", "row >= intermediate - 1 ||"),
        // The up projection's place is the gate's.
        ("table[expert * 3 + 1]", "table[expert * 3]"),
        // Without the shared expert.
        ("beside + sum", "sum"),
    ] {
        let fault = Fault { file: "moe.cu", find, replace };
        parity::catches(fault, cases(&LAYERS, 12, &[Values::Normal]), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let step = Step {
            tokens: 3,
            top_k: 2,
            routing: Routing::Any,
            values: Values::Normal,
            shared: false,
            seed: 1,
        };
        let case = Case { layer: LAYERS[0], mix: Mix::Int4, step };
        let upload = |experts| Experts::upload(device, experts).map_err(|error| error.to_string());
        let experts = upload(case.experts()).unwrap();
        let tensor = |dtype, shape: &[usize]| parity::poisoned(device, "tensor", dtype, shape);
        let (ids, weights) = (tensor(DType::Index, &[3, 2]), tensor(DType::Float, &[3, 2]));
        let run = |workspace: &_, x: &_| {
            let mut out = tensor(DType::Act, &[3, 64]);
            let outcome = moe(device, workspace, x, &ids, &weights, &experts, None, &mut out);
            outcome.unwrap_err().to_string()
        };
        let workspace = |tokens| MoeWorkspace::alloc(device, tokens, 2, 20).unwrap();
        expect(run(&workspace(3), &tensor(DType::Act, &[3, 32])), &["moe: `x`", "[3, 64]"]);
        expect(run(&workspace(2), &tensor(DType::Act, &[3, 64])), &["[6, 20]", "80 were allocated"]);
        expect(upload(vec![]).unwrap_err(), &["upload_experts: `experts` is 0"]);
        let mut experts = case.experts();
        experts[1].down_proj = experts[1].gate_proj.clone();
        expect(upload(experts).unwrap_err(), &["`down_proj` has shape [20, 64], expected [64, 20]"]);
        let mut experts = case.experts();
        experts[2].up_proj = HostLinear::Dense(HostTensor::f32([3], vec![0.0; 3]));
        expect(upload(experts).unwrap_err(), &["`up_proj` has shape [3]", "two dimensions of 3 elements"]);
    });
}
