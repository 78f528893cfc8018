//! Launches aside: neither side may use what the other writes.

use dsa80_cuda::{Arg, Device};

use crate::snippet::Snippet;

#[test]
fn what_one_side_writes_the_other_must_not_use() {
    let Some(snippet) = Snippet::new("KERNEL void kernel(uint32_t* a, const uint32_t* b) { a[0] += b[0]; }")
    else {
        return;
    };
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| snippet.buffer(name, &[1_u32]));
    let add = |to: &_, from: &_| snippet.launch(1, 1, 0, &[Arg::Buffer(to), Arg::Buffer(from)]).unwrap();
    let sides = |aside: [&_; 2], beside: [&_; 2]| {
        snippet
            .emulator
            .aside(|| {
                add(aside[0], aside[1]);
                Ok(())
            })
            .unwrap();
        add(beside[0], beside[1]);
        snippet.emulator.join().map_err(|error| error.to_string())
    };
    // Both read `b`.
    sides([&a, &b], [&c, &b]).unwrap();
    for (aside, beside, name) in
        [([&a, &b], [&c, &a], "a"), ([&a, &b], [&b, &c], "b"), ([&a, &b], [&a, &d], "a")]
    {
        let error = sides(aside, beside).unwrap_err();
        assert!(error.contains(&format!("`{name}` is used by launches that may overlap")), "{error}");
    }
    // Once they are joined, anything goes.
    add(&b, &a);
    snippet.emulator.join().unwrap();
}
