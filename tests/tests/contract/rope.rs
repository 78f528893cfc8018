//! `rope`.

use dsa80_reference::wgpu::Edit;
use dsa80_reference::{DType, Kernels, RopeLayout};
use dsa80_tests::parity::contract::{self, Backend, Contract};
use dsa80_tests::parity::{Interval, Values, assert_close};
use proptest::prelude::*;
use proptest::sample::select;

use crate::rotary::{RELATIVE_L2, rotate, turns};

/// Heads; columns, the first rotary one, rotary ones.
type Dims = (usize, [usize; 3]);

#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    dims: Dims,
    layout: RopeLayout,
    values: Values,
    seed: u64,
}

struct Rope;

impl Contract for Rope {
    const NAME: &'static str = "contract_rope";
    type Case = Case;

    fn cases() -> impl Strategy<Value = Case> {
        let dims: &[Dims] = &[(3, [80, 16, 64]), (1, [16, 3, 10]), (2, [8, 0, 8])];
        let layout = select(&[RopeLayout::Interleaved, RopeLayout::Half][..]);
        (0..=9_usize, select(dims), layout, Values::any_of(&Values::ORDINARY), any::<u64>())
            .prop_map(|(rows, dims, layout, values, seed)| Case { rows, dims, layout, values, seed })
    }

    fn run<K: Kernels>(kernels: &Backend<'_, K>, case: &Case) {
        let &Case { rows, dims: (heads, [width, offset, dim]), layout, values, seed } = case;
        let columns = values.take(seed, rows * heads * width);
        let mut x = contract::numbers(kernels, DType::Act, &[rows, heads, width], &columns);
        let cos_sin = turns(kernels, rows, dim, seed);
        let oracle = kernels.oracle();
        let before = oracle.read(&x.0).unwrap();
        oracle.rope(&mut x.0, offset, layout, &cos_sin.0).unwrap();
        kernels.rope(&mut x.1, offset, layout, &cos_sin.1).unwrap();
        let (found, expected) = (kernels.read(&x.1).unwrap(), oracle.read(&x.0).unwrap());
        let turns = oracle.read(&cos_sin.0).unwrap();
        // What does not rotate stays as it is.
        let mut intervals: Vec<Interval> = before.iter().map(|&x| Interval::around(x, 0.0)).collect();
        for (i, head) in intervals.chunks_mut(width).enumerate() {
            rotate(&mut head[offset..offset + dim], layout, &turns[i / heads * dim..][..dim], kernels.act());
        }
        assert_close(
            "x",
            width,
            &found,
            &expected,
            kernels.relative_l2(values, &expected, RELATIVE_L2),
            |i| intervals[i].bound(expected[i]),
        );
    }
}

#[test]
fn agrees_with_the_oracle() {
    contract::check::<Rope>();
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        ("if column + 1u < DIM {", "if column + 2u < DIM {"),
        ("columns[first] * turn.x - columns", "columns[first] * turn.x + columns"),
        ("column % (DIM / 2u), HALF", "column / 2u, HALF"),
        ("let t = head / params.heads;", "let t = 0u;"),
    ] {
        contract::catches::<Rope>(Edit { shader: "rope", find, replace });
    }
    let edit = Edit { shader: "act_f32", find: "select(pair.x, pair.y, (i & 1u) == 1u)", replace: "pair.x" };
    contract::catches_in_f32::<Rope>(edit);
}
