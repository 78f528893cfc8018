//! What the tests of `sample` share: logits that are hard to choose among, and rows that ask for anything.

use dsa80_reference::{SampleRow, SamplingParams};
use dsa80_tests::parity::Values;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

#[derive(Debug, Clone, Copy)]
pub(crate) enum Logits {
    Of(Values, f64),
    /// Whole numbers, some of them NaN or infinite.
    Special,
    NoNumbers,
    /// A few far above the rest.
    Peaked,
    /// Most are equal, or all but equal.
    Tied(Tied),
}

/// Masses of tokens that no bin tells apart.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tied {
    All(f64),
    /// Zeros of both signs.
    Zeros,
    TwoLevels(f64),
    /// One in 64 holds a logit, as where the logits of most ranks are missing.
    FewAbove,
    /// One token is far better.
    AllButOne(f64),
    /// Nothing is left of most.
    MostlyNothing,
    /// Next to each other as numbers.
    Near(f64),
}

pub(crate) const TIED: [Tied; 9] = [
    Tied::All(0.0),
    Tied::All(-7.25),
    Tied::Zeros,
    Tied::TwoLevels(1e-7),
    Tied::TwoLevels(2.0),
    Tied::FewAbove,
    Tied::AllButOne(9.5),
    Tied::MostlyNothing,
    Tied::Near(3.0),
];

impl Tied {
    pub(crate) fn at(self, seed: u64, id: usize) -> f64 {
        let choice = Values::Ties.at(seed, id);
        match self {
            Tied::All(x) => x,
            Tied::Zeros => Values::Zeros.at(seed, id),
            Tied::TwoLevels(step) => -step * f64::from(u8::from(choice > 0.0)),
            Tied::FewAbove if id.is_multiple_of(64) => 3.0 * Values::Normal.at(seed, id),
            Tied::AllButOne(above) if id == 41 => above,
            Tied::FewAbove | Tied::AllButOne(_) => 0.0,
            Tied::MostlyNothing if choice < 3.0 => f64::NEG_INFINITY,
            Tied::MostlyNothing => 1.5,
            Tied::Near(below) => {
                if id == 5 {
                    below
                } else {
                    1e-6 * Values::Normal.at(seed, id)
                }
            }
        }
    }
}

impl Logits {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            6 => (Values::any_of(&Values::ORDINARY), select(vec![0.01, 1.0, 4.0])).prop_map(|(v, x)| Logits::Of(v, x)),
            3 => select(vec![Logits::Special, Logits::NoNumbers, Logits::Peaked, Logits::Peaked]),
        ]
    }

    pub(crate) fn at(self, seed: u64, id: usize) -> f64 {
        let choice = Values::Ties.at(seed ^ 1, id);
        match self {
            Logits::Of(values, spread) => spread * values.at(seed, id),
            Logits::Special => match choice as i32 {
                -3 => f64::NAN,
                -2 => f64::NEG_INFINITY,
                3 if seed.is_multiple_of(2) && id.is_multiple_of(5) => f64::INFINITY,
                other => f64::from(other),
            },
            Logits::NoNumbers => {
                [f64::NAN, -f64::NAN, f64::NEG_INFINITY][if seed.is_multiple_of(2) { 2 } else { id % 2 }]
            }
            Logits::Tied(tied) => tied.at(seed, id),
            Logits::Peaked => 2.0 * Values::Normal.at(seed, id) + if id % 37 == 5 { 12.0 } else { 0.0 },
        }
    }
}

/// What a row of the contract is made of.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) params: SamplingParams,
    pub(crate) prompt: Vec<u32>,
    pub(crate) output: Vec<u32>,
    pub(crate) banned: Vec<u32>,
    pub(crate) position: u32,
    pub(crate) forced: Option<u32>,
    pub(crate) logits: Logits,
}

