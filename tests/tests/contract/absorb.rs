//! `absorb_query` and `absorb_output`.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels, RopeLayout};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{Interval, Values};
use proptest::prelude::*;
use proptest::sample::select;

use crate::products::{Stored, assert_within, of};
use crate::rotary::{rotate, turns};

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    heads: usize,
    /// Columns of a head that are not rotary, of its values, rotary ones, latent ones.
    dims: [usize; 4],
    weight: DType,
    seed: u64,
}

struct Absorb;

impl Contract for Absorb {
    const NAME: &'static str = "contract_absorb";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let dims = select(&[[64_usize, 48, 32, 128], [24, 16, 8, 40], [192, 256, 64, 512]][..]);
        let weight = select(&[DType::Bf16, DType::Bf16, DType::F16, DType::F32][..]);
        (select(&[0_usize, 1, 3, 9, 20][..]), 1..=3_usize, dims, weight, any::<u64>())
            .prop_map(|(tokens, heads, dims, weight, seed)| Case { tokens, heads, dims, weight, seed })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { tokens, heads, dims: [nope, v, rope, rank], seed, .. } = case;
        let (q_width, rows) = (nope + rope, nope + v);
        let numbers = |width: usize, seed| {
            let values = Values::Normal.take(seed, tokens * heads * width);
            contract::numbers(kernels, DType::Act, &[tokens, heads, width], &values)
        };
        let (q, o) = (numbers(q_width, seed), numbers(rank, seed ^ 4));
        let weights = Values::Normal.take(seed ^ 1, heads * rows * rank);
        let kv_b = contract::weight(kernels, case.weight, &[heads, rows, rank], &weights);
        let cos_sin = turns(kernels, tokens, rope, seed);
        let mut latent = contract::output(kernels, DType::Act, &[tokens, heads, rank + rope]);
        let mut out = contract::output(kernels, DType::Act, &[tokens, heads, v]);
        let oracle = kernels.oracle();
        oracle.absorb_query(&q.0, &kv_b.0, &cos_sin.0, &mut latent.0).unwrap();
        kernels.absorb_query(&q.1, &kv_b.1, &cos_sin.1, &mut latent.1).unwrap();
        oracle.absorb_output(&o.0, &kv_b.0, &mut out.0).unwrap();
        kernels.absorb_output(&o.1, &kv_b.1, &mut out.1).unwrap();
        let read = |tensor| oracle.read(tensor).unwrap();
        let (q, o, kv_b, turns) = (read(&q.0), read(&o.0), read(&kv_b.0), read(&cos_sin.0));
        let act = Stored::As(kernels.act());
        let (mut queries, mut outputs) = (Vec::new(), Vec::new());
        for i in 0..tokens * heads {
            let head = &kv_b[i % heads * rows * rank..][..rows * rank];
            let (q, o) = (&q[i * q_width..][..q_width], &o[i * rank..][..rank]);
            queries.extend((0..rank).map(|c| of((0..nope).map(|n| (q[n], head[n * rank + c])), act)));
            let mut rotary: Vec<Interval> = q[nope..].iter().map(|&x| Interval::around(x, 0.0)).collect();
            rotate(&mut rotary, RopeLayout::Interleaved, &turns[i / heads * rope..][..rope], kernels.act());
            queries.extend(rotary);
            outputs.extend((nope..rows).map(|j| of((0..rank).map(|c| (o[c], head[j * rank + c])), act)));
        }
        let found = kernels.read(&latent.1).unwrap();
        assert_within("absorb_query", rank + rope, &found, &read(&latent.0), &queries, act);
        assert_within("absorb_output", v, &kernels.read(&out.1).unwrap(), &read(&out.0), &outputs, act);
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<Absorb>();
}

#[test]
fn planted_faults_are_seen() {
    for (shader, find, replace) in [
        ("absorb_query", "n < NOPE; n++", "n < NOPE - 1u; n++"),
        ("absorb_query", "a * turn.x - b", "a * turn.x + b"),
        ("absorb_query", "min(TOKENS, params.tokens - first)", "min(TOKENS - 1u, params.tokens - first)"),
        ("product", "+ head * params.x_head;", ";"),
        ("weights_dense", "features + group.z * params.rows_of_head", "features"),
    ] {
        contract::catches::<Absorb>(Edit { shader, find, replace });
    }
}
