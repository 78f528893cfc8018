//! What the tests of `moe_int4` and `moe` share: layers of experts, steps of tokens that choose them, and how far off a result may be.

use dsa80_reference::sampling::uniform;
use dsa80_reference::{DType, HostData, HostExpert, HostInt4, HostLinear, HostTensor, Kernels};
use dsa80_tests::parity::{self, F32_UNIT, Interval, Pair, TestDevice, Values, half_ulp_bf16};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

/// A layer of INT4 experts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) experts: usize,
    /// Group sizes of gate and up, and of down.
    pub(crate) groups: (usize, usize),
    pub(crate) scales: DType,
    /// Every second weight then has zero points.
    pub(crate) zero_points: bool,
}

impl Layer {
    pub(crate) fn experts(self, seed: u64) -> Vec<HostExpert> {
        let Self { hidden, intermediate, groups: (gate_group, down_group), .. } = self;
        let weight = |out, inner, group, place: usize| {
            HostLinear::Int4(self.int4((out, inner), group, seed.wrapping_add(1000 + place as u64), place))
        };
        (0..self.experts)
            .map(|e| HostExpert {
                gate_proj: weight(intermediate, hidden, gate_group, 3 * e),
                up_proj: weight(intermediate, hidden, gate_group, 3 * e + 1),
                down_proj: weight(hidden, intermediate, down_group, 3 * e + 2),
            })
            .collect()
    }

    fn int4(self, (out, inner): (usize, usize), group_size: usize, seed: u64, place: usize) -> HostInt4 {
        let (groups, words) = (inner.div_ceil(group_size), inner.div_ceil(8));
        let random = |stream: u64, i: usize| unit(seed ^ stream << 40, i);
        let half = |stream, i| (random(stream, i) * 65536.0) as u32 & 0xffff;
        let word = |stream, i| half(stream, i) | half(stream + 8, i) << 16;
        // Outputs then are as large as inputs.
        let size = 1.0 / (inner as f64).sqrt() / 4.0;
        let scales = dense(self.scales, [out, groups], |i| {
            let sign = if random(2, i) < 0.2 { -1.0 } else { 1.0 };
            (sign * size * (0.5 + random(3, i))) as f32
        });
        HostInt4 {
            out_features: out,
            in_features: inner,
            group_size,
            weight_packed: (0..out * words).map(|i| word(1, i)).collect(),
            scales,
            zero_points: (self.zero_points && place.is_multiple_of(2))
                .then(|| (0..out.div_ceil(8) * groups).map(|i| word(4, i)).collect()),
        }
    }
}

/// A number inside (0, 1).
pub(crate) fn unit(seed: u64, i: usize) -> f64 {
    f64::from(uniform(seed, (i >> 20) as u32, (i & 0xf_ffff) as u32))
}

/// A dense weight of that type.
pub(crate) fn dense(dtype: DType, shape: [usize; 2], value: impl Fn(usize) -> f32) -> HostTensor {
    let values = (0..shape[0] * shape[1]).map(value);
    let data = match dtype {
        DType::Bf16 => HostData::Bf16(values.map(bf16::from_f32).collect()),
        DType::F16 => HostData::F16(values.map(f16::from_f32).collect()),
        _ => HostData::F32(values.collect()),
    };
    HostTensor { shape: shape.to_vec(), data }
}

/// How tokens choose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Routing {
    /// Experts that differ, all as likely.
    Any,
    /// All tokens the same.
    Same,
    /// The first experts far more often.
    Skewed,
    /// One expert, again and again.
    One,
}

/// The tokens of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) tokens: usize,
    pub(crate) top_k: usize,
    pub(crate) routing: Routing,
    pub(crate) values: Values,
    pub(crate) shared: bool,
    pub(crate) seed: u64,
}

impl Step {
    pub(crate) fn any(tokens: usize, top_k: usize, values: &'static [Values]) -> impl Strategy<Value = Self> {
        let tokens = prop_oneof![2 => 1..=4_usize, 3 => 0..=tokens];
        let routing = select(vec![Routing::Any, Routing::Any, Routing::Same, Routing::Skewed, Routing::One]);
        (tokens, 1..=top_k, routing, Values::any_of(values), any::<bool>(), any::<u64>()).prop_map(
            |(tokens, top_k, routing, values, shared, seed)| Self {
                tokens,
                top_k,
                routing,
                values,
                shared,
                seed: seed >> 8,
            },
        )
    }

    /// The experts of every token.
    pub(crate) fn ids(&self, experts: usize) -> Vec<i32> {
        let mut all = Vec::new();
        for t in 0..self.tokens {
            let token = if self.routing == Routing::Same { 0 } else { t };
            let mut left: Vec<i32> = (0..experts as i32).collect();
            for k in 0..self.top_k {
                let random = unit(self.seed ^ 0x77, token * self.top_k + k);
                let random = if self.routing == Routing::Skewed { random.powi(6) } else { random };
                all.push(match self.routing {
                    Routing::One => (self.seed % experts as u64) as i32,
                    _ => left.remove(((random * left.len() as f64) as usize).min(left.len() - 1)),
                });
            }
        }
        all
    }