impl Row {
    pub(crate) fn any(vocab: usize) -> impl Strategy<Value = Self> {
        let id = || prop_oneof![8 => 0..vocab as u32, 1 => any::<u32>()];
        let ids = |most| prop::collection::vec(id(), 0..most);
        let params = (
            prop_oneof![1 => Just(0.0f32), 4 => Just(1.0), 4 => 0.05..3.0f32, 1 => select(vec![1e-40, 1e-6, 1e6, f32::MAX])],
            prop_oneof![3 => Just(0u32), 3 => 1..12u32, 2 => 12..400u32, 1 => Just(u32::MAX)],
            prop_oneof![3 => Just(1.0f32), 3 => 0.0..1.0f32, 1 => select(vec![0.0, 0.999, 0.999_999_9])],
            prop_oneof![4 => Just(0.0f32), 2 => 0.0..0.3f32, 1 => select(vec![1.0, 1e-38])],
            prop_oneof![3 => Just(1.0f32), 1 => 0.5..2.0f32],
            prop_oneof![3 => Just((0.0f32, 0.0f32)), 1 => (-1.0..1.0f32, -1.0..1.0f32)],
            prop_oneof![
                3 => Just(Vec::new()),
                1 => prop::collection::vec((id(), -5.0..5.0f32), 1..20),
            ],
            any::<u64>(),
        );
        let params = params.prop_map(
            |(temperature, top_k, top_p, min_p, repetition_penalty, penalties, logit_bias, seed)| {
                let (frequency_penalty, presence_penalty) = penalties;
                SamplingParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty,
                    frequency_penalty,
                    presence_penalty,
                    logit_bias,
                    seed,
                }
            },
        );
        let few = prop_oneof![2 => Just(Vec::new()), 1 => ids(6), 1 => Just((0..vocab as u32).collect())];
        let banned = prop_oneof![
            8 => few,
            1 => subsequence((0..vocab as u32).collect::<Vec<_>>(), vocab / 2),
        ];
        let forced = prop_oneof![8 => Just(None), 1 => (0..vocab as u32).prop_map(Some)];
        (params, ids(40), ids(40), banned, 0..1000u32, forced, Logits::any()).prop_map(
            |(params, prompt, output, banned, position, forced, logits)| Row {
                params,
                prompt,
                output,
                banned,
                position,
                forced,
                logits,
            },
        )
    }

    pub(crate) fn as_row(&self) -> SampleRow<'_> {
        SampleRow {
            params: &self.params,
            prompt: &self.prompt,
            output: &self.output,
            banned: &self.banned,
            position: self.position,
            forced: self.forced,
        }
    }

    /// Whether rounding could move one of the row's cuts: `f64` sums in another order, and counts of probability that are right to
    /// 2^-31 (`sample_filter.cu`).
    pub(crate) fn is_clear(&self, logits: &[f64]) -> bool {
        let params = &self.params;
        if params.temperature == 0.0 || self.forced.is_some() {
            return true;
        }
        let adjusted = self.adjusted(logits);
        let max = adjusted.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let below = |x: f64| if x == max { 0.0 } else { (x - max) / f64::from(params.temperature) };
        let mut p: Vec<f64> = adjusted.iter().filter(|x| !x.is_nan()).map(|&x| below(x).exp()).collect();
        p.sort_by(|a, b| b.total_cmp(a));
        let min_p = f64::from(params.min_p);
        let clear = p.iter().all(|&p| p == 1.0 || (p - min_p).abs() > 1e-12 * min_p);
        p.retain(|&p| p >= min_p);
        if params.top_k > 0 {
            p.truncate(params.top_k as usize);
        }
        let total: f64 = p.iter().sum();
        let (enough, mut sum) = (f64::from(params.top_p) * total, 0.0);
        // Sums of equal numbers are exact in any order.
        let equal = p.iter().all(|&p| p == 1.0 || p == 0.0);
        let crosses = |p: &f64| {
            sum += p;
            (sum - enough).abs() < 1e-8 * total
        };
        clear && (equal || params.top_p == 1.0 || !p.iter().any(crosses))
    }

    fn adjusted(&self, logits: &[f64]) -> Vec<f64> {
        let (params, mut logits) = (&self.params, logits.to_vec());
        let times = |ids: &[u32]| {
            let mut times = vec![0.0; logits.len()];
            for &id in ids {
                if let Some(times) = times.get_mut(id as usize) {
                    *times += 1.0;
                }
            }
            times
        };
        let (banned, prompt, output) = (times(&self.banned), times(&self.prompt), times(&self.output));
        for (id, x) in logits.iter_mut().enumerate() {
            if banned[id] > 0.0 {
                *x = f64::NEG_INFINITY;
            }
            params
                .logit_bias
                .iter()
                .filter(|bias| bias.0 as usize == id)
                .for_each(|bias| *x += f64::from(bias.1));
            if output[id] + prompt[id] > 0.0 {
                let penalty = f64::from(params.repetition_penalty);
                *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
            }
            if output[id] > 0.0 {
                *x -= f64::from(params.frequency_penalty) * output[id] + f64::from(params.presence_penalty);
            }
        }
        logits
    }
}

pub(crate) fn plain_row(params: SamplingParams, logits: Logits) -> Row {
    let (prompt, output, banned) = (Vec::new(), Vec::new(), Vec::new());
    Row { params, prompt, output, banned, position: 0, forced: None, logits }
}