    pub(crate) fn inputs(&self, device: &TestDevice, hidden: usize, experts: usize) -> Inputs {
        let Self { tokens, top_k, seed, .. } = *self;
        let rows = [tokens, hidden];
        let act = |name, values: Values, seed| {
            Pair::new(device, name, DType::Act, &rows, &values.take(seed, tokens * hidden))
        };
        let weights: Vec<f64> = (0..tokens * top_k).map(|i| 2.0 * unit(seed ^ 0x99, i)).collect();
        Inputs {
            top_k,
            x: act("x", self.values, seed),
            ids: Pair::index(device, "topk_ids", &[tokens, top_k], &self.ids(experts)),
            weights: Pair::new(device, "topk_weights", DType::Float, &[tokens, top_k], &weights),
            shared: self.shared.then(|| act("shared", Values::Normal, seed ^ 0x55)),
        }
    }
}

/// The tensors of a step.
pub(crate) struct Inputs {
    top_k: usize,
    pub(crate) x: Pair,
    pub(crate) ids: Pair,
    pub(crate) weights: Pair,
    pub(crate) shared: Option<Pair>,
}

/// A projection, widened.
struct Matrix {
    inner: usize,
    elements: Vec<f64>,
}

impl Matrix {
    fn of(weight: &HostLinear) -> Self {
        let tensor = weight.clone().dense();
        Self { inner: tensor.shape[1], elements: tensor.to_f32().into_iter().map(f64::from).collect() }
    }

    /// Every product of a row with `x`, and what it may be off by: its terms, and `additions` of them on any path, each rounded (or cut
    /// off) at 2^-22.
    fn products<'a>(&'a self, x: &'a [f64]) -> impl Iterator<Item = (f64, f64)> + 'a {
        let additions = (self.inner / 4 + 40) as f64;
        self.elements.chunks(self.inner).map(move |row| {
            let terms = row.iter().zip(x).map(|(w, x)| w * x);
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
            (sum, additions * 4.0 * F32_UNIT * magnitude)
        })
    }

    /// What rows times `off` can be at most.
    fn spread<'a>(&'a self, off: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
        let rows = self.elements.chunks(self.inner);
        rows.map(move |row| row.iter().zip(off).map(|(w, off)| w.abs() * off).sum::<f64>())
    }
}

impl Inputs {
    /// How far each element may be from the oracle's: the error of the sums in f32, what it becomes behind the rounding of `silu * up`,
    /// which may go the other way than the oracle's, `part` of the largest of four features where parts are packed, and the roundings of
    /// both results.
    pub(crate) fn bounds(&self, experts: &[HostExpert], expected: &[f64], part: f64) -> Vec<f64> {
        let read = |pair: &Pair| parity::oracle().read(&pair.host).unwrap();
        let (x, weights) = (read(&self.x), read(&self.weights));
        let ids = parity::oracle().read_index(&self.ids.host).unwrap();
        let shared = self.shared.as_ref().map(read);
        let mut matrices: Vec<Option<[Matrix; 3]>> = experts.iter().map(|_| None).collect();
        let hidden = Matrix::of(&experts[0].gate_proj).inner;
        let mut bounds = vec![0.0; expected.len()];
        for (pair, &expert) in ids.iter().enumerate() {
            let (token, expert) = (pair / self.top_k, expert as usize);
            let [gate, up, down] = matrices[expert].get_or_insert_with(|| {
                let HostExpert { gate_proj, up_proj, down_proj } = &experts[expert];
                [gate_proj, up_proj, down_proj].map(Matrix::of)
            });
            let row = &x[token * hidden..][..hidden];
            let activated = gate.products(row).zip(up.products(row)).map(|((g, g_off), (u, u_off))| {
                let silu = g / (1.0 + (-g).exp());
                let (exact, error) = (silu * u, 1.1 * g_off * (u.abs() + u_off) + silu.abs() * u_off);
                let rounded = dsa80_reference::cpu::Real::round_bf16(exact);
                let error = error + 16.0 * F32_UNIT * exact.abs() + f64::from(f32::MIN_POSITIVE);
                (rounded, Interval::around(exact, error).round_bf16().farthest(rounded))
            });
            let (activated, off): (Vec<f64>, Vec<f64>) = activated.unzip();
            let weight = weights[pair].abs();
            let rows = down.products(&activated).zip(down.spread(&off));
            let rows: Vec<(f64, f64)> =
                rows.map(|((sum, error), spread)| (sum.abs() + spread, error + spread)).collect();
            for (i, (bound, &(most, error))) in bounds[token * hidden..].iter_mut().zip(&rows).enumerate() {
                let four = rows[i / 32 * 32..].iter().take(32).skip(i % 8).step_by(8);
                let largest = four.fold(0.0, |largest: f64, four| largest.max(four.0));
                let rounding = 4.0 * (self.top_k + 2) as f64 * F32_UNIT * most + part * largest;
                *bound += weight * 1.01 * (error + rounding);
            }
        }
        for (i, (bound, &expected)) in bounds.iter_mut().zip(expected).enumerate() {
            let beside = shared.as_ref().map_or(0.0, |shared| 4.0 * F32_UNIT * shared[i].abs());
            *bound += beside + half_ulp_bf16(expected);
            *bound += half_ulp_bf16(expected.abs() + *bound);
        }
        bounds
    }
}

/// What the relative L2 error may be: 2.5e-3, or more where results cancel so far that the bounds allow it.
pub(crate) fn relative_l2(expected: &[f64], bounds: &[f64]) -> f64 {
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (expected, bounds) = (norm(expected), norm(bounds));
    if expected == 0.0 { 0.0 } else { 2.5e-3_f64.max(0.5 * bounds / expected) }
}
